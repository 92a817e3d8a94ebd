"""What benchmarks/check_interruption.py, check_invariance.py and measure_training.py compute from what they measure."""

from __future__ import annotations

import importlib.util
import json
import math
import sys
from pathlib import Path
from signal import SIGKILL, SIGTERM, Signals
from types import ModuleType
from typing import Any

import pytest
import torch

RECORD = {"step": 1, "stage": "main", "loss": 1.5, "learning_rate": 1e-3, "seconds": 0.1, "tokens_per_second": 10.0}


def load(name: str) -> ModuleType:
    path = Path(__file__).parents[1] / "benchmarks" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their annotations up there
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def interruption() -> ModuleType:
    return load("check_interruption")


@pytest.fixture(scope="module")
def invariance() -> ModuleType:
    return load("check_invariance")


@pytest.fixture(scope="module")
def training() -> ModuleType:
    return load("measure_training")


def write_result(folder: Path, *, weights: bytes = b"\x00\x01", records: list[dict[str, Any]] | None = None) -> Path:
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(weights)
    lines = [json.dumps(record) + "\n" for record in ([RECORD] if records is None else records)]
    (folder / "metrics.jsonl").write_text("".join(lines))
    return folder


def test_only_what_a_clock_says_may_differ(interruption: ModuleType, tmp_path: Path) -> None:
    reference = write_result(tmp_path / "reference")
    later = write_result(tmp_path / "later", records=[RECORD | {"seconds": 9.0, "tokens_per_second": 1.0}])
    assert interruption.is_equal(later, reference)
    changes: dict[str, dict[str, Any]] = {
        "bit": {"weights": b"\x00\x03"},
        "loss": {"records": [RECORD | {"loss": math.nextafter(1.5, 2)}]},
        "missing": {"records": []},
        "twice": {"records": [RECORD, RECORD]},
    }
    for name, change in changes.items():
        assert not interruption.is_equal(write_result(tmp_path / name, **change), reference)
    assert not interruption.is_equal(tmp_path / "absent", reference)


def test_two_runs_without_records_prove_nothing(interruption: ModuleType, tmp_path: Path) -> None:
    one, other = (write_result(tmp_path / name, records=[]) for name in ("one", "other"))
    assert not interruption.is_equal(one, other)


@pytest.mark.parametrize(
    ("sent", "exit_code", "state", "finished", "expected"),
    [
        (SIGKILL, -9, "running", False, True),
        (SIGKILL, 1, "failed", False, False),
        (SIGTERM, 75, "preempted", False, True),
        (SIGTERM, 75, None, False, True),  # while text is packed, before the first status
        (SIGTERM, 75, "running", False, False),
        (SIGTERM, 0, "finished", True, True),
        (SIGTERM, 0, "running", False, False),
        (SIGTERM, 143, None, False, True),
        (SIGTERM, -15, None, False, True),
        (SIGTERM, -15, "finished", True, True),
        (SIGTERM, 143, "interrupted", False, False),  # steps that were not saved
        (SIGTERM, 2, None, False, False),
        (None, 0, "finished", True, True),
        (None, 2, None, False, False),
    ],
)
def test_exit_codes_after_a_signal(
    interruption: ModuleType, sent: Signals | None, exit_code: int, state: str | None, finished: bool, expected: bool
) -> None:
    status = None if state is None else {"state": state, "step": 3}
    assert interruption.Interruption(sent, 1.0, exit_code, status, finished).is_as_it_should_be is expected


def test_only_this_process_s_own_status_counts(interruption: ModuleType, tmp_path: Path) -> None:
    work = tmp_path / "out.uptraining"
    work.mkdir()
    (work / "run_status.json").write_text(json.dumps({"state": "running", "process_id": 7}))
    assert interruption.status_of(tmp_path / "out", 7) == {"state": "running", "process_id": 7}
    assert interruption.status_of(tmp_path / "out", 8) is None


def test_signals_take_turns_at_drawn_moments(interruption: ModuleType) -> None:
    plans, again, other = (list(interruption.plans(trials=50, kills=2, longest=3.0, seed=seed)) for seed in (0, 0, 1))
    assert plans == again
    assert plans != other
    assert [[number for number, _ in plan] for plan in plans[:2]] == [[SIGKILL, SIGTERM], [SIGTERM, SIGKILL]]
    moments = [seconds for plan in plans for _, seconds in plan]
    assert len(set(moments)) == 100
    assert 0 <= min(moments) < 0.2
    assert 2.8 < max(moments) <= 3


def outcome(script: ModuleType, losses: list[float], gradient: list[float], weights: list[float]) -> Any:
    return script.Outcome(losses, torch.tensor(gradient), {"w": torch.tensor(weights), "tied": torch.tensor([9.0])})


def test_distances_by_hand(invariance: ModuleType) -> None:
    start = {"w": torch.tensor([1.0, 1.0], dtype=torch.bfloat16)}
    reference = outcome(invariance, [2.0, 4.0], [3.0, 4.0], [4.0, 5.0])  # moved by (3, 4)
    apart = invariance.distance(outcome(invariance, [2.0, 4.4], [3.0, 4.5], [4.0, 5.0625]), reference, start)
    assert apart.loss == pytest.approx(0.1)
    assert apart.gradient == pytest.approx(0.1)
    assert apart.update == pytest.approx(0.0125)
    assert apart.weight == pytest.approx(0.0625)
    none = invariance.distance(reference, reference, start)
    assert (none.loss, none.gradient, none.update, none.weight) == (0, 0, 0, 0)


def test_optimizers_of_other_parameters_are_infinitely_far_apart(invariance: ModuleType) -> None:
    start = {"w": torch.zeros(2)}
    reference = outcome(invariance, [2.0], [3.0, 4.0], [4.0, 5.0])
    assert invariance.distance(outcome(invariance, [2.0], [3.0], [4.0, 5.0]), reference, start).gradient == math.inf


def test_ratios_are_of_neighbours(training: ModuleType) -> None:
    """The second round had half of the machine: medians of the rates alone would say 10 / 9."""
    found = training.ratio([10.0, 5.0, 12.0], [10.0, 4.0, 9.0])
    assert (found.median, found.least, found.largest) == (1.25, 1.0, 12 / 9)


def test_rates_of_a_run(training: ModuleType) -> None:
    run = training.Run(6, (1.0, 1.0, 4.0), 9.0, 1.5, 0, 0, None, None)
    assert run.tokens_per_second == 3
    assert run.median_tokens_per_second == 6
    assert run.tokens_per_processor_second == 2


def test_the_warm_up_is_not_counted(training: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    wall, processor = iter([10.0, 11.0, 13.0, 16.0]), iter([5.0, 9.0])
    monkeypatch.setattr(training.time, "perf_counter", lambda: next(wall))
    monkeypatch.setattr(training.time, "process_time", lambda: next(processor))
    clock = training.Clock(warm_up=2, steps=5)
    for _ in range(5):
        clock.step_ended()
    assert clock.seconds == (1.0, 2.0, 3.0)
    assert clock.processor_seconds == 4.0
    assert clock.resident_peak > 0
