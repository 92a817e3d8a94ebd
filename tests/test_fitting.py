from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch
from conftest import Train, settings_with
from kvconvert.convert.checkpoint.files import write_text
from kvconvert.convert.errors import UnsupportedError
from kvconvert.uptrain.observation import Observation
from kvconvert.uptrain.recipe import LossWeights, Recipe
from kvconvert.uptrain.settings import Execution
from kvconvert.uptrain.training import micro_batch as micro_batch_room
from kvconvert.uptrain.training import stage
from kvconvert.uptrain.training.arguments import training_arguments
from kvconvert.uptrain.training.micro_batch import largest_micro_batch
from torch import Tensor

CPU = torch.device("cpu")
WIDTH = 1000
STATES = 12 * WIDTH  # gradient and two moments of the one trained weight
FIRST = 4 * WIDTH  # what autograd keeps of a sequence


class Scale(torch.nn.Module):
    """Keeps its input, and one frozen weight that is no activation."""

    def __init__(self) -> None:
        super().__init__()
        self.trained = torch.nn.Parameter(torch.ones(WIDTH))
        self.frozen = torch.nn.Parameter(torch.ones(50 * WIDTH), requires_grad=False)


def fit(free: int, sequences: int, monkeypatch: pytest.MonkeyPatch, *, num_local: int = 1, **options: Any) -> int:
    monkeypatch.setattr(psutil, "virtual_memory", lambda: type("Memory", (), {"available": free}))
    model = Scale()

    def loss(num_sequences: int) -> Tensor:
        inputs = torch.ones(num_sequences, WIDTH)
        return (model.trained * inputs).sum() + (model.trained.sum() * model.frozen).sum()

    found = largest_micro_batch(
        model, loss, sequences_per_process=sequences, device=CPU, num_local=num_local, **options
    )
    assert model.trained.grad is None
    return found


@pytest.mark.parametrize(("num_fitting", "expected"), [(1, 1), (2, 2), (3, 3), (5, 4), (6, 6), (11, 6), (12, 12)])
def test_the_largest_divisor_that_fits(num_fitting: int, expected: int, monkeypatch: pytest.MonkeyPatch) -> None:
    free = STATES + round(num_fitting * FIRST / 0.9) + 10
    assert fit(free, 12, monkeypatch) == expected
    assert fit(3 * free, 12, monkeypatch, num_local=3) == expected


def test_what_does_not_hold_everywhere_is_not_done(monkeypatch: pytest.MonkeyPatch) -> None:
    """Processes of a sharded model run their steps together: one that cannot take two must not be alone with one."""
    asked: list[bool] = []

    def everywhere(holds: bool) -> bool:
        asked.append(holds)
        return len(asked) == 1

    free = STATES + round(4 * FIRST / 0.9) + 10
    assert fit(free, 12, monkeypatch, everywhere=everywhere) == 4
    assert asked == [True, True]
    with pytest.raises(UnsupportedError, match="one sequence needs"):
        fit(free, 12, monkeypatch, everywhere=lambda holds: False)


def test_more_than_64_gain_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    assert fit(10**12, 256, monkeypatch) == 64


def test_a_sequence_that_does_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UnsupportedError, match=r"one sequence needs 0\.0 GB beside the weights, and 0\.0 GB are free"):
        fit(STATES + FIRST, 12, monkeypatch)


class Accelerator:
    """A device's memory as an allocator tells it. Activations go while the backward pass makes the gradient."""

    def __init__(self, free: int, weight: torch.nn.Parameter, activation_bytes: int) -> None:
        self._free, self._weight, self._activation_bytes = free, weight, activation_bytes
        self._peak = 0

    def mem_get_info(self, device: torch.device) -> tuple[int, int]:
        return self._free, self._free

    def memory_allocated(self, device: torch.device) -> int:
        return 0 if self._weight.grad is None else 4 * self._weight.numel()

    def reset_peak_memory_stats(self, device: torch.device) -> None:
        self._peak = 0

    def max_memory_allocated(self, device: torch.device) -> int:
        return self._peak

    def loss(self, num_sequences: int) -> Any:
        def backward() -> None:
            needed = num_sequences * self._activation_bytes
            if self._weight.grad is None:
                self._peak = max(needed, 4 * self._weight.numel())
                self._weight.grad = torch.zeros_like(self._weight)
            else:
                self._peak = self.memory_allocated(CPU) + needed

        return SimpleNamespace(backward=backward)


@pytest.mark.parametrize("activation_bytes", [1000, 500_000])
def test_gradients_do_not_hide_what_a_sequence_needs(activation_bytes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A gradient of 400 kB, above or below the activations of one sequence; three sequences fit."""
    weight = torch.nn.Parameter(torch.zeros(100_000))
    device = Accelerator(1_200_000 + round(3.1 * activation_bytes / 0.9), weight, activation_bytes)
    monkeypatch.setattr(torch, "get_device_module", lambda of: device)
    model = SimpleNamespace(
        parameters=lambda: iter([weight]), zero_grad=lambda set_to_none: setattr(weight, "grad", None)
    )
    found = largest_micro_batch(model, device.loss, sequences_per_process=12, device=torch.device("cuda"), num_local=1)
    assert found == 3
    assert weight.grad is None


def stored(work: Path, stage: str) -> Any:
    return json.loads((work / f"micro_batch.{stage}.json").read_text())


def test_what_fits_is_found_for_each_stage_and_kept(
    train: Train, make_checkpoint: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Any
) -> None:
    """The second stage needs logits and more gradients; a resumed stage measures again on another machine only."""
    answers = iter([4, 2, 1])
    asked: list[int] = []

    def answer(model: Any, loss: Any, **options: Any) -> int:
        loss(1).backward()
        asked.append(sum(parameter.requires_grad for parameter in model.parameters()))
        return next(answers)

    used: list[int] = []
    arguments = training_arguments

    def spy(*args: Any, micro_batch: int, peak_rate: float) -> Any:
        used.append(micro_batch)
        return arguments(*args, micro_batch=micro_batch, peak_rate=peak_rate)

    done = 0

    def die_after_four(num_steps: int) -> None:
        nonlocal done
        done += num_steps
        if done == 4:
            raise RuntimeError

    def die_at_once(num_steps: int) -> None:
        raise RuntimeError

    monkeypatch.setattr(micro_batch_room, "largest_micro_batch", answer)
    monkeypatch.setattr(stage, "training_arguments", spy)
    settings = settings_with(recipe=Recipe.distill, weights=LossWeights(), layerwise_fraction=0.5)
    options: dict[str, Any] = {
        "settings": settings,
        "teacher": make_checkpoint(name="teacher", with_tokenizer=True),
        "execution": Execution(micro_batch=None, activation_checkpointing=True),
    }
    with pytest.raises(RuntimeError):
        train("out", watch=Observation(progress=die_after_four), **options)
    work = tmp_path / "out.uptraining"
    assert [stored(work, name)["micro_batch"] for name in ("layerwise", "main")] == [4, 2]
    with pytest.raises(RuntimeError):
        train("out", watch=Observation(progress=die_at_once), **options)
    assert used == [4, 2, 2]
    assert asked[0] < asked[1]
    write_text(work / "micro_batch.main.json", json.dumps({"micro_batch": 2, "machine": {"device": "another"}}))
    train("out", **options)
    assert used == [4, 2, 2, 1]
