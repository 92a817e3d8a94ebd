"""Tasks side by side in threads."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from threading import Barrier

import pytest
from kvconvert.convert.parallel import run_side_by_side


@pytest.mark.parametrize("jobs", [1, 2, 5])
def test_results_are_in_the_order_of_tasks(jobs: int) -> None:
    def task(number: int, go_on: Callable[[], None]) -> int:
        time.sleep(0.01 * (3 - number))
        return number

    assert run_side_by_side([partial(task, number) for number in range(4)], jobs) == [0, 1, 2, 3]


def test_two_tasks_run_at_the_same_time() -> None:
    """Each waits for the other."""
    both = Barrier(2)
    run_side_by_side([lambda go_on: both.wait(timeout=10)] * 2, 2)


@pytest.mark.parametrize("jobs", [1, 2])
def test_a_failure_ends_its_neighbours_and_is_raised(jobs: int) -> None:
    begun: list[int] = []

    def fail(go_on: Callable[[], None]) -> None:
        raise ValueError("first")

    def last_long(go_on: Callable[[], None]) -> None:
        begun.append(1)
        while True:
            go_on()
            time.sleep(0.001)

    with pytest.raises(ValueError, match="first"):
        run_side_by_side([fail, *[last_long] * 5], jobs)
    assert len(begun) <= 2
