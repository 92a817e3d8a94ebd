from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from conftest import SETTINGS, KilledError, settings_with
from kvconvert.convert.errors import DivergedError, InputError, OutputError, PreemptedError, UnsupportedError
from kvconvert.uptrain import run, sweep
from kvconvert.uptrain.job import UptrainJob
from kvconvert.uptrain.observation import Observation
from kvconvert.uptrain.recipe import LossWeights, Recipe
from kvconvert.uptrain.rundir.directories import sole_run_in
from kvconvert.uptrain.rundir.record import finished_before
from kvconvert.uptrain.rundir.status import RunStatus, read_status
from kvconvert.uptrain.rundir.trials import Trial, find_sweep, goes_on_to_replace, with_best_rate
from kvconvert.uptrain.sweep import check_sweep, sweep_learning_rates

MakeJob = Callable[..., UptrainJob]


def finished_trials(job: UptrainJob, num_rates: int) -> tuple[Trial, ...] | None:
    found = find_sweep(job, num_rates, force=False)
    return found.trials if found is not None and found.is_done else None


class Runs:
    """Stands for `uptrain`: the trial at index i ends with the i-th answer, or raises it."""

    def __init__(self, *answers: float | Exception | None) -> None:
        self.answers = list(answers)
        self.jobs: list[UptrainJob] = []
        self.watches: list[Observation] = []

    def __call__(self, job: UptrainJob, watch: Observation, *, force: bool) -> Any:
        self.jobs.append(job)
        self.watches.append(watch)
        answer = self.answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return run.result_of(job, 1.0, held_out=answer)


@pytest.fixture
def answers(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Runs]:
    def answer(*results: float | Exception | None) -> Runs:
        runs = Runs(*results)
        monkeypatch.setattr(sweep, "run_checked", runs)
        return runs

    return answer


def long_job(make_job: MakeJob, **fields: Any) -> UptrainJob:
    return make_job(settings=replace(SETTINGS, steps=1000), validation_fraction=0.3, **fields)


def test_rates_lie_around_the_jobs_own_and_the_best_is_taken(make_job: MakeJob, answers: Callable[..., Runs]) -> None:
    runs, job = answers(3.0, 2.0, 1.0, 1.5, 4.0), long_job(make_job)
    trials = sweep_learning_rates(job, Observation(eval_steps=7), num_rates=5)
    rates = [0.0025, 0.005, 0.01, 0.02, 0.04]
    assert trials == tuple(Trial(rate, 30, score) for rate, score in zip(rates, (3, 2, 1, 1.5, 4), strict=True))
    assert [trial.settings for trial in runs.jobs] == [
        replace(job.settings, steps=30, learning_rate=rate) for rate in rates
    ]
    assert {(watch.keep, watch.eval_steps) for watch in runs.watches} == {(False, 30)}
    assert with_best_rate(job, trials) == job
    assert with_best_rate(job, trials[:2]).settings.learning_rate == 0.005
    assert finished_trials(job, 5) == trials


@pytest.mark.parametrize(("steps", "expected"), [(10, 10), (100, 20), (10_000, 300), (1010, 31)])
def test_how_long_a_trial_is(steps: int, expected: int, make_job: MakeJob, answers: Callable[..., Runs]) -> None:
    answers(1.0)
    job = make_job(settings=replace(SETTINGS, steps=steps), validation_fraction=0.3)
    assert sweep_learning_rates(job, Observation(), num_rates=1)[0].steps == expected


def test_a_sweep_goes_on_after_a_kill(make_job: MakeJob, answers: Callable[..., Runs]) -> None:
    job = long_job(make_job)
    answers(3.0, 2.0, KilledError())
    with pytest.raises(KilledError):
        sweep_learning_rates(job, Observation(), num_rates=3)
    assert finished_trials(job, 3) is None
    runs = answers(1.0)
    trials = sweep_learning_rates(job, Observation(), num_rates=3)
    assert [trial.nats_per_token for trial in trials] == [3.0, 2.0, 1.0]
    assert [trial.settings.learning_rate for trial in runs.jobs] == [0.02]


def test_force_starts_over(make_job: MakeJob, answers: Callable[..., Runs]) -> None:
    job = long_job(make_job)
    answers(3.0, 2.0, 1.0)
    sweep_learning_rates(job, Observation(), num_rates=3)
    answers(1.0, 5.0)
    trials = sweep_learning_rates(job, Observation(), num_rates=2, force=True)
    assert [trial.nats_per_token for trial in trials] == [1.0, 5.0]
    assert finished_trials(job, 2) == trials


def test_a_trial_that_diverges_loses(make_job: MakeJob, answers: Callable[..., Runs], tmp_path: Path) -> None:
    job = long_job(make_job)
    answers(2.0, 3.0, DivergedError("loss is nan"), float("nan"))
    trials = sweep_learning_rates(job, Observation(), num_rates=4)
    assert [trial.nats_per_token for trial in trials] == [2.0, 3.0, None, None]
    assert with_best_rate(job, trials).settings.learning_rate == 0.0025
    record = json.loads((tmp_path / "out.lr-sweep/lr_sweep.json").read_text())
    assert [row["nats_per_token"] for row in record["trials"]] == [2.0, 3.0, None, None]
    answers(*[DivergedError("loss is nan")] * 2)
    with pytest.raises(DivergedError, match=r"every trial of --lr-sweep diverged"):
        sweep_learning_rates(job, Observation(), num_rates=2, force=True)
    with pytest.raises(DivergedError, match=r"every trial of --lr-sweep diverged"):
        with_best_rate(job, finished_trials(job, 2) or ())


@pytest.mark.parametrize("changes", [{"seed": 1}, {"learning_rate": 0.5}, {}])
def test_trials_of_another_run_are_refused(
    changes: dict[str, Any], make_job: MakeJob, answers: Callable[..., Runs]
) -> None:
    answers(1.0, 2.0)
    job = long_job(make_job)
    sweep_learning_rates(job, Observation(), num_rates=2)
    other = replace(job, settings=replace(job.settings, **changes))
    num_rates = 2 if changes else 3
    for ask in (
        lambda: finished_trials(other, num_rates),
        lambda: sweep_learning_rates(other, Observation(), num_rates=num_rates),
    ):
        with pytest.raises(InputError, match=r"lr_sweep\.json is of another run"):
            ask()


def test_a_real_sweep_leaves_its_table_in_the_result_and_nothing_beside_it(make_job: MakeJob, tmp_path: Path) -> None:
    job = make_job(validation_fraction=0.3, settings=replace(SETTINGS, steps=3))
    trials = sweep_learning_rates(job, Observation(), num_rates=2)
    assert all(trial.nats_per_token is not None for trial in trials)
    assert sorted(path.name for path in (tmp_path / "out.lr-sweep").iterdir()) == [
        "lr_sweep.json",
        "run_status.json",
    ]
    best = with_best_rate(job, trials)
    run.uptrain(best, Observation())
    assert {path.name for path in tmp_path.glob("out*")} == {"out"}
    assert finished_trials(job, 2) == trials
    assert finished_before(best)


SHORT = settings_with(steps=4)


class Steps:
    """For `progress`: remembers what it is told, and sends SIGTERM after `stop_after` steps of the first trial."""

    def __init__(self, *, stop_after: int | None = None) -> None:
        self.told: list[int] = []
        self._stop_after = stop_after

    def __call__(self, more: int) -> None:
        self.told.append(more)
        if sum(self.told) == self._stop_after:
            os.kill(os.getpid(), signal.SIGTERM)


def stop_in_first_trial(job: UptrainJob, **fields: Any) -> None:
    """A real sweep of two rates that is told to stop after two steps."""
    watch = Observation(log_steps=1, progress=Steps(stop_after=2), **fields)
    with pytest.raises(
        PreemptedError,
        match=r"^trial 1 of 2 of --lr-sweep: stopped at step 2 of 4 \(received SIGTERM\); saved in .*trial-0",
    ):
        sweep_learning_rates(job, watch, num_rates=2)


def test_a_trial_that_was_stopped_goes_on(make_job: MakeJob) -> None:
    whole = sweep_learning_rates(make_job("whole", settings=SHORT, validation_fraction=0.3), Observation(), num_rates=2)
    job = make_job(settings=SHORT, validation_fraction=0.3)
    stop_in_first_trial(job)
    steps = Steps()
    assert sweep_learning_rates(job, Observation(progress=steps), num_rates=2) == whole
    assert steps.told == [2, 1, 1, 0, 1, 1, 1, 1]


def test_a_trial_in_whose_place_is_another_starts_over(make_job: MakeJob, tmp_path: Path) -> None:
    job = make_job(settings=SHORT, validation_fraction=0.3)
    stop_in_first_trial(job)
    path = tmp_path / "out.lr-sweep/trial-0.uptraining/settings.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"weight_decay": 0.5}))
    steps = Steps()
    sweep_learning_rates(job, Observation(progress=steps), num_rates=2)
    assert steps.told == [0, 1, 1, 1, 1] * 2


def test_the_status_of_a_sweep_that_was_stopped(make_job: MakeJob, tmp_path: Path) -> None:
    folder = tmp_path / "out.lr-sweep"
    seen: list[RunStatus | None] = []
    job = make_job(settings=SHORT, validation_fraction=0.3)
    stop_in_first_trial(job, show=lambda record: seen.append(read_status(folder)), command="kvconvert uptrain again")
    status = read_status(folder)
    assert status is not None
    assert (status.state, status.exit_code, status.resume_command) == ("preempted", 75, "kvconvert uptrain again")
    assert (status.step, status.steps, status.tokens) == (2, 8, 2 * SHORT.tokens_per_step)
    assert status.reason is not None
    assert status.reason.startswith("trial 1 of 2 of --lr-sweep: stopped at step 2 of 4")
    assert status.last_checkpoint is not None
    assert Path(status.last_checkpoint, "COMPLETE.json").exists()
    assert {s and (s.state, s.exit_code, s.process_id) for s in seen} == {("running", None, os.getpid())}

    def look(record: dict[str, Any]) -> None:
        seen.append(read_status(folder))

    sweep_learning_rates(job, Observation(log_steps=1, show=look), num_rates=2)
    assert seen[-1] is not None
    assert (seen[-1].state, seen[-1].step, seen[-1].steps) == ("running", 8, 8)
    status = read_status(folder)
    assert status is not None
    assert (status.state, status.exit_code, status.step, status.reason) == ("finished", 0, 8, None)


@pytest.mark.parametrize(
    ("end", "state", "exit_code", "reason"),
    [
        (InputError("no text"), "failed", 2, "no text"),
        (KilledError("gone"), "failed", 1, "KilledError: gone"),
        (DivergedError("loss is nan"), "diverged", 4, "every trial of --lr-sweep diverged"),
    ],
)
def test_the_status_of_a_sweep_that_failed(
    end: Exception,
    state: str,
    exit_code: int,
    reason: str,
    make_job: MakeJob,
    answers: Callable[..., Runs],
    tmp_path: Path,
) -> None:
    answers(DivergedError("loss is nan"), end)
    with pytest.raises(type(end)):
        sweep_learning_rates(long_job(make_job), Observation(), num_rates=2)
    status = read_status(tmp_path / "out.lr-sweep")
    assert status is not None
    assert (status.state, status.exit_code, status.reason) == (state, exit_code, reason)


def test_a_directory_that_is_not_a_sweeps_is_refused_and_left_alone(make_job: MakeJob, tmp_path: Path) -> None:
    mine = tmp_path / "out.lr-sweep/mine.txt"
    mine.parent.mkdir()
    mine.write_text("x")
    job = make_job(settings=settings_with(steps=2), validation_fraction=0.3)
    for force in (False, True):
        with pytest.raises(OutputError, match=r"out\.lr-sweep is in the way and not a sweep's"):
            sweep_learning_rates(job, Observation(), num_rates=2, force=force)
    run.uptrain(job, Observation())
    run.uptrain(job, Observation())  # which is finished
    assert mine.read_text() == "x"


def test_a_sweep_that_did_not_choose_the_rate_stays_out_of_the_result(make_job: MakeJob, tmp_path: Path) -> None:
    job = make_job(settings=SHORT, validation_fraction=0.3)
    stop_in_first_trial(job)
    run.uptrain(job, Observation())
    assert (tmp_path / "out.lr-sweep/lr_sweep.json").exists()
    assert not (tmp_path / "out/lr_sweep.json").exists()


def test_the_trials_of_another_run_stay_out_of_the_result(
    make_job: MakeJob, answers: Callable[..., Runs], tmp_path: Path
) -> None:
    job = make_job(settings=settings_with(steps=1), validation_fraction=0.3)
    answers(2.0, 1.0)
    sweep_learning_rates(job, Observation(), num_rates=2)
    run.uptrain(replace(job, settings=replace(job.settings, seed=1)), Observation())
    assert (tmp_path / "out.lr-sweep/lr_sweep.json").exists()
    assert not (tmp_path / "out/lr_sweep.json").exists()


def test_trials_that_could_not_begin_leave_nothing(make_job: MakeJob, tmp_path: Path) -> None:
    before = sorted(tmp_path.rglob("*"))
    steps = Steps()
    for fraction, why in (
        (0.0, "there is no held-out text"),
        (1e-9, "a validation fraction of 1e-09 holds out no document of this text"),
    ):
        job = make_job(settings=SHORT, validation_fraction=fraction)
        with pytest.raises(InputError, match=f"--lr-sweep compares held-out loss, and {why}"):
            sweep_learning_rates(job, Observation(progress=steps), num_rates=2)
    assert sorted(tmp_path.rglob("*")) == before
    assert steps.told == []
    job = make_job(settings=SHORT)
    scored = sweep_learning_rates(job, Observation(score=lambda model: 1.5), num_rates=1)
    assert scored[0].nats_per_token == 1.5


def test_a_rate_that_no_stage_trains_at_cannot_be_swept(
    make_job: MakeJob, make_checkpoint: Callable[..., Path]
) -> None:
    teacher = make_checkpoint(name="teacher", with_tokenizer=True)
    own_rate = {"layerwise_learning_rate": 1e-3, "weights": LossWeights()}

    def check(**settings: Any) -> None:
        check_sweep(make_job(settings=settings_with(**settings), teacher=teacher), scored=True)

    with pytest.raises(UnsupportedError, match="recipe layerwise trains at --layerwise-lr, which --lr-sweep does not"):
        check(recipe=Recipe.layerwise, **own_rate)
    check(recipe=Recipe.layerwise, weights=LossWeights())
    check(recipe=Recipe.distill, layerwise_fraction=0.5, **own_rate)


def test_a_run_that_began_without_trials_is_not_swept(make_job: MakeJob, tmp_path: Path) -> None:
    job = make_job(settings=SHORT, validation_fraction=0.3)
    with pytest.raises(PreemptedError):
        run.uptrain(job, Observation(progress=Steps(stop_after=2)))
    with pytest.raises(InputError, match=r"out\.uptraining holds an unfinished run that began without --lr-sweep"):
        sweep_learning_rates(job, Observation(), num_rates=2)
    run.uptrain(job, Observation())
    with pytest.raises(OutputError, match="out already exists"):
        sweep_learning_rates(job, Observation(), num_rates=2)
    assert not (tmp_path / "out.lr-sweep").exists()


@pytest.mark.parametrize("force", [False, True])
def test_trials_that_began_with_force_go_on_until_their_run_begins(
    force: bool, make_job: MakeJob, tmp_path: Path
) -> None:
    job = make_job(settings=SHORT, validation_fraction=0.3)
    with pytest.raises(PreemptedError):
        run.uptrain(job, Observation(progress=Steps(stop_after=2)))
    with pytest.raises(PreemptedError):
        sweep_learning_rates(job, Observation(progress=Steps(stop_after=6)), num_rates=2, force=True)
    assert not job.work.exists()  # given up, and what its status says is out of date
    found = find_sweep(job, 2, force=force)
    assert found is not None
    assert (len(found.trials), goes_on_to_replace(found, job)) == (1, True)
    assert find_sweep(job, 3, force=True) is None
    trials = sweep_learning_rates(job, Observation(), num_rates=2, force=True)
    with pytest.raises(PreemptedError):
        run.uptrain(with_best_rate(job, trials), Observation(progress=Steps(stop_after=2)), force=True)
    found = find_sweep(job, 2, force=False)
    assert found is not None
    assert not goes_on_to_replace(found, job)
    assert find_sweep(job, 2, force=True) is None


def test_one_process_at_a_sweep(make_job: MakeJob, tmp_path: Path) -> None:
    job = make_job(settings=SHORT, validation_fraction=0.3)
    stop_in_first_trial(job)
    folder = tmp_path / "out.lr-sweep"
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    with sole_run_in(folder):
        for force in (False, True):
            with pytest.raises(OutputError, match=r"out\.lr-sweep: another process is at this run"):
                sweep_learning_rates(job, Observation(), num_rates=2, force=force)
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before
