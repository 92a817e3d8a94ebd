"""The merge of K/V heads, of one layer or of several layers that are to share keys and values, group by group."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, NamedTuple

from .attention_shape import AttentionShape
from .heads import HeadGrouping
from .linear import WhiteInputs, solve_ridge
from .merge import (
    ExpectedRotations,
    Merged,
    RopePair,
    covariances_of,
    joint,
    merge_at_distances,
    merge_linear,
    merge_mean,
    merge_rotary,
    pair_losses,
    shared_pairs,
)
from .projections import Projections
from .rotations import Rotary, expected_rotation, expected_rotation_between

if TYPE_CHECKING:
    from torch import Tensor

__all__ = [
    "PREDICTION_PULL",
    "FreeTransformations",
    "Heads",
    "LayerInput",
    "LayerMerge",
    "SharedHead",
    "merge_layers",
    "predicted_input",
]

PREDICTION_PULL = 1.0  # times the mean diagonal of the moments; docs/measurement-log.md compares other values


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
class SharedHead:
    """A key and a value that the heads of a group are to share, in another size than theirs.

    Its keys rotate by `rotary`, which rotates where those of the heads do, and has at most as many pairs for each of
    their frequencies as a group has heads. Queries are multiplied by `query_scale`, since the class of the result may
    divide scores by another number.
    """

    head_dim: int
    rotary: Rotary
    query_scale: float = 1.0


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

    groups = [(list(group), heads.merged_keys(group), heads.merged_values(group)) for group in grouping.groups]
    k, v = torch.cat([keys.shared for _, keys, _ in groups]), torch.cat([values.shared for _, _, values in groups])
    merged = []
    for layer in range(heads.num_layers):
        q, o = [], []
        for group, keys, values in groups:
            own = [place for place, head in enumerate(group) if heads.layer(head) == layer]
            chosen = [group[place] for place in own]
            readers = heads.query_scale * keys.readers[own].mT
            q.append(readers[:, None] @ heads.queries[chosen])  # (m, size, R, E + 1), R dims of the shared head
            o.append(heads.outputs[chosen] @ values.readers[own][:, None])  # (m, size, E, R)
        outputs = torch.cat(o).flatten(0, 1).transpose(0, 1).flatten(1)
        merged.append(Projections(torch.cat(q).flatten(0, 2), k, v, outputs))
    return LayerMerge(
        tuple(merged),
        grouping,
        tuple(keys.retained for _, keys, _ in groups),
        tuple(values.retained for _, _, values in groups),
    )


class Heads:
    """The K/V heads of one layer, or of several that are to share keys and values, numbered layer after layer.

    queries[h] and outputs[h] are of the query heads that read K/V head h: their rows of q_proj, (size, head_dim,
    hidden_size + 1), and their columns of o_proj, (size, hidden_size, head_dim). Keys and values of the layers after
    the first are linear predictions from the attention input of the first (`predicted_input`, with `prediction_pull`).
    The covariances of all keys and of all values, which every candidate group needs, are computed once. Without
    `at_distances`, keys that rotate are merged as if all angles between query and key were equally likely. A group
    shares a head like its own or, where both keys and values are free, like `shared`.

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
        shared: SharedHead | None = None,
        prediction_pull: float = PREDICTION_PULL,
        at_distances: bool = True,
    ) -> None:

        rotary, white = free.rotary, [WhiteInputs.of(layer.gram) for layer in layers]
        parts = [
            _LayerHeads.of(layer.projections, inputs, shape, free) for layer, inputs in zip(layers, white, strict=True)
        ]
        self.num_layers = len(layers)
        self.queries = _together([part.queries for part in parts])
        self.outputs = _together([part.outputs for part in parts])
        self.free = free
        self.query_scale = 1.0 if shared is None else shared.query_scale
        self._shared = shared or SharedHead(shape.head_dim, rotary)
        self._resized = shared is not None
        self._at_distances = at_distances
        self._rotations = (
            _expected_rotations(self._shared, rotary, shape.head_dim) if rotary.dims and free.keys else None
        )
        self._key_weights = _together([part.key_weights for part in parts])
        self._key_weights_of_all = _together([part.key_weights_of_all for part in parts])
        self._value_weights = _together([part.value_weights for part in parts])
        predictions = [_Prediction.of(layer, layers[0], prediction_pull) for layer in layers]
        sides = [
            ([part.keys for part in parts], [part.white_keys for part in parts]),
            ([part.values for part in parts], [part.white_values for part in parts]),
        ]
        del parts  # of several layers gigabytes, which each side lets go of when it is done
        self._keys = _Side.of(*sides.pop(0), predictions, white[0])
        self._values = _Side.of(*sides.pop(0), predictions, white[0])

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
        return len(self.queries)

    def merged_values(self, group: tuple[int, ...]) -> Merged:
        """Merge the values of a group's heads: in closed form (`merge_linear`), or by their mean."""
        import torch

        chosen = list(group)
        weights, covariances = self._value_weights[chosen], self._values.covariances[chosen][:, chosen]
        if self.free.values:
            alike = torch.eye(weights.shape[-1], dtype=weights.dtype).expand_as(weights)
            rank = self._shared.head_dim
            merged = _counted(weights, alike, lambda counted: merge_linear(covariances, counted, rank))
        else:
            merged = merge_mean(covariances, weights)
        return self._values.measured(merged, chosen, weights)

    def merged_keys(self, group: tuple[int, ...]) -> Merged:
        """Merge the keys of a group's heads, whose dims have the class's own order of rotary pairs in the result.

        Keys that rotate are merged by `merge_at_distances`, others by `merge_linear`, and by their mean where a norm or
        a clip follows the projection.
        """
        chosen, rotary = list(group), self.free.rotary
        weights, covariances = self._key_weights[chosen], self._keys.covariances[chosen][:, chosen]
        if self.free.keys:
            of_all = self._key_weights_of_all[chosen]
            merged = _counted(weights, of_all, lambda counted: self._merged_free_keys(covariances, counted))
        else:
            merged = merge_mean(covariances, weights)
        merged = self._keys.measured(merged, chosen, weights, self._rotations)
        readers = merged.readers.permute(1, 2, 0)  # (d, r, m)
        original = self._shared.rotary.original
        readers = original(rotary.original(readers).transpose(0, 1)).permute(2, 1, 0)
        return replace(merged, shared=original(merged.shared), readers=readers)

    def _merged_free_keys(self, covariances: Tensor, weights: Tensor) -> Merged:
        if self._rotations is None:
            return merge_linear(covariances, weights, self._shared.head_dim)
        if self._resized:
            start = _start(covariances, weights, self.free.rotary, self._shared)
            return merge_at_distances(start, covariances, weights, self._rotations)
        merged = _at_any_angle(covariances, weights, self.free.rotary.dims)
        if self._at_distances:
            merged = merge_at_distances(merged, covariances, weights, self._rotations)
        return merged

    def pair_losses(self) -> Tensor:
        """Return what merging two heads loses, (heads, heads): the fraction of keys' energy plus that of values'."""
        keys = pair_losses(
            self._keys.covariances, self._key_weights, None if self._rotations is None else self._rotations.heads
        )
        return keys + pair_losses(self._values.covariances, self._value_weights)


class _Prediction(NamedTuple):
    """How a layer's input x is predicted from that of the first layer, x': A x', as `predicted_input` says."""

    matrix: Tensor  # A, (E + 1, E + 1)
    cross: Tensor  # E[x x'ᵀ]

    @classmethod
    def of(cls, layer: LayerInput, first: LayerInput, pull: float) -> _Prediction | None:
        """None for the first layer itself."""
        return None if layer.cross is None else cls(predicted_input(layer.cross, first.gram, pull), layer.cross)


class _LayerHeads(NamedTuple):
    """The heads of one layer, and how much errors of their keys and values count. Keys are half-split.

    What a layer's keys and values are as rows over white inputs follows from `white_keys` and `white_values`.
    """

    queries: Tensor  # (K, size, D, E + 1)
    outputs: Tensor  # (K, size, E, D)
    keys: Tensor  # (K, D, E + 1)
    values: Tensor  # (K, D, E + 1)
    white_keys: Tensor  # (K, D, E + 1)
    white_values: Tensor  # (K, D, E + 1)
    key_weights: Tensor  # (K, D, D)
    key_weights_of_all: Tensor  # the same with silent query heads counted
    value_weights: Tensor  # (K, D, D)

    @classmethod
    def of(
        cls, source: Projections, white: WhiteInputs, shape: AttentionShape, free: FreeTransformations
    ) -> _LayerHeads:
        import torch

        rotary = free.rotary
        heads = (shape.num_key_value_heads, shape.num_attention_heads // shape.num_key_value_heads, shape.head_dim)
        outputs = source.o.unflatten(1, heads).permute(1, 2, 0, 3)
        keys, values = (rows.unflatten(0, (-1, shape.head_dim)) for rows in (source.k, source.v))
        keys = rotary.half_split(keys.transpose(0, 1)).transpose(0, 1)
        white_queries, white_keys, white_values = (
            white.rows(source.q).unflatten(0, heads),
            white.rows(keys),
            white.rows(values),
        )
        order = rotary.half_split(torch.arange(shape.head_dim))
        weights = (white_queries @ white_queries.mT)[..., order[:, None], order]  # (K, size, D, D)
        output_weights = outputs.mT @ outputs
        heard = torch.ones(heads[:2], dtype=torch.bool)
        if free.values:  # what is not linear may mix heads
            spread = white_values @ white_values.mT
            heard = (output_weights @ spread[:, None]).flatten(2).any(2)
        return cls(
            source.q.unflatten(0, heads),
            outputs,
            keys,
            values,
            white_keys,
            white_values,
            (weights * heard[..., None, None]).sum(1),
            weights.sum(1),
            output_weights.sum(1),
        )


class _Side(NamedTuple):
    """The keys or the values of all heads, N, as functions of the first layer's input x': predictions for other layers.

    covariances: of these, of every two heads. own: E[z zᵀ] of each head's key or value z as its layer computes it.
    cross: E[z x'ᵀ] for the heads of layers after the first.
    """

    rows: Tensor  # (N, D, E + 1)
    covariances: Tensor  # (N, N, D, D)
    own: Tensor  # (N, D, D)
    cross: Tensor  # (N - K, D, E + 1)

    @classmethod
    def of(
        cls,
        heads: Sequence[Tensor],
        white: Sequence[Tensor],
        predictions: Sequence[_Prediction | None],
        first: WhiteInputs,
    ) -> _Side:
        """Of each layer the heads, (K, D, E + 1), and the same over white inputs of their own layer."""
        import torch

        rows = [part if one is None else part @ one.matrix for part, one in zip(heads, predictions, strict=True)]
        over_first = [
            part if one is None else first.rows(row) for part, row, one in zip(white, rows, predictions, strict=True)
        ]
        covariances, own = covariances_of(_together(over_first)), torch.cat([part @ part.mT for part in white])
        del over_first
        cross = [part @ one.cross for part, one in zip(heads, predictions, strict=True) if one is not None]
        return cls(
            _together(rows),
            covariances,
            own,
            torch.cat(cross) if cross else rows[0][:0],
        )

    def measured(
        self, merged: Merged, group: Sequence[int], weights: Tensor, rotations: ExpectedRotations | None = None
    ) -> Merged:
        """The merge of a group with its shared rows as weights over x'.

        Its energies are measured against what the heads compute in their layers, not against predictions.
        """
        import torch

        result = merged.over(self.rows[group])
        if not len(self.cross):
            return result

        together = joint(self.covariances[group][:, group])
        of_shared = merged.shared @ together
        power = of_shared @ merged.shared.T
        num_first = len(self.rows) - len(self.cross)
        with_heads = of_shared.unflatten(1, (len(group), -1)).transpose(0, 1)  # E[shared zᵀ], (m, r, D)
        read = torch.stack(
            [
                with_heads[place] if head < num_first else result.shared @ self.cross[head - num_first].T
                for place, head in enumerate(group)
            ]
        )
        covariance, readers = self.own[group], merged.readers
        if rotations is not None:
            power, read = rotations.shared.mean(power), rotations.cross.mean(read)
            covariance = rotations.heads.mean(covariance)
        read = readers @ read
        total = float((weights * covariance).sum())
        error = float((weights * (covariance - 2 * read + readers @ power @ readers.mT)).sum())
        return replace(result, kept=max(total - error, 0.0), total=total)


def _together(layers: Sequence[Tensor]) -> Tensor:
    """What layers have of each head, one layer after the other; of one layer no copy is made."""
    import torch

    return layers[0] if len(layers) == 1 else torch.cat(list(layers))


def _counted(weights: Tensor, otherwise: Tensor, merge: Callable[[Tensor], Merged]) -> Merged:
    """What `merge` makes of heads that count as `weights` say, or, where all of these are zero, as `otherwise` says.

    In the second case nothing of the heads is heard, so that nothing can be lost.
    """
    if weights.any():
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


def _at_any_angle(covariances: Tensor, weights: Tensor, rotating: int) -> Merged:
    """The merge whose readers commute with every rotation: the rotating dims, the first ones, apart from the others."""
    import torch

    num_heads, size = weights.shape[:2]
    powers = weights.diagonal(dim1=1, dim2=2)[:, :rotating].unflatten(1, (2, -1)).sum(1)  # (m, F)
    parts = [merge_rotary(covariances[..., :rotating, :rotating], powers)]
    # at a random angle each dim of a pair meets half of the power of the queries' pair
    parts[0] = replace(parts[0], kept=parts[0].kept / 2, total=parts[0].total / 2)
    if rotating < size:
        rest = slice(rotating, size)
        parts.append(merge_linear(covariances[..., rest, rest], weights[..., rest, rest], size - rotating))
    shared, readers = covariances.new_zeros(size, num_heads, size), torch.zeros_like(weights)
    for part, dims in zip(parts, (slice(0, rotating), slice(rotating, size)), strict=False):
        shared[dims, :, dims] = part.shared.unflatten(1, (num_heads, -1))
        readers[:, dims, dims] = part.readers
    return Merged(shared.flatten(1), readers, sum(part.kept for part in parts), sum(part.total for part in parts))


def _expected_rotations(shared: SharedHead, rotary: Rotary, head_dim: int) -> ExpectedRotations:
    heads = expected_rotation(rotary, head_dim)
    if (shared.head_dim, shared.rotary) == (head_dim, rotary):
        return ExpectedRotations.same(heads)
    return ExpectedRotations(
        expected_rotation(shared.rotary, shared.head_dim),
        expected_rotation_between(shared.rotary, shared.head_dim, rotary, head_dim),
        heads,
    )


def _start(covariances: Tensor, weights: Tensor, rotary: Rotary, shared: SharedHead) -> Merged:
    """A key of another size as if every angle were as likely, which no head reads yet; the rotating dims come first.

    Each of its pairs is the best key that is left of the heads' frequency that is nearest to its own. Keys without
    energy become their mean, which each head reads.
    """
    import torch

    num_heads, (size, rotating) = len(weights), (weights.shape[1], rotary.dims)
    pairs = _nearest_pairs(shared.rotary.frequencies, rotary.frequencies, num_heads)
    own = torch.stack([covariances[head, head] for head in range(num_heads)])
    if not (weights * own).any():
        firsts = [(place, pair) for place, (pair, rank) in enumerate(pairs) if rank == 0]
        reader = covariances.new_zeros(size, shared.head_dim)
        for place, pair in firsts:
            reader[pair, place] = reader[pair + rotating // 2, place + len(pairs)] = 1
        rest = min(size - rotating, shared.head_dim - shared.rotary.dims)
        reader[rotating : rotating + rest, shared.rotary.dims : shared.rotary.dims + rest] = torch.eye(rest)
        return Merged(reader.T.repeat(1, num_heads) / num_heads, reader.expand(num_heads, -1, -1), 0.0, 0.0)
    powers = weights.diagonal(dim1=1, dim2=2)[:, :rotating].unflatten(1, (2, -1)).sum(1).T  # (F, m)
    rows = covariances.new_zeros(shared.head_dim, num_heads, size)
    turning, still = slice(0, shared.rotary.dims), slice(shared.rotary.dims, shared.head_dim)
    start = shared_pairs(covariances[..., :rotating, :rotating], powers, pairs)
    rows[turning, :, :rotating] = start.shared.unflatten(1, (num_heads, -1))
    if rotating < size:
        rest_of = covariances[..., rotating:, rotating:], weights[..., rotating:, rotating:]
        rows[still, :, rotating:] = merge_linear(*rest_of, still.stop - still.start).shared.unflatten(
            1, (num_heads, -1)
        )
    return Merged(rows.flatten(1), covariances.new_zeros(num_heads, size, shared.head_dim), 0.0, 0.0)


def _nearest_pairs(wanted: Sequence[float], frequencies: Sequence[float], most: int) -> list[RopePair]:
    """For each wanted frequency the nearest of `frequencies`, on a scale of octaves, of each at most `most` times."""
    taken, pairs = [0] * len(frequencies), list[RopePair]()
    for frequency in wanted:
        free = [place for place, number in enumerate(taken) if number < most]
        ratios = {place: frequencies[place] / frequency for place in free}
        nearest = min(free, key=lambda place: max(ratios[place], 1 / ratios[place]))
        pairs.append((nearest, taken[nearest]))
        taken[nearest] += 1
    return pairs
