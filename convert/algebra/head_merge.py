"""The merge of heads, of one layer or of several that share: every group's keys and values, and which heads form it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, NamedTuple

from .attention_shape import AttentionShape
from .heads import HeadGrouping
from .linear import solve_ridge
from .merge import ExpectedRotations, Merged, merge_at_distances, merge_linear, merge_mean, merge_rotary, pair_losses
from .projections import Projections
from .rotations import ExpectedRotation, Rotary, expected_rotation

if TYPE_CHECKING:
    from torch import Tensor

__all__ = [
    "PREDICTION_PULL",
    "FreeTransformations",
    "Heads",
    "LayerInput",
    "LayerMerge",
    "merge_layers",
    "predicted_input",
]

PREDICTION_PULL = 1.0  # docs/measurements.md has others


@dataclass(frozen=True)
class FreeTransformations:
    """What a merge may change in a layer without changing its function; a side that is not free takes the mean."""

    rotary: Rotary
    keys: bool = True
    values: bool = True


@dataclass(frozen=True)
class LayerInput:
    """A layer's projections and what its attention reads, x with a 1 appended: (hidden_size + 1,).

    gram: E[x xᵀ]. cross: for a layer that takes keys and values from another, E[x x'ᵀ] with the x' that the other one
    reads. Both (hidden_size + 1, hidden_size + 1), float64.
    """

    projections: Projections
    gram: Tensor
    cross: Tensor | None = None


@dataclass(frozen=True)
class LayerMerge:
    """Layers with the heads of each group made equal, and the fraction of its energy that each group keeps."""

    projections: tuple[Projections, ...]
    grouping: HeadGrouping
    keys_retained: tuple[float, ...]
    values_retained: tuple[float, ...]


def merge_layers(heads: Heads, grouping: HeadGrouping) -> LayerMerge:
    """Merge the K/V heads of each group.

    Each layer of the result has one K/V head for each group, which its query heads read: those of a group's heads stand
    next to one another, in `grouping`'s order. Keys and values, the same for all layers, are functions of what the
    first layer's attention reads.
    """
    import torch

    groups = [(group, heads.merged_keys(group), heads.merged_values(group)) for group in grouping.groups]
    k, v = torch.cat([keys.shared for _, keys, _ in groups]), torch.cat([values.shared for _, _, values in groups])
    merged = []
    for layer in range(heads.num_layers):
        q, o = [], []
        for group, keys, values in groups:
            for head, read_key, read_value in zip(group, keys.readers, values.readers, strict=True):
                if heads.layer(head) == layer:
                    q += [read_key.T @ query for query in heads.queries[head]]
                    o += [output @ read_value for output in heads.outputs[head]]
        merged.append(Projections(torch.cat(q), k, v, torch.cat(o, dim=1)))
    return LayerMerge(
        tuple(merged),
        grouping,
        tuple(keys.retained for _, keys, _ in groups),
        tuple(values.retained for _, _, values in groups),
    )


class Heads:
    """The K/V heads of one layer, or of several that are to share keys and values, numbered through.

    queries[h] and outputs[h] are those of the query heads that read K/V head h, (head_dim, hidden_size + 1) and
    (hidden_size, head_dim) each. The keys and values of layers after the first are predicted from what the first one's
    attention reads, pulled by `prediction_pull` (docs/merging.md, "Layers that share"). What merges need of the inputs,
    the covariances of all keys and of all values, is computed once. Without `at_distances` keys that rotate are merged
    as if every angle between a query and a key were as likely.
    """

    def __init__(
        self,
        layers: Sequence[LayerInput],
        shape: AttentionShape,
        free: FreeTransformations,
        *,
        prediction_pull: float = PREDICTION_PULL,
        at_distances: bool = True,
    ) -> None:
        import torch

        size = shape.num_attention_heads // shape.num_key_value_heads
        gram, rotary = layers[0].gram, free.rotary
        self.num_layers = len(layers)
        self.queries: list[list[Tensor]] = []
        self.outputs: list[list[Tensor]] = []
        self.free = free
        self._at_distances = at_distances
        self._rotation_of_keys = expected_rotation(rotary, shape.head_dim) if rotary.dims and free.keys else None
        self._key_weights: list[Tensor] = []
        keys, values = [], []
        self._own_keys: list[_Own] = []
        self._own_values: list[_Own] = []
        for layer in layers:
            source = layer.projections
            queries = source.q.unflatten(0, (shape.num_key_value_heads, size, shape.head_dim))
            outputs = source.o.unflatten(1, (shape.num_key_value_heads, size, shape.head_dim))
            self.queries += [list(group) for group in queries]
            self.outputs += [list(group) for group in outputs.permute(1, 2, 0, 3)]
            self._key_weights += [
                _sum(rotary.half_split(query) @ layer.gram @ rotary.half_split(query).T for query in group)
                for group in queries
            ]
            heads = source.k.unflatten(0, (-1, shape.head_dim)).transpose(0, 1)
            keys.append(rotary.half_split(heads).transpose(0, 1))  # (heads, head_dim, hidden_size + 1)
            values.append(source.v.unflatten(0, (-1, shape.head_dim)))
            if len(layers) > 1:
                self._own_keys += _own(keys[-1], layer, gram)
                self._own_values += _own(values[-1], layer, gram)
            if layer.cross is not None:
                predicted = predicted_input(layer.cross, gram, prediction_pull)
                keys[-1], values[-1] = keys[-1] @ predicted, values[-1] @ predicted
        self._keys, self._values, self._gram = torch.cat(keys), torch.cat(values), gram
        self._key_covariances = _covariances(self._keys, gram)
        self._value_covariances = _covariances(self._values, gram)
        self._value_weights = [_sum(output.T @ output for output in group) for group in self.outputs]

    def layer(self, head: int) -> int:
        """The layer of a head, counted from the first."""
        return head * self.num_layers // len(self)

    def in_order(self, num_groups: int) -> HeadGrouping:
        """Neighbouring heads of a layer form a group, with those in the same place of the other layers."""
        size = len(self) // self.num_layers
        groups = HeadGrouping.contiguous(size, num_groups).groups
        return HeadGrouping(
            tuple(tuple(layer * size + head for layer in range(self.num_layers) for head in group) for group in groups)
        )

    def __len__(self) -> int:
        return len(self._keys)

    def merged_values(self, group: tuple[int, ...]) -> Merged:
        weights = [self._value_weights[head] for head in group]
        covariance, rows = _within(self._value_covariances, group)
        if self.free.values:
            merged = merge_linear(rows, weights, covariance, len(rows[0]))
        else:
            merged = merge_mean(rows, weights, covariance)
        merged = _of_rows(merged, self._values[list(group)])
        if self.num_layers > 1:
            merged = _measured(merged, [self._own_values[head] for head in group], weights, self._gram)
        return merged

    def merged_keys(self, group: tuple[int, ...]) -> Merged:
        """In the order of the class's rotary pairs."""
        rotary = self.free.rotary
        weights = [self._key_weights[head] for head in group]
        covariance, rows = _within(self._key_covariances, group)
        if not self.free.keys:
            merged = merge_mean(rows, weights, covariance)
        elif self._rotation_of_keys is None:
            merged = merge_linear(rows, weights, covariance, len(rows[0]))
        else:
            merged = _at_any_angle(rows, weights, covariance, rotary.dims)
            if self._at_distances:
                rotations = ExpectedRotations.same(self._rotation_of_keys)
                merged = merge_at_distances(merged, rows, weights, covariance, rotations)
        merged = _of_rows(merged, self._keys[list(group)])
        if self.num_layers > 1:
            merged = _measured(
                merged, [self._own_keys[head] for head in group], weights, self._gram, self._rotation_of_keys
            )
        readers = [rotary.original(rotary.original(reader).T).T for reader in merged.readers]
        return Merged(rotary.original(merged.shared), readers, merged.kept, merged.total)

    def pair_losses(self) -> Tensor:
        """What merging two heads loses, of the energies of all keys and of all values, added: (heads, heads)."""
        keys = pair_losses(self._key_covariances, self._key_weights, self._rotation_of_keys)
        return keys + pair_losses(self._value_covariances, self._value_weights)


def predicted_input(cross: Tensor, gram: Tensor, pull: float) -> Tensor:
    """argmin over A of E‖x − A x'‖² + λ ‖A − D‖², from cross = E[x x'ᵀ] and gram = E[x' x'ᵀ].

    D is diagonal, each dim's best multiple of the same dim of x', which has most of the residual stream in common with
    x. λ is a fraction of the mean diagonal of gram. Least squares alone shrinks whatever it cannot foresee of a single
    token, and attention, which averages over tokens, would find it shrunk.
    """
    import torch

    power = gram.diagonal().clamp(min=1e-300)
    strength = pull * power.mean()
    return solve_ridge(cross + strength * torch.diag(cross.diagonal() / power), gram, strength)


class _Own(NamedTuple):
    """A head as its own layer computes it: E[z zᵀ], (head_dim, head_dim), and E[z x'ᵀ] with the first layer's x'."""

    covariance: Tensor
    cross: Tensor


def _own(heads: Tensor, layer: LayerInput, gram: Tensor) -> list[_Own]:
    cross = heads @ (gram if layer.cross is None else layer.cross)
    return [_Own(*parts) for parts in zip(heads @ layer.gram @ heads.mT, cross, strict=True)]


def _measured(
    merged: Merged,
    own: Sequence[_Own],
    weights: Sequence[Tensor],
    gram: Tensor,
    rotation: ExpectedRotation | None = None,
) -> Merged:
    """The same with the energies of what heads compute in their own layers, and of what the shared one keeps of it."""

    def mean(matrix: Tensor) -> Tensor:
        return matrix if rotation is None else rotation.mean(matrix)

    power = mean(merged.shared @ gram @ merged.shared.T)
    total = error = 0.0
    for reader, head, weight in zip(merged.readers, own, weights, strict=True):
        covariance, read = mean(head.covariance), reader @ mean(merged.shared @ head.cross.T)
        total += float((weight * covariance).sum())
        error += float((weight * (covariance - 2 * read + reader @ power @ reader.T)).sum())
    return replace(merged, kept=max(total - error, 0.0), total=total)


def _covariances(heads: Tensor, gram: Tensor) -> Tensor:
    """Of every two heads, (heads, heads, head_dim, head_dim)."""
    num_heads, head_dim, _ = heads.shape
    rows = heads.flatten(0, 1)
    blocks: Tensor = (rows @ gram @ rows.T).view(num_heads, head_dim, num_heads, head_dim).transpose(1, 2)
    return blocks


def _within(covariances: Tensor, group: tuple[int, ...]) -> tuple[Tensor, list[Tensor]]:
    """The joint covariance of a group's heads, and each head's rows in terms of all of theirs: rows of an identity."""
    import torch

    chosen = covariances[list(group)][:, list(group)].transpose(1, 2).flatten(2, 3).flatten(0, 1)
    return chosen, list(torch.eye(len(chosen), dtype=chosen.dtype).chunk(len(group)))


def _of_rows(merged: Merged, heads: Tensor) -> Merged:
    """The same with the shared head as a weight: `heads`, (m, head_dim, D + 1), are what its rows combine."""
    return Merged(merged.shared @ heads.flatten(0, 1), merged.readers, merged.kept, merged.total)


def _at_any_angle(heads: Sequence[Tensor], weights: Sequence[Tensor], gram: Tensor, rotating: int) -> Merged:
    """The merge whose readers commute with every rotation, half-split: rotating dims and still ones apart."""
    import torch

    powers = [weight.diagonal()[:rotating].unflatten(0, (2, -1)).sum(0) for weight in weights]
    parts = [merge_rotary([head[:rotating] for head in heads], powers, gram)]
    if rotating < len(heads[0]):
        blocks = [weight[rotating:, rotating:] for weight in weights]
        parts.append(merge_linear([head[rotating:] for head in heads], blocks, gram, len(heads[0]) - rotating))
    return Merged(
        torch.cat([part.shared for part in parts]),
        [torch.block_diag(*(part.readers[head] for part in parts)) for head in range(len(heads))],
        sum(part.kept for part in parts),
        sum(part.total for part in parts),
    )


def _sum(tensors: Iterable[Tensor]) -> Tensor:
    import torch

    return torch.stack(list(tensors)).sum(0)
