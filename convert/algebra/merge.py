"""Merging the heads of a group into one with the least error, in closed form, from second moments of a text.

docs/merging.md derives the formulas. Everything here is float64. Shapes: D hidden_size, d head_dim, m heads of a group.
`gram` is E[x xᵀ] of the attention's input x with a 1 appended, (D + 1, D + 1), so that a weight W with its bias as last
column has the covariance W · gram · Wᵀ. The energy of a head is tr(weight · covariance), where the weight, (d, d), says
how much an error of each of its dims counts. Where all heads of a group have an energy of zero, so that no key or value
is better than another, they become their mean.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from .linear import align_phase, floored_roots, pseudo_inverse, root_and_inverse, scale_between
from .rotations import ExpectedRotation

if TYPE_CHECKING:
    from torch import Tensor

__all__ = [
    "ExpectedRotations",
    "Merged",
    "merge_at_distances",
    "merge_linear",
    "merge_mean",
    "merge_rotary",
    "pair_losses",
]

_ROUNDS = 20  # the error falls by less than 1 % from the fifth on


@dataclass(frozen=True)
class Merged:
    """The one key or value that a group's heads share, and the map through which each head reads it.

    Head h is approximated by readers[h] · shared, which has r rows. `kept` is the part of the heads' energy, `total`,
    that the approximation retains.
    """

    shared: Tensor  # (r, D + 1)
    readers: list[Tensor]  # of m heads, (d, r) each
    kept: float
    total: float

    @property
    def retained(self) -> float:
        """The fraction of the heads' energy that is kept, from 0 to 1 but for rounding; 1 where there is none."""
        return self.kept / self.total if self.total > 0 else 1.0


def merge_linear(heads: Sequence[Tensor], weights: Sequence[Tensor], gram: Tensor, rank: int) -> Merged:
    """Merge values, or keys that do not rotate: each head may read the shared rows through any matrix.

    heads: m tensors (d, D + 1). weights: m tensors (d, d), the metric in which head h's error counts: Σ W_oᵀ W_o over
    the query heads of h for values, Σ E[q qᵀ] for keys. The top `rank` eigenvectors of the heads' joint weighted
    covariance minimise Σ_h ‖weights_h^½ (head_h − reader_h · shared) gram^½‖². A head without energy, one that is zero
    or that nothing reads, has the reader 0. Returns `rank` shared rows.
    """
    import torch

    roots, inverses = zip(*(root_and_inverse(weight) for weight in weights), strict=True)
    stacked = torch.cat([root @ head for root, head in zip(roots, heads, strict=True)])  # (m · d, D + 1)
    energies = [torch.einsum("ij,jk,ik->", block, gram, block) for block in stacked.chunk(len(heads))]
    if not any(energies):
        return _mean_of_rows(heads, rank)
    values, vectors = torch.linalg.eigh(stacked @ gram @ stacked.T)
    values, vectors = values.flip(0)[:rank], vectors.flip(1)[:, :rank]
    shared = vectors.T @ stacked
    readers = [
        inverse @ part if energy else torch.zeros_like(part)  # exactly: an eigenvector of the rest is free there
        for inverse, part, energy in zip(inverses, vectors.chunk(len(heads)), energies, strict=True)
    ]
    kept, total = float(values.clamp(min=0).sum()), float(sum(energies))
    return _with_scale_of(heads, gram, Merged(shared, readers, kept, total))


def merge_rotary(heads: Sequence[Tensor], powers: Sequence[Tensor], gram: Tensor) -> Merged:
    """Merge keys that rotate so that readers commute with every rotation: one complex scalar per pair and head.

    heads: m tensors (2 · F, D + 1), of which rows i and i + F are a rotary pair. powers: m tensors (F,), E|q|² of each
    pair, summed over the query heads of the head. For each pair, let z ∈ Cᵐ be the heads' keys as complex numbers, P
    the diagonal matrix of the heads' powers and u the top eigenvector of P^½ E[z zᴴ] P^½: the shared key is
    s = uᴴ P^½ z, and head h reads it as z_h ≈ (u_h / √P_h) s, up to a scale of each pair that gives s the heads' rms.
    That is the best where every angle between a query and a key is as likely. Returns 2 · F shared rows.
    """
    import torch

    num_pairs = heads[0].shape[0] // 2
    energies = [
        power.repeat(2) @ torch.einsum("ij,jk,ik->i", head, gram, head)
        for power, head in zip(powers, heads, strict=True)
    ]
    if not any(energies):
        return _mean_of_rows(heads, 2 * num_pairs)
    keys = torch.stack([torch.complex(head[:num_pairs], head[num_pairs:]) for head in heads], dim=1)  # (F, m, D + 1)
    roots = floored_roots(torch.stack(list(powers), dim=1))  # (F, m)
    weighted = roots[..., None] * keys
    values, vectors = torch.linalg.eigh(weighted @ gram.to(weighted.dtype) @ weighted.mH)  # of (F, m, m)
    top = align_phase(vectors[..., -1])  # (F, m)
    shared = (top.conj()[..., None] * weighted).sum(1)  # (F, D + 1)
    scalars = top / roots  # (F, m)
    merged = Merged(
        torch.cat([shared.real, shared.imag]),
        [_rotation(scalars[:, head]) for head in range(len(heads))],
        float(values[:, -1].clamp(min=0).sum()),
        float(values.clamp(min=0).sum()),
    )
    return _with_scale_of(heads, gram, merged, per_pair=True)


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


def merge_at_distances(
    start: Merged, heads: Sequence[Tensor], weights: Sequence[Tensor], gram: Tensor, rotations: ExpectedRotations
) -> Merged:
    """Improve the shared rows of `start`, keys that rotate, for the distances between query and key that are likely.

    heads: m tensors (d, D + 1), half-split. weights: m tensors (d, d), how much an error of head h counts: E[q qᵀ]
    summed over its query heads, or a multiple of that. Distances are not measured: `rotations` says how likely each is
    (`expected_rotation`, a distance n as 1 / (n + 1)), perhaps less a part of their mean. With R the
    rotation of the heads by a random distance and S that of the shared key, minimises
    Σ_h E tr(weights_h e_h gram e_hᵀ), where e_h = R head_h − reader_h S shared, by alternating two exact steps: the
    best readers for the shared key, then the best shared key for the readers. Readers need not commute with the
    rotations: pairs that rotate little within these distances can be mixed almost as if they did not rotate. Heads
    without energy leave `start` as it is.
    """
    import torch

    size = len(heads[0])
    stacked = torch.cat(list(heads))
    joint = (stacked @ gram @ stacked.T).unflatten(0, (-1, size)).unflatten(2, (-1, size)).transpose(1, 2)
    total = [(weight * rotations.heads.mean(joint[head, head])).sum() for head, weight in enumerate(weights)]
    if not any(total):
        return start
    power = start.shared @ gram @ start.shared.T  # E[shared sharedᵀ]
    cross = [start.shared @ gram @ head.T for head in heads]
    mixes: list[Tensor] = []
    for _ in range(_ROUNDS):
        readers = _best_readers(power, cross, rotations)
        weighted = [(reader.T @ weight, reader) for reader, weight in zip(readers, weights, strict=True)]
        read = torch.stack([left @ reader for left, reader in weighted]).sum(0)
        inverse = pseudo_inverse(rotations.shared.mean_back(read))
        mixes = [inverse @ rotations.cross.mean_back(left) for left, _ in weighted]
        cross = list(torch.einsum("gij,ghjk->hik", torch.stack(mixes), joint))
        power = torch.stack([part @ mix.T for part, mix in zip(cross, mixes, strict=True)]).sum(0)
    readers = _best_readers(power, cross, rotations)
    shared = torch.stack([mix @ head for mix, head in zip(mixes, heads, strict=True)]).sum(0)
    kept = [
        (weight * (rotations.cross.mean(part).T @ reader.T)).sum()
        for weight, part, reader in zip(weights, cross, readers, strict=True)
    ]
    return _with_scale_of(heads, gram, Merged(shared, readers, float(sum(kept)), float(sum(total))))


def _best_readers(power: Tensor, cross: Sequence[Tensor], rotations: ExpectedRotations) -> list[Tensor]:
    """For each head the B that minimises E‖R head − B S shared‖², from E[shared sharedᵀ] and E[shared headᵀ]."""
    inverse = pseudo_inverse(rotations.shared.mean(power))
    return [rotations.cross.mean(part).T @ inverse for part in cross]


def pair_losses(covariances: Tensor, weights: Sequence[Tensor], rotation: ExpectedRotation | None = None) -> Tensor:
    """Return the fraction of all heads' energy that merging two of them loses at least: (m, m), 0 on the diagonal.

    covariances: E[z_i z_jᵀ] of every two heads, (m, m, d, d). weights: m tensors (d, d). Without `rotation` the loss is
    that of `merge_linear`. With it, heads are keys at random distances, and the loss is a lower bound for
    `merge_at_distances`, since the shared key may here be any combination of the keys after their rotation.
    """
    import torch

    size, num_heads = covariances.shape[-1], len(covariances)
    roots = torch.stack([root_and_inverse(weight)[0] for weight in weights])

    def weighed(blocks: Tensor, one: Tensor, other: Tensor) -> Tensor:
        return one @ (rotation.mean(blocks) if rotation is not None else blocks) @ other

    alone = weighed(covariances.diagonal().permute(2, 0, 1), roots, roots)  # (m, d, d)
    losses = torch.zeros(num_heads, num_heads, dtype=alone.dtype)
    for one in range(num_heads - 1):
        others = range(one + 1, num_heads)
        cross = weighed(covariances[one, one + 1 :], roots[one], roots[one + 1 :])
        upper = torch.cat([alone[one].expand(len(others), -1, -1), cross], dim=2)
        lower = torch.cat([cross.mT, alone[one + 1 :]], dim=2)
        losses[one, one + 1 :] = torch.linalg.eigvalsh(torch.cat([upper, lower], dim=1))[:, :size].clamp(min=0).sum(1)
    total = alone.diagonal(dim1=1, dim2=2).sum().clamp(min=1e-300)
    fractions: Tensor = (losses + losses.T) / total
    return fractions


def merge_mean(heads: Sequence[Tensor], weights: Sequence[Tensor], gram: Tensor) -> Merged:
    """Merge heads into their mean, which each reads unchanged, for keys or values that may not be mapped.

    heads, weights and gram are those of `merge_linear`. Returns d shared rows.
    """
    import torch

    shared = torch.stack(list(heads)).mean(0)
    identity = torch.eye(len(shared), dtype=shared.dtype)

    def energy(head: Tensor, weight: Tensor) -> float:
        return float(((head.T @ weight @ head) * gram).sum())

    total = sum(energy(head, weight) for head, weight in zip(heads, weights, strict=True))
    error = sum(energy(head - shared, weight) for head, weight in zip(heads, weights, strict=True))
    return Merged(shared, [identity] * len(heads), max(total - error, 0.0), total)


def _mean_of_rows(heads: Sequence[Tensor], rank: int) -> Merged:
    """Heads without energy, (d, D + 1) each, as their mean, of which the first `rank` rows are shared."""
    import torch

    shared = torch.stack(list(heads)).mean(0)
    reader = torch.eye(len(shared), rank, dtype=shared.dtype)
    return Merged(reader.T @ shared, [reader] * len(heads), 0.0, 0.0)


def _rotation(scalars: Tensor) -> Tensor:
    """The real (2 · F, 2 · F) matrix of a multiplication of each pair (i, i + F) by a complex scalar (F,)."""
    import torch

    real, imaginary = torch.diag(scalars.real), torch.diag(scalars.imag)
    upper, lower = torch.cat([real, -imaginary], dim=1), torch.cat([imaginary, real], dim=1)
    rotation: Tensor = torch.cat([upper, lower])
    return rotation


def _with_scale_of(heads: Sequence[Tensor], gram: Tensor, merged: Merged, *, per_pair: bool = False) -> Merged:
    """The merge with the shared head scaled to the heads' rms, which is safe in 16 bits, and readers by the inverse.

    The scale is one for all rows or, `per_pair`, one for each rotary pair, which readers commute with.
    """
    import torch

    def power(head: Tensor) -> Tensor:
        rows: Tensor = torch.einsum("ij,jk,ik->i", head, gram, head).clamp(min=0)
        if per_pair:
            pairs: Tensor = rows.unflatten(0, (2, -1)).sum(0)
            return pairs.repeat(2)
        return rows.mean().expand(len(merged.shared))

    scale = scale_between(torch.stack([power(head) for head in heads]).mean(0), power(merged.shared))
    return Merged(
        scale[:, None] * merged.shared, [reader / scale for reader in merged.readers], merged.kept, merged.total
    )
