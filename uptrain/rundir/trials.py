"""Trials of learning rates for a run: which they are, and what is written down of those that are done."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from ...convert.checkpoint.files import write_text
from ...convert.checkpoint.staging import discard
from ...convert.errors import DivergedError, InputError, OutputError
from ..job import UptrainJob, sweep_directory
from ..settings import RunSettings
from .record import REPLACES_NAME, changes

__all__ = [
    "SWEEP_NAME",
    "Sweep",
    "Trial",
    "find_sweep",
    "goes_on_to_replace",
    "new_sweep",
    "remove_sweep",
    "sweep_that_chose",
    "trial_settings",
    "with_best_rate",
    "write_sweep",
]


SWEEP_NAME = "lr_sweep.json"
_FRACTION = 0.03  # of the run's steps
_LEAST_STEPS = 20
_FACTOR = 2.0  # between neighbouring rates


@dataclass(frozen=True)
class Trial:
    """What a short run at one learning rate ended with, in nats per held-out token; None if it diverged.

    `peak_learning_rate` is what followed from the setting and the start, None where it is the setting itself or the
    start was not reached.
    """

    learning_rate: float
    steps: int
    nats_per_token: float | None
    peak_learning_rate: float | None = None


@dataclass(frozen=True)
class Sweep:
    """The trials that are done of `num_rates`, for the run that `of` describes.

    `replaces` says that it began with force: what it is for may then replace an output.
    """

    of: dict[str, Any]
    num_rates: int
    trials: tuple[Trial, ...]
    replaces: bool

    @property
    def is_done(self) -> bool:
        """Whether no trial is left to be run."""
        return len(self.trials) == self.num_rates


def trial_settings(settings: RunSettings, num_rates: int) -> tuple[RunSettings, ...]:
    """Make the settings of each trial.

    The rates lie around the run's own, each twice the one before; a trial has 3 % of the run's steps, at least 20.
    """
    steps = min(max(math.ceil(_FRACTION * settings.steps), _LEAST_STEPS), settings.steps)
    return tuple(
        replace(settings, steps=steps, learning_rate=rate, keep_best=False)
        for rate in (settings.learning_rate * _FACTOR ** (index - num_rates // 2) for index in range(num_rates))
    )


def new_sweep(job: UptrainJob, num_rates: int, *, force: bool) -> Sweep:
    """Begin a sweep for a job, without a trial that is done."""
    return Sweep(job.description, num_rates, (), replaces=force)


def find_sweep(job: UptrainJob, num_rates: int, *, force: bool) -> Sweep | None:
    """Find the trials for this job to go on with, beside its output or in it; None where they have to begin.

    With `force` they begin, unless they are ones that began with force themselves and the run that they are for has
    not begun: the same command then goes on. Raises OutputError where something else is in their place, InputError for
    those of another run.
    """
    folder = sweep_directory(job.output)
    if folder.exists() and not (folder / SWEEP_NAME).exists():
        raise OutputError(f"{folder} is in the way and not a sweep's", hint="remove it, or choose another --output")
    beside = _read_sweep(folder)
    # in the output they are those of a run that is finished, and replaces nothing any more
    found = beside or (None if force else _read_sweep(job.output, replaces=False))
    if found is None:
        return None
    same = found.num_rates == num_rates and not changes(found.of, job)
    if force:
        return found if same and goes_on_to_replace(found, job) else None
    if not same:
        raise InputError(
            f"{(folder if beside else job.output) / SWEEP_NAME} is of another run",
            hint="remove it, choose another --output, or start over with --force",
        )
    return found


def goes_on_to_replace(sweep: Sweep, job: UptrainJob) -> bool:
    """Tell whether these trials began with force and their run, which then may replace an output, has not begun.

    Once it has begun, its own work directory tells that.
    """
    return sweep.replaces and not job.work.exists()


def with_best_rate(job: UptrainJob, trials: Sequence[Trial]) -> UptrainJob:
    """Give the job the learning rate whose trial ended with the least held-out loss.

    Raises DivergedError if none came to its end.
    """
    return replace(job, settings=replace(job.settings, learning_rate=_best_rate(trials)))


def sweep_that_chose(job: UptrainJob) -> Path | None:
    """Find the directory of the trials that chose this job's learning rate; None if none did."""
    folder = sweep_directory(job.output)
    sweep = _read_sweep(folder)
    if sweep is None or not sweep.is_done or all(trial.nats_per_token is None for trial in sweep.trials):
        return None
    chosen = {**sweep.of, "learning_rate": _best_rate(sweep.trials)}
    return None if changes(chosen, job) else folder


def write_sweep(folder: Path, sweep: Sweep) -> None:
    """Write a sweep into its folder."""
    record = {
        "of": sweep.of,
        "num_rates": sweep.num_rates,
        REPLACES_NAME: sweep.replaces,
        "trials": [asdict(trial) for trial in sweep.trials],
    }
    write_text(folder / SWEEP_NAME, json.dumps(record, indent=2) + "\n")


def remove_sweep(folder: Path) -> None:
    """Remove a sweep's directory, which has its record as long as it has its name; nothing if it is not a sweep's."""
    if (folder / SWEEP_NAME).exists():
        discard(folder)


def _read_sweep(folder: Path, *, replaces: bool = True) -> Sweep | None:
    """What is written down in a directory; without `replaces`, as of trials that replace nothing."""
    path = folder / SWEEP_NAME
    if not path.exists():
        return None
    record = json.loads(path.read_text())
    trials = tuple(Trial(**row) for row in record["trials"])
    return Sweep(record["of"], record["num_rates"], trials, replaces=replaces and bool(record.get(REPLACES_NAME)))


def _best_rate(trials: Sequence[Trial]) -> float:
    finite = [(trial.nats_per_token, trial) for trial in trials if trial.nats_per_token is not None]
    if not finite:
        raise DivergedError("every trial of --lr-sweep diverged", hint="use a smaller --lr, and --force to start over")
    return min(finite, key=lambda pair: pair[0])[1].learning_rate
