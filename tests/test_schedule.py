from __future__ import annotations

import pytest
import torch
from conftest import Train, settings_with, weights
from hypothesis import given
from hypothesis import strategies as st
from kvconvert.convert.errors import UnsupportedError
from kvconvert.uptrain.schedule import Schedule, count_warmup_steps, rate_factor
from transformers import get_scheduler


def rates(schedule: Schedule, warmup_steps: int, steps: int) -> list[float]:
    return [rate_factor(schedule, step, warmup_steps=warmup_steps, steps=steps) for step in range(1, steps + 1)]


@given(st.sampled_from(Schedule), st.integers(1, 300), st.floats(0, 1))
def test_every_step_trains_and_one_is_at_the_peak(schedule: Schedule, steps: int, fraction: float) -> None:
    warmup_steps = count_warmup_steps(fraction, steps)
    found = rates(schedule, warmup_steps, steps)
    assert min(found) > 0
    assert max(found) == 1 == found[max(warmup_steps, 1) - 1]


@pytest.mark.parametrize("schedule", Schedule)
@pytest.mark.parametrize(("warmup_steps", "ahead"), [(0, 0), (3, 1), (10, 1)])
def test_the_rates_are_those_of_transformers_without_its_step_of_rate_0(
    schedule: Schedule, warmup_steps: int, ahead: int
) -> None:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    scheduler = get_scheduler(schedule.value, optimizer, num_warmup_steps=warmup_steps, num_training_steps=10 + ahead)
    (theirs,) = scheduler.lr_lambdas
    assert rates(schedule, warmup_steps, 10) == pytest.approx([theirs(step + ahead) for step in range(10)])
    assert ahead == 0 or theirs(0) == 0  # the control: the step that is left out


def test_warmup_steps_are_counted_exactly() -> None:
    assert [count_warmup_steps(0.07, 100), count_warmup_steps(0.03, 1), count_warmup_steps(0.0, 5)] == [7, 1, 0]


def test_a_schedule_that_is_not_known() -> None:
    with pytest.raises(UnsupportedError, match=r"lr scheduler is 'polynomial', expected one of cosine, linear, const"):
        settings_with(lr_scheduler="polynomial")


@pytest.mark.parametrize("schedule", Schedule)
def test_a_run_of_one_step_trains(schedule: Schedule, train: Train) -> None:
    output = train("out", settings=settings_with(steps=1, lr_scheduler=schedule.value))
    before, after = weights(output.parent / "model"), weights(output)
    unchanged = [name for name, tensor in after.items() if torch.equal(tensor, before[name])]
    assert not unchanged
