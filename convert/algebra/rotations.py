"""Which dims of a head rotate with the position, how fast, and in which order its pairs lie."""

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
    """The rotations R of one head and S of another between a query and the keys before it, at random distances.

    left: (m, m) and right: (n, n), complex and unitary; the rotations by one position are diagonal in them, with
    e^{iω}. coherence: (m, n), E e^{i (ω_a − ω_b) distance}.
    """

    left: Tensor
    right: Tensor
    coherence: Tensor

    def mean(self, matrix: Tensor) -> Tensor:
        """E[R matrix Sᵀ]; matrix is (…, m, n)."""
        return self._mean(matrix, self.coherence)

    def mean_back(self, matrix: Tensor) -> Tensor:
        """E[Rᵀ matrix S]."""
        return self._mean(matrix, self.coherence.conj())

    def _mean(self, matrix: Tensor, coherence: Tensor) -> Tensor:
        turned = coherence * (self.left @ matrix.to(self.left.dtype) @ self.right.mH)
        mean: Tensor = (self.left.mH @ turned @ self.right).real
        return mean


@dataclass(frozen=True)
class Rotary:
    """The first dims of a head rotate, two for each of `frequencies`, in radians per position.

    Pairs are (i, i + half of the dims), or if `interleaved` (2i, 2i + 1). `longest` is the longest distance between a
    query and a key.
    """

    frequencies: tuple[float, ...]
    interleaved: bool = False
    longest: int = 1

    @property
    def dims(self) -> int:
        return 2 * len(self.frequencies)

    def half_split(self, head: Tensor) -> Tensor:
        """The rows of a head, (head_dim, …), with rotary pairs (i, i + dims / 2) whatever their order."""
        return head[self._order(head)]

    def original(self, head: Tensor) -> Tensor:
        """The inverse of `half_split`."""
        return head[self._order(head).argsort()]

    def _order(self, head: Tensor) -> Tensor:
        import torch

        order = torch.arange(len(head))
        if self.interleaved:
            order[: self.dims] = torch.cat([order[0 : self.dims : 2], order[1 : self.dims : 2]])
        return order


def expected_rotation(rotary: Rotary, head_dim: int) -> ExpectedRotation:
    """Of a half-split head with itself, at distances below `longest`, a distance n as likely as 1 / (n + 1)."""
    return expected_rotation_between(rotary, head_dim, rotary, head_dim)


@cache
def expected_rotation_between(
    one: Rotary, one_dim: int, other: Rotary, other_dim: int, centred: float = 0.0
) -> ExpectedRotation:
    """Of two half-split heads, at the distances of `expected_rotation` that the first has.

    `centred`: with so much of their mean left out, which a key without position can make up for.
    """
    import torch

    angular, others = _angular(one, one_dim), _angular(other, other_dim)
    coherence = torch.zeros(one_dim, other_dim, dtype=torch.complex128)
    for distances, likelihood in _distances(one.longest):
        phases = torch.exp(1j * angular[:, None] * distances)
        coherence += (phases * likelihood) @ torch.exp(1j * others[:, None] * distances).mH
    if centred:
        coherence -= centred * torch.outer(_mean_turn(one, one_dim), _mean_turn(other, other_dim).conj())
    return ExpectedRotation(_basis(one, one_dim), _basis(other, other_dim), coherence)


def _mean_turn(rotary: Rotary, head_dim: int) -> Tensor:
    """E of the rotation, on the diagonal of `_basis`."""
    import torch

    phases = mean_phases(rotary)
    return torch.cat([phases.conj(), phases, torch.ones(head_dim - rotary.dims, dtype=phases.dtype)])


def mean_rotation(rotary: Rotary, head_dim: int) -> Tensor:
    """E of the rotation of a half-split head by the distances of `expected_rotation`, (head_dim, head_dim)."""
    basis = _basis(rotary, head_dim)
    mean: Tensor = (basis.mH @ (_mean_turn(rotary, head_dim)[:, None] * basis)).real
    return mean


def _angular(rotary: Rotary, head_dim: int) -> Tensor:
    """By how much each dim of `_basis` turns per position: a key n positions before the query is turned back by n."""
    import torch

    angular = torch.tensor(rotary.frequencies, dtype=torch.float64)
    return torch.cat([-angular, angular, torch.zeros(head_dim - rotary.dims, dtype=torch.float64)])


def _basis(rotary: Rotary, head_dim: int) -> Tensor:
    import torch

    pairs = torch.eye(len(rotary.frequencies), dtype=torch.complex128) / 2**0.5
    basis = torch.eye(head_dim, dtype=torch.complex128)
    basis[: rotary.dims, : rotary.dims] = torch.cat(
        [torch.cat([pairs, 1j * pairs], dim=1), torch.cat([pairs, -1j * pairs], dim=1)]
    )
    return basis


@cache
def mean_phases(rotary: Rotary) -> Tensor:
    """E e^{iω distance} of each frequency, (F,), at the distances of `expected_rotation`."""
    import torch

    angular = torch.tensor(rotary.frequencies, dtype=torch.float64)
    mean = torch.zeros(len(angular), dtype=torch.complex128)
    for distances, likelihood in _distances(rotary.longest):
        mean += (torch.exp(1j * angular[:, None] * distances) * likelihood).sum(1)
    return mean


def _distances(longest: int) -> Iterator[tuple[Tensor, Tensor]]:
    """The distances below `longest`, in parts, and how likely each is."""
    import torch

    total = (1 / torch.arange(1, longest + 1, dtype=torch.float64)).sum()
    for distances in torch.arange(longest, dtype=torch.float64).split(_DISTANCES_AT_ONCE):
        yield distances, 1 / (distances + 1) / total
