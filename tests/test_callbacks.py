from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from conftest import Train, same_weights
from kvconvert.convert.errors import PreemptedError
from kvconvert.uptrain.observation import Observation
from kvconvert.uptrain.recipe import Objective, Stage, Trained
from kvconvert.uptrain.rundir.checkpoints import last_complete
from kvconvert.uptrain.training import evaluation, metrics, stopping
from kvconvert.uptrain.training.evaluation import PeriodicEvaluation
from kvconvert.uptrain.training.metrics import Throughput
from kvconvert.uptrain.training.saving import Checkpoints
from kvconvert.uptrain.training.stopping import StopRequests
from transformers import TrainerControl, TrainerState, TrainingArguments

STAGE = Stage("main", Objective.prediction, Trained.all, 10, 0, 1e-3)


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """The callbacks' time, which passes when it is told to."""
    made = Clock()
    for module in (evaluation, metrics, stopping):
        monkeypatch.setattr(module, "time", made)
    return made


@pytest.fixture
def arguments(tmp_path: Path) -> TrainingArguments:
    return TrainingArguments(output_dir=str(tmp_path), use_cpu=True)


def at(step: int, max_steps: int = 10) -> TrainerState:
    return TrainerState(global_step=step, max_steps=max_steps)


def throughput(**known: float) -> Throughput:
    return Throughput(
        tokens_per_step=100,
        last_step=10,
        flops_per_token=known.get("flops"),
        peak_flops=known.get("peak"),
    )


def test_throughput_is_that_of_the_steps_since_it_was_read(clock: Clock) -> None:
    rate = throughput(flops=6e9, peak=1e12)
    assert rate.read(1) == {}
    rate.start(2)
    assert rate.read(2) == {}
    clock.now += 8
    assert rate.read(6) == {"tokens_per_second": 50.0, "mfu": 0.3, "eta_seconds": 8.0}
    clock.now += 1
    assert rate.read(7) == {"tokens_per_second": 100.0, "mfu": 0.6, "eta_seconds": 3.0}


@pytest.mark.parametrize("known", [{}, {"flops": 6e9}, {"peak": 1e12}])
def test_without_a_peak_there_is_no_utilisation(known: dict[str, float], clock: Clock) -> None:
    rate = throughput(**known)
    rate.start(0)
    clock.now += 2
    assert rate.read(1) == {"tokens_per_second": 50.0, "mfu": None, "eta_seconds": 18.0}


def test_evaluation_takes_no_time(clock: Clock, arguments: TrainingArguments) -> None:
    def score(model: Any) -> float:
        assert model.mode == "eval"
        clock.now += 1000
        return 2.5

    class Model:
        mode = "train"

        def eval(self) -> None:
            self.mode = "eval"

        def train(self) -> None:
            self.mode = "train"

        def modules(self) -> list[Any]:
            return []

    reported: list[dict[str, float]] = []
    rate, model = throughput(), Model()
    evaluation = PeriodicEvaluation(score, STAGE, name="model", every=4, throughput=rate)
    evaluation.report = reported.append
    rate.start(0)
    for step in range(1, 11):
        clock.now += 2
        evaluation.on_step_end(arguments, at(step), TrainerControl(), model=model)
    assert reported == [{"eval_nats_per_token": 2.5}] * 3  # after 4, 8 and the last
    assert model.mode == "train"
    assert rate.read(10)["tokens_per_second"] == 50


def test_evaluation_before_the_first_step_of_a_run_only(arguments: TrainingArguments) -> None:
    scored: list[tuple[int, int]] = []

    def note(place: tuple[int, int]) -> Callable[[dict[str, float]], None]:
        return lambda record: scored.append(place)

    for first_step, step in ((0, 0), (0, 4), (4, 0), (4, 4)):
        stage = Stage("main", Objective.prediction, Trained.all, 10, first_step, 1e-3)
        evaluation = PeriodicEvaluation(lambda model: 0.0, stage, name="model", every=4, throughput=throughput())
        evaluation.report = note((first_step, step))
        model = SimpleNamespace(eval=lambda: None, train=lambda: None, modules=list)
        evaluation.on_train_begin(arguments, at(step), TrainerControl(), model=model)
    assert scored == [(0, 0)]


@pytest.mark.parametrize(("every", "at_end", "expected"), [(5, False, [5]), (5, True, [5, 10]), (4, True, [4, 8, 10])])
def test_checkpoints_every_few_steps_and_maybe_after_the_last(
    every: int, at_end: bool, expected: list[int], arguments: TrainingArguments
) -> None:
    asked = []
    for step in range(1, 11):
        control = TrainerControl()
        Checkpoints(every, at_end=at_end).on_step_end(arguments, at(step), control)
        asked += [step] if control.should_save else []
    assert asked == expected


SIGNALS = [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1]


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_stops_after_the_step(number: signal.Signals, arguments: TrainingArguments) -> None:
    before = [signal.getsignal(each) for each in SIGNALS]
    with StopRequests() as stop:
        assert not stop.requested
        stop.on_train_begin(arguments, at(0), TrainerControl())
        stop.on_step_begin(arguments, at(0), TrainerControl())
        os.kill(os.getpid(), number)
        assert not stop.requested  # the step may wait for text that is packed beside it
        control = TrainerControl()
        stop.on_step_end(arguments, at(1), control)
        assert (control.should_save, control.should_training_stop) == (True, True)
        assert stop.reason == f"received {number.name}"
        assert bool(stop.requested)
    assert [signal.getsignal(each) for each in SIGNALS] == before


def test_a_first_checkpoint_is_left_time_for(clock: Clock, arguments: TrainingArguments) -> None:
    """One second a step; a checkpoint is taken to need 20 until one needed 3."""

    def out_of_time(now: float) -> bool:
        clock.now = now - 1.0
        stop.on_step_begin(arguments, at(1), TrainerControl())
        clock.now = now
        control = TrainerControl()
        stop.on_step_end(arguments, at(2), control)
        return bool(control.should_training_stop)

    stop = StopRequests(deadline=100.0, save_seconds=20.0)
    assert not out_of_time(50.0)
    assert out_of_time(58.0)
    clock.now += 3.0
    stop.on_save(arguments, at(2), TrainerControl())
    assert not out_of_time(91.0)
    assert out_of_time(92.0)


def test_a_signal_before_training_is_seen_at_once() -> None:
    with StopRequests() as stop:
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.requested


@pytest.mark.parametrize("second", SIGNALS)
def test_a_second_signal_ends_at_once_unless_a_launcher_repeats_the_first(second: signal.Signals, clock: Clock) -> None:
    with StopRequests(), pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGUSR1)
        clock.now += 1
        os.kill(os.getpid(), second)  # Ctrl-C reaches every process, and torchrun passes it on to all
        clock.now += 5
        os.kill(os.getpid(), second)


def test_a_signal_in_the_last_step_stops_nothing(arguments: TrainingArguments) -> None:
    with StopRequests() as stop:
        os.kill(os.getpid(), signal.SIGTERM)
        control = TrainerControl()
        stop.on_step_end(arguments, at(10), control)
        assert not control.should_training_stop


def last_step(clock: Clock, arguments: TrainingArguments, *, seconds: float, step: float, save: float) -> float:
    """The time left when a run with steps and checkpoints of this length was told to stop."""
    deadline = clock.now + seconds
    stop = StopRequests(deadline=deadline)
    stop.on_train_begin(arguments, at(0), TrainerControl())
    for number in range(1, 1000):
        stop.on_step_begin(arguments, at(number - 1), TrainerControl())
        clock.now += step
        control = TrainerControl()
        stop.on_step_end(arguments, at(number, 1000), control)
        if control.should_training_stop:
            assert stop.reason == "out of time"
            return deadline - clock.now
        if number % 5 == 0:
            clock.now += save
            stop.on_save(arguments, at(number), control)
    raise AssertionError


@pytest.mark.parametrize(("step", "save", "margin"), [(1, 0, 5), (10, 0, 20), (10, 30, 80), (0.1, 100, 200.2)])
def test_a_step_and_a_checkpoint_fit_before_the_deadline(
    step: float, save: float, margin: float, clock: Clock, arguments: TrainingArguments
) -> None:
    left = last_step(clock, arguments, seconds=1000, step=step, save=save)
    assert save <= left <= margin + 1e-6
    assert left > margin - step - save - 1e-6


@pytest.mark.parametrize("number", SIGNALS)
def test_signals_end_a_run_with_75_and_the_same_command_goes_on(
    number: signal.Signals, train: Train, tmp_path: Path
) -> None:
    def send(num_steps: int) -> None:
        if num_steps:
            os.kill(os.getpid(), number)

    with pytest.raises(PreemptedError, match=rf"stopped at step 1 of 6 \(received {number.name}\)") as raised:
        train("out", watch=Observation(progress=send))
    assert raised.value.exit_code == 75
    checkpoint = last_complete(tmp_path / "out.uptraining/checkpoints/main")
    assert checkpoint is not None
    assert checkpoint.name == "checkpoint-1"


def test_a_deadline_ends_a_run_with_a_checkpoint(train: Train, tmp_path: Path, clock: Clock) -> None:
    def pass_time(num_steps: int) -> None:
        clock.now += 10 * num_steps

    watch = Observation(deadline=clock.now + 55, progress=pass_time)
    with pytest.raises(PreemptedError, match=r"stopped at step 4 of 6 \(out of time\)"):
        train("parts", watch=watch)
    clock.now += 10**6
    # another one that has no time for a second step, and so goes on by one
    with pytest.raises(PreemptedError, match=r"stopped at step 5 of 6 \(out of time\)"):
        train("parts", watch=Observation(deadline=0.0))
    assert same_weights(train("parts"), train("whole"))
