"""The linear algebra that merges and latents share, against values worked out by hand or another formula."""

from __future__ import annotations

import pytest
import torch
from kvconvert.convert.algebra.linear import (
    align_phase,
    floored_roots,
    pseudo_inverse,
    root_and_inverse,
    scale_between,
    solve_ridge,
)
from torch import Tensor


def diagonal(*values: float) -> Tensor:
    return torch.diag(torch.tensor(values, dtype=torch.float64))


def random(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def test_the_tolerance_decides_which_eigenvalues_count() -> None:
    torch.testing.assert_close(pseudo_inverse(diagonal(4.0, 8e-12, 0.0)), diagonal(0.25, 1.25e11, 0.0))
    assert torch.equal(pseudo_inverse(diagonal(4.0, 2e-12, 0.0)), diagonal(0.25, 0.0, 0.0))


def test_a_root_times_itself_is_the_matrix_and_its_inverse_undoes_it() -> None:
    rows = random(3, 5)
    matrix = rows.T @ rows  # of rank 3
    root, inverse = root_and_inverse(matrix)
    torch.testing.assert_close(root @ root, matrix)
    torch.testing.assert_close(root, root.T)
    torch.testing.assert_close(root @ inverse @ root, root)
    assert torch.linalg.matrix_rank(inverse, rtol=1e-9) == 3
    assert root_and_inverse(diagonal(4.0, 2e-12))[1].tolist() == [[0.5, 0.0], [0.0, 0.0]]


def test_roots_have_a_floor_to_divide_by() -> None:
    roots = floored_roots(torch.tensor([[4.0, 0.0]], dtype=torch.float64))
    torch.testing.assert_close(roots, torch.tensor([[2.0, 2e-6]], dtype=torch.float64))
    assert (floored_roots(torch.zeros(2, dtype=torch.float64)) > 0).all()
    assert floored_roots(torch.zeros(0, 3)).shape == (0, 3)


@pytest.mark.parametrize("phase", [1j, -1, -1j])
def test_a_phase_does_not_change_an_aligned_vector(phase: complex) -> None:
    vectors = torch.complex(random(2, 3, 4), random(3, 2, 4).transpose(0, 1))
    aligned = align_phase(vectors)
    torch.testing.assert_close(align_phase(phase * vectors), aligned)
    torch.testing.assert_close(aligned.abs(), vectors.abs())
    largest = aligned.flatten(0, 1)[range(6), aligned.abs().flatten(0, 1).argmax(1)]
    torch.testing.assert_close(largest, largest.abs().to(largest.dtype))
    assert not torch.allclose(phase * vectors, vectors)


def test_a_scale_brings_rows_to_a_power_and_leaves_rows_of_zero() -> None:
    wanted, found = torch.tensor([9.0, 0.0, 1.0]), torch.tensor([1.0, 1.0, 0.0])
    assert scale_between(wanted, found).tolist() == [3.0, 1.0, 1.0]


def test_a_ridge_is_least_squares_with_rows_added() -> None:
    """argmin over W of ‖W x − y‖² + λ‖W‖² is plain least squares on inputs with √λ I beside them."""
    inputs, outputs, strength = random(4, 9), random(2, 9), torch.tensor(0.7, dtype=torch.float64)
    found = solve_ridge(outputs @ inputs.T, inputs @ inputs.T, strength)
    beside = torch.cat([inputs, strength.sqrt() * torch.eye(4, dtype=torch.float64)], dim=1)
    padded = torch.cat([outputs, torch.zeros(2, 4, dtype=torch.float64)], dim=1)
    torch.testing.assert_close(found, torch.linalg.lstsq(beside.T, padded.T).solution.T)
    plain = solve_ridge(outputs @ inputs.T, inputs @ inputs.T, torch.zeros(()))
    assert not torch.allclose(plain, found)
