"""The merge of one layer's heads: every group's keys and values, and which heads form a group."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import combinations, product
from typing import TYPE_CHECKING

from .architecture import AttentionShape
from .heads import HeadGrouping
from .merge import (
    Merged,
    merge_at_distances,
    merge_linear,
    merge_mean,
    merge_rotary,
    pair_losses,
)
from .projections import Projections
from .rotary import Rotary, turning

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Freedom", "LayerMerge", "best_grouping", "merge_layer"]

Groups = tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class Freedom:
    """What a merge may change in a layer without changing its function; a side that is not free takes the mean."""

    rotary: Rotary
    keys: bool = True
    values: bool = True


@dataclass(frozen=True)
class LayerMerge:
    """A layer with the heads of each group made equal, and the fraction of its energy that each group keeps."""

    projections: Projections
    grouping: HeadGrouping
    keys_retained: tuple[float, ...]
    values_retained: tuple[float, ...]


def merge_layer(
    source: Projections,
    shape: AttentionShape,
    grouping: HeadGrouping,
    gram: Tensor,
    freedom: Freedom,
) -> LayerMerge:
    """Merge the K/V heads of each group.

    gram: E[x xᵀ] of the attention's input with a 1 appended, (hidden_size + 1, hidden_size + 1), float64. The result
    has the heads of a group next to one another, and their query heads with them, in the order of `grouping`.
    """
    import torch

    heads = _Heads(source, shape, gram, freedom)
    groups = [(group, heads.merged_keys(group), heads.merged_values(group)) for group in grouping.groups]
    q, k, v, o = [], [], [], []
    for group, keys, values in groups:
        for head, read_key, read_value in zip(group, keys.readers, values.readers, strict=True):
            q += [read_key.T @ query for query in heads.queries[head]]
            o += [output @ read_value for output in heads.outputs[head]]
            k.append(keys.shared)
            v.append(values.shared)
    return LayerMerge(
        Projections(torch.cat(q), torch.cat(k), torch.cat(v), torch.cat(o, dim=1)),
        grouping,
        tuple(keys.retained for _, keys, _ in groups),
        tuple(values.retained for _, _, values in groups),
    )


class _Heads:
    """A layer's projections head by head: queries[h] and outputs[h] are those of the query heads that read K/V head h.

    queries: (head_dim, hidden_size + 1) each; outputs: (hidden_size, head_dim) each.
    """

    def __init__(self, source: Projections, shape: AttentionShape, gram: Tensor, freedom: Freedom) -> None:
        size = shape.num_attention_heads // shape.num_key_value_heads
        queries = source.q.unflatten(0, (shape.num_key_value_heads, size, shape.head_dim))
        outputs = source.o.unflatten(1, (shape.num_key_value_heads, size, shape.head_dim))
        self.queries = [list(group) for group in queries]
        self.outputs = [list(group) for group in outputs.permute(1, 2, 0, 3)]
        self._gram, self._freedom = gram, freedom
        rotary = freedom.rotary
        self._keys = [rotary.half_split(key) for key in source.k.unflatten(0, (-1, shape.head_dim))]
        self._values = list(source.v.unflatten(0, (-1, shape.head_dim)))
        self._key_weights = [
            _sum(rotary.half_split(query) @ gram @ rotary.half_split(query).T for query in group)
            for group in self.queries
        ]
        self._value_weights = [_sum(output.T @ output for output in group) for group in self.outputs]

    def merged_values(self, group: tuple[int, ...]) -> Merged:
        values, weights = [self._values[head] for head in group], [self._value_weights[head] for head in group]
        if not self._freedom.values:
            return merge_mean(values, weights, self._gram)
        return merge_linear(values, weights, self._gram, len(values[0]))

    def merged_keys(self, group: tuple[int, ...]) -> Merged:
        """In the order of the class's rotary pairs."""
        import torch

        rotating = self._freedom.rotary.dims
        keys, weights = [self._keys[head] for head in group], [self._key_weights[head] for head in group]
        if not self._freedom.keys:
            return _in_original_order(merge_mean(keys, weights, self._gram), self._freedom.rotary)
        parts = []
        if rotating:
            powers = [weight.diagonal()[:rotating].unflatten(0, (2, -1)).sum(0) for weight in weights]
            parts.append(merge_rotary([key[:rotating] for key in keys], powers, self._gram))
        if rotating < len(keys[0]):
            blocks = [weight[rotating:, rotating:] for weight in weights]
            parts.append(merge_linear([key[rotating:] for key in keys], blocks, self._gram, len(keys[0]) - rotating))
        merged = Merged(
            torch.cat([part.shared for part in parts]),
            [torch.block_diag(*(part.readers[head] for part in parts)) for head in range(len(keys))],
            sum(part.kept for part in parts),
            sum(part.total for part in parts),
        )
        if rotating:
            merged = merge_at_distances(merged, keys, weights, self._gram, turning(self._freedom.rotary, len(keys[0])))
        return _in_original_order(merged, self._freedom.rotary)

    def pair_losses(self) -> Tensor:
        """What merging two heads loses, of the energies of all keys and of all values, added: (heads, heads)."""
        turns = turning(self._freedom.rotary, len(self._keys[0])) if self._freedom.rotary.dims else None
        keys = pair_losses(self._keys, self._key_weights, self._gram, turns)
        return keys + pair_losses(self._values, self._value_weights, self._gram)


def _sum(tensors: Iterable[Tensor]) -> Tensor:
    import torch

    return torch.stack(list(tensors)).sum(0)


def _in_original_order(merged: Merged, rotary: Rotary) -> Merged:
    """Rows of the shared head, and rows and columns of its readers, in the order of the class's rotary pairs."""
    readers = [rotary.original(rotary.original(reader).T).T for reader in merged.readers]
    return Merged(rotary.original(merged.shared), readers, merged.kept, merged.total)


def best_grouping(
    source: Projections,
    shape: AttentionShape,
    num_groups: int,
    gram: Tensor,
    freedom: Freedom,
) -> HeadGrouping:
    """The groups, of equal size, that lose the least: the lost fractions of the energies of keys and of values, added.

    Both sides must be free. What a group loses is taken for the sum of what its pairs would, each computed once. Groups
    grow greedily from every head as seed, and heads are swapped until no swap helps (QCQA, arXiv 2406.10247, searches
    groups too, for the mean).
    """
    losses: list[list[float]] = _Heads(source, shape, gram, freedom).pair_losses().tolist()

    def loss(group: Iterable[int]) -> float:
        return sum(losses[one][other] for one, other in combinations(group, 2))

    everything = tuple(range(shape.num_key_value_heads))
    size = len(everything) // num_groups
    candidates = [HeadGrouping.contiguous(len(everything), num_groups).groups]
    candidates += [_grown(everything, seed, size, loss) for seed in everything]
    best = min((_swapped(groups, loss) for groups in candidates), key=lambda groups: sum(map(loss, groups)))
    return HeadGrouping(tuple(sorted(tuple(sorted(group)) for group in best)))


def _grown(heads: tuple[int, ...], seed: int, size: int, loss: Callable[[Iterable[int]], float]) -> Groups:
    """Groups filled one after the other, each with the head that costs least, the first from `seed`."""
    free = set(heads)
    groups: list[tuple[int, ...]] = []
    while free:
        group = [seed if not groups else min(free)]
        free -= set(group)
        while len(group) < size:
            group.append(min(sorted(free), key=lambda head: loss([*group, head])))
            free.discard(group[-1])
        groups.append(tuple(group))
    return tuple(groups)


def _swapped(groups: Groups, loss: Callable[[Iterable[int]], float]) -> Groups:
    """The groups after swaps of two heads, as long as one lowers the loss."""
    current = [list(group) for group in groups]
    improved = True
    while improved:
        improved = False
        for one, other in combinations(current, 2):
            for i, j in product(range(len(one)), range(len(other))):
                before = loss(one) + loss(other)
                one[i], other[j] = other[j], one[i]
                if loss(one) + loss(other) < before - 1e-12:
                    improved = True
                else:
                    one[i], other[j] = other[j], one[i]
    return tuple(tuple(group) for group in current)
