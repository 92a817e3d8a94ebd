"""transformers.Trainer with kvconvert's objective, its stop before a bad step, its log and its answer to signals."""

from __future__ import annotations

import json
import math
import signal
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..convert.errors import DivergedError
from ..convert.output import write_text
from .objective import IGNORED_LABEL, cross_entropy_sum, forward_kl_sum

__all__ = ["MetricsLog", "PeriodicEvaluation", "StepProgress", "StopOnSignal", "UptrainTrainer"]


class UptrainTrainer(Trainer):
    """Minimises cross-entropy, or the forward KL to `teacher` if there is one.

    The loss is a sum over tokens divided by the tokens of the whole accumulated batch, so that gradient accumulation
    changes nothing; `loss_is_scaled_for_ga` tells the Trainer not to scale it again. No attention mask is passed and
    no cache is used: either would let packed documents attend to each other.
    Raises DivergedError before the optimizer step when loss or gradient is not finite.
    """

    loss_is_scaled_for_ga = True

    def __init__(self, *args: Any, teacher: Any | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.teacher = teacher
        self.model_accepts_loss_kwargs = True  # makes the Trainer count the tokens of the accumulated batch

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        labels = inputs["labels"]
        feed = {name: value for name, value in inputs.items() if name != "labels"}
        outputs = model(**feed, use_cache=False)
        if self.teacher is None:
            total = cross_entropy_sum(outputs.logits, labels)
        else:
            with torch.no_grad():
                teacher_logits = self.teacher(**feed, use_cache=False).logits
            total = forward_kl_sum(outputs.logits, teacher_logits, labels)
        if num_items_in_batch is None:
            num_items_in_batch = (labels[:, 1:] != IGNORED_LABEL).sum()
        elif self.args.average_tokens_across_devices:
            total = total * self.accelerator.num_processes  # the Trainer's gradient is a mean over processes
        loss = total / num_items_in_batch
        return (loss, outputs) if return_outputs else loss

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        loss: Tensor = super().training_step(*args, **kwargs)
        self._require_finite(loss.item(), "loss")
        return loss

    def _get_grad_norm(self, *args: Any, **kwargs: Any) -> Any:
        norm = super()._get_grad_norm(*args, **kwargs)
        if norm is not None:
            self._require_finite(float(norm), "gradient norm")
        return norm

    def _require_finite(self, value: float, quantity: str) -> None:
        if not math.isfinite(value):
            raise DivergedError(
                f"step {self.state.global_step + 1}: {quantity} is {value}; the weights were not updated",
                hint="use a smaller --lr, and --force to start over",
            )


class MetricsLog(TrainerCallback):
    """Appends what the Trainer logs to a JSONL file, and hands it to `show`.

    A resumed run first drops the records after the checkpoint that it starts from.
    """

    def __init__(self, path: Path, *, tokens_per_step: int, show: Callable[[dict[str, Any]], object]) -> None:
        self._path = path
        self._tokens_per_step = tokens_per_step
        self._show = show
        self._start = time.monotonic()

    def write(self, record: dict[str, Any]) -> None:
        with self._path.open("a") as file:
            file.write(json.dumps(record) + "\n")
        self._show(record)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if not state.is_world_process_zero:
            return
        text = self._path.read_text() if self._path.exists() and state.global_step > 0 else ""
        whole_lines = text[: text.rfind("\n") + 1].splitlines()  # a killed run may have torn the last one
        kept = [line for line in whole_lines if json.loads(line)["step"] <= state.global_step]
        write_text(self._path, "".join(line + "\n" for line in kept))

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if state.global_step == state.max_steps:
            control.should_log = True

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        if logs and "loss" in logs and state.is_world_process_zero:
            names = ("loss", "grad_norm", "learning_rate")
            record: dict[str, Any] = {"step": state.global_step, "tokens": state.global_step * self._tokens_per_step}
            record |= {name: logs[name] for name in names if name in logs}
            self.write(record | {"seconds": round(time.monotonic() - self._start, 1)})


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


class PeriodicEvaluation(TrainerCallback):
    """Scores held-out text every `every` steps, before the first and after the last, into the metrics log."""

    def __init__(self, score: Callable[[Any], float], log: MetricsLog, *, every: int, tokens_per_step: int) -> None:
        self._score = score
        self._log = log
        self._every = every
        self._tokens_per_step = tokens_per_step

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if state.global_step == 0:
            self._run(state, kwargs["model"])

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if state.global_step % self._every == 0 or state.global_step == state.max_steps:
            self._run(state, kwargs["model"])

    def _run(self, state: TrainerState, model: Any) -> None:
        if not state.is_world_process_zero:
            return
        model.eval()
        nats = self._score(model)
        model.train()
        step = state.global_step
        self._log.write({"step": step, "tokens": step * self._tokens_per_step, "eval_nats_per_token": nats})


class StopOnSignal(TrainerCallback):
    """On the first SIGTERM or SIGINT, finish the step, save a checkpoint and stop; a second one ends at once."""

    def __init__(self) -> None:
        self.received: int | None = None
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> StopOnSignal:
        for number in (signal.SIGTERM, signal.SIGINT):
            self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *exc_info: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.received is not None:
            raise KeyboardInterrupt
        self.received = number

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self.received is not None and state.global_step < state.max_steps:
            control.should_save = True
            control.should_training_stop = True
