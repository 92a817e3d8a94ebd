"""The baselines of benchmarks/compare_merges.py do what their formulas say."""

from __future__ import annotations

import importlib.util
import math
from pathlib import Path
from types import ModuleType

import pytest
import torch
from kvconvert.convert.algebra.attention_shape import AttentionShape
from kvconvert.convert.algebra.heads import HeadGrouping
from kvconvert.convert.algebra.projections import Projections

SHAPE = AttentionShape(6, 4, 4, 4, (None,))
PAIRS = HeadGrouping.contiguous(4, 2)


@pytest.fixture(scope="module")
def script() -> ModuleType:
    path = Path(__file__).parents[1] / "benchmarks" / "compare_merges.py"
    spec = importlib.util.spec_from_file_location("compare_merges", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def random(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)), dtype=torch.float64)


def test_the_rescaled_mean_has_the_norm_of_the_heads(script: ModuleType) -> None:
    source = Projections(random(16, 7), random(16, 7), random(16, 7) * 2, random(6, 16))
    result = script.rescaled_mean(source, SHAPE, PAIRS, torch.eye(7, dtype=torch.float64))
    heads, pooled = source.v.unflatten(0, (4, 4)), result.v.unflatten(0, (4, 4))
    wanted = (heads[0].norm() + heads[1].norm()) / 2
    assert pooled[0].norm() == pytest.approx(wanted.item())
    torch.testing.assert_close(pooled[0] / pooled[0].norm(), (heads[0] + heads[1]) / (heads[0] + heads[1]).norm())


def test_no_rotation_fits_better(script: ModuleType) -> None:
    cross = random(4, 4)
    best = torch.trace(script.rotations(cross) @ cross.T)
    for step in range(200):
        angle = torch.tensor([step * math.pi / 100, step * math.pi / 50], dtype=torch.float64)
        cosine, sine = torch.diag(angle.cos()), torch.diag(angle.sin())
        other = torch.cat([torch.cat([cosine, -sine], dim=1), torch.cat([sine, cosine], dim=1)])
        assert torch.trace(other @ cross.T) <= best + 1e-9


def test_no_orthogonal_matrix_fits_better(script: ModuleType) -> None:
    cross = random(4, 4)
    best = torch.trace(script.orthogonal(cross) @ cross.T)
    for seed in range(200):
        matrix = torch.randn(4, 4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        assert torch.trace(torch.linalg.qr(matrix).Q @ cross.T) <= best + 1e-9


def test_heads_turned_apart_are_aligned_without_loss(script: ModuleType) -> None:
    """Scores and outputs of every query head are those of the source."""
    keys, values = random(4, 4, 7), random(4, 4, 7) + 1
    turns = [script.rotations(random(4, 4) + index) for index in range(4)]
    orthogonals = [torch.linalg.qr(random(4, 4) + index * random(4, 4).T).Q for index in range(4)]
    keys = torch.stack([turns[head] @ keys[head // 2 * 2] for head in range(4)])
    values = torch.stack([orthogonals[head] @ values[head // 2 * 2] for head in range(4)])
    source = Projections(random(16, 7), keys.flatten(0, 1), values.flatten(0, 1), random(6, 16))
    x = random(7, 50)
    result = script.procrustes_mean(source, SHAPE, PAIRS, x @ x.T / 50)
    for head in range(4):
        rows = slice(4 * head, 4 * head + 4)
        torch.testing.assert_close(result.q[rows].T @ result.k[rows], source.q[rows].T @ source.k[rows])
        torch.testing.assert_close(result.o[:, rows] @ result.v[rows], source.o[:, rows] @ source.v[rows])
    torch.testing.assert_close(result.k[0:4], result.k[4:8])
