from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from conftest import DISTILL, CheckpointFactory, KilledError, Train, same_weights, settings_with
from kvconvert.uptrain import run
from kvconvert.uptrain.job import UptrainJob
from kvconvert.uptrain.observation import Observation
from kvconvert.uptrain.rundir.start import Start, read_start, write_start
from kvconvert.uptrain.settings import RunSettings, rate_for_start
from kvconvert.uptrain.training import start
from safetensors.torch import load_file, save_file

PEAK = 1e-3
FROM_START: dict[str, Any] = {**DISTILL, "learning_rate": PEAK, "rate_from_start": True}


@pytest.fixture
def near(make_checkpoint: CheckpointFactory, tmp_path: Path) -> Path:
    """A teacher whose predictions the student nearly has already: its own weights, each 1 % larger."""
    near = shutil.copytree(make_checkpoint(num_key_value_heads=2, with_tokenizer=True), tmp_path / "near")
    tensors = load_file(near / "model.safetensors")
    save_file({name: 1.01 * tensor for name, tensor in tensors.items()}, near / "model.safetensors", {"format": "pt"})
    return near


@pytest.mark.parametrize(
    ("kl", "rate"),
    [(2.0, 1e-3), (0.3, 1e-3), (0.075, 5e-4), (0.012, 2e-4), (0.003, 1e-4), (1e-9, 5e-5), (0.0, 5e-5), (-1e-12, 5e-5)],
)
def test_the_rate_falls_with_the_root_of_the_divergence(kl: float, rate: float) -> None:
    assert rate_for_start(PEAK, kl) == rate


def watch(**fields: Any) -> Observation:
    return Observation(**{"save_steps": 2, "log_steps": 1, **fields})


def settings(**changes: Any) -> RunSettings:
    return settings_with(**{**FROM_START, **changes})


def losses_and_rates(result: Path) -> list[tuple[str, float, float]]:
    records = [json.loads(line) for line in (result / "metrics.jsonl").read_text().splitlines()]
    return [(record["stage"], record["loss"], record["learning_rate"]) for record in records if "loss" in record]


def test_the_start_is_the_loss_before_the_first_step(
    make_job: Callable[..., UptrainJob], near: Path, tmp_path: Path
) -> None:
    """A run of one step, the samples of which are all that is measured."""
    remarks: list[str] = []
    job = make_job(settings=settings(steps=1, sequences_per_step=8), teacher=near)
    result = run.uptrain(job, watch(remark=remarks.append))
    assert result.start is not None
    ((_, loss, rate),) = losses_and_rates(result.output)
    assert result.start.kl_nats_per_token == pytest.approx(loss, rel=1e-5)
    assert rate == result.start.peak_learning_rate == rate_for_start(PEAK, result.start.kl_nats_per_token) < PEAK
    assert json.loads((result.output / "kvconvert.json").read_text())["uptraining"]["start"] == asdict(result.start)
    said = f"at the start {loss:.4f} nats/token: peak learning rate {rate:.2g}"
    assert [text for text in remarks if "divergence" in text] == [f"divergence from the teacher {said}"]
    assert run.uptrain(job, watch()).start == result.start  # of a run that is finished


def test_a_rate_that_was_asked_for_is_taken_as_it_is(make_job: Callable[..., UptrainJob], near: Path) -> None:
    result = run.uptrain(make_job(settings=settings(steps=1, rate_from_start=False), teacher=near), watch())
    assert result.start is None
    assert [rate for _, _, rate in losses_and_rates(result.output)] == [PEAK]
    assert json.loads((result.output / "kvconvert.json").read_text())["uptraining"]["start"] is None


def test_a_run_that_goes_on_keeps_its_rate(
    train: Train, make_job: Callable[..., UptrainJob], near: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = train("whole", settings=settings(), teacher=near, watch=watch())
    done = 0

    def die(more: int) -> None:
        nonlocal done
        done += more
        if done == 3:
            raise KilledError

    job = make_job("parts", settings=settings(), teacher=near)
    with pytest.raises(KilledError):
        run.uptrain(job, watch(progress=die))
    begun = read_start(job.work)
    with monkeypatch.context() as patch:
        patch.setattr(start, "_divergence", lambda *args: pytest.fail("the start was measured again"))
        result = run.uptrain(job, watch())
    assert result.start == begun
    assert same_weights(result.output, whole)
    control = train("control", settings=settings(rate_from_start=False), teacher=near, watch=watch())
    assert not same_weights(control, whole)


def test_only_the_last_stage_follows_its_start(make_job: Callable[..., UptrainJob], near: Path) -> None:
    two = settings(steps=4, layerwise_fraction=0.5, warmup_fraction=0.0, lr_scheduler="constant_with_warmup")
    result = run.uptrain(make_job(settings=two, teacher=near), watch())
    assert result.start is not None
    peak = result.start.peak_learning_rate
    assert [(stage, rate) for stage, _, rate in losses_and_rates(result.output)] == [
        ("layerwise", PEAK),
        ("layerwise", PEAK),
        ("main", peak),
        ("main", peak),
    ]
    assert peak < PEAK


def test_a_start_that_is_not_finite_is_left_to_the_first_step(
    make_job: Callable[..., UptrainJob], near: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(start, "_divergence", lambda *args: math.nan)
    result = run.uptrain(make_job(settings=settings(steps=1), teacher=near), watch())
    assert result.start is None
    assert [rate for _, _, rate in losses_and_rates(result.output)] == [PEAK]


def test_what_is_written_is_read(tmp_path: Path) -> None:
    assert read_start(tmp_path) is None
    write_start(tmp_path, Start(0.25, 5e-4))
    assert read_start(tmp_path) == Start(0.25, 5e-4)
