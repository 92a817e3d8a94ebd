"""Tasks side by side, in threads: hashing, reading and computing overlap with writing."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from threading import Event
from typing import TypeVar

__all__ = ["default_jobs", "run_side_by_side"]

Result = TypeVar("Result")

_MOST_JOBS = 4


class _StoppedError(Exception):
    """Ends a task whose neighbour has failed."""


def default_jobs() -> int:
    """How many tasks run side by side: one for each processor that this process may use, at most 4."""
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(usable, _MOST_JOBS)


def run_side_by_side(tasks: Sequence[Callable[[Callable[[], None]], Result]], jobs: int) -> list[Result]:
    """Run tasks, `jobs` of them at a time, and return what they return, in their order.

    Each is called with a function that it calls from time to time, which ends it where another has failed or the
    program is to stop. Raises what the first that failed has raised, after all have ended.
    """
    if jobs == 1:
        return [task(lambda: None) for task in tasks]
    stopped = Event()

    def go_on() -> None:
        if stopped.is_set():
            raise _StoppedError

    with ThreadPoolExecutor(jobs) as pool:
        futures = [pool.submit(task, go_on) for task in tasks]
        try:
            wait(futures, return_when=FIRST_EXCEPTION)
        finally:
            if not all(future.done() for future in futures):
                stopped.set()
            for future in futures:
                future.cancel()
    failures = [future.exception() for future in futures if not future.cancelled() and future.exception() is not None]
    for failure in failures:
        if failure is not None and not isinstance(failure, _StoppedError):
            raise failure
    return [future.result() for future in futures]
