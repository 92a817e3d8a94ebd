"""Grouped-query attention: fewer K/V heads (Ainslie et al. 2023, arXiv 2305.13245). One head is MQA."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

from .architecture import Architecture, AttentionShape, read_attention
from .checkpoint import Checkpoint
from .errors import UnsupportedError
from .heads import POOLING_METHODS, HeadGrouping
from .plan import ConversionPlan, PoolHeads, Step
from .writer import TensorSpec

__all__ = ["Gqa"]

_DEFAULT_INITIALIZER_RANGE = 0.02


@dataclass(frozen=True)
class Gqa:
    """Reduce a checkpoint to `num_key_value_heads` K/V heads per layer.

    `seed` matters for the random method only. `allow_same` accepts the number of heads that the source has already:
    every tensor is then copied.
    """

    num_key_value_heads: int
    method: str = "mean"
    seed: int = 0
    allow_same: bool = False

    def __post_init__(self) -> None:
        if self.method not in POOLING_METHODS:
            raise UnsupportedError(f"unknown method {self.method!r}", hint=f"methods: {', '.join(POOLING_METHODS)}")

    def plan(self, checkpoint: Checkpoint, architecture: Architecture) -> ConversionPlan:
        """The plan for this checkpoint. Raises UnsupportedError or CheckpointError where it cannot be done."""
        refusal = architecture.refusal(checkpoint.config)
        if refusal:
            raise UnsupportedError(f"{checkpoint.name}: {refusal}")
        source = read_attention(checkpoint, architecture)
        grouping = HeadGrouping.contiguous(source.num_key_value_heads, self.num_key_value_heads)
        unchanged = self.num_key_value_heads == source.num_key_value_heads
        if unchanged and not self.allow_same:
            raise UnsupportedError(
                f"{checkpoint.name} already has {source.num_key_value_heads} K/V heads",
                hint="ask for fewer groups, or pass --force to write an identical copy",
            )
        pooled = set() if unchanged else _pooled_tensors(checkpoint, architecture, source)
        return ConversionPlan(
            target="mqa" if self.num_key_value_heads == 1 else "gqa",
            method=self.method,
            model_type=architecture.model_type,
            source=source,
            result=source.with_key_value_heads(self.num_key_value_heads),
            config=checkpoint.config if unchanged else self._result_config(checkpoint, source),
            steps=tuple(
                self._pool_step(checkpoint, name, source, grouping) if name in pooled else _copy_step(checkpoint, name)
                for name in checkpoint.tensors
            ),
            bytes_in=sum(info.num_bytes for info in checkpoint.tensors.values()),
        )

    def _pool_step(self, checkpoint: Checkpoint, name: str, source: AttentionShape, grouping: HeadGrouping) -> Step:
        info = checkpoint.tensors[name]
        shape = (self.num_key_value_heads * source.head_dim, *info.shape[1:])
        if self.method == "random":
            std = float(checkpoint.config.get("initializer_range") or _DEFAULT_INITIALIZER_RANGE)
            op = PoolHeads("random", grouping, std=std, seed=_tensor_seed(self.seed, name))
        else:
            op = PoolHeads(self.method, grouping)
        return Step(name, TensorSpec(name, info.dtype, shape), op)

    def _result_config(self, checkpoint: Checkpoint, source: AttentionShape) -> dict[str, object]:
        config = dict(checkpoint.config)
        config.pop("auto_map", None)  # the result opens in the stock class; the source's own code knows no grouping
        config["num_key_value_heads"] = self.num_key_value_heads
        config["head_dim"] = source.head_dim
        return config


def _pooled_tensors(checkpoint: Checkpoint, architecture: Architecture, source: AttentionShape) -> set[str]:
    names = {
        architecture.tensor_name(layer, projection, kind)
        for layer in range(source.num_hidden_layers)
        for projection in ("k_proj", "v_proj")
        for kind in ("weight", "bias")
    }
    return names & checkpoint.tensors.keys()


def _copy_step(checkpoint: Checkpoint, name: str) -> Step:
    info = checkpoint.tensors[name]
    return Step(name, TensorSpec(name, info.dtype, info.shape))


def _tensor_seed(seed: int, name: str) -> int:
    """A seed per tensor, so that the values do not depend on the order in which tensors are written."""
    return int.from_bytes(hashlib.sha256(f"{seed}:{name}".encode()).digest()[:8], "little") >> 1
