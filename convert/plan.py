"""A conversion as pure data: what is read, what is written, by which operation. `--dry-run --json` prints it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from .architecture import AttentionShape
from .heads import POOLING_METHODS, HeadGrouping
from .kv_cache import kv_cache_bytes_per_token
from .writer import TensorSpec

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["ConversionPlan", "PoolHeads", "Step"]


@dataclass(frozen=True)
class PoolHeads:
    """Reduce the heads of one key or value projection to one per group. `std` and `seed` are those of random heads."""

    method: str
    grouping: HeadGrouping
    std: float | None = None
    seed: int | None = None

    def __post_init__(self) -> None:
        if self.method not in POOLING_METHODS:
            raise ValueError(f"unknown method {self.method!r}, expected one of {', '.join(POOLING_METHODS)}")
        if (self.method == "random") != (self.std is not None and self.seed is not None):
            raise ValueError("std and seed belong to the random method, and only to it")

    def __call__(self, projection: Tensor) -> Tensor:
        if self.method == "random":
            return POOLING_METHODS["random"](projection, self.grouping, std=self.std, seed=self.seed)
        return POOLING_METHODS[self.method](projection, self.grouping)


@dataclass(frozen=True)
class Step:
    """Read one tensor, write one. Without `op` the bytes are copied and never decoded."""

    reads: str
    writes: TensorSpec
    op: PoolHeads | None = None


@dataclass(frozen=True)
class ConversionPlan:
    """Everything `execute` needs besides the checkpoint: it decides nothing."""

    target: str
    method: str
    model_type: str
    source: AttentionShape
    result: AttentionShape
    config: Mapping[str, Any]
    steps: tuple[Step, ...]
    bytes_in: int

    @property
    def bytes_out(self) -> int:
        return sum(step.writes.num_bytes for step in self.steps)

    @property
    def cache_bytes_per_token(self) -> tuple[int, int]:
        """Before and after, for a 16-bit cache."""
        before, after = (
            kv_cache_bytes_per_token(
                num_layers=shape.num_hidden_layers,
                num_key_value_heads=shape.num_key_value_heads,
                head_dim=shape.head_dim,
            )
            for shape in (self.source, self.result)
        )
        return before, after

    def to_json(self) -> dict[str, Any]:
        """A JSON object from which `from_json` builds an equal plan."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> ConversionPlan:
        return cls(
            **{key: data[key] for key in ("target", "method", "model_type", "config", "bytes_in")},
            source=_attention_shape(data["source"]),
            result=_attention_shape(data["result"]),
            steps=tuple(_step(step) for step in data["steps"]),
        )


def _attention_shape(data: Mapping[str, Any]) -> AttentionShape:
    return AttentionShape(**{**data, "windows": tuple(data["windows"])})


def _step(data: Mapping[str, Any]) -> Step:
    spec = data["writes"]
    writes = TensorSpec(spec["name"], spec["dtype"], tuple(spec["shape"]))
    op = data["op"]
    if op is None:
        return Step(data["reads"], writes)
    grouping = HeadGrouping(tuple(tuple(group) for group in op["grouping"]["groups"]))
    return Step(data["reads"], writes, PoolHeads(**{**op, "grouping": grouping}))
