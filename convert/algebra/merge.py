"""Merging the heads of a group into one with the least error, in closed form, from second moments of a text.

docs/merging.md derives the formulas. Everything here is float64: small energies count, and float32 would not tell one
of 1e-7 of the largest from rounding (`test_float32_does_not_do_for_covariances`). Shapes: d head_dim, m heads of a
group. `covariances` holds E[z_i z_jᵀ] of the keys or values z of every two heads, (m, m, d, d). The energy of a head is
tr(weight · covariance), where the weight, (d, d), says how much an error of each of its dims counts. Where all heads of
a group have an energy of zero, so that no key or value is better than another, they become their mean.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from .linear import (
    align_phase,
    floored_roots,
    pseudo_inverse,
    root_and_inverse,
    scale_between,
    symmetric_product,
    top_eigenvectors,
)
from .rotations import ExpectedRotation

if TYPE_CHECKING:
    from torch import Tensor

__all__ = [
    "ExpectedRotations",
    "Merged",
    "RopePair",
    "complex_covariances",
    "covariances_of",
    "joint",
    "merge_at_distances",
    "merge_linear",
    "merge_mean",
    "merge_rotary",
    "own_covariances",
    "pair_losses",
    "rotary_components",
    "rotations_of",
    "shared_pairs",
]

RopePair = tuple[int, int]
"""A pair of dims of the shared rotary key: the index of its frequency, and which of that frequency's pairs it is.

Pairs of one frequency are numbered from 0, the one that keeps most of the heads' keys, in descending order.
"""

_ROUNDS = 20  # the error falls by less than 1 % from the fifth on
_PAIRS_AT_ONCE = 64  # whose joint covariances are in memory together: 32 MiB for heads of 128 dims


@dataclass(frozen=True)
class Merged:
    """The one key or value that a group's heads share, and the map through which each head reads it.

    Head h is approximated by readers[h] · shared, which has r rows: combinations of the dims of all heads, one after
    the other, or what `over` makes of them. `kept` is the part of the heads' energy, `total`, that is retained.
    """

    shared: Tensor  # (r, m · d)
    readers: Tensor  # (m, d, r)
    kept: float
    total: float

    @property
    def retained(self) -> float:
        """The fraction of the heads' energy that is kept, from 0 to 1 but for rounding; 1 where there is none."""
        return self.kept / self.total if self.total > 0 else 1.0

    def over(self, heads: Tensor) -> Merged:
        """The same with the shared rows as weights, where `heads`, (m, d, n), are those of the heads: (r, n)."""
        return replace(self, shared=self.shared @ heads.flatten(0, 1))


def covariances_of(white: Tensor) -> Tensor:
    """Return E[z_i z_jᵀ], (m, m, d, d), of heads that are rows over white inputs (`WhiteInputs`), (m, d, n)."""
    num_heads, size, _ = white.shape
    rows = white.flatten(0, 1)
    blocks: Tensor = symmetric_product(rows, rows).view(num_heads, size, num_heads, size).transpose(1, 2)
    return blocks


def own_covariances(covariances: Tensor) -> Tensor:
    """Return E[z zᵀ] of each head, (m, d, d), of (m, m, d, d)."""
    return covariances.diagonal().permute(2, 0, 1)


def joint(covariances: Tensor) -> Tensor:
    """Return the covariance of the dims of all heads, one after the other: (m · d, n · e) of (m, n, d, e)."""
    return covariances.transpose(1, 2).flatten(2, 3).flatten(0, 1)


def merge_linear(covariances: Tensor, weights: Tensor, rank: int) -> Merged:
    """Merge values, or keys that do not rotate: each head may read the shared rows through any matrix.

    weights: (m, d, d), the metric in which head h's error counts: Σ W_oᵀ W_o over the query heads of h for values,
    Σ E[q qᵀ] for keys. The top `rank` eigenvectors of the heads' joint weighted covariance minimise
    Σ_h tr(weights_h E[e_h e_hᵀ]), where e_h = z_h − reader_h · shared. A head without energy, one that is zero or that
    nothing reads, has the reader 0. Returns `rank` shared rows.
    """
    import torch

    roots, inverses = root_and_inverse(weights)
    weighed = roots[:, None] @ covariances @ roots
    energies = _traces(own_covariances(weighed))  # (m,)
    if not energies.any():
        return _mean_of_heads(covariances, rank)
    values, vectors = top_eigenvectors(joint(weighed), rank)
    parts = vectors.unflatten(0, (len(weights), -1))  # (m, d, rank)
    shared = (parts.mT @ roots).transpose(0, 1).flatten(1)
    # exactly 0: an eigenvector of the rest is free there
    readers = torch.where(energies[:, None, None] != 0, inverses @ parts, torch.zeros_like(parts))
    merged = Merged(shared, readers, float(values.clamp(min=0).sum()), float(energies.sum()))
    return _with_scale_of(covariances, merged)


def merge_rotary(covariances: Tensor, powers: Tensor) -> Merged:
    """Merge keys that rotate so that readers commute with every rotation: one complex scalar per pair and head.

    Of the d = 2 · F dims, i and i + F are a rotary pair. powers: (m, F), E|q|² of each pair, summed over the query
    heads of the head. For each pair, let z ∈ Cᵐ be the heads' keys as complex numbers, P the diagonal matrix of the
    heads' powers and u the top eigenvector of P^½ E[z zᴴ] P^½: the shared key is s = uᴴ P^½ z, and head h reads it as
    z_h ≈ (u_h / √P_h) s, up to a scale of each pair that gives s the heads' rms. That is the best where every angle
    between a query and a key is as likely. Returns 2 · F shared rows.
    """
    import torch

    energies = (powers.repeat(1, 2) * own_covariances(covariances).diagonal(dim1=1, dim2=2)).sum(1)
    if not energies.any():
        return _mean_of_heads(covariances, covariances.shape[-1])
    roots = floored_roots(powers).T  # (F, m)
    values, vectors = torch.linalg.eigh(roots[:, :, None] * complex_covariances(covariances) * roots[:, None])
    top = align_phase(vectors[..., -1])  # (F, m)
    merged = Merged(
        rotations_of((top.conj() * roots).T).transpose(0, 1).flatten(1),
        rotations_of((top / roots).T),
        float(values[:, -1].clamp(min=0).sum()),
        float(values.clamp(min=0).sum()),
    )
    return _with_scale_of(covariances, merged, per_pair=True)


def complex_covariances(covariances: Tensor) -> Tensor:
    """Return E[z zᴴ] of the heads' keys as complex numbers, for each pair of dims (i, i + F) of 2 · F: (F, m, m)."""
    import torch

    half = covariances.shape[-1] // 2
    real, mixed = covariances[..., :half, :], covariances[..., half:, :]
    parts = [block.diagonal(dim1=2, dim2=3) for side in (real, mixed) for block in side.split(half, dim=3)]
    result: Tensor = torch.complex(parts[0] + parts[3], parts[2] - parts[1]).permute(2, 0, 1)
    return result


def rotary_components(covariances: Tensor, powers: Tensor) -> tuple[Tensor, Tensor]:
    """The principal components of the heads' keys, for each frequency apart: the candidates for shared keys.

    covariances: (G, G, 2 F, 2 F). Keys are weighted by the roots of `powers`, (F, G). Returns what each component
    keeps, (F, G) in descending order, and the directions, (F, G, G) complex: eigenvectors in columns, of which the
    first combines the weighted keys, as complex numbers, into the shared key that keeps most.
    """
    import torch

    roots = floored_roots(powers)
    energies, directions = torch.linalg.eigh(roots[:, :, None] * complex_covariances(covariances) * roots[:, None])
    return energies.flip(1).clamp(min=0), directions.flip(2)


def shared_pairs(covariances: Tensor, powers: Tensor, rope_pairs: Sequence[RopePair]) -> Merged:
    """The best shared key for rotations by any angle, with the heads' rms; no head reads it yet.

    covariances: (G, G, 2 F, 2 F) of keys whose dims all rotate. powers: (F, G). Returns 2 S shared rows.
    """
    import torch

    energies, directions = rotary_components(covariances, powers)
    num_pairs, num_heads = powers.shape
    frequencies, ranks = [frequency for frequency, _ in rope_pairs], [rank for _, rank in rope_pairs]
    own = own_covariances(covariances).diagonal(dim1=1, dim2=2).unflatten(1, (2, num_pairs)).sum(1)  # E|z|², (G, F)
    scales = scale_between(own.mean(0)[frequencies], energies[frequencies, ranks])
    mixes = align_phase(directions[frequencies, :, ranks]).conj() * floored_roots(powers)[frequencies]
    mixes = scales[:, None] * mixes  # (S, G): the shared key is Σ mixes · z
    pairs = torch.arange(len(rope_pairs))
    shared = covariances.new_zeros(2, len(pairs), num_heads, 2, num_pairs)
    for row, column, part in ((0, 0, mixes.real), (0, 1, -mixes.imag), (1, 0, mixes.imag), (1, 1, mixes.real)):
        shared[row, pairs, :, column, frequencies] = part
    unread = covariances.new_zeros(num_heads, 2 * num_pairs, 2 * len(pairs))
    return Merged(shared.flatten(2).flatten(0, 1), unread, 0.0, 0.0)


@dataclass(frozen=True)
class ExpectedRotations:
    """Expected rotations of a shared key with itself, of it with the heads' keys, and of those with themselves."""

    shared: ExpectedRotation
    cross: ExpectedRotation
    heads: ExpectedRotation

    @classmethod
    def same(cls, rotation: ExpectedRotation) -> ExpectedRotations:
        """Return those of a shared key that rotates as the heads' keys do."""
        return cls(rotation, rotation, rotation)


def merge_at_distances(start: Merged, covariances: Tensor, weights: Tensor, rotations: ExpectedRotations) -> Merged:
    """Improve the shared rows of `start`, keys that rotate, for the distances between query and key that are likely.

    Dims are half-split. weights: (m, d, d), how much an error of head h counts: E[q qᵀ] summed over its query heads, or
    a multiple of that. Distances are not measured: `rotations` says how likely each is (`expected_rotation`, a distance
    n as 1 / (n + 1)), perhaps less a part of their mean. With R the rotation of the heads by a random distance and S
    that of the shared key, minimises Σ_h E tr(weights_h e_h e_hᵀ), where e_h = R z_h − reader_h S shared, by
    alternating two exact steps: the best readers for the shared key, then the best shared key for the readers. Readers
    need not commute with the rotations: pairs that rotate little within these distances can be mixed almost as if they
    did not rotate. Heads without energy leave `start` as it is.
    """
    num_heads, size = weights.shape[:2]
    total = (weights * rotations.heads.mean(own_covariances(covariances))).sum()
    if not total:
        return start
    together = joint(covariances)

    def of_shared(shared: Tensor) -> tuple[Tensor, Tensor]:
        """E[shared sharedᵀ], (r, r), and E[shared z_hᵀ] of each head, (m, r, d)."""
        cross = shared @ together
        return cross @ shared.T, cross.unflatten(1, (num_heads, size)).transpose(0, 1)

    shared = start.shared
    power, cross = of_shared(shared)
    for _ in range(_ROUNDS):
        readers = _best_readers(power, cross, rotations)
        weighted = readers.mT @ weights  # (m, r, d)
        inverse = pseudo_inverse(rotations.shared.mean_back((weighted @ readers).sum(0)))
        shared = (inverse @ rotations.cross.mean_back(weighted)).transpose(0, 1).flatten(1)
        power, cross = of_shared(shared)
    readers = _best_readers(power, cross, rotations)
    kept = (weights * (rotations.cross.mean(cross).mT @ readers.mT)).sum()
    return _with_scale_of(covariances, Merged(shared, readers, float(kept), float(total)))


def _best_readers(power: Tensor, cross: Tensor, rotations: ExpectedRotations) -> Tensor:
    """For each head the B that minimises E‖R z − B S shared‖², from E[shared sharedᵀ] and E[shared z_hᵀ]: (m, d, r)."""
    return rotations.cross.mean(cross).mT @ pseudo_inverse(rotations.shared.mean(power))


def pair_losses(covariances: Tensor, weights: Tensor, rotation: ExpectedRotation | None = None) -> Tensor:
    """Return the fraction of all heads' energy that merging two of them loses at least: (m, m), 0 on the diagonal.

    weights: (m, d, d). Without `rotation` the loss is that of `merge_linear`. With it, heads are keys at random
    distances, and the loss is a lower bound for `merge_at_distances`, since the shared key may here be any combination
    of the keys after their rotation.
    """
    import torch

    size, num_heads = covariances.shape[-1], len(covariances)
    roots = root_and_inverse(weights)[0]

    def weighed(blocks: Tensor, one: Tensor, other: Tensor) -> Tensor:
        return one @ (rotation.mean(blocks) if rotation is not None else blocks) @ other

    alone = weighed(own_covariances(covariances), roots, roots)  # (m, d, d)
    losses = torch.zeros(num_heads, num_heads, dtype=alone.dtype)
    for one, other in (part.T for part in torch.triu_indices(num_heads, num_heads, 1).T.split(_PAIRS_AT_ONCE)):
        cross = weighed(covariances[one, other], roots[one], roots[other])
        pairs = torch.cat([torch.cat([alone[one], cross], dim=2), torch.cat([cross.mT, alone[other]], dim=2)], dim=1)
        losses[one, other] = torch.linalg.eigvalsh(pairs)[:, :size].clamp(min=0).sum(1)
    total = _traces(alone).sum().clamp(min=1e-300)
    fractions: Tensor = (losses + losses.T) / total
    return fractions


def merge_mean(covariances: Tensor, weights: Tensor) -> Merged:
    """Merge heads into their mean, which each reads unchanged, for keys or values that may not be mapped.

    weights: (m, d, d), as `merge_linear` has them. Returns d shared rows.
    """
    merged = _mean_of_heads(covariances, covariances.shape[-1])
    mean = covariances.mean(0)  # E[z̄ z_hᵀ]
    errors = own_covariances(covariances) - mean - mean.mT + covariances.mean((0, 1))
    total, error = (float((weights * energy).sum()) for energy in (own_covariances(covariances), errors))
    return replace(merged, kept=max(total - error, 0.0), total=total)


def _traces(matrices: Tensor) -> Tensor:
    return matrices.diagonal(dim1=-2, dim2=-1).sum(-1)


def _mean_of_heads(covariances: Tensor, rank: int) -> Merged:
    """Heads without energy as their mean, of which the first `rank` rows are shared."""
    import torch

    num_heads, size = covariances.shape[1:3]
    reader = torch.eye(size, rank, dtype=covariances.dtype)
    return Merged(reader.T.repeat(1, num_heads) / num_heads, reader.expand(num_heads, -1, -1), 0.0, 0.0)


def rotations_of(scalars: Tensor) -> Tensor:
    """Return the real matrices, (…, 2 · F, 2 · F), that multiply each pair (i, i + F) by a complex scalar, (…, F)."""
    import torch

    real, imaginary = torch.diag_embed(scalars.real), torch.diag_embed(scalars.imag)
    upper, lower = torch.cat([real, -imaginary], dim=-1), torch.cat([imaginary, real], dim=-1)
    return torch.cat([upper, lower], dim=-2)


def _with_scale_of(covariances: Tensor, merged: Merged, *, per_pair: bool = False) -> Merged:
    """The merge with the shared head scaled to the heads' rms, which is safe in 16 bits, and readers by the inverse.

    The scale is one for all rows or, `per_pair`, one for each rotary pair, which readers commute with.
    """
    import torch

    def power(rows: Tensor) -> Tensor:
        if per_pair:
            pairs = rows.unflatten(0, (2, -1)).sum(0)
            return torch.cat([pairs, pairs])
        return rows.mean().expand(len(merged.shared))

    heads = own_covariances(covariances).diagonal(dim1=1, dim2=2).clamp(min=0).mean(0)  # (d,)
    shared = ((merged.shared @ joint(covariances)) * merged.shared).sum(1).clamp(min=0)  # (r,)
    scale = scale_between(power(heads), power(shared))
    return replace(merged, shared=scale[:, None] * merged.shared, readers=merged.readers / scale)
