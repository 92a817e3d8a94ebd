from __future__ import annotations

from itertools import combinations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from kvconvert.convert.algebra.head_merge import Heads
from kvconvert.convert.algebra.head_search import best_grouping
from kvconvert.convert.algebra.heads import HeadGrouping, first_heads, mean_heads, random_heads
from kvconvert.convert.errors import UnsupportedError

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@st.composite
def groupings(draw: st.DrawFn) -> HeadGrouping:
    """Any partition of up to 12 heads into equal groups, in any order."""
    num_groups = draw(st.integers(1, 4))
    size = draw(st.integers(1, 3))
    heads = draw(st.permutations(range(num_groups * size)))
    return HeadGrouping(tuple(tuple(heads[g * size : (g + 1) * size]) for g in range(num_groups)))


@given(grouping=groupings(), head_dim=st.integers(1, 5), bias=st.booleans(), dtype=st.sampled_from(DTYPES))
def test_mean_equals_a_float64_loop(grouping: HeadGrouping, head_dim: int, bias: bool, dtype: torch.dtype) -> None:
    rows = grouping.num_heads * head_dim
    shape = (rows,) if bias else (rows, 3)
    projection = torch.randn(shape, generator=torch.Generator().manual_seed(rows)).to(dtype)
    pooled = mean_heads(projection, grouping)
    expected = torch.zeros((len(grouping.groups) * head_dim, *shape[1:]), dtype=torch.float64)
    for g, group in enumerate(grouping.groups):
        for d in range(head_dim):
            for head in group:
                expected[g * head_dim + d] += projection[head * head_dim + d].double() / len(group)
    # one rounding to the target dtype; the loop sums in another order, which may move a tie by one unit
    torch.testing.assert_close(pooled, expected.to(dtype), rtol=torch.finfo(dtype).eps, atol=1e-12)
    assert pooled.dtype == dtype


def test_every_value_names_its_place() -> None:
    """4 heads of 2 rows whose values count up: head h holds rows 2h and 2h + 1."""
    projection = torch.arange(8.0)
    grouping = HeadGrouping(((0, 3), (2, 1)))
    assert mean_heads(projection, grouping).tolist() == [3.0, 4.0, 3.0, 4.0]
    assert first_heads(projection, grouping).tolist() == [0.0, 1.0, 4.0, 5.0]
    contiguous = HeadGrouping.contiguous(4, 2)
    assert mean_heads(projection, contiguous).tolist() == [1.0, 2.0, 5.0, 6.0]


@pytest.mark.parametrize("dtype", DTYPES)
def test_groups_of_one_keep_every_bit(dtype: torch.dtype) -> None:
    projection = torch.randn(12, 5).to(dtype)
    for method in (mean_heads, first_heads):
        assert torch.equal(method(projection, HeadGrouping.contiguous(4, 4)), projection)


def test_random_heads_follow_the_seed_and_the_standard_deviation() -> None:
    projection = torch.zeros(64 * 8, 512)
    grouping = HeadGrouping.contiguous(64, 32)
    one = random_heads(projection, grouping, std=0.02, seed=1)
    assert one.shape == (32 * 8, 512)
    assert torch.equal(one, random_heads(projection, grouping, std=0.02, seed=1))
    assert not torch.equal(one, random_heads(projection, grouping, std=0.02, seed=2))
    assert one.std().item() == pytest.approx(0.02, rel=0.02)
    assert random_heads(torch.ones(8), HeadGrouping.contiguous(4, 2), std=0.02, seed=1).tolist() == [0.0] * 4


def test_contiguous_says_which_numbers_divide() -> None:
    with pytest.raises(UnsupportedError, match="12 K/V heads cannot form 5 equal groups") as raised:
        HeadGrouping.contiguous(12, 5)
    assert raised.value.hint == "possible numbers of groups: 1, 2, 3, 4, 6"


@pytest.mark.parametrize("groups", [((0, 1), (1, 2)), ((0, 2),), (), ((0, 1), (3, 4))])
def test_a_grouping_holds_every_head_once(groups: tuple[tuple[int, ...], ...]) -> None:
    with pytest.raises(ValueError, match="do not hold every head exactly once"):
        HeadGrouping(groups)


def test_groups_are_of_equal_size() -> None:
    with pytest.raises(ValueError, match="not of equal size"):
        HeadGrouping(((0, 1), (2,)))


class _Losses:
    """Stands for `Heads` of two layers, with given losses."""

    num_layers = 2

    def __init__(self, losses: torch.Tensor) -> None:
        self.losses = losses

    def __len__(self) -> int:
        return len(self.losses)

    def layer(self, head: int) -> int:
        return head * 2 // len(self)

    def in_order(self, num_groups: int) -> HeadGrouping:
        return Heads.in_order(self, num_groups)  # type: ignore[arg-type]

    def pair_losses(self) -> torch.Tensor:
        return self.losses


def _loss(groups: tuple[tuple[int, ...], ...], losses: torch.Tensor) -> float:
    return sum(losses[one, other].item() for group in groups for one, other in combinations(group, 2))


@pytest.mark.parametrize("seed", range(5))
def test_no_swap_of_two_heads_lowers_the_loss_of_the_best_groups(seed: int) -> None:
    losses = torch.rand(12, 12, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    losses = (losses + losses.T).fill_diagonal_(0)
    heads = _Losses(losses)
    found = best_grouping(heads, 3).groups  # type: ignore[arg-type]
    assert all(sorted(heads.layer(head) for head in group) == [0, 0, 1, 1] for group in found)
    assert _loss(found, losses) < _loss(heads.in_order(3).groups, losses)
    for one, other in combinations(range(12), 2):
        if heads.layer(one) == heads.layer(other):
            swap = {one: other, other: one}
            swapped = tuple(tuple(swap.get(head, head) for head in group) for group in found)
            assert _loss(swapped, losses) > _loss(found, losses) - 1e-9
