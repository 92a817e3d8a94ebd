"""Cross-layer attention: neighbouring layers share keys and values (Brandon et al. 2024, arXiv 2405.12981)."""

from __future__ import annotations

from dataclasses import dataclass, replace

from ..algebra.attention_shape import AttentionShape
from ..algebra.heads import HeadGrouping
from ..algebra.layer_grouping import LayerGrouping
from ..architectures.architecture import Architecture
from ..architectures.attention import read_attention
from ..checkpoint.tensors import Checkpoint
from ..checkpoint.writer import TensorSpec
from ..errors import UnsupportedError
from ..plan import AverageLayers, ConversionPlan, MoveGain, PoolHeads, Step
from .merging import MergedCheckpoint

__all__ = ["Cla"]

_METHODS = ("mean", "first", "svd")


@dataclass(frozen=True)
class Cla:
    """Let the layers of each group of `layers` share keys and values, which the first of them computes.

    They become the layers' mean ("mean"), stay the first's ("first") or are what merge_checkpoint made of a
    MergedCheckpoint ("svd"). `num_key_value_heads` also reduces the heads; without it they stay as many.
    """

    layers: LayerGrouping
    num_key_value_heads: int | None = None
    method: str = "mean"

    def __post_init__(self) -> None:
        if self.method not in _METHODS:
            raise UnsupportedError(f"unknown method {self.method!r}", hint=f"methods: {', '.join(_METHODS)}")

    def plan(self, checkpoint: Checkpoint, architecture: Architecture) -> ConversionPlan:
        """The plan for a checkpoint as CrossLayerDecoder. Raises UnsupportedError where it cannot be done."""
        refusal = architecture.refusal(checkpoint.config)
        if refusal:
            raise UnsupportedError(f"{checkpoint.name}: {refusal}")
        source = read_attention(checkpoint, architecture)
        _check_shareable(checkpoint, source, self.layers)
        number = self.num_key_value_heads or source.num_key_value_heads
        grouping = HeadGrouping.contiguous(source.num_key_value_heads, number)
        if self.method == "svd" and not isinstance(checkpoint, MergedCheckpoint):
            raise ValueError("the method svd plans on what merge_checkpoint made")
        steps = {name: Step.copy(info) for name, info in checkpoint.tensors.items()}
        for group in self.layers.groups:
            self._share(steps, checkpoint, architecture, source, grouping, group)
        heads = {1: "mqa+", source.num_key_value_heads: ""}.get(number, "gqa+")
        return ConversionPlan(
            target=f"{heads}cla",
            method=self.method,
            model_type=architecture.model_type,
            source=source,
            result=replace(source, num_key_value_heads=number, layer_grouping=self.layers),
            config={
                **checkpoint.config,
                "num_key_value_heads": number,
                "kv_source_layers": list(self.layers.sources),
            },
            steps=tuple(steps.values()),
            bytes_in=sum(info.num_bytes for info in checkpoint.tensors.values()),
            layers=checkpoint.reports if isinstance(checkpoint, MergedCheckpoint) else (),
        )

    def _share(
        self,
        steps: dict[str, Step],
        checkpoint: Checkpoint,
        architecture: Architecture,
        source: AttentionShape,
        grouping: HeadGrouping,
        group: tuple[int, ...],
    ) -> None:
        """Replace the copies of the keys and values of the group's layers, and of norms of queries and keys."""
        if len(group) > 1:
            self._move_gains(steps, architecture, group)
        tensors = [architecture.key_value_tensors(checkpoint, source, layer) for layer in group]
        for same in zip(*tensors, strict=True):
            names = [tensor.name for tensor in same]
            steps[names[0]] = self._step(checkpoint, architecture, grouping, group, names)
            for name in names[1:]:
                del steps[name]

    def _move_gains(self, steps: dict[str, Step], architecture: Architecture, group: tuple[int, ...]) -> None:
        """Where keys are normalised, with the mean or the first one's gain: the rest goes to each layer's queries."""
        if architecture.key_norm is None or architecture.query_norm is None:
            return
        keys, queries = (
            [architecture.tensor_name(layer, norm) for layer in group] for norm in ("key_norm", "query_norm")
        )
        if keys[0] not in steps:
            return
        shared = keys if self.method == "mean" else keys[:1]
        for key, query in zip(keys, queries, strict=True):
            steps[query] = Step((query, key, *shared), steps[query].writes, MoveGain())
        if self.method == "mean":
            steps[keys[0]] = Step(tuple(keys), steps[keys[0]].writes, AverageLayers(len(group)))
        for key in keys[1:]:
            del steps[key]

    def _step(
        self,
        checkpoint: Checkpoint,
        architecture: Architecture,
        grouping: HeadGrouping,
        group: tuple[int, ...],
        names: list[str],
    ) -> Step:
        """How the group's one projection is made of the layers' projections `names`."""
        info = checkpoint.tensors[names[0]]
        number = len(grouping.groups)
        spec = TensorSpec(info.name, info.dtype, (info.shape[0] // grouping.num_heads * number, *info.shape[1:]))
        pool = None
        if number != grouping.num_heads:
            # merged heads of a group are equal
            pool = PoolHeads("first" if self.method == "first" else "mean", grouping)
        if self.method != "mean" or len(group) == 1:
            return Step((info.name,), spec, pool)
        gains = [architecture.input_norm_name(layer) for layer in group] if len(info.shape) == 2 else []
        return Step((*names, *gains), spec, AverageLayers(len(group), pool))


def _check_shareable(checkpoint: Checkpoint, shape: AttentionShape, layers: LayerGrouping) -> None:
    """Raise UnsupportedError unless the layers are the checkpoint's, and those that share are neighbours that see as
    much."""
    if len(layers.sources) != shape.num_hidden_layers:
        raise UnsupportedError(
            f"{checkpoint.name} has {shape.num_hidden_layers} layers, and {len(layers.sources)} were given a source"
        )
    if layers.sources == tuple(range(shape.num_hidden_layers)):
        raise UnsupportedError(f"{checkpoint.name}: no layer would share keys and values")
    for layer, first in enumerate(layers.sources):
        if layers.sources[first:layer].count(first) != layer - first:
            raise UnsupportedError(
                f"{checkpoint.name}: layers {first} and {layer} share, and one between them does not"
            )
        if shape.windows[layer] != shape.windows[first]:
            seen = [f"{window} tokens" if window else "all" for window in (shape.windows[first], shape.windows[layer])]
            raise UnsupportedError(
                f"{checkpoint.name}: layers {first} and {layer} cannot share keys and values, one sees {seen[0]}, "
                f"the other {seen[1]}",
                hint="choose the layers with --kv-source-layers",
            )
