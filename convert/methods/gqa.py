"""Grouped-query attention: fewer K/V heads (Ainslie et al. 2023, arXiv 2305.13245). One head is MQA."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from typing import Any

from ..algebra.attention_shape import AttentionShape
from ..algebra.heads import POOLING_METHODS, HeadGrouping
from ..architectures.architecture import Architecture, HeadTensor
from ..architectures.attention import read_attention
from ..checkpoint.tensors import Checkpoint
from ..checkpoint.writer import TensorSpec
from ..errors import UnsupportedError
from ..plan import ConversionPlan, PoolHeads, Step
from ..runtime import RUNTIME_CLASSES
from .merging import MergedCheckpoint

__all__ = ["Gqa"]

_DEFAULT_INITIALIZER_RANGE = 0.02


@dataclass(frozen=True)
class Gqa:
    """Reduce a checkpoint to `num_key_value_heads` K/V heads per layer.

    With the method "svd" the checkpoint to plan on is a MergedCheckpoint. `seed` matters for the random method only.
    `allow_same` accepts the number of heads that the source has already: no head is then pooled.
    """

    num_key_value_heads: int
    method: str = "mean"
    seed: int = 0
    allow_same: bool = False

    def __post_init__(self) -> None:
        if self.method not in (*POOLING_METHODS, "svd"):
            raise UnsupportedError(f"unknown method {self.method!r}", hint=f"methods: {', '.join(POOLING_METHODS)}")

    def plan(self, checkpoint: Checkpoint, architecture: Architecture) -> ConversionPlan:
        """The plan for this checkpoint. Raises UnsupportedError or CheckpointError where it cannot be done.

        Raises ValueError for the method "svd" on a checkpoint whose heads were not merged into as many groups.
        """
        refusal = architecture.refusal(checkpoint.config)
        if refusal:
            raise UnsupportedError(f"{checkpoint.name}: {refusal}")
        source = read_attention(checkpoint, architecture)
        grouping = HeadGrouping.contiguous(source.num_key_value_heads, self.num_key_value_heads)
        reason = architecture.heads_refusal(checkpoint.config, self.num_key_value_heads)
        if reason:
            raise UnsupportedError(f"{checkpoint.name}: {reason}")
        unchanged = self.num_key_value_heads == source.num_key_value_heads
        if unchanged and not self.allow_same:
            raise UnsupportedError(
                f"{checkpoint.name} already has {source.num_key_value_heads} K/V heads",
                hint="ask for fewer groups, or pass --force to keep every head",
            )
        if self.method == "svd" and not unchanged and _merged_groups(checkpoint) != self.num_key_value_heads:
            raise ValueError("the method svd plans on what merge_checkpoint made for as many K/V heads")
        steps = {name: Step.copy(checkpoint.tensors[name]) for name in checkpoint.tensors}
        if not unchanged:
            for layer in range(source.num_hidden_layers):
                self._pool_layer(steps, checkpoint, architecture, source, grouping, layer)
        return ConversionPlan(
            target="mqa" if self.num_key_value_heads == 1 else "gqa",
            method=self.method,
            model_type=architecture.model_type,
            source=source,
            result=replace(source, num_key_value_heads=self.num_key_value_heads),
            config=checkpoint.config if unchanged else self._result_config(checkpoint, architecture, source.head_dim),
            steps=tuple(steps.values()),
            bytes_in=sum(info.num_bytes for info in checkpoint.tensors.values()),
            layers=checkpoint.reports if isinstance(checkpoint, MergedCheckpoint) else (),
        )

    def _pool_layer(
        self,
        steps: dict[str, Step],
        checkpoint: Checkpoint,
        architecture: Architecture,
        source: AttentionShape,
        grouping: HeadGrouping,
        layer: int,
    ) -> None:
        """Replace the copy steps of a layer's K/V heads, and of the norms that belong to them."""
        for tensor in architecture.key_value_tensors(checkpoint, source, layer):
            info = checkpoint.tensors[tensor.name]
            num_heads = tensor.num_query_heads + tensor.num_runs * source.num_key_value_heads
            num_kept = tensor.num_query_heads + tensor.num_runs * self.num_key_value_heads
            spec = TensorSpec(tensor.name, info.dtype, (info.shape[0] // num_heads * num_kept, *info.shape[1:]))
            steps[tensor.name] = Step((tensor.name,), spec, self._pooling(checkpoint, tensor, grouping))
        for names in architecture.key_norms_per_head(checkpoint, source, layer):
            for name in names:
                del steps[name]
            for group, name in zip(grouping.groups, names, strict=False):
                info = checkpoint.tensors[name]
                whole = HeadGrouping((tuple(range(len(group))),))
                op = self._pooling(checkpoint, HeadTensor(name, is_norm=True), whole)
                spec = TensorSpec(name, info.dtype, info.shape)
                steps[name] = Step(tuple(names[head] for head in group), spec, op)

    def _pooling(self, checkpoint: Checkpoint, tensor: HeadTensor, grouping: HeadGrouping) -> PoolHeads:
        method, std, seed = self.method, None, None
        if method == "random" and tensor.is_norm:
            method = "mean"  # a gain near zero would switch the fresh keys off
        if method == "svd":
            method = "mean"  # the checkpoint is a MergedCheckpoint: the heads of a group are equal
        if method == "random":
            std = float(checkpoint.config.get("initializer_range") or _DEFAULT_INITIALIZER_RANGE)
            seed = _tensor_seed(self.seed, tensor.name)
        return PoolHeads(
            method,
            grouping,
            num_query_heads=tensor.num_query_heads,
            num_runs=tensor.num_runs,
            interleaved=tensor.interleaved,
            std=std,
            seed=seed,
        )

    def _result_config(self, checkpoint: Checkpoint, architecture: Architecture, head_dim: int) -> dict[str, Any]:
        config = architecture.result_config(checkpoint.config, self.num_key_value_heads, head_dim)
        if architecture.model_type not in RUNTIME_CLASSES:
            config.pop("auto_map", None)  # the result opens in the stock class; the source's own code knows no grouping
        return config


def _merged_groups(checkpoint: Checkpoint) -> int | None:
    return len(checkpoint.reports[0].groups) if isinstance(checkpoint, MergedCheckpoint) else None


def _tensor_seed(seed: int, name: str) -> int:
    """A seed per tensor, so that the values do not depend on the order in which tensors are written."""
    return int.from_bytes(hashlib.sha256(f"{seed}:{name}".encode()).digest()[:8], "little") >> 1
