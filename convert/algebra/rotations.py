"""Rotary positions (RoPE): which dims of a head rotate, how fast, and what that does to keys on average."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

__all__ = [
    "ExpectedRotation",
    "Rotary",
    "expected_rotation",
    "expected_rotation_between",
    "mean_phases",
    "mean_rotation",
]

_DISTANCES_AT_ONCE = 8192


@dataclass(frozen=True)
class ExpectedRotation:
    """The expectation over random distances of R M Sᵀ, with R and S the rotations of two kinds of key by a distance.

    Their first `left_pairs` and `right_pairs` dims, and as many after those, are rotary pairs, the rest does not
    rotate. A pair is the complex number a + ib, which a distance n multiplies by e^{−iωn}. coherence[a, b] is
    E e^{i (ω_a − ω_b) n} for ω_a and ω_b in −ω of the pairs, ω of the pairs, and 0 for the rest, less a part of the
    product of the means where it is centred.
    """

    left_pairs: int
    right_pairs: int
    coherence: Tensor  # (m, n), complex

    def mean(self, matrix: Tensor) -> Tensor:
        """Return E[R matrix Sᵀ], real, in the shape of `matrix`: (…, m, n)."""
        return self._mean(matrix, self.coherence)

    def mean_back(self, matrix: Tensor) -> Tensor:
        """Return E[Rᵀ matrix S], real, in the shape of `matrix`: (…, m, n)."""
        return self._mean(matrix, self.coherence.conj())

    def _mean(self, matrix: Tensor, coherence: Tensor) -> Tensor:
        """A 2 × 2 block of two pairs is c z + a z̄ for two complex c and a, which a distance multiplies."""
        import torch

        left, right = self.left_pairs, self.right_pairs
        upper, lower, still = matrix.tensor_split([left, 2 * left], dim=-2)
        mean = torch.empty_like(matrix)
        linear = torch.complex(
            upper[..., :right] + lower[..., right : 2 * right], lower[..., :right] - upper[..., right : 2 * right]
        )
        conjugate = torch.complex(
            upper[..., :right] - lower[..., right : 2 * right], lower[..., :right] + upper[..., right : 2 * right]
        )
        linear = linear * (coherence[:left, :right] / 2)
        conjugate = conjugate * (coherence[:left, right : 2 * right] / 2)
        mean[..., :left, :right] = linear.real + conjugate.real
        mean[..., left : 2 * left, right : 2 * right] = linear.real - conjugate.real
        mean[..., left : 2 * left, :right] = linear.imag + conjugate.imag
        mean[..., :left, right : 2 * right] = conjugate.imag - linear.imag
        beside = torch.complex(upper[..., 2 * right :], lower[..., 2 * right :]) * coherence[:left, 2 * right :]
        mean[..., :left, 2 * right :], mean[..., left : 2 * left, 2 * right :] = beside.real, beside.imag
        below = torch.complex(still[..., :right], -still[..., right : 2 * right]) * coherence[2 * left :, :right]
        mean[..., 2 * left :, :right], mean[..., 2 * left :, right : 2 * right] = below.real, -below.imag
        mean[..., 2 * left :, 2 * right :] = still[..., 2 * right :] * coherence[2 * left :, 2 * right :].real
        return mean


@dataclass(frozen=True)
class Rotary:
    """How the keys of a head rotate: pairs of its first dims, one pair for each of `frequencies`, in radians per token.

    The pairs are dims (i, i + half of the rotating dims), which is called half-split, or (2i, 2i + 1) if `interleaved`.
    `longest` is the greatest distance between a query and a key, in tokens.
    """

    frequencies: tuple[float, ...]
    interleaved: bool = False
    longest: int = 1

    @property
    def dims(self) -> int:
        """The number of dims that rotate."""
        return 2 * len(self.frequencies)

    def half_split(self, head: Tensor) -> Tensor:
        """Return the rows of a head, (head_dim, …), reordered so that its rotary pairs are (i, i + dims / 2)."""
        return head[self._order(head)]

    def original(self, head: Tensor) -> Tensor:
        """Return half-split rows, (head_dim, …), in the class's own order: the inverse of `half_split`."""
        return head[self._order(head).argsort()]

    def _order(self, head: Tensor) -> Tensor:
        import torch

        order = torch.arange(len(head))
        if self.interleaved:
            order[: self.dims] = torch.cat([order[0 : self.dims : 2], order[1 : self.dims : 2]])
        return order


def expected_rotation(rotary: Rotary, head_dim: int) -> ExpectedRotation:
    """Return the expected rotation of a half-split head with itself.

    Distances are whole numbers below `longest`, and n is drawn with a probability proportional to 1 / (n + 1), since
    attention looks at near tokens more than at far ones.
    """
    return expected_rotation_between(rotary, head_dim, rotary, head_dim)


@cache
def expected_rotation_between(
    one: Rotary, one_dim: int, other: Rotary, other_dim: int, centred: float = 0.0
) -> ExpectedRotation:
    """Return the expected rotation of two half-split heads, of `one_dim` and `other_dim` dims, with each other.

    Distances are drawn as in `expected_rotation`, below the `longest` of `one`. `centred` is the fraction, from 0 to
    1, of the product of the two mean rotations that is subtracted: that part needs no position, and a latent without
    one can hold it.
    """
    import torch

    angular, others = _angular(one, one_dim), _angular(other, other_dim)
    coherence = torch.zeros(one_dim, other_dim, dtype=torch.complex128)
    for distances, likelihood in _distances(one.longest):
        phases = torch.exp(1j * angular[:, None] * distances)
        coherence += (phases * likelihood) @ torch.exp(1j * others[:, None] * distances).mH
    if centred:
        coherence -= centred * torch.outer(_mean_in_basis(one, one_dim), _mean_in_basis(other, other_dim).conj())
    return ExpectedRotation(len(one.frequencies), len(other.frequencies), coherence)


def _mean_in_basis(rotary: Rotary, head_dim: int) -> Tensor:
    """The expected rotation, which is diagonal in `_basis`: its entries, (head_dim,) complex."""
    import torch

    phases = mean_phases(rotary)
    return torch.cat([phases.conj(), phases, torch.ones(head_dim - rotary.dims, dtype=phases.dtype)])


def mean_rotation(rotary: Rotary, head_dim: int) -> Tensor:
    """Return the mean rotation of a half-split head, (head_dim, head_dim), at the distances of `expected_rotation`."""
    basis = _basis(rotary, head_dim)
    mean: Tensor = (basis.mH @ (_mean_in_basis(rotary, head_dim)[:, None] * basis)).real
    return mean


def _angular(rotary: Rotary, head_dim: int) -> Tensor:
    """The angle by which each dim of `_basis` rotates per token of distance.

    A pair has −ω and ω, in this order, since a key n tokens before the query is rotated back by n relative to it.
    """
    import torch

    angular = torch.tensor(rotary.frequencies, dtype=torch.float64)
    return torch.cat([-angular, angular, torch.zeros(head_dim - rotary.dims, dtype=torch.float64)])


def _basis(rotary: Rotary, head_dim: int) -> Tensor:
    """The complex basis, (head_dim, head_dim), in which the rotations of a half-split head are diagonal."""
    import torch

    pairs = torch.eye(len(rotary.frequencies), dtype=torch.complex128) / 2**0.5
    basis = torch.eye(head_dim, dtype=torch.complex128)
    basis[: rotary.dims, : rotary.dims] = torch.cat(
        [torch.cat([pairs, 1j * pairs], dim=1), torch.cat([pairs, -1j * pairs], dim=1)]
    )
    return basis


@cache
def mean_phases(rotary: Rotary) -> Tensor:
    """Return E e^{iωn} for each frequency ω, (F,) complex128, over the distances n of `expected_rotation`."""
    import torch

    angular = torch.tensor(rotary.frequencies, dtype=torch.float64)
    mean = torch.zeros(len(angular), dtype=torch.complex128)
    for distances, likelihood in _distances(rotary.longest):
        mean += (torch.exp(1j * angular[:, None] * distances) * likelihood).sum(1)
    return mean


def _distances(longest: int) -> Iterator[tuple[Tensor, Tensor]]:
    """The distances below `longest`, in parts that fit in memory, and the probability of each."""
    import torch

    total = (1 / torch.arange(1, longest + 1, dtype=torch.float64)).sum()
    for distances in torch.arange(longest, dtype=torch.float64).split(_DISTANCES_AT_ONCE):
        yield distances, 1 / (distances + 1) / total
