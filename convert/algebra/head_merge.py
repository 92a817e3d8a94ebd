"""The merge of K/V heads, of one layer or of several layers that are to share keys and values, group by group."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
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

PREDICTION_PULL = 1.0  # times the mean diagonal of the moments; docs/measurements.md compares other values


@dataclass(frozen=True)
class FreeTransformations:
    """The invertible maps of keys and of values that a layer's function does not depend on.

    Where nothing but linear maps lies between k_proj and the scores, a head's keys may be mapped by any matrix that
    commutes with its rotary rotations if its queries are mapped by the inverse. A head's values may be mapped by any
    invertible matrix if its columns of o_proj are mapped by the inverse. A merge chooses the best maps in closed form.
    Where `keys` or `values` is False, a norm, a clip or another non-linear step is in between, and that side takes the
    mean of the heads instead. `rotary` says how keys rotate.
    """

    rotary: Rotary
    keys: bool = True
    values: bool = True


@dataclass(frozen=True)
class LayerInput:
    """A layer's projections, and second moments of the input x of its attention, with a 1 appended.

    gram: E[x xᵀ]. cross: E[x x'ᵀ], where the layer is to read the keys and values of an earlier one, whose attention
    has the input x'; None for the layer that computes them.
    """

    projections: Projections
    gram: Tensor  # (hidden_size + 1, hidden_size + 1), float64
    cross: Tensor | None = None  # (hidden_size + 1, hidden_size + 1), float64


@dataclass(frozen=True)
class LayerMerge:
    """Layers with one K/V head per group, and the fraction of its energy that each group keeps.

    keys_retained and values_retained: one fraction per group, 1 where the merge loses nothing (`Merged.retained`).
    """

    projections: tuple[Projections, ...]
    grouping: HeadGrouping
    keys_retained: tuple[float, ...]
    values_retained: tuple[float, ...]


def merge_layers(heads: Heads, grouping: HeadGrouping) -> LayerMerge:
    """Merge the K/V heads of each group into one key and one value, which the group's query heads read.

    Each layer of the result has one K/V head per group. The query heads that read it stand next to one another, in the
    order of `grouping`. Keys and values are the same for all layers, and are computed from the attention input of the
    first.
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
    """The K/V heads of one layer, or of several that are to share keys and values, numbered layer after layer.

    queries[h] and outputs[h] list the query heads that read K/V head h: their rows of q_proj, (head_dim,
    hidden_size + 1), and their columns of o_proj, (hidden_size, head_dim). Keys and values of the layers after the
    first are linear predictions from the attention input of the first (`predicted_input`, with `prediction_pull`). The
    covariances of all keys and of all values, which every candidate group needs, are computed once. Without
    `at_distances`, keys that rotate are merged as if all angles between query and key were equally likely.

    A query head whose output is zero, because its values or its columns of o_proj are, counts for nothing: it takes no
    part of a shared key or value from the heads that are live. In a group of such heads alone all count alike, so that
    training can still wake them.
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
        self._key_weights_of_all: list[Tensor] = []  # silent query heads counted too
        keys, values = [], []
        self._key_moments: list[_HeadMoments] = []
        self._value_moments: list[_HeadMoments] = []
        for layer in layers:
            source = layer.projections
            queries = source.q.unflatten(0, (shape.num_key_value_heads, size, shape.head_dim))
            outputs = source.o.unflatten(1, (shape.num_key_value_heads, size, shape.head_dim))
            self.queries += [list(group) for group in queries]
            self.outputs += [list(group) for group in outputs.permute(1, 2, 0, 3)]
            values.append(source.v.unflatten(0, (-1, shape.head_dim)))
            for group, value, read in zip(queries, values[-1], self.outputs[-len(queries) :], strict=True):
                weights = [rotary.half_split(query) @ layer.gram @ rotary.half_split(query).T for query in group]
                spread = value @ layer.gram @ value.T
                heard = [
                    weight
                    for weight, output in zip(weights, read, strict=True)
                    if not free.values or (output @ spread).any()  # what is not linear may mix heads
                ]
                self._key_weights_of_all.append(_sum(weights))
                self._key_weights.append(_sum(heard or [torch.zeros_like(spread)]))
            heads = source.k.unflatten(0, (-1, shape.head_dim)).transpose(0, 1)
            keys.append(rotary.half_split(heads).transpose(0, 1))  # (heads, head_dim, hidden_size + 1)
            if len(layers) > 1:
                self._key_moments += _moments(keys[-1], layer, gram)
                self._value_moments += _moments(values[-1], layer, gram)
            if layer.cross is not None:
                predicted = predicted_input(layer.cross, gram, prediction_pull)
                keys[-1], values[-1] = keys[-1] @ predicted, values[-1] @ predicted
        self._keys, self._values, self._gram = torch.cat(keys), torch.cat(values), gram
        self._key_covariances = _covariances(self._keys, gram)
        self._value_covariances = _covariances(self._values, gram)
        self._value_weights = [_sum(output.T @ output for output in group) for group in self.outputs]

    def layer(self, head: int) -> int:
        """Return the layer of a head: 0 for the first of these layers."""
        return head * self.num_layers // len(self)

    def in_order(self, num_groups: int) -> HeadGrouping:
        """Return groups of neighbouring heads of a layer, each with the same heads of the other layers."""
        size = len(self) // self.num_layers
        groups = HeadGrouping.contiguous(size, num_groups).groups
        return HeadGrouping(
            tuple(tuple(layer * size + head for layer in range(self.num_layers) for head in group) for group in groups)
        )

    def __len__(self) -> int:
        """Return the number of K/V heads of all layers."""
        return len(self._keys)

    def merged_values(self, group: tuple[int, ...]) -> Merged:
        """Merge the values of a group's heads: in closed form (`merge_linear`), or by their mean."""
        import torch

        weights = [self._value_weights[head] for head in group]
        covariance, rows = _within(self._value_covariances, group)
        if self.free.values:
            alike = [torch.eye(len(weight), dtype=weight.dtype) for weight in weights]
            merged = _counted(weights, alike, lambda chosen: merge_linear(rows, chosen, covariance, len(rows[0])))
        else:
            merged = merge_mean(rows, weights, covariance)
        merged = _of_rows(merged, self._values[list(group)])
        if self.num_layers > 1:
            merged = _measured(merged, [self._value_moments[head] for head in group], weights, self._gram)
        return merged

    def merged_keys(self, group: tuple[int, ...]) -> Merged:
        """Merge the keys of a group's heads, whose dims have the class's own order of rotary pairs in the result.

        Keys that rotate are merged by `merge_at_distances`, others by `merge_linear`, and by their mean where a norm or
        a clip follows the projection.
        """
        rotary = self.free.rotary
        weights = [self._key_weights[head] for head in group]
        covariance, rows = _within(self._key_covariances, group)
        if self.free.keys:
            of_all = [self._key_weights_of_all[head] for head in group]
            merged = _counted(weights, of_all, lambda chosen: self._merged_free_keys(rows, chosen, covariance))
        else:
            merged = merge_mean(rows, weights, covariance)
        merged = _of_rows(merged, self._keys[list(group)])
        if self.num_layers > 1:
            merged = _measured(
                merged, [self._key_moments[head] for head in group], weights, self._gram, self._rotation_of_keys
            )
        readers = [rotary.original(rotary.original(reader).T).T for reader in merged.readers]
        return Merged(rotary.original(merged.shared), readers, merged.kept, merged.total)

    def _merged_free_keys(self, rows: Sequence[Tensor], weights: Sequence[Tensor], covariance: Tensor) -> Merged:
        if self._rotation_of_keys is None:
            return merge_linear(rows, weights, covariance, len(rows[0]))
        merged = _at_any_angle(rows, weights, covariance, self.free.rotary.dims)
        if self._at_distances:
            rotations = ExpectedRotations.same(self._rotation_of_keys)
            merged = merge_at_distances(merged, rows, weights, covariance, rotations)
        return merged

    def pair_losses(self) -> Tensor:
        """Return what merging two heads loses, (heads, heads): the fraction of keys' energy plus that of values'."""
        keys = pair_losses(self._key_covariances, self._key_weights, self._rotation_of_keys)
        return keys + pair_losses(self._value_covariances, self._value_weights)


def _counted(
    weights: Sequence[Tensor], otherwise: Sequence[Tensor], merge: Callable[[Sequence[Tensor]], Merged]
) -> Merged:
    """What `merge` makes of heads that count as `weights` say, or, where all of these are zero, as `otherwise` says.

    In the second case nothing of the heads is heard, so that nothing can be lost.
    """
    if any(weight.any() for weight in weights):
        return merge(weights)
    return replace(merge(otherwise), kept=0.0, total=0.0)


def predicted_input(cross: Tensor, gram: Tensor, pull: float) -> Tensor:
    """Return the A that minimises E‖x − A x'‖² + λ ‖A − D‖², from cross = E[x x'ᵀ] and gram = E[x' x'ᵀ].

    All three are (hidden_size + 1) squared, float64, for inputs with a 1 appended. D is diagonal: it predicts each dim
    of x by the best multiple of the same dim of x', which has most of the residual stream in common with x. λ is `pull`
    times the mean diagonal of gram. Least squares without that term (λ = 0)
    shrinks whatever it cannot predict of a single token; attention averages over tokens, and the average would be
    too small.
    """
    import torch

    power = gram.diagonal().clamp(min=1e-300)
    strength = pull * power.mean()
    return solve_ridge(cross + strength * torch.diag(cross.diagonal() / power), gram, strength)


class _HeadMoments(NamedTuple):
    """Of a key or value z as the head's layer computes it, before any prediction from the first layer's input x'.

    covariance: E[z zᵀ], (head_dim, head_dim). cross: E[z x'ᵀ], (head_dim, hidden_size + 1).
    """

    covariance: Tensor
    cross: Tensor


def _moments(heads: Tensor, layer: LayerInput, gram: Tensor) -> list[_HeadMoments]:
    """The moments of a layer's keys or values, (heads, head_dim, hidden_size + 1)."""
    cross = heads @ (gram if layer.cross is None else layer.cross)
    return [_HeadMoments(*parts) for parts in zip(heads @ layer.gram @ heads.mT, cross, strict=True)]


def _measured(
    merged: Merged,
    moments: Sequence[_HeadMoments],
    weights: Sequence[Tensor],
    gram: Tensor,
    rotation: ExpectedRotation | None = None,
) -> Merged:
    """The merge with its energies measured against what the heads compute in their layers, not against predictions."""

    def mean(matrix: Tensor) -> Tensor:
        return matrix if rotation is None else rotation.mean(matrix)

    power = mean(merged.shared @ gram @ merged.shared.T)
    total = error = 0.0
    for reader, head, weight in zip(merged.readers, moments, weights, strict=True):
        covariance, read = mean(head.covariance), reader @ mean(merged.shared @ head.cross.T)
        total += float((weight * covariance).sum())
        error += float((weight * (covariance - 2 * read + reader @ power @ reader.T)).sum())
    return replace(merged, kept=max(total - error, 0.0), total=total)


def _covariances(heads: Tensor, gram: Tensor) -> Tensor:
    """E[z_i z_jᵀ] of the keys or values of every two heads, (heads, heads, head_dim, head_dim)."""
    num_heads, head_dim, _ = heads.shape
    rows = heads.flatten(0, 1)
    blocks: Tensor = (rows @ gram @ rows.T).view(num_heads, head_dim, num_heads, head_dim).transpose(1, 2)
    return blocks


def _within(covariances: Tensor, group: tuple[int, ...]) -> tuple[Tensor, list[Tensor]]:
    """The joint covariance of a group's m heads, (m · head_dim) squared, and each head's rows of the identity."""
    import torch

    chosen = covariances[list(group)][:, list(group)].transpose(1, 2).flatten(2, 3).flatten(0, 1)
    return chosen, list(torch.eye(len(chosen), dtype=chosen.dtype).chunk(len(group)))


def _of_rows(merged: Merged, heads: Tensor) -> Merged:
    """The merge with its shared head as a weight: a combination of `heads`, (m, head_dim, D + 1), as its rows say."""
    return Merged(merged.shared @ heads.flatten(0, 1), merged.readers, merged.kept, merged.total)


def _at_any_angle(heads: Sequence[Tensor], weights: Sequence[Tensor], gram: Tensor, rotating: int) -> Merged:
    """The merge whose readers commute with every rotation: the rotating dims, the first ones, apart from the others."""
    import torch

    powers = [weight.diagonal()[:rotating].unflatten(0, (2, -1)).sum(0) for weight in weights]
    parts = [merge_rotary([head[:rotating] for head in heads], powers, gram)]
    # at a random angle each dim of a pair meets half of the power of the queries' pair
    parts[0] = replace(parts[0], kept=parts[0].kept / 2, total=parts[0].total / 2)
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
