"""Multi-head attention as multi-head latent attention (DeepSeek-V2, arXiv 2405.04434), with the least error.

docs/merging.md derives the formulas. Everything here is float64. Shapes: D hidden_size, d head_dim, H query heads, G
K/V heads, F rotary pairs of a head, S = qk_rope_head_dim / 2 pairs of the shared rotary key, R kv_lora_rank. `gram` is
E[x xᵀ] of the attention's input x with a 1 appended, (D + 1, D + 1); weights have their bias as last column.

A query head whose output is zero, because its values or its columns of o_proj are, counts for nothing. Where all heads
of a layer are so, they count alike, so that training can still wake them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from .attention_shape import AttentionShape
from .linear import TOLERANCE, align_phase, floored_roots, pseudo_inverse, root_and_inverse, scale_between, solve_ridge
from .merge import ExpectedRotations, Merged, merge_at_distances
from .projections import Projections
from .rotations import Rotary, expected_rotation, expected_rotation_between, mean_phases, mean_rotation

if TYPE_CHECKING:
    from torch import Tensor

__all__ = [
    "LatentAttention",
    "LatentObjective",
    "RopePair",
    "constant_norm",
    "latent_attention",
    "normalised",
    "rope_pair_gains",
    "top_rows",
    "without_constant",
]

RopePair = tuple[int, int]
"""A pair of dims of the shared rotary key: the index of its frequency, and which of that frequency's pairs it is.

Pairs of one frequency are numbered from 0, the one that keeps most of the heads' keys, in descending order.
"""

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
class _Heads:
    """The heads of a layer, queries and keys half-split, and how much errors of their keys and values count.

    key_weights: Σ over the query heads of a K/V head of E[q qᵀ] times the power of that query head's output over d, so
    that keys count in the same unit as values. value_weights: Σ W_oᵀ W_o. powers: the mean key weight of each pair.
    heard: whether the output of any head is other than zero.
    """

    queries: Tensor  # (H, d, D + 1)
    keys: Tensor  # (G, d, D + 1)
    values: Tensor  # (G, d, D + 1)
    key_weights: Tensor  # (G, d, d)
    value_weights: Tensor  # (G, d, d)
    powers: Tensor  # (F, G)
    heard: bool


@dataclass(frozen=True)
class _Shared:
    """The principal components of the heads' keys, for each frequency apart: the candidates for shared keys.

    keys: the heads' keys as complex numbers, weighted by the root of their powers. directions: eigenvectors in columns,
    of which the first combines the keys into the shared key that keeps most. energies: what each keeps, descending.
    """

    keys: Tensor  # (F, G, D + 1), complex
    directions: Tensor  # (F, G, G), complex
    energies: Tensor  # (F, G)


def rope_pair_gains(projections: Projections, shape: AttentionShape, rotary: Rotary, gram: Tensor) -> Tensor:
    """Return the fraction of its keys' energy that the layer would lose without each possible `RopePair`: (F, G).

    Left to the latent, which has no position, a pair of frequency ω keeps |E e^{iωn}|² of its energy over the distances
    n that occur: slow frequencies lose little. The mean key of all tokens does not count.
    """
    import torch

    heads = _heads(projections, shape, rotary, gram)
    if not heads.powers.any():
        return torch.zeros_like(heads.powers)
    centred = gram - torch.outer(gram[:, -1], gram[:, -1])
    energies = _shared_keys(heads, centred).energies
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
    import torch

    # 1. and 2. the rotary key, and what it leaves of keys to the latent
    heads = _heads(projections, shape, rotary, gram)
    counted = heads if heads.heard else _heads(projections, shape, rotary, gram, alike=True)
    shared = Rotary(tuple(rotary.frequencies[frequency] for frequency, _ in rope_pairs), longest=rotary.longest)
    rope_key, readers, keys = _rope_key(
        counted, rotary, shared, gram, rope_pairs, mean_in_latent=objective.mean_in_latent
    )
    means = gram[:, -1]
    centred = gram - torch.outer(means, means)
    # the mean key of all tokens adds the same to all scores of a query, which softmax ignores
    keys[..., -1] -= keys @ means
    # 3. the latent, and the maps from it
    parts = torch.cat([keys, heads.values])
    weights = torch.cat([objective.key_weight * counted.key_weights, counted.value_weights])
    value_gram = centred if constant else gram
    latent = top_rows(parts, weights, value_gram, kv_lora_rank - constant)
    latent[:, -1] = 0
    key_up, value_up = _best_ups(keys, latent, centred), _best_ups(heads.values, latent, value_gram)
    if constant:
        key_up, value_up = (
            torch.cat([up, ((part - up @ latent) @ means)[..., None]], dim=2)
            for up, part in ((key_up, keys), (value_up, heads.values))
        )
        one = torch.zeros(1, latent.shape[1], dtype=latent.dtype)
        one[0, -1] = 1
        latent = torch.cat([latent, one])
    # the energies that are lost, and those of the whole
    key_error = _rotation_error(heads, rotary, shared, rope_key, readers, gram)
    key_error += _energy(keys - key_up @ latent, heads.key_weights, centred)
    value_error = _energy(heads.values - value_up @ latent, heads.value_weights, gram)
    rotated = expected_rotation(rotary, shape.head_dim).mean(heads.keys @ gram @ heads.keys.mT)
    key_energy = (heads.key_weights * rotated).sum().clamp(min=1e-300)
    value_energy = _energy(heads.values, heads.value_weights, gram).clamp(min=1e-300)

    per_head = shape.num_attention_heads // shape.num_key_value_heads
    queries = readers.mT.repeat_interleave(per_head, dim=0) @ heads.queries  # (H, 2 S, D + 1)
    # the class divides scores by the root of more dims
    scale = ((shape.head_dim + 2 * len(rope_pairs)) / shape.head_dim) ** 0.5
    return LatentAttention(
        q=torch.cat([heads.queries, queries], dim=1) * scale,
        rope_key=rope_key,
        latent=latent,
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
    with torch.inference_mode(False), torch.enable_grad():
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


def _heads(
    projections: Projections, shape: AttentionShape, rotary: Rotary, gram: Tensor, *, alike: bool = False
) -> _Heads:
    """The heads of a layer with their weights: those of what is heard of them, or the same for all if `alike`."""
    import torch

    size, num_heads, num_shared = shape.head_dim, shape.num_attention_heads, shape.num_key_value_heads
    queries = torch.stack([rotary.half_split(head) for head in projections.q.split(size)])
    keys = torch.stack([rotary.half_split(head) for head in projections.k.split(size)])
    values = projections.v.unflatten(0, (num_shared, size))
    outputs = projections.o.unflatten(1, (num_heads, size)).transpose(0, 1)  # (H, D, d)
    output_weights = outputs.mT @ outputs
    spread = values @ gram @ values.mT
    per_head = num_heads // num_shared
    power = (output_weights * spread.repeat_interleave(per_head, dim=0)).sum((1, 2)) / size  # (H,)
    if alike:
        power, output_weights = torch.ones_like(power), torch.eye(size, dtype=power.dtype).expand_as(output_weights)
    query_weights = power[:, None, None] * (queries @ gram @ queries.mT)
    key_weights = query_weights.unflatten(0, (num_shared, per_head)).sum(1)
    diagonal = key_weights.diagonal(dim1=1, dim2=2)[:, : rotary.dims]
    return _Heads(
        queries,
        keys,
        values,
        key_weights,
        output_weights.unflatten(0, (num_shared, per_head)).sum(1),
        diagonal.unflatten(1, (2, -1)).mean(1).T,
        bool(power.any()),
    )


def _shared_keys(heads: _Heads, gram: Tensor) -> _Shared:
    """The candidates for shared keys, by an eigendecomposition for each frequency."""
    import torch

    num_pairs = len(heads.powers)
    keys = torch.complex(heads.keys[:, :num_pairs], heads.keys[:, num_pairs : 2 * num_pairs]).transpose(0, 1)
    keys = floored_roots(heads.powers)[..., None] * keys
    energies, directions = torch.linalg.eigh(keys @ gram.to(keys.dtype) @ keys.mH)
    return _Shared(keys, directions.flip(2), energies.flip(1).clamp(min=0))


def _rope_key(
    heads: _Heads, rotary: Rotary, shared: Rotary, gram: Tensor, rope_pairs: Sequence[RopePair], *, mean_in_latent: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """The rotary key, (2 S, D + 1), heads' maps of it, (G, d, 2 S), and the keys that it leaves, (G, d, D + 1)."""
    import torch

    dims = rotary.dims  # the others do not rotate, and need no position
    rotations = _expected_rotations(shared, rotary, dims, centred=1 - _NOT_KEPT if mean_in_latent else 0.0)
    keys, weights = heads.keys[:, :dims], heads.key_weights[:, :dims, :dims]
    if not weights.any():  # no query asks for the keys, which training may change
        weights = torch.eye(dims, dtype=weights.dtype).expand_as(weights)
    merged = merge_at_distances(_start(heads, gram, rope_pairs), list(keys), list(weights), gram, rotations)
    readers = torch.stack(merged.readers)
    left = mean_rotation(rotary, dims) @ keys - readers @ (mean_rotation(shared, shared.dims) @ merged.shared)
    unread = readers.new_zeros(len(readers), heads.keys.shape[1] - dims, shared.dims)
    return merged.shared, torch.cat([readers, unread], dim=1), torch.cat([left, heads.keys[:, dims:]], dim=1)


def _rotation_error(
    heads: _Heads, rotary: Rotary, shared: Rotary, rope_key: Tensor, readers: Tensor, gram: Tensor
) -> Tensor:
    """Σ_h E tr(weights_h e_h gram e_hᵀ), where e_h is what the rotary key leaves of head h's key at a random distance,
    less its mean over the distances: the part that no key without position can make up for.
    """
    rotations = _expected_rotations(shared, rotary, heads.keys.shape[1], centred=1.0)
    power = rotations.shared.mean(rope_key @ gram @ rope_key.T)  # (2 S, 2 S)
    cross = rotations.cross.mean(rope_key @ gram @ heads.keys.mT)  # (G, 2 S, d)
    keys = rotations.heads.mean(heads.keys @ gram @ heads.keys.mT)  # (G, d, d)
    errors = keys - 2 * readers @ cross + readers @ power @ readers.mT  # as their trace with symmetric weights counts
    error: Tensor = (heads.key_weights * errors).sum()
    return error


def _expected_rotations(shared: Rotary, rotary: Rotary, dims: int, centred: float) -> ExpectedRotations:
    """The expected rotations of a shared key and of heads with `dims` dims; see `expected_rotation_between`."""
    return ExpectedRotations(
        expected_rotation_between(shared, shared.dims, shared, shared.dims, centred),
        expected_rotation_between(shared, shared.dims, rotary, dims, centred),
        expected_rotation_between(rotary, dims, rotary, dims, centred),
    )


def _start(heads: _Heads, gram: Tensor, rope_pairs: Sequence[RopePair]) -> Merged:
    """The best shared key for rotations by any angle, (2 S, D + 1), with their rms; no head reads it yet."""
    import torch

    num_pairs = len(heads.powers)
    shared, roots = _shared_keys(heads, gram), floored_roots(heads.powers)
    frequencies, ranks = [frequency for frequency, _ in rope_pairs], [rank for _, rank in rope_pairs]
    directions = align_phase(shared.directions[frequencies, :, ranks])  # (S, G)
    weighted = shared.keys[frequencies]  # (S, G, D + 1)
    keys = (directions.conj()[..., None] * weighted).sum(1)
    unweighted = weighted / roots[frequencies][..., None]
    complex_gram = gram.to(keys.dtype)
    power = ((keys @ complex_gram) * keys.conj()).sum(1).real
    wanted = ((unweighted @ complex_gram) * unweighted.conj()).sum(2).real.mean(1)
    keys = scale_between(wanted, power)[:, None] * keys
    unread = [keys.real.new_zeros(2 * num_pairs, 2 * len(keys)) for _ in range(shared.keys.shape[1])]
    return Merged(torch.cat([keys.real, keys.imag]), unread, 0.0, 0.0)


def _best_ups(parts: Tensor, latent: Tensor, gram: Tensor) -> Tensor:
    """For each part, (d, D + 1), the least-squares map of the latent to it, (d, R), under the moments `gram`."""
    ups: Tensor = parts @ gram @ latent.T @ pseudo_inverse(latent @ gram @ latent.T)
    return ups


def top_rows(parts: Tensor, weights: Tensor, gram: Tensor, rank: int) -> Tensor:
    """Return the combinations of the rows of `parts`, (n, d, D + 1), that keep most of their energy: (rank, D + 1).

    `weights`, (n, d, d), say how much an error of each row counts. Each combination has an rms of 1, or is 0 where
    there are fewer independent directions.
    """
    import torch

    rows = torch.cat([root_and_inverse(weight)[0] @ part for part, weight in zip(parts, weights, strict=True)])
    if len(rows) > len(gram):  # the same from the other side, where that is smaller
        root = root_and_inverse(gram)[0]
        inner = rows.T @ rows
        values, vectors = torch.linalg.eigh(root @ inner @ root)
        combined, powers = vectors.T @ root @ inner, -1.0
    else:
        values, vectors = torch.linalg.eigh(rows @ gram @ rows.T)
        combined, powers = vectors.T @ rows, -0.5
    values, combined = values.flip(0)[:rank], combined.flip(0)[:rank]
    present = values > TOLERANCE * values[:1].clamp(min=1e-300)
    scales = torch.where(present, values.clamp(min=1e-300) ** powers, torch.zeros_like(values))
    top = scales[:, None] * combined
    return torch.cat([top, top.new_zeros(rank - len(top), top.shape[1])])


def _energy(parts: Tensor, weights: Tensor, gram: Tensor) -> Tensor:
    """The energy Σ tr(weight · part · gram · partᵀ) of parts, (n, d, D + 1), with weights, (n, d, d)."""
    energy: Tensor = (weights * (parts @ gram @ parts.mT)).sum()
    return energy
