from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from conftest import SETTINGS, KilledError
from kvconvert.convert.errors import DivergedError, InputError
from kvconvert.uptrain import jobs, run, sweep
from kvconvert.uptrain.jobs import UptrainJob
from kvconvert.uptrain.run import Observation
from kvconvert.uptrain.sweep import Trial, finished_trials, sweep_learning_rates, with_best_rate

MakeJob = Callable[..., UptrainJob]


class Runs:
    """Stands for `uptrain`: the trial at index i ends with the i-th answer, or raises it."""

    def __init__(self, *answers: float | Exception | None) -> None:
        self.answers = list(answers)
        self.jobs: list[UptrainJob] = []
        self.watches: list[Observation] = []

    def __call__(self, job: UptrainJob, watch: Observation, *, force: bool) -> Any:
        self.jobs.append(job)
        self.watches.append(watch)
        assert force
        answer = self.answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return run._result(job, 1.0, held_out=answer)


@pytest.fixture
def answers(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Runs]:
    def answer(*results: float | Exception | None) -> Runs:
        runs = Runs(*results)
        monkeypatch.setattr(sweep, "uptrain", runs)
        return runs

    return answer


def long_job(make_job: MakeJob, **fields: Any) -> UptrainJob:
    return make_job(settings=replace(SETTINGS, steps=1000), **fields)


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
    job = make_job(settings=replace(SETTINGS, steps=steps))
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


def test_without_held_out_text_nothing_can_be_compared(make_job: MakeJob, answers: Callable[..., Runs]) -> None:
    answers(None)
    with pytest.raises(InputError, match="--lr-sweep compares held-out loss, and there is no held-out text"):
        sweep_learning_rates(long_job(make_job), Observation(), num_rates=2)


def test_a_real_sweep_leaves_its_table_in_the_result_and_nothing_beside_it(make_job: MakeJob, tmp_path: Path) -> None:
    job = make_job(validation_fraction=0.3, settings=replace(SETTINGS, steps=3))
    trials = sweep_learning_rates(job, Observation(), num_rates=2)
    assert all(trial.nats_per_token is not None for trial in trials)
    assert [path.name for path in (tmp_path / "out.lr-sweep").iterdir()] == ["lr_sweep.json"]
    best = with_best_rate(job, trials)
    run.uptrain(best, Observation())
    assert {path.name for path in tmp_path.glob("out*")} == {"out"}
    assert finished_trials(job, 2) == trials
    assert jobs.finished_before(best)
