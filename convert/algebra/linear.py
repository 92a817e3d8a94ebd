"""Linear algebra that merges, latents and refits share."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

__all__ = [
    "TOLERANCE",
    "align_phase",
    "floored_roots",
    "pseudo_inverse",
    "root_and_inverse",
    "scale_between",
    "solve_ridge",
]

TOLERANCE = 1e-12
"""The fraction of the largest eigenvalue below which one counts as zero: where an (n, n) matrix in float64 has a zero,
rounding leaves about 1e-16 · n of the largest there."""


def pseudo_inverse(matrix: Tensor) -> Tensor:
    """Return the pseudo-inverse of a symmetric matrix, (n, n) or a batch (…, n, n), in its dtype.

    Eigenvalues below TOLERANCE times the largest absolute one count as zero.
    """
    import torch

    inverse: Tensor = torch.linalg.pinv(matrix, hermitian=True, rtol=TOLERANCE)
    return inverse


def root_and_inverse(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Return the symmetric square root of a positive semidefinite matrix, (n, n), and the root's pseudo-inverse.

    Eigenvalues of `matrix` below TOLERANCE times the largest are left out of the pseudo-inverse.
    """
    import torch

    values, vectors = torch.linalg.eigh(matrix)
    roots = values.clamp(min=0).sqrt()
    present = roots > TOLERANCE**0.5 * roots.max()
    inverse = torch.where(present, 1 / roots.clamp(min=1e-300), torch.zeros_like(roots))
    return vectors * roots @ vectors.T, vectors * inverse @ vectors.T


def floored_roots(powers: Tensor) -> Tensor:
    """Return √powers, of any shape, after raising each power to at least TOLERANCE times the largest.

    The results can be divided by: none is zero, even where all powers are.
    """
    smallest = TOLERANCE * powers.max().clamp(min=1e-300) if powers.numel() else 0.0
    return powers.clamp(min=smallest).sqrt()


def align_phase(vectors: Tensor) -> Tensor:
    """Multiply complex vectors, (…, n), by unit scalars, so that the largest entry of each is real and positive.

    An eigenvector's phase is arbitrary. With this choice the head of the largest weight reads its own key unrotated.
    """
    largest = vectors.gather(-1, vectors.abs().argmax(-1, keepdim=True))  # (…, 1)
    return vectors * (largest.conj() / largest.abs())


def scale_between(wanted: Tensor, found: Tensor) -> Tensor:
    """Return what rows of mean square `found` are multiplied by to have the mean square `wanted`; 1 where one is 0."""
    import torch

    usable = (wanted > 0) & (found > 0)
    return torch.where(usable, (wanted / found.clamp(min=1e-300)).sqrt(), torch.ones_like(found))


def solve_ridge(right: Tensor, normal: Tensor, strength: Tensor) -> Tensor:
    """Return right · (normal + strength · I)⁻¹, the solution of a ridge regression: (m, n) from `right`, (m, n).

    normal: (n, n), symmetric, the dtype of the result. strength: a scalar, added to each entry of its diagonal.
    """
    import torch

    damped = normal + strength * torch.eye(len(normal), dtype=normal.dtype)
    solution: Tensor = torch.linalg.solve(damped, right.T).T
    return solution
