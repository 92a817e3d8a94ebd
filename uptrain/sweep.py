"""Learning rates tried in short runs."""

from __future__ import annotations

import math
from contextlib import ExitStack
from dataclasses import replace

from ..convert.checkpoint.output import check_output, disk_errors
from ..convert.checkpoint.staging import clear_leftovers, discard, staged_directory
from ..convert.errors import DivergedError, InputError, PreemptedError, UnsupportedError
from .job import UptrainJob, sweep_directory
from .observation import Observation
from .run import run_checked
from .rundir.directories import sole_run_in
from .rundir.prepare import no_held_out_text
from .rundir.record import begun_before
from .rundir.start import read_start
from .rundir.status import STATUS_NAME, StatusFile, write_status
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
from .training.processes import Processes

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
        raise no_held_out_text("--lr-sweep")
    check_output(job.output, force=force)  # one that is finished without trials is another run's
    if job.work.exists() and not force:
        raise InputError(
            f"{job.work} holds an unfinished run that began without --lr-sweep",
            hint="go on without --lr-sweep, start over with --force, or choose another --output",
        )


def sweep_learning_rates(
    job: UptrainJob, watch: Observation, *, num_rates: int, force: bool = False
) -> tuple[Trial, ...]:
    """Try `num_rates` learning rates around the job's own, as `trial_settings` has them; returns the trials.

    To be called after `check_job`. Each has a whole schedule, on the text that the run begins with. A trial that was
    stopped goes on by itself. Those that are done are kept beside the output, with a status, until the run is finished,
    and then in it; `force` starts over, as `find_sweep` says.
    Raises what `check_sweep` and `run_checked` raise, InputError without held-out text, DivergedError when no trial
    came to its end.
    """
    processes = Processes()
    check_sweep(job, scored=watch.score is not None, force=force)
    found = find_sweep(job, num_rates, force=force)
    processes.wait()  # all have looked before one writes
    folder = sweep_directory(job.output)
    trials = _Trials(job, watch, processes, found or new_sweep(job, num_rates, force=force))
    with disk_errors(folder), ExitStack() as held:
        if processes.is_first:
            held.enter_context(sole_run_in(folder))
            clear_leftovers(folder, watch.remark)
            if found is None:
                trials.begin()
        processes.wait()
        try:
            return trials.run()
        except BaseException as error:
            trials.fail(error)
            raise


class _Trials:
    """Trials that are under way, and their status, in which steps and tokens count over all of them."""

    def __init__(self, job: UptrainJob, watch: Observation, processes: Processes, sweep: Sweep) -> None:
        self._job, self._watch, self._processes, self._sweep = job, watch, processes, sweep
        self._folder = sweep_directory(job.output)
        self._settings = trial_settings(job.settings, sweep.num_rates)
        self._status = StatusFile(
            self._folder,
            steps=sum(settings.steps for settings in self._settings),
            tokens_per_step=job.settings.tokens_per_step,
            command=watch.command,
            writes=processes.is_first,
        )

    def begin(self) -> None:
        """Make the directory, in the place of one that is given up, with what it is for written down in it."""
        if self._sweep.replaces:
            with sole_run_in(self._job.work):
                remove_sweep(self._folder)
                discard(self._job.work)  # the run would do it, and its status is out of date
        with staged_directory(self._folder) as staging:
            write_sweep(staging, self._sweep)
            write_status(staging, self._status.now)

    def run(self) -> tuple[Trial, ...]:
        """Run the trials that are not done yet; returns all of them."""
        self._watch.remark(
            f"{self._sweep.num_rates} trials of {self._settings[0].steps} steps; "
            f"their status is in {self._folder / STATUS_NAME}"
        )
        for index in range(len(self._sweep.trials), self._sweep.num_rates):
            trial = self._try(index)
            self._sweep = replace(self._sweep, trials=(*self._sweep.trials, trial))
            if self._processes.is_first:
                write_sweep(self._folder, self._sweep)
            self._processes.wait()
        with_best_rate(self._job, self._sweep.trials)  # raises if none came to its end
        if self._processes.is_first:
            write_status(self._folder, self._status.finished)
        return self._sweep.trials

    def fail(self, error: BaseException) -> None:
        """Write how the trials ended; nothing stays of those that could not begin."""
        if self._processes.is_first and not self._sweep.trials and not any(self._folder.glob("trial-*")):
            remove_sweep(self._folder)
        self._status.fail(error)

    def _try(self, index: int) -> Trial:
        settings = self._settings[index]
        before = sum(settings.steps for settings in self._settings[:index])
        trial = replace(self._job, settings=settings, output=self._folder / f"trial-{index}")
        watch = replace(
            self._watch,
            keep=False,
            eval_steps=settings.steps,
            note=lambda status: self._status.reach(before + status.step, status.last_checkpoint),
        )
        try:
            result = run_checked(trial, watch, force=not begun_before(trial))
            held_out, start = result.held_out, result.start
        except DivergedError:
            start = read_start(trial.work)
            self._processes.wait()  # all have looked before it goes
            if self._processes.is_first:
                discard(trial.work)
            held_out = None
        except PreemptedError as error:
            raise PreemptedError(
                f"trial {index + 1} of {self._sweep.num_rates} of --lr-sweep: {error}", hint=error.hint
            ) from error
        # a loss that is not a number compares as none
        finite = held_out is not None and math.isfinite(held_out)
        peak = None if start is None else start.peak_learning_rate
        return Trial(settings.learning_rate, settings.steps, held_out if finite else None, peak)
