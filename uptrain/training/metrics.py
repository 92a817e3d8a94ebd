"""Records of a run: loss, throughput, remaining time."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ...convert.checkpoint.files import append_file, write_text
from ..recipe import Stage

__all__ = ["MetricsLog", "StepProgress", "Throughput"]


class Throughput:
    """A clock that gives tokens per second, model FLOPs utilisation and remaining time between two readings.

    `peak_flops` is that of all devices together; without it, or without `flops_per_token`, the utilisation is None,
    never a guess. The first reading covers the steps since `start`, with what compiles or warms up in them.
    """

    def __init__(
        self, *, tokens_per_step: int, last_step: int, flops_per_token: float | None, peak_flops: float | None
    ) -> None:
        self._tokens_per_step = tokens_per_step
        self._last_step = last_step
        self._flops_per_token = flops_per_token
        self._peak_flops = peak_flops
        self._at: tuple[int, float] | None = None

    def start(self, step: int) -> None:
        """Count from this step on."""
        self._at = (step, time.monotonic())

    def leave_out(self, seconds: float) -> None:
        """Do not count time that was not training."""
        if self._at is not None:
            self._at = (self._at[0], self._at[1] + seconds)

    def read(self, step: int) -> dict[str, float | None]:
        """Return what the steps since the last reading took; nothing if there were none."""
        now = time.monotonic()
        if self._at is None or step <= self._at[0]:
            return {}
        seconds_per_step = max(now - self._at[1], 1e-9) / (step - self._at[0])
        self._at = (step, now)
        tokens_per_second = self._tokens_per_step / seconds_per_step
        used = None
        if self._flops_per_token is not None and self._peak_flops is not None:
            used = tokens_per_second * self._flops_per_token / self._peak_flops
        return {
            "tokens_per_second": round(tokens_per_second, 1),
            "mfu": None if used is None else round(used, 4),
            "eta_seconds": round((self._last_step - step) * seconds_per_step, 1),
        }


class MetricsLog(TrainerCallback):
    """Appends a stage's records to a JSONL file, with the step counted over the whole run, and hands them to `show`.

    A resumed run first drops the records after the checkpoint that it starts from.
    """

    def __init__(
        self,
        path: Path,
        stage: Stage,
        *,
        tokens_per_step: int,
        throughput: Throughput,
        show: Callable[[dict[str, Any]], object],
    ) -> None:
        self._path = path
        self._stage = stage
        self._tokens_per_step = tokens_per_step
        self._throughput = throughput
        self._show = show
        self._start = time.monotonic()

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._throughput.start(state.global_step)
        if not state.is_world_process_zero:
            return
        step = self._stage.first_step + state.global_step
        text = self._path.read_text() if self._path.exists() and step > 0 else ""
        whole_lines = text[: text.rfind("\n") + 1].splitlines()  # a killed run may have torn the last one
        kept = [line for line in whole_lines if json.loads(line)["step"] <= step]
        write_text(self._path, "".join(line + "\n" for line in kept))

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if state.global_step == state.max_steps:
            control.should_log = True

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        if logs is None or not ("loss" in logs or "eval_nats_per_token" in logs):
            return
        if state.is_world_process_zero:
            step = self._stage.first_step + state.global_step
            record = {"step": step, "tokens": step * self._tokens_per_step, "stage": self._stage.name, **logs}
            record["seconds"] = round(time.monotonic() - self._start, 1)
            with append_file(self._path) as file:
                file.write(json.dumps(record).encode() + b"\n")
            self._show(record)


class StepProgress(TrainerCallback):
    """Tells `progress` how many more steps are done, those before a resume included."""

    def __init__(self, progress: Callable[[int], object]) -> None:
        self._progress = progress

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._progress(state.global_step)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._progress(1)
