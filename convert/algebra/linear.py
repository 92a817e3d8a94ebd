"""Linear algebra that merges, latents and refits share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

__all__ = [
    "TOLERANCE",
    "WhiteInputs",
    "align_phase",
    "floored_roots",
    "pseudo_inverse",
    "root_and_inverse",
    "scale_between",
    "solve_ridge",
    "symmetric_product",
    "top_eigenvectors",
]

TOLERANCE = 1e-12
"""The fraction of the largest eigenvalue below which one counts as zero: where an (n, n) matrix in float64 has a zero,
rounding leaves about 1e-16 · n of the largest there."""


_LARGE, _GUARD, _TOLD_APART = 1024, 32, 1e-5  # of `top_eigenvectors`; the guard makes its iteration converge
_BLOCKS = 8  # of rows: 9 / 16 of the products of a symmetric matrix are computed, and each is large


def pseudo_inverse(matrix: Tensor) -> Tensor:
    """Return the pseudo-inverse of a symmetric matrix, (n, n) or a batch (…, n, n), in its dtype.

    Eigenvalues below TOLERANCE times the largest absolute one count as zero.
    """
    import torch

    inverse: Tensor = torch.linalg.pinv(matrix, hermitian=True, rtol=TOLERANCE)
    return inverse


def root_and_inverse(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Return the symmetric square roots of positive semidefinite matrices, (…, n, n), and the roots' pseudo-inverses.

    Eigenvalues of a matrix below TOLERANCE times its largest are left out of the pseudo-inverse.
    """
    import torch

    values, vectors = torch.linalg.eigh(matrix)
    roots = values.clamp(min=0).sqrt()[..., None, :]
    present = roots > TOLERANCE**0.5 * roots.amax(-1, keepdim=True)
    inverse = torch.where(present, 1 / roots.clamp(min=1e-300), torch.zeros_like(roots))
    return vectors * roots @ vectors.mT, vectors * inverse @ vectors.mT


@dataclass(frozen=True)
class WhiteInputs:
    """Inputs x with a 1 appended as a linear map of inputs whose second moments are the identity.

    Rows w over x become rows over those, of the same length, so that E[(w · x) (w' · x)] is a product of rows without
    the moments in between. The last entry is the mean of w · x, the others are what varies.
    """

    factor: Tensor  # (n, n), whose product with its transpose is the covariance of x without the 1
    triangular: bool  # whether `factor` is lower triangular, as it is but for inputs that do not span all dims
    means: Tensor  # (n + 1,)

    @classmethod
    def of(cls, gram: Tensor) -> WhiteInputs:
        """From E[x xᵀ] with a 1 appended to x, or another constant, (n + 1, n + 1), float64."""
        import torch

        means = gram[:, -1] / gram[-1, -1].sqrt()
        covariance = gram[:-1, :-1] - torch.outer(means[:-1], means[:-1])
        factor, failed = torch.linalg.cholesky_ex(covariance)
        if failed:
            return cls(root_and_inverse(covariance)[0], False, means)
        return cls(factor, True, means)

    def rows(self, rows: Tensor) -> Tensor:
        """Return rows over x, (…, n + 1), as rows over white inputs, in the same shape."""
        white = rows.new_empty(rows.shape)
        white[..., -1] = rows @ self.means
        size = len(self.factor)
        step = -(-size // _BLOCKS) if self.triangular else size
        for start in range(0, size, step):
            first = start if self.triangular else 0
            white[..., start : min(start + step, size)] = (
                rows[..., first:-1] @ self.factor[first:, start : start + step]
            )
        return white


def top_eigenvectors(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Return the `rank` largest eigenvalues, (rank,) from the largest on, of a symmetric (n, n), and their vectors.

    The vectors are orthonormal columns, (n, rank). Of a large float64 matrix the eigenvectors are those of float32,
    improved by two steps of subspace iteration in float64, which costs half of the decomposition in float64 and finds
    the same energies (`test_top_eigenvectors_of_a_large_matrix_keep_what_float64_keeps`). That needs eigenvalues that
    float32 tells from rounding: where the smallest one wanted is below 1e-5 of the largest, all is done in float64.
    """
    import torch

    size, more = len(matrix), rank + _GUARD
    if size >= _LARGE and 4 * more <= size:
        vectors = torch.linalg.eigh(matrix.float())[1][:, -more:].to(matrix.dtype)
        for _ in range(2):
            vectors = torch.linalg.qr(matrix @ vectors)[0]
        values, mixes = torch.linalg.eigh(vectors.T @ matrix @ vectors)
        if values[-rank] > _TOLD_APART * values[-1]:
            return values.flip(0)[:rank], vectors @ mixes.flip(1)[:, :rank]
    values, vectors = torch.linalg.eigh(matrix)
    return values.flip(0)[:rank], vectors.flip(1)[:, :rank]


def symmetric_product(left: Tensor, right: Tensor) -> Tensor:
    """Return left · rightᵀ, (n, n) from two (n, k), where that is known to be symmetric: for little more than half."""
    rows = len(left)
    product = left.new_empty(rows, rows)
    size = max(-(-rows // _BLOCKS), 1)
    for start in range(0, rows, size):
        block = left[start : start + size] @ right[start:].T
        product[start : start + size, start:] = block
        product[start:, start : start + size] = block.T
    return product


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

    damped = normal.clone()
    damped.diagonal().add_(strength)
    factor, failed = torch.linalg.cholesky_ex(damped)
    if failed:  # a normal matrix without full rank, and next to no ridge
        solution: Tensor = torch.linalg.solve(damped, right.T).T
        return solution
    return torch.cholesky_solve(right.T, factor).T
