"""The linear algebra that merges and latents share, against values worked out by hand or another formula."""

from __future__ import annotations

import pytest
import torch
from kvconvert.convert.algebra.linear import (
    WhiteInputs,
    align_phase,
    floored_roots,
    pseudo_inverse,
    root_and_inverse,
    scale_between,
    solve_ridge,
    symmetric_product,
    top_eigenvectors,
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


@pytest.mark.parametrize("outlier", [1.0, 1e2], ids=["flat", "with-an-outlier"])
def test_top_eigenvectors_of_a_large_matrix_keep_what_float64_keeps(outlier: float) -> None:
    """Flat, or so but for one value, as with an attention sink: both are hard to tell apart in float32.

    An eigenvector's error in float32 costs its square: with a largest value 1e4 times the others (1e-7 · 1e4)², what is
    kept of those differs by less than 1e-6, 16-bit weights by 4e-6. The control are the same steps from random vectors.
    """
    rows = random(1100, 1024) * torch.linspace(1, 0.2, 1100, dtype=torch.float64)[:, None]
    rows[0] *= outlier
    matrix = rows.T @ rows
    values, vectors = top_eigenvectors(matrix, 64)
    expected = torch.linalg.eigvalsh(matrix).flip(0)[:64]
    others = expected[1:].sum().item()
    assert values[0].item() == pytest.approx(expected[0].item(), rel=1e-12)
    assert values[1:].sum().item() == pytest.approx(others, rel=1e-12 if outlier == 1 else 1e-7)
    torch.testing.assert_close((vectors.T @ matrix @ vectors).diagonal(), values)
    torch.testing.assert_close(vectors.T @ vectors, torch.eye(64, dtype=torch.float64), rtol=0, atol=1e-12)
    vectors = torch.linalg.qr(matrix @ (matrix @ random(1024, 96)))[0]
    assert torch.linalg.eigvalsh(vectors.T @ matrix @ vectors)[-64:-1].sum().item() < 0.99 * others


def test_a_product_known_to_be_symmetric_is_the_product() -> None:
    left = random(21, 30)
    torch.testing.assert_close(symmetric_product(left, left), left @ left.T)


@pytest.mark.parametrize("dead", [False, True], ids=["all-dims", "a-dim-that-is-always-zero"])
def test_rows_over_white_inputs_have_the_moments_of_the_inputs(dead: bool) -> None:
    x = torch.cat([random(40, 9) + 2, torch.ones(40, 1, dtype=torch.float64)], dim=1)
    if dead:
        x[:, 3] = 0
    gram, rows = x.T @ x / 40, random(6, 10)
    inputs = WhiteInputs.of(gram)
    white = inputs.rows(rows)
    assert inputs.triangular is not dead
    torch.testing.assert_close(white @ white.T, rows @ gram @ rows.T)
    torch.testing.assert_close(white[:, -1], rows @ x.mean(0))
    centred = (x @ rows.T).T.cov(correction=0)
    torch.testing.assert_close(white[:, :-1] @ white[:, :-1].T, centred)
