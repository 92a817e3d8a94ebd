"""Merging heads on calibration text: a checkpoint seen with the heads of each group equal already.

The view has the source's shapes. Its queries and outputs read the shared heads through the free transformations
(docs/merging.md), so that taking the first head of each group then loses nothing more.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, TYPE_CHECKING

from safetensors import safe_open

from ..algebra.attention_shape import AttentionShape
from ..algebra.head_merge import FreeTransformations, Heads, LayerInput, merge_layers
from ..algebra.head_search import best_grouping
from ..algebra.layer_grouping import LayerGrouping
from ..algebra.refit import refitted
from ..architectures.architecture import Architecture
from ..architectures.attention import read_attention
from ..architectures.projections import projection_tensors, read_projections
from ..architectures.rotary import read_rotary
from ..calibration.layerwise import LayerwiseModel
from ..calibration.moments import layer_moments, second_moment
from ..calibration.statistics import LayerStatistics
from ..calibration.text import CalibrationText
from ..checkpoint.output import disk_errors
from ..checkpoint.tensors import Checkpoint, TensorInfo, tensor_bytes
from ..errors import UnsupportedError
from ..plan import LayerReport

if TYPE_CHECKING:
    from torch import Tensor

    from ..calibration.layerwise import SharedStates

__all__ = [
    "MergeSettings",
    "MergedCheckpoint",
    "check_mergeable",
    "merge_checkpoint",
    "scratch_bytes",
    "store",
]


@dataclass(frozen=True)
class MergeSettings:
    """`grouping` is "similarity" (groups that lose least) or "contiguous" (neighbours). `kv_source_layers` says which
    layer's keys and values each layer reads (LayerGrouping); without it, its own.

    `refit` fits each o_proj to the original's attention output on the calibration text, pulled towards the closed form
    by `refit_ridge`, a fraction of the mean diagonal of the normal equations. The text is run on `device`, in
    `precision`: "fp32", or "bf16" for autocast.
    """

    num_key_value_heads: int
    kv_source_layers: tuple[int, ...] | None = None
    grouping: str = "similarity"
    refit: bool = True
    refit_ridge: float = 0.2
    precision: str = "fp32"
    device: str = "cpu"


@dataclass
class MergedCheckpoint(Checkpoint):
    """`source` with its heads merged: the tensors of `merged` come from the files named there."""

    source: Checkpoint = field(kw_only=True)
    merged: dict[str, Path] = field(kw_only=True)
    scratch: Path = field(kw_only=True)
    reports: tuple[LayerReport, ...] = field(kw_only=True)

    def close(self) -> None:
        self.source.close()

    def gram(self, layer: int) -> Tensor:
        """The Gram matrix of a layer's attention input, if it was kept."""
        with safe_open(_gram_file(self.scratch, layer), "pt") as file:
            tensor: Tensor = file.get_tensor("gram")
        return tensor

    def counted_tensors(self, names: Iterable[str] | None = None) -> list[TensorInfo]:
        return self.source.counted_tensors(names)

    def read(self, name: str) -> Tensor:
        if name not in self.merged:
            return self.source.read(name)
        with safe_open(self.merged[name], "pt") as file:
            tensor: Tensor = file.get_tensor(name)
        return tensor

    def copy_bytes(self, name: str, target: IO[bytes]) -> None:
        if name in self.merged:
            target.write(tensor_bytes(self.read(name)))
        else:
            self.source.copy_bytes(name, target)


def merge_checkpoint(
    checkpoint: Checkpoint,
    architecture: Architecture,
    settings: MergeSettings,
    scratch: Path,
    *,
    text: CalibrationText | None = None,
    statistics: LayerStatistics | None = None,
    keep: bool = False,
    progress: Callable[[int], object] = lambda num_layers: None,
) -> MergedCheckpoint:
    """Merge the heads of every layer, from calibration text or from statistics of it; from neither, as if inputs were
    white.

    With text the model runs layer by layer, the original and, to refit the outputs, the merged one beside it. Merged
    tensors are kept in files in `scratch`, which the result reads; with `keep`, so are the Gram matrices.
    Layers that are to share keys and values need text: what one layer reads has to be predicted from another's.
    Raises UnsupportedError for architectures that have no such merge.
    """
    check_mergeable(checkpoint, architecture)
    shape = read_attention(checkpoint, architecture)
    rotary = read_rotary(checkpoint, architecture, shape)
    free_keys, free_values = _free_sides(checkpoint, architecture)
    # a norm over keys, or after the values, may have gains for each head
    may_regroup = free_keys and free_values and not architecture.ordered_heads(checkpoint.config)
    may_regroup &= settings.grouping == "similarity"
    layers_of_groups: tuple[tuple[int, ...], ...] = tuple((layer,) for layer in range(shape.num_hidden_layers))
    if settings.kv_source_layers is not None:
        if text is None:
            raise ValueError("layers that share keys and values are merged on text")
        layers_of_groups = LayerGrouping(settings.kv_source_layers).groups
    runner = _TwoStreams(checkpoint, architecture, text, settings) if text is not None else None
    merged: dict[str, Path] = {}
    reports = []
    for layers in layers_of_groups:
        if runner is not None:
            grams, crosses = runner.moments(layers)
        else:
            grams, crosses = [_gram_without_text(statistics, shape, layers[0])], [None]
        inputs = [
            LayerInput(read_projections(checkpoint, architecture, shape, layer), gram, cross)
            for layer, gram, cross in zip(layers, grams, crosses, strict=True)
        ]
        heads = Heads(inputs, shape, FreeTransformations(rotary[layers[0]], keys=free_keys, values=free_values))
        whole = settings.num_key_value_heads == 1 or settings.num_key_value_heads == len(heads)
        choose = may_regroup and not whole
        best = best_grouping if choose else Heads.in_order
        result = merge_layers(heads, best(heads, settings.num_key_value_heads))
        for layer, projections, gram in zip(layers, result.projections, grams, strict=True):
            tensors = projection_tensors(projections, checkpoint, architecture, shape, layer)
            if runner is not None:
                runner.advance(layer, tensors, architecture.tensor_name(layer, "o_proj"))
            merged |= store(tensors, scratch / f"layer-{layer:05d}.safetensors")
            if keep:
                store({"gram": gram}, _gram_file(scratch, layer))
            progress(1)
        reports.append(LayerReport(layers, result.grouping.groups, result.keys_retained, result.values_retained))
    return MergedCheckpoint(
        checkpoint.name,
        checkpoint.path,
        checkpoint.config,
        checkpoint.tensors,
        checkpoint.size_on_disk_bytes,
        source=checkpoint,
        merged=merged,
        scratch=scratch,
        reports=tuple(reports),
    )


def _gram_without_text(statistics: LayerStatistics | None, shape: AttentionShape, layer: int) -> Tensor:
    import torch

    return torch.eye(shape.hidden_size + 1, dtype=torch.float64) if statistics is None else statistics.gram(layer)


def check_mergeable(checkpoint: Checkpoint, architecture: Architecture) -> None:
    """Raise UnsupportedError for architectures that have no such merge."""
    if architecture.cross_attention is not None:
        raise UnsupportedError(
            f"{checkpoint.name}: --method svd merges decoders only, not the encoder-decoder {architecture.model_type}",
            hint="use --method mean",
        )
    if read_attention(checkpoint, architecture).layer_grouping is not None:
        raise UnsupportedError(
            f"{checkpoint.name}: --method svd does not merge heads whose keys and values several layers read",
            hint="merge heads and layers at once: mha2cla --groups; or use --method mean",
        )


def scratch_bytes(checkpoint: Checkpoint, architecture: Architecture) -> int:
    """What the files of merged tensors take beside the output, as long as it is being made."""
    shape = read_attention(checkpoint, architecture)
    projections = ("qkv_proj", "o_proj") if architecture.qkv_proj else ("q_proj", "k_proj", "v_proj", "o_proj")
    names = [
        architecture.tensor_name(layer, projection, kind)
        for layer in range(shape.num_hidden_layers)
        for projection in projections
        for kind in ("weight", "bias")
    ]
    return sum(checkpoint.tensors[name].num_bytes for name in names if name in checkpoint.tensors)


def _free_sides(checkpoint: Checkpoint, architecture: Architecture) -> tuple[bool, bool]:
    """Whether keys and values are linear in the input, up to where they are used."""
    clipped = checkpoint.config_value(architecture.config_name("clip_qkv")) is not None
    return architecture.approximation(checkpoint) is None, architecture.free_values and not clipped


def _gram_file(scratch: Path, layer: int) -> Path:
    return scratch / f"gram-{layer:05d}.safetensors"


def store(tensors: dict[str, Tensor], path: Path) -> dict[str, Path]:
    """Write a file of tensors, and say for each where it is."""
    from safetensors.torch import save_file

    with disk_errors(path):
        save_file(tensors, path)
    return dict.fromkeys(tensors, path)


class _TwoStreams:
    """The original's hidden states and the merged model's, at the entrance of the same layer.

    Beside the latter are the keys and values that its layers have computed, where others read them.
    """

    def __init__(
        self, checkpoint: Checkpoint, architecture: Architecture, text: CalibrationText, settings: MergeSettings
    ) -> None:
        import torch

        self._settings = settings
        self._model = LayerwiseModel(checkpoint, architecture, device=settings.device, precision=settings.precision)
        with torch.inference_mode():
            self._original = [self._model.embed(batch) for batch in text.batches]
        self._model.release_embeddings()
        self._merged = list(self._original)
        self._shared: list[SharedStates | None] = [None] * len(self._merged)

    def moments(self, layers: tuple[int, ...]) -> tuple[list[Tensor], list[Tensor | None]]:
        """Of the original: `layer_moments`."""
        return layer_moments(self._model, layers, self._original, self._settings.device)

    def advance(self, layer: int, tensors: dict[str, Tensor], o_proj: str) -> None:
        """Take both streams through the layer, and refit tensors[o_proj] in between if asked for."""
        import torch

        wanted: list[Tensor] | None = [] if self._settings.refit else None
        with torch.inference_mode():
            with self._model.layer(layer) as module:
                original = module.get_parameter(self._model.local_name(o_proj, layer)).detach().cpu().double()
                self._original = [self._model.run(module, layer, states, wanted) for states in self._original]
            if wanted is None:
                return
            model, sources = self._model, self._settings.kv_source_layers
            source = sources[layer] if sources is not None else None
            if sources is not None and source == layer:  # what the layers before have computed is not read again
                self._shared = [{} if sources.count(layer) > 1 else None for _ in self._merged]
            streams = list(zip(self._merged, self._shared, strict=True))
            with model.layer(layer, tensors, source) as module:
                found = [model.attention_outputs(module, layer, states, shared) for states, shared in streams]
                cross = second_moment(zip(wanted, found, strict=True), self._settings.device)
                normal = second_moment(((states, states) for states in found), self._settings.device)
                del wanted, found
                tensors[o_proj] = refitted(original, tensors[o_proj], cross, normal, self._settings.refit_ridge)
                fitted = module.get_parameter(model.local_name(o_proj, layer))
                fitted.copy_(tensors[o_proj])
                self._merged = [model.run(module, layer, states, shared=shared) for states, shared in streams]
