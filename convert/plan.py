"""A conversion as pure data: what is read, what is written, by which operation. `--dry-run --json` prints it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from .algebra.attention_shape import AttentionShape, LatentSizes
from .algebra.heads import POOLING_METHODS, HeadGrouping, interleave_heads, stack_heads
from .algebra.kv_cache import kv_cache_bytes_per_token
from .algebra.layer_grouping import LayerGrouping
from .checkpoint.tensors import TensorInfo
from .checkpoint.writer import TensorSpec

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["AverageLayers", "ConversionPlan", "LayerReport", "MoveGain", "PoolHeads", "Step"]


@dataclass(frozen=True)
class PoolHeads:
    """Reduce the K/V heads of one tensor to one per group.

    The tensor's rows are `num_query_heads` heads that stay, then all K/V heads, `num_runs` times (keys, then values,
    in a fused projection); or, if `interleaved`, for each K/V head the query heads that read it, its key and its value.
    `std` and `seed` are those of random heads.
    """

    method: str
    grouping: HeadGrouping
    num_query_heads: int = 0
    num_runs: int = 1
    interleaved: bool = False
    std: float | None = None
    seed: int | None = None

    def __post_init__(self) -> None:
        if self.method not in POOLING_METHODS:
            raise ValueError(f"unknown method {self.method!r}, expected one of {', '.join(POOLING_METHODS)}")
        if (self.method == "random") != (self.std is not None and self.seed is not None):
            raise ValueError("std and seed belong to the random method, and only to it")

    def __call__(self, *tensors: Tensor) -> Tensor:
        """The tensors are joined along their rows first."""
        import torch

        tensor = torch.cat(tensors)
        if self.interleaved:
            tensor = stack_heads(tensor, self.num_query_heads, self.grouping.num_heads)
        num_heads = self.num_query_heads + self.num_runs * self.grouping.num_heads
        queries, pooled = tensor.tensor_split([tensor.shape[0] // num_heads * self.num_query_heads])
        runs = [self._pool(run, index) for index, run in enumerate(pooled.chunk(self.num_runs))]
        result = torch.cat([queries, *runs])
        if self.interleaved:
            return interleave_heads(result, self.num_query_heads, len(self.grouping.groups))
        return result

    def _pool(self, run: Tensor, index: int) -> Tensor:
        pool = POOLING_METHODS[self.method]
        if self.seed is None:
            return pool(run, self.grouping)
        return pool(run, self.grouping, std=self.std, seed=self.seed + index)


@dataclass(frozen=True)
class AverageLayers:
    """The mean of a projection over `num_layers` layers, as a function of what the first layer's attention reads.

    Called with the layers' weights, (rows, hidden_size), and then the gains of their input norms, (hidden_size,): each
    weight is folded with its own gain, and the mean unfolded with the first's. Without gains, biases are averaged.
    `pool` then pools heads. In float64, rounded once.
    """

    num_layers: int
    pool: PoolHeads | None = None

    def __call__(self, *tensors: Tensor) -> Tensor:
        import torch

        weights, gains = [[tensor.double() for tensor in part] for part in _split(tensors, self.num_layers)]
        if gains:
            # an input that the first layer's norm switches off is zero whatever the weight
            ratios = [torch.where(gains[0] == 0, torch.zeros_like(gain), gain / gains[0]) for gain in gains]
            weights = [weight * ratio for weight, ratio in zip(weights, ratios, strict=True)]
        mean = torch.stack(weights).mean(0)
        return (mean if self.pool is None else self.pool(mean)).to(tensors[0].dtype)


@dataclass(frozen=True)
class MoveGain:
    """The gain of a query norm that makes up for keys with another layer's gain, (head_dim,).

    Called with the query norm's gain, the gain that the keys had, and those whose mean they get. What commutes with
    RoPE is moved: the mean ratio of each rotary pair (i, i + head_dim / 2), exact if both dims have the same.
    """

    def __call__(self, query: Tensor, key: Tensor, *shared: Tensor) -> Tensor:
        import torch

        mean = torch.stack([gain.double() for gain in shared]).mean(0)
        ratio = torch.where(mean == 0, torch.ones_like(mean), key.double() / mean)
        moved: Tensor = query.double() * ratio.unflatten(0, (2, -1)).mean(0).repeat(2)
        return moved.to(query.dtype)


def _split(tensors: Sequence[Tensor], index: int) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
    return tensors[:index], tensors[index:]


@dataclass(frozen=True)
class Step:
    """Read tensors, write what `op` makes of them. Without `op` bytes are copied, never decoded."""

    reads: tuple[str, ...]
    writes: TensorSpec
    op: PoolHeads | AverageLayers | MoveGain | None = None

    def __post_init__(self) -> None:
        if self.op is None and len(self.reads) != 1:
            raise ValueError(f"{self.writes.name} would be a copy of {len(self.reads)} tensors")

    @classmethod
    def copy(cls, info: TensorInfo) -> Step:
        return cls((info.name,), TensorSpec(info.name, info.dtype, info.shape))


@dataclass(frozen=True)
class LayerReport:
    """The groups of heads that were merged, and the fraction of energy that keys and values of each kept.

    `layers` share keys and values, which the first computes. Heads are numbered through all of them.
    """

    layers: tuple[int, ...]
    groups: tuple[tuple[int, ...], ...]
    keys_retained: tuple[float, ...]
    values_retained: tuple[float, ...]


@dataclass(frozen=True)
class ConversionPlan:
    """Everything `execute` needs besides the checkpoint: it decides nothing. `layers` tells of a merge."""

    target: str
    method: str
    model_type: str
    source: AttentionShape
    result: AttentionShape
    config: Mapping[str, Any]
    steps: tuple[Step, ...]
    bytes_in: int
    layers: tuple[LayerReport, ...] = ()

    @property
    def bytes_out(self) -> int:
        return sum(step.writes.num_bytes for step in self.steps)

    @property
    def cache_bytes_per_token(self) -> tuple[int, int]:
        """Before and after, for a 16-bit cache."""
        before, after = (
            kv_cache_bytes_per_token(num_layers=shape.num_key_value_layers, values=shape.cached_values)
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
            layers=tuple(_layer_report(layer) for layer in data["layers"]),
        )


def _attention_shape(data: Mapping[str, Any]) -> AttentionShape:
    grouping = data["layer_grouping"]
    shared = None if grouping is None else LayerGrouping(tuple(grouping["sources"]))
    latent = None if data["latent"] is None else LatentSizes(**data["latent"])
    return AttentionShape(**{**data, "windows": tuple(data["windows"]), "layer_grouping": shared, "latent": latent})


def _layer_report(data: Mapping[str, Any]) -> LayerReport:
    groups = tuple(tuple(group) for group in data["groups"])
    return LayerReport(tuple(data["layers"]), groups, tuple(data["keys_retained"]), tuple(data["values_retained"]))


def _step(data: Mapping[str, Any]) -> Step:
    spec = data["writes"]
    op = data["op"]
    if op is not None and "num_layers" in op:
        op = AverageLayers(op["num_layers"], _pool_heads(op["pool"]))
    elif op is not None:
        op = _pool_heads(op) if op else MoveGain()
    return Step(tuple(data["reads"]), TensorSpec(spec["name"], spec["dtype"], tuple(spec["shape"])), op)


def _pool_heads(data: Mapping[str, Any] | None) -> PoolHeads | None:
    if data is None:
        return None
    grouping = HeadGrouping(tuple(tuple(group) for group in data["grouping"]["groups"]))
    return PoolHeads(**{**data, "grouping": grouping})
