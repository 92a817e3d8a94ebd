"""Learning rates tried in short runs."""

from __future__ import annotations

import math
import os
import shutil
from contextlib import ExitStack, suppress
from dataclasses import replace

from accelerate import PartialState

from ..convert.checkpoint.output import check_output, disk_errors, staged_directory
from ..convert.errors import DivergedError, InputError, PreemptedError, UnsupportedError
from .checks import check_job
from .job import UptrainJob, sweep_directory
from .run import Observation, process_state, uptrain
from .rundir.lock import sole_run_in
from .rundir.prepare import no_held_out_text
from .rundir.record import begun_before
from .rundir.status import STATUS_NAME, RunStatus, status_of_error, write_status
from .rundir.trials import (
    Sweep,
    Trial,
    find_sweep,
    new_sweep,
    remove_sweep,
    trial_settings,
    with_best_rate,
    write_sweep,
)

__all__ = ["check_sweep", "sweep_learning_rates"]


def check_sweep(job: UptrainJob, *, scored: bool, force: bool = False) -> None:
    """Raise InputError for whatever `check_job` takes and can be refused before the first trial; touches nothing.

    `scored` says that a text of its own is scored, beside the validation slice if there is one.
    """
    if replace(job.settings, learning_rate=2 * job.settings.learning_rate).stages == job.settings.stages:
        raise UnsupportedError(
            f"recipe {job.settings.recipe} trains at --layerwise-lr, which --lr-sweep does not vary",
            hint="pass its learning rate as --lr, without --layerwise-lr",
        )
    if not scored and job.validation_fraction == 0:
        raise no_held_out_text()
    check_output(job.output, force=force)  # one that is finished without trials is another run's
    if job.work.exists() and not force:
        raise InputError(
            f"{job.work} holds an unfinished run that began without --lr-sweep",
            hint="go on without --lr-sweep, start over with --force, or choose another --output",
        )


def sweep_learning_rates(
    job: UptrainJob, watch: Observation, *, num_rates: int, force: bool = False
) -> tuple[Trial, ...]:
    """Trials of `num_rates` rates around the job's own, as `trial_settings` has them.

    Each has a whole schedule, on the text that the run begins with. A trial that was stopped goes on by itself. Those
    that are done are kept beside the output, with a status, until the run is finished, and then in it; `force` starts
    over, as `find_sweep` says.
    Raises what `check_sweep` and `uptrain` raise, InputError without held-out text, DivergedError when no trial came
    to its end.
    """
    state = process_state()
    check_job(job, force=force)
    check_sweep(job, scored=watch.score is not None, force=force)
    sweep = find_sweep(job, num_rates, force=force)
    state.wait_for_everyone()  # all have looked before one writes
    folder = sweep_directory(job.output)
    with disk_errors(folder), ExitStack() as held:
        running = _Sweeping(job, watch, state, sweep or new_sweep(job, num_rates, force=force))
        if state.is_main_process:
            if sweep is None:
                running.begin()
            held.enter_context(sole_run_in(folder))
        state.wait_for_everyone()
        try:
            return running.run()
        except BaseException as error:
            running.record(error)
            raise


class _Sweeping:
    """Trials that are under way, and their status, in which steps and tokens count over all of them."""

    def __init__(self, job: UptrainJob, watch: Observation, state: PartialState, sweep: Sweep) -> None:
        self._job, self._watch, self._state, self._sweep = job, watch, state, sweep
        self._folder = sweep_directory(job.output)
        self._settings = trial_settings(job.settings, sweep.num_rates)
        self._status = RunStatus(
            state="running",
            exit_code=None,
            step=0,
            steps=sum(settings.steps for settings in self._settings),
            tokens=0,
            reason=None,
            last_checkpoint=None,
            resume_command=watch.command,
            process_id=os.getpid(),
        )

    def begin(self) -> None:
        """Make the directory, in the place of one that is given up, with what it is for written down in it."""
        if self._sweep.replaces:
            with ExitStack() as held:
                for place in (self._folder, self._job.work):
                    if place.exists():
                        held.enter_context(sole_run_in(place))
                remove_sweep(self._folder)
                shutil.rmtree(self._job.work, ignore_errors=True)  # the run would do it, and its status is out of date
        with staged_directory(self._folder) as staging:
            write_sweep(staging, self._sweep)
            write_status(staging, self._status)

    def run(self) -> tuple[Trial, ...]:
        """The trials that are not done yet."""
        self._watch.remark(
            f"{self._sweep.num_rates} trials of {self._settings[0].steps} steps; "
            f"their status is in {self._folder / STATUS_NAME}"
        )
        for index in range(len(self._sweep.trials), self._sweep.num_rates):
            trial = self._try(index)
            self._sweep = replace(self._sweep, trials=(*self._sweep.trials, trial))
            if self._state.is_main_process:
                write_sweep(self._folder, self._sweep)
            self._state.wait_for_everyone()
        with_best_rate(self._job, self._sweep.trials)  # raises if none came to its end
        if self._state.is_main_process:
            step, tokens = self._status.steps, self._status.steps * self._job.settings.tokens_per_step
            write_status(
                self._folder,
                replace(self._status, state="finished", exit_code=0, step=step, tokens=tokens, last_checkpoint=None),
            )
        return self._sweep.trials

    def record(self, error: BaseException) -> None:
        """Write how the trials ended; nothing stays of those that could not begin."""
        if not self._state.is_main_process or not self._folder.exists():
            return
        if not self._sweep.trials and not any(self._folder.glob("trial-*")):
            remove_sweep(self._folder)
            return
        with suppress(OSError):  # a full disk must not hide the error
            write_status(self._folder, status_of_error(self._status, error))

    def _try(self, index: int) -> Trial:
        settings = self._settings[index]
        trial = replace(self._job, settings=settings, output=self._folder / f"trial-{index}")
        watch = replace(
            self._watch, keep=False, eval_steps=settings.steps, note=lambda status: self._note(index, status)
        )
        try:
            held_out = uptrain(trial, watch, force=not begun_before(trial)).held_out
        except DivergedError:
            if self._state.is_main_process:
                shutil.rmtree(trial.work, ignore_errors=True)
            held_out = None
        except PreemptedError as error:
            raise PreemptedError(
                f"trial {index + 1} of {self._sweep.num_rates} of --lr-sweep: {error}", hint=error.hint
            ) from error
        # a loss that is not a number compares as none
        finite = held_out is not None and math.isfinite(held_out)
        return Trial(settings.learning_rate, settings.steps, held_out if finite else None)

    def _note(self, index: int, trial: RunStatus) -> None:
        step = sum(settings.steps for settings in self._settings[:index]) + trial.step
        self._status = replace(
            self._status,
            step=step,
            tokens=step * self._job.settings.tokens_per_step,
            last_checkpoint=trial.last_checkpoint,
        )
        write_status(self._folder, self._status)
