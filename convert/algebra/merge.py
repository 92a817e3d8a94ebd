"""Merging heads with the least error: closed forms for keys and values on covariances of calibration text.

docs/merging.md derives them. Everything here is float64. Shapes: D hidden_size, d head_dim, m heads of a group. `gram`
is E[x xᵀ] of the attention's input x with a 1 appended, (D + 1, D + 1), so that a weight with its bias as last column
has the covariance W · gram · Wᵀ.
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
_TOLERANCE = 1e-12  # of the largest eigenvalue: a smaller one counts as zero


@dataclass(frozen=True)
class Merged:
    """What a group's heads become: `shared`, and how each head reads it.

    shared: (r, D + 1), the rows of the one key or value. readers[h]: (d, r), so that head h ≈ readers[h] · shared; for
    rotary pairs r = d and the reader commutes with the rotations. `kept` of `total` is the weighted energy retained.
    """

    shared: Tensor
    readers: list[Tensor]
    kept: float
    total: float

    @property
    def retained(self) -> float:
        """The fraction of the energy that is kept."""
        return self.kept / self.total if self.total > 0 else 1.0


def merge_linear(heads: Sequence[Tensor], weights: Sequence[Tensor], gram: Tensor, rank: int) -> Merged:
    """The best shared rows where every invertible map of a head is free: values, and keys that do not rotate.

    heads: m tensors (d, D + 1). weights: m tensors (d, d), the metric in which head h's error counts: Σ W_oᵀ W_o of its
    query heads for values, Σ E[q qᵀ] for keys. Minimises Σ_h ‖weights_h^½ (head_h − reader_h · shared) gram^½‖² by the
    top `rank` eigenvectors of the heads' joint weighted covariance.
    """
    import torch

    roots, inverses = zip(*(root_and_inverse(weight) for weight in weights), strict=True)
    stacked = torch.cat([root @ head for root, head in zip(roots, heads, strict=True)])  # (m · d, D + 1)
    values, vectors = torch.linalg.eigh(stacked @ gram @ stacked.T)
    values, vectors = values.flip(0)[:rank], vectors.flip(1)[:, :rank]
    shared = vectors.T @ stacked
    readers = [inverse @ part for inverse, part in zip(inverses, vectors.chunk(len(heads)), strict=True)]
    total = sum(torch.einsum("ij,jk,ik->", block, gram, block) for block in stacked.chunk(len(heads)))
    return _with_scale_of(heads, gram, Merged(shared, readers, float(values.clamp(min=0).sum()), float(total)))


def merge_rotary(heads: Sequence[Tensor], powers: Sequence[Tensor], gram: Tensor) -> Merged:
    """The best shared key where only a complex scalar per rotary pair and head is free.

    heads: m tensors (2 · F, D + 1), rows i and i + F a pair. powers: m tensors (F,), E|q|² of each pair, summed over
    the query heads of the head. Per pair, with the heads' keys as complex numbers z ∈ C^m, the shared key is the top
    eigenvector of D^½ E[z zᴴ] D^½ and head h reads it through the scalar u_h / √D_h.
    """
    import torch

    num_pairs = heads[0].shape[0] // 2
    keys = torch.stack([torch.complex(head[:num_pairs], head[num_pairs:]) for head in heads], dim=1)  # (F, m, D + 1)
    roots = floored_roots(torch.stack(list(powers), dim=1), tolerance=_TOLERANCE)  # (F, m)
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
    """The rotations of a shared key with itself, of it with the heads' keys, and of these with themselves."""

    shared: ExpectedRotation
    cross: ExpectedRotation
    heads: ExpectedRotation

    @classmethod
    def same(cls, rotation: ExpectedRotation) -> ExpectedRotations:
        """Of a shared key with the heads' rotations."""
        return cls(rotation, rotation, rotation)


def merge_at_distances(
    start: Merged, heads: Sequence[Tensor], weights: Sequence[Tensor], gram: Tensor, rotations: ExpectedRotations
) -> Merged:
    """`start` improved for keys that turn by the distances that occur, instead of by any angle.

    heads: m tensors (d, D + 1). weights: m tensors (d, d), E[q qᵀ] summed over the query heads of head h. With R the
    rotation of the heads by a random distance and S that of the shared key, lowers
    Σ_h E tr(weights_h (R head_h − reader_h S shared) gram (…)ᵀ) by turns, each one exact: the readers for the shared
    key, the shared key for the readers. Readers need not commute with rotations here: pairs that hardly turn within the
    distances that occur mix almost freely.
    """
    import torch

    size = len(heads[0])
    stacked = torch.cat(list(heads))
    joint = (stacked @ gram @ stacked.T).unflatten(0, (-1, size)).unflatten(2, (-1, size)).transpose(1, 2)
    own = start.shared @ gram @ start.shared.T
    cross = [start.shared @ gram @ head.T for head in heads]
    mixes: list[Tensor] = []
    for _ in range(_ROUNDS):
        readers = _best_readers(own, cross, rotations)
        seen = [(reader.T @ weight, reader) for reader, weight in zip(readers, weights, strict=True)]
        read = torch.stack([left @ reader for left, reader in seen]).sum(0)
        inverse = pseudo_inverse(rotations.shared.mean_back(read), tolerance=_TOLERANCE)
        mixes = [inverse @ rotations.cross.mean_back(left) for left, _ in seen]
        cross = list(torch.einsum("gij,ghjk->hik", torch.stack(mixes), joint))
        own = torch.stack([part @ mix.T for part, mix in zip(cross, mixes, strict=True)]).sum(0)
    readers = _best_readers(own, cross, rotations)
    shared = torch.stack([mix @ head for mix, head in zip(mixes, heads, strict=True)]).sum(0)
    kept = [
        (weight * (rotations.cross.mean(part).T @ reader.T)).sum()
        for weight, part, reader in zip(weights, cross, readers, strict=True)
    ]
    total = [(weight * rotations.heads.mean(joint[head, head])).sum() for head, weight in enumerate(weights)]
    return _with_scale_of(heads, gram, Merged(shared, readers, float(sum(kept)), float(sum(total))))


def _best_readers(own: Tensor, cross: Sequence[Tensor], rotations: ExpectedRotations) -> list[Tensor]:
    """For each head argmin over B of E‖R head − B S shared‖², from E[shared sharedᵀ] and E[shared headᵀ]."""
    inverse = pseudo_inverse(rotations.shared.mean(own), tolerance=_TOLERANCE)
    return [rotations.cross.mean(part).T @ inverse for part in cross]


def pair_losses(covariances: Tensor, weights: Sequence[Tensor], rotation: ExpectedRotation | None = None) -> Tensor:
    """What merging two heads loses at least, of the energy of all, (m, m): exactly what `merge_linear` does.

    covariances: of every two heads, (m, m, d, d). With `rotation` heads are keys at random distances, and the shared
    key may mix all that they are there: more than `merge_at_distances` can, so that this is its lower bound.
    """
    import torch

    size, num_heads = covariances.shape[-1], len(covariances)
    roots = torch.stack([root_and_inverse(weight)[0] for weight in weights])

    def weighed(blocks: Tensor, one: Tensor, other: Tensor) -> Tensor:
        return one @ (rotation.mean(blocks) if rotation is not None else blocks) @ other

    own = weighed(covariances.diagonal().permute(2, 0, 1), roots, roots)
    losses = torch.zeros(num_heads, num_heads, dtype=own.dtype)
    for one in range(num_heads - 1):
        others = range(one + 1, num_heads)
        cross = weighed(covariances[one, one + 1 :], roots[one], roots[one + 1 :])
        upper = torch.cat([own[one].expand(len(others), -1, -1), cross], dim=2)
        lower = torch.cat([cross.mT, own[one + 1 :]], dim=2)
        losses[one, one + 1 :] = torch.linalg.eigvalsh(torch.cat([upper, lower], dim=1))[:, :size].clamp(min=0).sum(1)
    total = own.diagonal(dim1=1, dim2=2).sum().clamp(min=1e-300)
    fractions: Tensor = (losses + losses.T) / total
    return fractions


def merge_mean(heads: Sequence[Tensor], weights: Sequence[Tensor], gram: Tensor) -> Merged:
    """The heads' mean, which each reads as it is: where nothing is free. Arguments as those of `merge_linear`."""
    import torch

    shared = torch.stack(list(heads)).mean(0)
    identity = torch.eye(len(shared), dtype=shared.dtype)

    def energy(head: Tensor, weight: Tensor) -> float:
        return float(((head.T @ weight @ head) * gram).sum())

    total = sum(energy(head, weight) for head, weight in zip(heads, weights, strict=True))
    error = sum(energy(head - shared, weight) for head, weight in zip(heads, weights, strict=True))
    return Merged(shared, [identity] * len(heads), max(total - error, 0.0), total)


def _rotation(scalars: Tensor) -> Tensor:
    """The real (2 · F, 2 · F) matrix of a multiplication of each pair (i, i + F) by a complex scalar (F,)."""
    import torch

    real, imaginary = torch.diag(scalars.real), torch.diag(scalars.imag)
    upper, lower = torch.cat([real, -imaginary], dim=1), torch.cat([imaginary, real], dim=1)
    rotation: Tensor = torch.cat([upper, lower])
    return rotation


def _with_scale_of(heads: Sequence[Tensor], gram: Tensor, merged: Merged, *, per_pair: bool = False) -> Merged:
    """The same with a shared head of the heads' rms, over all rows or pair by pair: safe in 16 bits."""
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
