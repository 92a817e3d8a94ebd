"""A conversion as pure data: what is read, what is written, by which operation. It goes to JSON and back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from .algebra.attention_shape import AttentionShape, LatentSizes
from .algebra.heads import POOLING_METHODS, HeadGrouping, interleave_heads, stack_heads
from .algebra.kv_cache import kv_cache_bytes_per_token
from .algebra.layer_grouping import LayerGrouping
from .checkpoint.tensors import Checkpoint, TensorInfo
from .checkpoint.writer import TensorSpec

if TYPE_CHECKING:
    from torch import Tensor

__all__ = [
    "OPERATIONS",
    "AverageLayers",
    "ConversionPlan",
    "KeepSilent",
    "MoveGain",
    "Operation",
    "PoolHeads",
    "Step",
    "operation_from_json",
]


@dataclass(frozen=True)
class PoolHeads:
    """Reduce the K/V heads of one tensor to one per group.

    The tensor's rows are `num_query_heads` heads that stay, then all K/V heads, `num_runs` times (keys, then values,
    in a fused projection); or, if `qkv_interleaved`, for each K/V head the query heads that read it, its key and its
    value. `std` and `seed` are those of random heads.
    """

    method: str
    grouping: HeadGrouping
    num_query_heads: int = 0
    num_runs: int = 1
    qkv_interleaved: bool = False
    std: float | None = None
    seed: int | None = None

    def __post_init__(self) -> None:
        if self.method not in POOLING_METHODS:
            raise ValueError(f"unknown method {self.method!r}, expected one of {', '.join(POOLING_METHODS)}")
        if (self.method == "random") != (self.std is not None and self.seed is not None):
            raise ValueError("std and seed belong to the random method, and only to it")

    def __call__(self, *tensors: Tensor) -> Tensor:
        """The pooled tensor, (rows of fewer heads, …), in the dtype of the given ones, which are joined by rows."""
        import torch

        tensor = torch.cat(tensors)
        if self.qkv_interleaved:
            tensor = stack_heads(tensor, self.num_query_heads, self.grouping.num_heads)
        num_heads = self.num_query_heads + self.num_runs * self.grouping.num_heads
        queries, pooled = tensor.tensor_split([tensor.shape[0] // num_heads * self.num_query_heads])
        runs = [self._pool(run, index) for index, run in enumerate(pooled.chunk(self.num_runs))]
        result = torch.cat([queries, *runs])
        if self.qkv_interleaved:
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


@dataclass(frozen=True)
class KeepSilent:
    """o_proj, (hidden_size, num_attention_heads · head_dim), without the heads whose values are zero.

    Called with o_proj, the gain of the norm before the attention, (hidden_size,), v_proj, and its bias if it has one.
    Query heads that would come to read other values, which are not zero, add nothing to the output as before.
    """

    num_key_value_heads: int

    def __call__(self, output: Tensor, gain: Tensor, weight: Tensor, *bias: Tensor) -> Tensor:
        import torch

        rows = torch.cat([weight * gain, *(column[:, None] for column in bias)], dim=1)
        heard = rows.unflatten(0, (self.num_key_value_heads, -1)).flatten(1).any(1)
        heads = output.unflatten(1, (self.num_key_value_heads, -1))
        kept: Tensor = torch.where(heard[:, None], heads, torch.zeros_like(heads)).flatten(1)
        return kept


def _split(tensors: Sequence[Tensor], index: int) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
    return tensors[:index], tensors[index:]


Operation = PoolHeads | AverageLayers | MoveGain | KeepSilent

OPERATIONS: Mapping[str, type[Operation]] = MappingProxyType(
    {"pool_heads": PoolHeads, "average_layers": AverageLayers, "move_gain": MoveGain, "keep_silent": KeepSilent}
)
"""The operations of steps, by the name that a plan's JSON gives them."""

_NAMES = {operation: name for name, operation in OPERATIONS.items()}


@dataclass(frozen=True)
class Step:
    """Read tensors, write what `op` makes of them. Without `op` bytes are copied, never decoded.

    They are the source's tensors, or with `overlay` those that the method made.
    """

    reads: tuple[str, ...]
    writes: TensorSpec
    op: Operation | None = None
    overlay: bool = False

    def __post_init__(self) -> None:
        if self.op is None and len(self.reads) != 1:
            raise ValueError(f"{self.writes.name} would be a copy of {len(self.reads)} tensors")

    def operation_json(self) -> dict[str, Any] | None:
        """The operation as an object for JSON, from which `operation_from_json` builds an equal one; None for none."""
        return _operation_json(self.op)

    @classmethod
    def copy(cls, info: TensorInfo) -> Step:
        """A tensor of the source as it is."""
        return cls((info.name,), TensorSpec(info.name, info.dtype, info.shape))

    @classmethod
    def made(cls, name: str, dtype: str, shape: tuple[int, ...]) -> Step:
        """A tensor of the overlay as it is."""
        return cls((name,), TensorSpec(name, dtype, shape), overlay=True)


@dataclass(frozen=True)
class ConversionPlan:
    """Everything `execute` needs besides the source and the overlay: it decides nothing.

    `route` names the classes through which the source is translated, one after the other, before steps read it.
    """

    target: str
    method: str
    model_type: str
    route: tuple[str, ...]
    source: AttentionShape
    result: AttentionShape
    config: Mapping[str, Any]
    steps: tuple[Step, ...]
    bytes_in: int

    @property
    def bytes_out(self) -> int:
        return sum(step.writes.num_bytes for step in self.steps)

    @property
    def overlay_bytes(self) -> int:
        """The size of the tensors of the overlay that the steps read."""
        return sum(step.writes.num_bytes for step in self.steps if step.overlay)

    @property
    def cache_bytes_per_token(self) -> tuple[int, int]:
        """Before and after, for a 16-bit cache."""
        before, after = (
            kv_cache_bytes_per_token(num_layers=shape.num_key_value_layers, values=shape.cached_values)
            for shape in (self.source, self.result)
        )
        return before, after

    @property
    def resizes_heads(self) -> bool:
        """Whether K/V heads of the result, which are no latent, have another size than the source's."""
        return self.result.latent is None and self.source.head_dim != self.result.head_dim

    @property
    def head_dims(self) -> dict[str, int]:
        """The size of K/V heads, of the source and of the result."""
        return {"source": self.source.head_dim, "result": self.result.head_dim}

    @property
    def changes_cache(self) -> bool:
        """Whether the result caches anything else than the source."""
        return self.source != self.result

    def check_readable(self, source: Checkpoint) -> None:
        """Raise UnsupportedError for a tensor that an operation reads and whose dtype is none to compute with."""
        for step in self.steps:
            for name in step.reads if step.op is not None else ():
                source.check_readable(name)

    def to_json(self) -> dict[str, Any]:
        """A JSON object from which `from_json` builds an equal plan; every operation has its name under "op"."""
        steps = [asdict(step) | {"op": step.operation_json()} for step in self.steps]
        return asdict(self) | {"steps": steps}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> ConversionPlan:
        """The plan that `to_json` gave. Raises KeyError, TypeError or ValueError for anything else."""
        return cls(
            **{key: data[key] for key in ("target", "method", "model_type", "config", "bytes_in")},
            route=tuple(data["route"]),
            source=_attention_shape(data["source"]),
            result=_attention_shape(data["result"]),
            steps=tuple(_step(step) for step in data["steps"]),
        )


def _operation_json(op: Operation | None) -> dict[str, Any] | None:
    if op is None:
        return None
    fields = asdict(op)
    if isinstance(op, AverageLayers):
        fields["pool"] = _operation_json(op.pool)
    return {"op": _NAMES[type(op)]} | fields


def operation_from_json(data: Mapping[str, Any] | None) -> Any:
    """The operation that `Step.operation_json` gave. Raises KeyError, TypeError or ValueError for anything else."""
    if data is None:
        return None
    fields = {name: value for name, value in data.items() if name != "op"}
    if "grouping" in fields:
        fields["grouping"] = HeadGrouping(tuple(tuple(group) for group in fields["grouping"]["groups"]))
    if "pool" in fields:
        fields["pool"] = operation_from_json(fields["pool"])
    return OPERATIONS[data["op"]](**fields)


def _step(data: Mapping[str, Any]) -> Step:
    spec = TensorSpec(data["writes"]["name"], data["writes"]["dtype"], tuple(data["writes"]["shape"]))
    return Step(tuple(data["reads"]), spec, operation_from_json(data["op"]), data["overlay"])


def _attention_shape(data: Mapping[str, Any]) -> AttentionShape:
    grouping = data["layer_grouping"]
    shared = None if grouping is None else LayerGrouping(tuple(grouping["sources"]))
    latent = None if data["latent"] is None else LatentSizes(**data["latent"])
    return AttentionShape(**{**data, "windows": tuple(data["windows"]), "layer_grouping": shared, "latent": latent})
