"""Multi-head attention as multi-head latent attention (DeepSeek-V2, arXiv 2405.04434), with the least error.

docs/merging.md derives it. Everything here is float64. Shapes: D hidden_size, d head_dim, H query heads, G K/V heads,
F rotary pairs of a head, S = qk_rope_head_dim / 2 pairs of the shared rotary key, R kv_lora_rank. `gram` is E[x xᵀ] of
the attention's input x with a 1 appended, (D + 1, D + 1); weights have their bias as last column.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from .attention_shape import AttentionShape
from .linear import align_phase, floored_roots, pseudo_inverse, root_and_inverse, scale_between, solve_ridge
from .merge import ExpectedRotations, Merged, merge_at_distances
from .projections import Projections
from .rotations import Rotary, expected_rotation, expected_rotation_between, mean_phases, mean_rotation

if TYPE_CHECKING:
    from torch import Tensor

__all__ = [
    "LatentAttention",
    "LatentObjective",
    "RopePair",
    "latent_attention",
    "normalised",
    "rope_pair_gains",
    "without_constant",
]

RopePair = tuple[int, int]
"""A pair of the shared rotary key: the index of its frequency, and its rank among the shared keys of that frequency."""

_TOLERANCE = 1e-13  # of the largest eigenvalue: a smaller one counts as zero
_FRAGILE = 0.01  # of the energy that is left to the latent counts as an error: it is not kept exactly
_NORM_STEPS, _NORM_ROUNDS = 5, 20  # of L-BFGS
_NORM_RIDGE = 1e-9


@dataclass(frozen=True)
class LatentAttention:
    """One layer's attention over a latent.

    q: (H, d + 2 S, D + 1), per head what meets the latent's keys, then what meets the rotary key, whose pairs are
    (i, i + S). rope_key: (2 S, D + 1). latent: (R, D + 1), what is cached of x. key_up and value_up: (G, d, R), which
    make the heads' keys and values of it. o: (D, H · d). `keys_retained` and `values_retained` are the fractions kept
    of the energy of scores, at the distances that occur, and of outputs.
    """

    q: Tensor
    rope_key: Tensor
    latent: Tensor
    key_up: Tensor
    value_up: Tensor
    o: Tensor
    keys_retained: float
    values_retained: float


@dataclass(frozen=True)
class _Heads:
    """queries: (H, d, D + 1), keys and values: (G, d, D + 1), queries and keys half-split.

    key_weights: (G, d, d), what an error of a head's key costs: E[q qᵀ] of each of its query heads times the power of
    that head's output, over d, so that keys count as values do. value_weights: (G, d, d), Σ W_oᵀ W_o. powers: (F, G),
    that of a frequency's pair.
    """

    queries: Tensor
    keys: Tensor
    values: Tensor
    key_weights: Tensor
    value_weights: Tensor
    powers: Tensor


@dataclass(frozen=True)
class _Shared:
    """Keys that heads share, per frequency. keys: (F, G, D + 1) complex, the weighted heads'. directions: (F, G, G),
    in its columns what the 1st, 2nd … shared key is made of. energies: (F, G), what each keeps, descending.
    """

    keys: Tensor
    directions: Tensor
    energies: Tensor


def rope_pair_gains(projections: Projections, shape: AttentionShape, rotary: Rotary, gram: Tensor) -> Tensor:
    """What the layer would lose without each possible pair of the rotary key, (F, G), of its keys' energy.

    A pair without position keeps the square of its mean rotation, so that slow frequencies hardly need one. What the
    keys of all tokens have in common is left out.
    """
    import torch

    centred = gram - torch.outer(gram[:, -1], gram[:, -1])
    energies = _shared_keys(_heads(projections, shape, rotary, gram), centred).energies
    lost = 1 - mean_phases(rotary).abs().square()
    gains: Tensor = energies * lost[:, None] / energies.sum().clamp(min=1e-300)
    return gains


@dataclass(frozen=True)
class LatentObjective:
    """What `latent_attention` cannot know from second moments, so that several are tried.

    `still`: the rotary key may leave to the latent what does not rotate. `keys`: how much keys count in the latent
    beside values.
    """

    still: bool = True
    keys: float = 1.0


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
    """The layer with a latent of `kv_lora_rank` and a shared rotary key of len(rope_pairs) pairs.

    The rotary key, with the frequencies of `rope_pairs`, is the best that heads can share at the distances that occur.
    What is left of the keys loses its position: the mean over the distances of what the rotary key leaves goes into
    the latent with the values, weighted by what reads them: the top directions of their joint covariance. With
    `constant` the last channel of the latent is 1 and carries means and biases. The other channels have an rms of 1.
    """
    import torch

    heads = _heads(projections, shape, rotary, gram)
    per_head = shape.num_attention_heads // shape.num_key_value_heads
    shared = Rotary(tuple(rotary.frequencies[frequency] for frequency, _ in rope_pairs), longest=rotary.longest)
    rope_key, readers, keys = _rope_key(heads, rotary, shared, gram, rope_pairs, still=objective.still)
    means = gram[:, -1]
    centred = gram - torch.outer(means, means)
    # what all tokens' keys have in common adds the same to all scores of a query
    keys[..., -1] -= keys @ means

    parts = torch.cat([keys, heads.values])
    counted = torch.cat([objective.keys * heads.key_weights, heads.value_weights])
    value_gram = centred if constant else gram
    latent = _top_rows(parts, counted, value_gram, kv_lora_rank - constant)
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

    queries = readers.mT.repeat_interleave(per_head, dim=0) @ heads.queries  # (H, 2 S, D + 1)
    # the class divides scores by the root of more dims
    scale = ((shape.head_dim + 2 * len(rope_pairs)) / shape.head_dim) ** 0.5

    key_error = _rotation_error(heads, rotary, shared, rope_key, readers, gram)
    key_error += _energy(keys - key_up @ latent, heads.key_weights, centred)
    value_error = _energy(heads.values - value_up @ latent, heads.value_weights, gram)
    turned = expected_rotation(rotary, shape.head_dim).mean(heads.keys @ gram @ heads.keys.mT)
    key_energy = (heads.key_weights * turned).sum().clamp(min=1e-300)
    value_energy = _energy(heads.values, heads.value_weights, gram).clamp(min=1e-300)
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
    """The projections without biases, in whose place is what x alone predicts of them: the least squares of 1 on x."""
    import torch

    predicted = pseudo_inverse(gram[:-1, :-1], tolerance=_TOLERANCE) @ gram[:-1, -1]  # (D,)

    def without(rows: Tensor) -> Tensor:
        return torch.cat([rows[:, :-1] + rows[:, -1:] * predicted, torch.zeros_like(rows[:, -1:])], dim=1)

    return replace(projections, q=without(projections.q), k=without(projections.k), v=without(projections.v))


def normalised(layer: LatentAttention, inputs: Tensor, weights: Tensor) -> LatentAttention:
    """The layer for a class that divides each token's latent by its rms.

    `inputs` are some of its x, (tokens, D + 1), and `weights`, (tokens,), with the sum 1, say how much each counts. The
    latent is free up to an invertible map, which is chosen so that its rms is nearly 1 for every token. That goes far,
    since x comes from a norm itself. What reads the latent is then fitted to the normalised one.
    """
    import torch

    tokens = inputs @ layer.latent.T.to(inputs)  # (tokens, R), on the device of `inputs`
    weights = weights.to(tokens)
    root = root_and_inverse((tokens.T @ (weights[:, None] * tokens)).double().cpu())[1].to(tokens)
    chosen = _constant_norm(tokens, weights, root / (tokens @ root).square().mean(1).sqrt().mean()).double().cpu()
    values, vectors = torch.linalg.eigh(chosen @ chosen.T)  # the same norm, in channels that do not mix large and small
    chosen, tokens = vectors * values.clamp(min=0).sqrt(), tokens.double().cpu()
    shaped = tokens @ chosen
    shaped = shaped / shaped.square().mean(1, keepdim=True).sqrt()
    weighted = weights.double().cpu()[:, None] * shaped
    moment = shaped.T @ weighted
    ridge = _NORM_RIDGE * moment.diagonal().mean()
    back = solve_ridge((weighted.T @ tokens).T, moment, ridge)  # tokens ≈ back · shaped
    latent = chosen.T @ layer.latent
    return replace(layer, latent=latent, key_up=layer.key_up @ back, value_up=layer.value_up @ back)


def _constant_norm(tokens: Tensor, weights: Tensor, start: Tensor) -> Tensor:
    """The map, (R, R), from `start` on, after which tokens, (n, R), have nearly the same rms, 1.

    By L-BFGS on the weighted mean of log² rms², as long as its plain mean over every eighth token, which is left out,
    gets less too.
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


def _heads(projections: Projections, shape: AttentionShape, rotary: Rotary, gram: Tensor) -> _Heads:
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
    )


def _shared_keys(heads: _Heads, gram: Tensor) -> _Shared:
    import torch

    num_pairs = len(heads.powers)
    keys = torch.complex(heads.keys[:, :num_pairs], heads.keys[:, num_pairs : 2 * num_pairs]).transpose(0, 1)
    keys = floored_roots(heads.powers, tolerance=_TOLERANCE)[..., None] * keys
    energies, directions = torch.linalg.eigh(keys @ gram.to(keys.dtype) @ keys.mH)
    return _Shared(keys, directions.flip(2), energies.flip(1).clamp(min=0))


def _rope_key(
    heads: _Heads, rotary: Rotary, shared: Rotary, gram: Tensor, rope_pairs: Sequence[RopePair], *, still: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """The rotary key, (2 S, D + 1), how heads read it, (G, d, 2 S), and what is left of their keys, (G, d, D + 1)."""
    import torch

    dims = rotary.dims  # the others do not turn, and need no position
    rotations = _expected_rotations(shared, rotary, dims, centred=1 - _FRAGILE if still else 0.0)
    keys, weights = heads.keys[:, :dims], heads.key_weights[:, :dims, :dims]
    merged = merge_at_distances(_start(heads, gram, rope_pairs), list(keys), list(weights), gram, rotations)
    readers = torch.stack(merged.readers)
    left = mean_rotation(rotary, dims) @ keys - readers @ (mean_rotation(shared, shared.dims) @ merged.shared)
    unread = readers.new_zeros(len(readers), heads.keys.shape[1] - dims, shared.dims)
    return merged.shared, torch.cat([readers, unread], dim=1), torch.cat([left, heads.keys[:, dims:]], dim=1)


def _rotation_error(
    heads: _Heads, rotary: Rotary, shared: Rotary, rope_key: Tensor, readers: Tensor, gram: Tensor
) -> Tensor:
    """Σ_h E tr(weights_h e gram eᵀ), where e is what the rotary key leaves of a head's key at a random distance, less
    its mean: the part that no key without position makes up for.
    """
    rotations = _expected_rotations(shared, rotary, heads.keys.shape[1], centred=1.0)
    own = rotations.shared.mean(rope_key @ gram @ rope_key.T)  # (2 S, 2 S)
    cross = rotations.cross.mean(rope_key @ gram @ heads.keys.mT)  # (G, 2 S, d)
    keys = rotations.heads.mean(heads.keys @ gram @ heads.keys.mT)  # (G, d, d)
    errors = keys - 2 * readers @ cross + readers @ own @ readers.mT  # as their trace with symmetric weights counts
    error: Tensor = (heads.key_weights * errors).sum()
    return error


def _expected_rotations(shared: Rotary, rotary: Rotary, dims: int, centred: float) -> ExpectedRotations:
    return ExpectedRotations(
        expected_rotation_between(shared, shared.dims, shared, shared.dims, centred),
        expected_rotation_between(shared, shared.dims, rotary, dims, centred),
        expected_rotation_between(rotary, dims, rotary, dims, centred),
    )


def _start(heads: _Heads, gram: Tensor, rope_pairs: Sequence[RopePair]) -> Merged:
    """The best complex key of each pair, (2 S, D + 1), with the rms of the heads' keys: safe in 16 bits."""
    import torch

    shared, roots = _shared_keys(heads, gram), floored_roots(heads.powers, tolerance=_TOLERANCE)
    frequencies, ranks = [frequency for frequency, _ in rope_pairs], [rank for _, rank in rope_pairs]
    directions = align_phase(shared.directions[frequencies, :, ranks])  # (S, G)
    weighted = shared.keys[frequencies]  # (S, G, D + 1)
    keys = (directions.conj()[..., None] * weighted).sum(1)
    own = weighted / roots[frequencies][..., None]
    complex_gram = gram.to(keys.dtype)
    power = ((keys @ complex_gram) * keys.conj()).sum(1).real
    wanted = ((own @ complex_gram) * own.conj()).sum(2).real.mean(1)
    keys = scale_between(wanted, power)[:, None] * keys
    return Merged(torch.cat([keys.real, keys.imag]), [], 0.0, 0.0)


def _best_ups(parts: Tensor, latent: Tensor, gram: Tensor) -> Tensor:
    """For each part, (d, D + 1), the map of the latent, (d, R), that is nearest to it under the Gram matrix."""
    ups: Tensor = parts @ gram @ latent.T @ pseudo_inverse(latent @ gram @ latent.T, tolerance=_TOLERANCE)
    return ups


def _top_rows(parts: Tensor, weights: Tensor, gram: Tensor, rank: int) -> Tensor:
    """`rank` combinations of all rows of `parts`, (n, d, D + 1), that keep most of them as `weights` count it, each of
    rms 1 (0 where nothing is left to keep)."""
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
    present = values > _TOLERANCE * values[:1].clamp(min=1e-300)
    scales = torch.where(present, values.clamp(min=1e-300) ** powers, torch.zeros_like(values))
    top = scales[:, None] * combined
    return torch.cat([top, top.new_zeros(rank - len(top), top.shape[1])])


def _energy(parts: Tensor, weights: Tensor, gram: Tensor) -> Tensor:
    """Σ tr(weight · part · gram · partᵀ)."""
    energy: Tensor = (weights * (parts @ gram @ parts.mT)).sum()
    return energy
