"""Learning rates tried in short runs."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace

import torch
from accelerate import PartialState

from ..convert.errors import DivergedError, InputError
from ..convert.output import write_text
from .jobs import SWEEP_NAME, UptrainJob, describe, sweep_directory
from .run import Observation, uptrain

__all__ = ["Trial", "finished_trials", "sweep_learning_rates", "with_best_rate"]

_FRACTION = 0.03  # of the run's steps
_LEAST_STEPS = 20
_FACTOR = 2.0  # between neighbouring rates


@dataclass(frozen=True)
class Trial:
    """What a short run at one learning rate ended with, in nats per held-out token; None if it diverged."""

    learning_rate: float
    steps: int
    nats_per_token: float | None


def sweep_learning_rates(
    job: UptrainJob, watch: Observation, *, num_rates: int, force: bool = False
) -> tuple[Trial, ...]:
    """Trials of `num_rates` rates around the job's own, each twice the one before.

    Each trial is 3 % of the run's steps, at least 20, with a whole schedule, on the text that the run begins with.
    Trials that are done are kept beside the output until the run is finished, and then in it; `force` starts over.
    Raises InputError without held-out text, DivergedError when no trial came to its end.
    """
    state = PartialState(cpu=not torch.accelerator.is_available())
    folder = sweep_directory(job.output)
    if force and state.is_main_process:
        shutil.rmtree(folder, ignore_errors=True)
    state.wait_for_everyone()
    trials = [] if force else list(_recorded_trials(job, num_rates))
    steps = min(max(math.ceil(_FRACTION * job.settings.steps), _LEAST_STEPS), job.settings.steps)
    for index in range(len(trials), num_rates):
        rate = job.settings.learning_rate * _FACTOR ** (index - num_rates // 2)
        settings = replace(job.settings, steps=steps, learning_rate=rate)
        trial = replace(job, settings=settings, output=folder / f"trial-{index}")
        try:
            held_out = uptrain(trial, replace(watch, keep=False, eval_steps=steps), force=True).held_out
        except DivergedError:
            trials.append(Trial(rate, steps, None))
        else:
            if held_out is None:
                raise InputError(
                    "--lr-sweep compares held-out loss, and there is no held-out text",
                    hint="pass --eval-data, or a --validation-fraction that holds out at least one block",
                )
            # a loss that is not a number compares as none
            trials.append(Trial(rate, steps, held_out if math.isfinite(held_out) else None))
        if state.is_main_process:
            folder.mkdir(parents=True, exist_ok=True)
            record = {"of": describe(job), "num_rates": num_rates, "trials": [asdict(done) for done in trials]}
            write_text(folder / SWEEP_NAME, json.dumps(record, indent=2) + "\n")
        state.wait_for_everyone()
    if all(trial.nats_per_token is None for trial in trials):
        raise DivergedError("every trial of --lr-sweep diverged", hint="use a smaller --lr, and --force to start over")
    return tuple(trials)


def finished_trials(job: UptrainJob, num_rates: int) -> tuple[Trial, ...] | None:
    """The trials for this job if all are done. Raises InputError for those of another."""
    trials = _recorded_trials(job, num_rates)
    return trials if len(trials) == num_rates else None


def with_best_rate(job: UptrainJob, trials: Sequence[Trial]) -> UptrainJob:
    """The job at the learning rate whose trial ended with the least held-out loss."""
    best = min(trials, key=lambda trial: math.inf if trial.nats_per_token is None else trial.nats_per_token)
    return replace(job, settings=replace(job.settings, learning_rate=best.learning_rate))


def _recorded_trials(job: UptrainJob, num_rates: int) -> tuple[Trial, ...]:
    """The trials that are done, beside the job's output or in it."""
    for path in (sweep_directory(job.output) / SWEEP_NAME, job.output / SWEEP_NAME):
        if path.exists():
            record = json.loads(path.read_text())
            if (record["of"], record["num_rates"]) != (describe(job), num_rates):
                raise InputError(
                    f"{path} is of another run", hint="remove it, choose another --output, or start over with --force"
                )
            return tuple(Trial(**row) for row in record["trials"])
    return ()
