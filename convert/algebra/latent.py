"""Multi-head attention as multi-head latent attention (DeepSeek-V2, arXiv 2405.04434), with the least error.

docs/merging.md derives the formulas. Everything here is float64. Shapes: D hidden_size, d head_dim, H query heads, G
K/V heads, F rotary pairs of a head, S = qk_rope_head_dim / 2 pairs of the shared rotary key, R kv_lora_rank. `gram` is
E[x xᵀ] of the attention's input x with a 1 appended, (D + 1, D + 1); weights have their bias as last column.

A query head whose output is zero, because its values or its columns of o_proj are, counts for nothing. Where all heads
of a layer are so, they count alike, so that training can still wake them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import groupby
from typing import TYPE_CHECKING

from .attention_shape import AttentionShape
from .linear import (
    TOLERANCE,
    WhiteInputs,
    pseudo_inverse,
    root_and_inverse,
    solve_ridge,
    symmetric_product,
    top_eigenvectors,
)
from .merge import (
    ExpectedRotations,
    RopePair,
    covariances_of,
    joint,
    merge_at_distances,
    own_covariances,
    rotary_components,
    shared_pairs,
)
from .projections import Projections
from .rotations import Rotary, expected_rotation, expected_rotation_between, mean_phases, mean_rotation

if TYPE_CHECKING:
    from torch import Tensor

__all__ = [
    "LatentAttention",
    "LatentObjective",
    "constant_norm",
    "latent_attention",
    "latent_attentions",
    "normalised",
    "rope_pair_gains",
    "without_constant",
]

_NOT_KEPT = 0.01  # of the energy that is left to the latent counts as an error, since it is not kept exactly there
_NORM_STEPS, _NORM_ROUNDS = 5, 20  # of L-BFGS
_NORM_RIDGE = 1e-9


@dataclass(frozen=True)
class LatentAttention:
    """The weights of one layer's attention over a latent.

    `latent` and `rope_key` map x to what is cached; `key_up` and `value_up` make the K/V heads' keys and values of the
    latent. The first d rows of a head in `q` are scored against its keys, the other 2 S against the rotary key, whose
    pairs are dims (i, i + S). `keys_retained` and `values_retained` are the fractions kept of the energy of scores, at
    the distances that occur, and of that of outputs.
    """

    q: Tensor  # (H, d + 2 S, D + 1)
    rope_key: Tensor  # (2 S, D + 1)
    latent: Tensor  # (R, D + 1)
    key_up: Tensor  # (G, d, R)
    value_up: Tensor  # (G, d, R)
    o: Tensor  # (D, H · d)
    keys_retained: float
    values_retained: float


@dataclass(frozen=True)
class _Rows:
    """Rows over x, and the same over white inputs (`WhiteInputs`), (…, D + 1) each."""

    over_x: Tensor
    white: Tensor

    @classmethod
    def of(cls, rows: Tensor, inputs: WhiteInputs) -> _Rows:
        return cls(rows, inputs.rows(rows))


@dataclass(frozen=True)
class _Weights:
    """How much errors of keys and of values count.

    keys: Σ over the query heads of a K/V head of E[q qᵀ] times the power of that query head's output over d, so that
    keys count in the same unit as values. values: Σ W_oᵀ W_o.
    """

    keys: Tensor  # (G, d, d)
    values: Tensor  # (G, d, d)

    def powers(self, num_pairs: int) -> Tensor:
        """The mean weight of each rotary pair of keys, which are half-split, (F, G)."""
        diagonal = self.keys.diagonal(dim1=1, dim2=2)[:, : 2 * num_pairs]
        powers: Tensor = diagonal.unflatten(1, (2, -1)).mean(1).T
        return powers


@dataclass(frozen=True)
class _Heads:
    """The heads of a layer, queries and keys half-split, and what errors of their keys and values count.

    heard: as they add to the layer's output. counted: the same or, where the output of every head is zero, as if all
    were heard alike.
    """

    inputs: WhiteInputs
    queries: Tensor  # (H, d, D + 1)
    keys: _Rows  # (G, d, D + 1)
    values: _Rows  # (G, d, D + 1)
    heard: _Weights
    counted: _Weights


@dataclass(frozen=True)
class _RopeKey:
    """The shared rotary key, heads' maps of it, and the keys that it leaves to the latent, less their means.

    error: the weighed energy that neither it nor any key without position can make up for.
    """

    key: Tensor  # (2 S, D + 1)
    readers: Tensor  # (G, d, 2 S)
    left: _Rows  # (G, d, D + 1)
    error: Tensor


@dataclass(frozen=True)
class _Weighed:
    """Heads' keys or values times the roots of how much errors of their dims count, centred or not."""

    rows: _Rows  # (n, d, D + 1)
    roots: Tensor  # (n, d, d)
    centred: bool

    @property
    def num_rows(self) -> int:
        """n · d."""
        return self.roots.shape[0] * self.roots.shape[1]

    @property
    def num_inputs(self) -> int:
        """How many white inputs the rows vary with: D if they are centred, or else D + 1."""
        return self.rows.white.shape[-1] - self.centred

    @property
    def white(self) -> Tensor:
        """Rows over white inputs, (num_rows, num_inputs)."""
        white: Tensor = (self.roots @ _varying(self.rows.white, self.centred)).flatten(0, 1)
        return white

    @cached_property
    def inner(self) -> Tensor:
        """The product of the transpose of `white` and itself."""
        columns = self.white.T
        return symmetric_product(columns, columns)

    def combined(self, rows: Tensor) -> Tensor:
        """Return combinations, (r, n · d), of the weighed rows, over x: (r, D + 1)."""
        unweighed = rows.unflatten(1, self.roots.shape[:2]).transpose(0, 1) @ self.roots  # (n, r, d)
        combined: Tensor = unweighed.transpose(0, 1).flatten(1) @ self.rows.over_x.flatten(0, 1)
        return combined


def rope_pair_gains(projections: Projections, shape: AttentionShape, rotary: Rotary, gram: Tensor) -> Tensor:
    """Return the fraction of its keys' energy that the layer would lose without each possible `RopePair`: (F, G).

    Left to the latent, which has no position, a pair of frequency ω keeps |E e^{iωn}|² of its energy over the distances
    n that occur: slow frequencies lose little. The mean key of all tokens does not count.
    """
    import torch

    heads = _heads(projections, shape, rotary, gram)
    powers = heads.heard.powers(len(rotary.frequencies))
    if not powers.any():
        return torch.zeros_like(powers)
    energies, _ = rotary_components(covariances_of(heads.keys.white[:, : rotary.dims, :-1]), powers)
    lost = 1 - mean_phases(rotary).abs().square()
    gains: Tensor = energies * lost[:, None] / energies.sum().clamp(min=1e-300)
    return gains


@dataclass(frozen=True)
class LatentObjective:
    """Two choices of `latent_attention` that second moments do not decide, so that callers try several on a text.

    `mean_in_latent`: whether the rotary key is fitted to what is left of keys after their mean rotation, which needs no
    position and can be held by the latent; otherwise it is fitted to whole keys. `key_weight`: how much errors of keys
    count beside those of values when the latent is chosen.
    """

    mean_in_latent: bool = True
    key_weight: float = 1.0


def latent_attention(
    projections: Projections,
    shape: AttentionShape,
    rotary: Rotary,
    gram: Tensor,
    *,
    rope_pairs: Sequence[RopePair],
    kv_lora_rank: int,
    constant: bool,
    objective: LatentObjective = LatentObjective(),
) -> LatentAttention:
    """Return the layer with a latent of `kv_lora_rank` and a shared rotary key with the frequencies of `rope_pairs`.

    1. The rotary key and the maps through which heads read it are those with the least error at likely distances
       (`merge_at_distances`).
    2. What the rotary key leaves of a head's key is replaced by its mean over the distances, which needs no position.
    3. The latent holds the top directions of the joint covariance of these keys and of all values, each weighted by the
       queries or outputs that read it (`objective` weights keys further). Its channels have an rms of 1.

    With `constant`, the last channel of the latent is the constant 1, which carries means and biases; the others have a
    standard deviation of 1. Without it, projections are those that `without_constant` gives. Queries are scaled by
    √((d + 2 S) / d), since DeepSeek's class divides scores by the root of more dims.
    """
    candidates = latent_attentions(
        projections,
        shape,
        rotary,
        gram,
        rope_pairs=rope_pairs,
        kv_lora_rank=kv_lora_rank,
        constant=constant,
        objectives=(objective,),
    )
    return next(candidates)


def latent_attentions(
    projections: Projections,
    shape: AttentionShape,
    rotary: Rotary,
    gram: Tensor,
    *,
    rope_pairs: Sequence[RopePair],
    kv_lora_rank: int,
    constant: bool,
    objectives: Sequence[LatentObjective],
) -> Iterator[LatentAttention]:
    """Yield what `latent_attention` returns for each of the objectives, which share all that is the same for them.

    Each is made when it is asked for: of a large model it takes gigabytes.
    """
    import torch

    heads = _heads(projections, shape, rotary, gram)
    covariances = covariances_of(heads.keys.white)
    values = _Weighed(heads.values, root_and_inverse(heads.counted.values)[0], constant)
    shared = Rotary(tuple(rotary.frequencies[frequency] for frequency, _ in rope_pairs), longest=rotary.longest)
    rotated = expected_rotation(rotary, shape.head_dim).mean(own_covariances(covariances))
    key_energy = (heads.heard.keys * rotated).sum().clamp(min=1e-300)
    value_energy = _energy(heads.values.white, heads.heard.values).clamp(min=1e-300)
    per_head = shape.num_attention_heads // shape.num_key_value_heads
    # the class divides scores by the root of more dims
    scale = ((shape.head_dim + 2 * len(rope_pairs)) / shape.head_dim) ** 0.5
    for mean_in_latent, alike in groupby(objectives, lambda objective: objective.mean_in_latent):
        # 1. and 2. the rotary key, and what it leaves of keys to the latent
        rope = _rope_key(heads, covariances, rotary, shared, rope_pairs, mean_in_latent=mean_in_latent)
        keys = _Weighed(rope.left, root_and_inverse(heads.counted.keys)[0], constant)
        queries = rope.readers.mT.repeat_interleave(per_head, dim=0) @ heads.queries  # (H, 2 S, D + 1)
        for objective in alike:
            # 3. the latent, and the maps from it
            found = _top_rows([(objective.key_weight, keys), (1.0, values)], kv_lora_rank - constant)
            found[:, -1] = 0
            latent = _Rows.of(found, heads.inputs)
            key_up, value_up = _best_ups(rope.left, latent, True), _best_ups(heads.values, latent, constant)
            if constant:
                key_up, value_up = (
                    torch.cat([up, part.white[..., -1:] - up @ latent.white[:, -1:]], dim=2)
                    for up, part in ((key_up, rope.left), (value_up, heads.values))
                )
                one = torch.zeros(1, found.shape[1], dtype=found.dtype)
                one[0, -1] = 1
                latent = _Rows.of(torch.cat([found, one]), heads.inputs)
            # the energies that are lost
            key_error = rope.error + _energy(_varying(rope.left.white - key_up @ latent.white, True), heads.heard.keys)
            value_error = _energy(heads.values.white - value_up @ latent.white, heads.heard.values)
            yield LatentAttention(
                q=torch.cat([heads.queries, queries], dim=1) * scale,
                rope_key=rope.key,
                latent=latent.over_x,
                key_up=key_up,
                value_up=value_up,
                o=projections.o,
                keys_retained=max(0.0, 1 - float(key_error / key_energy)),
                values_retained=max(0.0, 1 - float(value_error / value_energy)),
            )


def without_constant(projections: Projections, gram: Tensor) -> Projections:
    """Return the projections with biases of zero, each bias replaced by its best prediction from x, a linear map.

    A bias is a multiple of the constant 1, so that the least-squares prediction of 1 from x stands in its place.
    """
    import torch

    if not any(rows[:, -1].any() for rows in (projections.q, projections.k, projections.v)):
        return projections
    predicted = pseudo_inverse(gram[:-1, :-1]) @ gram[:-1, -1]  # (D,)

    def without(rows: Tensor) -> Tensor:
        return torch.cat([rows[:, :-1] + rows[:, -1:] * predicted, torch.zeros_like(rows[:, -1:])], dim=1)

    return replace(projections, q=without(projections.q), k=without(projections.k), v=without(projections.v))


def normalised(layer: LatentAttention, inputs: Tensor, weights: Tensor) -> LatentAttention:
    """Return the layer for a class that divides each token's latent by its rms, as DeepSeek's does (RMSNorm).

    inputs: some attention inputs x with a 1 appended, (tokens, D + 1). weights: how much each counts, (tokens,), with
    the sum 1. The latent may be multiplied by any invertible matrix if what reads it is multiplied by the inverse: the
    matrix is chosen so that the rms is nearly 1 for every token (`constant_norm`), which is possible to a good part
    because x comes from a norm itself. `key_up` and `value_up` are then fitted to the normalised latent. A token whose
    latent is zero keeps that; where all are, the layer is returned as it is.
    """
    import torch

    tokens = inputs @ layer.latent.T.to(inputs)  # (tokens, R), on the device of `inputs`
    if not tokens.any():
        return layer
    weights = weights.to(tokens)
    root = root_and_inverse((tokens.T @ (weights[:, None] * tokens)).double().cpu())[1].to(tokens)
    chosen = constant_norm(tokens, weights, root / (tokens @ root).square().mean(1).sqrt().mean()).double().cpu()
    values, vectors = torch.linalg.eigh(chosen @ chosen.T)  # the same norm, in channels that do not mix large and small
    chosen, tokens = vectors * values.clamp(min=0).sqrt(), tokens.double().cpu()
    shaped = tokens @ chosen
    shaped = shaped / shaped.square().mean(1, keepdim=True).sqrt().clamp(min=1e-300)
    weighted = weights.double().cpu()[:, None] * shaped
    moment = shaped.T @ weighted
    ridge = _NORM_RIDGE * moment.diagonal().mean()
    back = solve_ridge((weighted.T @ tokens).T, moment, ridge)  # tokens ≈ back · shaped
    latent = chosen.T @ layer.latent
    return replace(layer, latent=latent, key_up=layer.key_up @ back, value_up=layer.value_up @ back)


def constant_norm(tokens: Tensor, weights: Tensor, start: Tensor) -> Tensor:
    """Return the matrix, (R, R), after which the latents of all tokens, (n, R), have nearly the same rms, 1.

    L-BFGS minimises the weighted mean of log² (mean square) from `start` on. Every eighth token is held out, and the
    fit ends when the unweighted mean over those stops falling.
    """
    import torch

    held_out = torch.arange(len(tokens)) % 8 == 0
    with torch.enable_grad():
        fitted = tokens[~held_out].clone(), weights[~held_out].clone()
        kept = tokens[held_out].clone(), torch.ones_like(weights[held_out])
        chosen = start.clone().requires_grad_()
        optimizer = torch.optim.LBFGS([chosen], max_iter=_NORM_STEPS, line_search_fn="strong_wolfe")

        def spread(of: Tensor, weight: Tensor) -> Tensor:
            losses = (of @ chosen).square().mean(1).clamp(min=1e-30).log().square()
            return (weight * losses).sum() / weight.sum()

        def step() -> Tensor:
            optimizer.zero_grad()
            loss = spread(*fitted)
            loss.backward()
            return loss

        best, least = start, spread(*kept).item()
        for _ in range(_NORM_ROUNDS):
            optimizer.step(step)
            reached = spread(*kept).item()
            if not reached < least:
                break
            best, least = chosen.detach().clone(), reached
    return best


def _heads(projections: Projections, shape: AttentionShape, rotary: Rotary, gram: Tensor) -> _Heads:
    """The heads of a layer, and what errors of them count."""
    import torch

    inputs = WhiteInputs.of(gram)
    size, num_heads, num_shared = shape.head_dim, shape.num_attention_heads, shape.num_key_value_heads
    per_head = num_heads // num_shared
    queries, keys = (
        rotary.half_split(rows.unflatten(0, (-1, size)).transpose(0, 1)).transpose(0, 1)
        for rows in (projections.q, projections.k)
    )
    values = _Rows.of(projections.v.unflatten(0, (num_shared, size)), inputs)
    outputs = projections.o.unflatten(1, (num_heads, size)).transpose(0, 1)  # (H, D, d)
    white_queries = inputs.rows(queries)
    query_moments = white_queries @ white_queries.mT  # (H, d, d)
    output_weights = outputs.mT @ outputs
    spread = values.white @ values.white.mT
    power = (output_weights * spread.repeat_interleave(per_head, dim=0)).sum((1, 2)) / size  # (H,)

    def of_shared(weights: Tensor) -> Tensor:
        shared: Tensor = weights.unflatten(0, (num_shared, per_head)).sum(1)
        return shared

    heard = _Weights(of_shared(power[:, None, None] * query_moments), of_shared(output_weights))
    alike = torch.eye(size, dtype=power.dtype).expand_as(output_weights)
    counted = heard if power.any() else _Weights(of_shared(query_moments), of_shared(alike))
    return _Heads(inputs, queries, _Rows.of(keys, inputs), values, heard, counted)


def _rope_key(
    heads: _Heads,
    covariances: Tensor,
    rotary: Rotary,
    shared: Rotary,
    rope_pairs: Sequence[RopePair],
    *,
    mean_in_latent: bool,
) -> _RopeKey:
    """The rotary key, and the keys that it leaves; `covariances` are those of the heads' keys, (G, G, d, d)."""
    import torch

    dims = rotary.dims  # the others do not rotate, and need no position
    rotations = _expected_rotations(shared, rotary, dims, centred=1 - _NOT_KEPT if mean_in_latent else 0.0)
    weights = heads.counted.keys[:, :dims, :dims]
    if not weights.any():  # no query asks for the keys, which training may change
        weights = torch.eye(dims, dtype=weights.dtype).expand_as(weights)
    rotating = covariances[..., :dims, :dims]
    start = shared_pairs(rotating, heads.counted.powers(dims // 2), rope_pairs)
    merged = merge_at_distances(start, rotating, weights, rotations)
    readers = merged.readers.new_zeros(*covariances.shape[1:3], shared.dims)  # (G, d, 2 S)
    readers[:, :dims] = merged.readers
    turn, shared_turn = mean_rotation(rotary, dims), mean_rotation(shared, shared.dims)

    def split(keys: Tensor) -> tuple[Tensor, Tensor]:
        """The rotary key, and the rest of the keys, over the inputs that `keys`, (G, d, D + 1), are over."""
        key = merged.over(keys[:, :dims]).shared
        return key, torch.cat([turn @ keys[:, :dims] - merged.readers @ (shared_turn @ key), keys[:, dims:]], dim=1)

    (key, over_x), (_, white) = split(heads.keys.over_x), split(heads.keys.white)
    # the mean key of all tokens adds the same to all scores of a query, which softmax ignores
    over_x[..., -1] -= white[..., -1]
    white[..., -1] = 0
    error = _rotation_error(heads.heard.keys, covariances, rotary, shared, merged.shared, readers)
    return _RopeKey(key, readers, _Rows(over_x, white), error)


def _rotation_error(
    weights: Tensor, covariances: Tensor, rotary: Rotary, shared: Rotary, rope_key: Tensor, readers: Tensor
) -> Tensor:
    """Σ_h E tr(weights_h e_h e_hᵀ), where e_h is what the rotary key leaves of head h's key at a random distance, less
    its mean over the distances: the part that no key without position can make up for.

    `rope_key` combines the rotating dims of the heads' keys, (2 S, G · rotary.dims).
    """
    num_heads, size = covariances.shape[1:3]
    rotations = _expected_rotations(shared, rotary, size, centred=1.0)
    cross = rope_key @ joint(covariances[:, :, : rotary.dims])  # (2 S, G · d)
    power = cross.unflatten(1, (num_heads, size))[..., : rotary.dims].flatten(1) @ rope_key.T  # (2 S, 2 S)
    cross = rotations.cross.mean(cross.unflatten(1, (num_heads, size)).transpose(0, 1))  # (G, 2 S, d)
    keys = rotations.heads.mean(own_covariances(covariances))  # (G, d, d)
    # as their trace with symmetric weights counts
    errors = keys - 2 * readers @ cross + readers @ rotations.shared.mean(power) @ readers.mT
    error: Tensor = (weights * errors).sum()
    return error


def _expected_rotations(shared: Rotary, rotary: Rotary, dims: int, centred: float) -> ExpectedRotations:
    """The expected rotations of a shared key and of heads with `dims` dims; see `expected_rotation_between`."""
    return ExpectedRotations(
        expected_rotation_between(shared, shared.dims, shared, shared.dims, centred),
        expected_rotation_between(shared, shared.dims, rotary, dims, centred),
        expected_rotation_between(rotary, dims, rotary, dims, centred),
    )


def _best_ups(parts: _Rows, latent: _Rows, centred: bool) -> Tensor:
    """For each part, (d, D + 1), the least-squares map of the latent to it, (d, R), of what varies if `centred`."""
    channels = _varying(latent.white, centred)
    ups: Tensor = _varying(parts.white, centred) @ channels.T @ pseudo_inverse(channels @ channels.T)
    return ups


def _top_rows(parts: Sequence[tuple[float, _Weighed]], rank: int) -> Tensor:
    """Return the combinations of all rows that keep most of their energy, times a factor for each part: (rank, D + 1).

    Each combination has an rms of 1, or is 0 where there are fewer independent directions.
    """
    import torch

    sizes = [part.num_rows for _, part in parts]
    if sum(sizes) > parts[0][1].num_inputs:  # the same from the other side, where that is smaller
        inner = torch.stack([factor * part.inner for factor, part in parts]).sum(0)
        values, vectors = top_eigenvectors(inner, rank)
        combined = sum(factor * part.combined((part.white @ vectors).T) for factor, part in parts)
        powers = -1.0
    else:
        white = torch.cat([factor**0.5 * part.white for factor, part in parts])
        values, vectors = top_eigenvectors(symmetric_product(white, white), rank)
        split = vectors.split(sizes)
        combined = sum(factor**0.5 * part.combined(rows.T) for (factor, part), rows in zip(parts, split, strict=True))
        powers = -0.5
    present = values > TOLERANCE * values[:1].clamp(min=1e-300)
    scales = torch.where(present, values.clamp(min=1e-300) ** powers, torch.zeros_like(values))
    top = scales[:, None] * combined
    return torch.cat([top, top.new_zeros(rank - len(top), top.shape[1])])


def _varying(white: Tensor, centred: bool) -> Tensor:
    """Rows over white inputs without their mean, the last entry, if they are to be centred."""
    return white[..., :-1] if centred else white


def _energy(white: Tensor, weights: Tensor) -> Tensor:
    """The energy Σ E tr(weight · z zᵀ) of z, rows over white inputs, (n, d, D + 1), with weights, (n, d, d)."""
    energy: Tensor = ((weights @ white) * white).sum()
    return energy
