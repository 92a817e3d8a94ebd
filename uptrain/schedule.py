"""How the learning rate goes over the steps of a stage."""

from __future__ import annotations

import math
from enum import StrEnum
from fractions import Fraction

__all__ = ["Schedule", "count_warmup_steps", "rate_factor"]


class Schedule(StrEnum):
    """How the learning rate goes down after its warm-up, by the names that transformers has."""

    cosine = "cosine"
    linear = "linear"
    constant = "constant_with_warmup"


def count_warmup_steps(warmup_fraction: float, steps: int) -> int:
    """Count the steps of a stage in which the rate rises, rounded up."""
    return math.ceil(Fraction(str(warmup_fraction)) * steps)  # exact: 0.07 · 100 in floats is a little above 7


def rate_factor(schedule: Schedule, step: int, *, warmup_steps: int, steps: int) -> float:
    """Compute the part of the peak rate that step `step` of `steps`, counted from 1, is taken at.

    It rises linearly to 1 at step `warmup_steps`, then goes down to what would be 0 one step after the last. No step
    has the rate 0: transformers' schedules begin with one, so that a run of one step would train nothing.
    """
    if step <= warmup_steps:
        return step / warmup_steps
    at_peak = max(warmup_steps, 1)
    progress = (step - at_peak) / (steps + 1 - at_peak)
    if schedule is Schedule.cosine:
        return (1 + math.cos(math.pi * progress)) / 2
    return 1 - progress if schedule is Schedule.linear else 1.0
