"""K/V heads in groups, and what the one head is that takes the place of a group's heads."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING

from ..errors import UnsupportedError

if TYPE_CHECKING:
    from torch import Tensor

__all__ = [
    "POOLING_METHODS",
    "HeadGrouping",
    "first_heads",
    "interleave_heads",
    "mean_heads",
    "random_heads",
    "stack_heads",
]


@dataclass(frozen=True)
class HeadGrouping:
    """Which K/V heads of the source become which head of the result: those in `groups[g]` become head g.

    Raises ValueError unless the groups are of equal size and hold every head of the source exactly once.
    """

    groups: tuple[tuple[int, ...], ...]

    def __post_init__(self) -> None:
        heads = sorted(head for group in self.groups for head in group)
        if not heads or heads != list(range(len(heads))):
            raise ValueError(f"the groups {self.groups} do not hold every head exactly once")
        if len({len(group) for group in self.groups}) != 1:
            raise ValueError(f"the groups {self.groups} are not of equal size")

    @classmethod
    def contiguous(cls, num_heads: int, num_groups: int) -> HeadGrouping:
        """Return groups of neighbouring heads, as in the GQA paper.

        Raises UnsupportedError unless `num_groups` divides `num_heads`.
        """
        if num_groups < 1 or num_heads % num_groups:
            possible = ", ".join(str(n) for n in range(1, num_heads) if num_heads % n == 0)
            raise UnsupportedError(
                f"{num_heads} K/V heads cannot form {num_groups} equal groups",
                hint=f"possible numbers of groups: {possible}" if possible else None,
            )
        size = num_heads // num_groups
        return cls(tuple(tuple(range(g * size, (g + 1) * size)) for g in range(num_groups)))

    @property
    def num_heads(self) -> int:
        """The number of K/V heads of the source."""
        return sum(len(group) for group in self.groups)


def stack_heads(fused: Tensor, num_query_heads: int, num_key_value_heads: int) -> Tensor:
    """Reorder the rows of a fused projection from K/V head by K/V head to [q; k; v].

    fused: ((num_query_heads + 2 · num_key_value_heads) · head_dim, …), whose rows are, for each K/V head, its query
    heads, then its key, then its value. Returns the same shape and dtype.
    """
    import torch

    size = num_query_heads // num_key_value_heads
    heads = fused.reshape(num_key_value_heads, size + 2, -1, *fused.shape[1:])
    return torch.cat([heads[:, :size].flatten(0, 1), heads[:, size], heads[:, size + 1]]).reshape(fused.shape)


def interleave_heads(stacked: Tensor, num_query_heads: int, num_key_value_heads: int) -> Tensor:
    """Reorder the rows [q; k; v] of a fused projection K/V head by K/V head: the inverse of `stack_heads`."""
    import torch

    heads = stacked.reshape(num_query_heads + 2 * num_key_value_heads, -1, *stacked.shape[1:])
    queries, keys, values = heads.split([num_query_heads, num_key_value_heads, num_key_value_heads])
    grouped = queries.unflatten(0, (num_key_value_heads, -1))
    return torch.cat([grouped, keys[:, None], values[:, None]], dim=1).reshape(stacked.shape)


def mean_heads(projection: Tensor, grouping: HeadGrouping) -> Tensor:
    """Return the mean of the heads of each group (Ainslie et al. 2023, arXiv 2305.13245, §2.1).

    projection: a k_proj or v_proj weight (num_heads · head_dim, hidden_size) or bias (num_heads · head_dim,), any
    float dtype. Returns (num_groups · head_dim, …) in the same dtype. The mean is taken in float64, group by group,
    so that the result is rounded once. Raises ValueError where the rows do not split into the heads.
    """
    heads = _split_heads(projection, grouping)  # (K, D, …)
    return _join_heads([_mean([heads[head] for head in group]) for group in grouping.groups], projection)


def _mean(heads: Sequence[Tensor]) -> Tensor:
    """The mean in float64, added up in place: a fifth of the time that it takes to stack them."""
    import torch

    total = heads[0].to(torch.float64, copy=True)
    for head in heads[1:]:
        total += head
    return total.div_(len(heads))


def first_heads(projection: Tensor, grouping: HeadGrouping) -> Tensor:
    """Return the first head of each group, unchanged: the GQA paper's "first" ablation (§3.3).

    Shapes are those of `mean_heads`.
    """
    heads = _split_heads(projection, grouping)
    return _join_heads([heads[group[0]] for group in grouping.groups], projection)


def random_heads(projection: Tensor, grouping: HeadGrouping, *, std: float, seed: int) -> Tensor:
    """Return fresh heads from N(0, std²) with biases of zero: the GQA paper's "random" ablation (§3.3).

    Shapes are those of `mean_heads`. The same `seed` gives the same values on every machine.
    """
    import torch

    heads = _split_heads(projection, grouping)
    shape = (len(grouping.groups) * heads.shape[1], *heads.shape[2:])
    if projection.dim() == 1:
        return torch.zeros(shape, dtype=projection.dtype)
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(shape, generator=generator, dtype=torch.float32) * std).to(projection.dtype)


POOLING_METHODS: Mapping[str, Callable[..., Tensor]] = MappingProxyType(
    {"mean": mean_heads, "first": first_heads, "random": random_heads}
)


def _split_heads(projection: Tensor, grouping: HeadGrouping) -> Tensor:
    rows = projection.shape[0]
    if rows % grouping.num_heads:
        raise ValueError(f"{rows} rows do not split into {grouping.num_heads} heads")
    return projection.reshape(grouping.num_heads, rows // grouping.num_heads, *projection.shape[1:])


def _join_heads(heads: list[Tensor], projection: Tensor) -> Tensor:
    import torch

    return torch.cat([head.to(projection.dtype) for head in heads])
