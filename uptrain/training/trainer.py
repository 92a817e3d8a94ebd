"""transformers.Trainer with kvconvert's losses, its stop before a bad step, and checkpoints that are whole or not."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR
from transformers import Trainer
from transformers.trainer import SCHEDULER_NAME
from transformers.trainer_utils import SchedulerType

from ...convert.errors import DivergedError
from ...convert.runtime.transformers_interface import require
from ..losses.prediction import IGNORED_LABEL, Loss
from ..rundir.checkpoints import finish_checkpoint
from ..schedule import Schedule, rate_factor
from .sharded import load_sharded, save_sharded

__all__ = ["NonFiniteError", "UptrainTrainer"]


require("training")


class NonFiniteError(DivergedError):
    """Step `step` of a run, which was not taken, because its loss or gradient was not finite.

    `student_is_finite` and `teacher_is_finite` tell what is known of what the loss compares.
    """

    def __init__(
        self, step: int, quantity: str, value: float, *, student_is_finite: bool = True, teacher_is_finite: bool = True
    ) -> None:
        super().__init__(
            f"step {step}: {quantity} is {value}; the weights were not updated",
            hint="use a smaller --lr, and --force to start over",
        )
        self.step = step
        self.student_is_finite = student_is_finite
        self.teacher_is_finite = teacher_is_finite


class UptrainTrainer(Trainer):
    """The Trainer, which minimises `loss` per token.

    The loss is a sum over tokens divided by the tokens of the whole accumulated batch, so that gradient accumulation
    changes nothing; `loss_is_scaled_for_ga` tells the Trainer not to scale it again. With `bf16` models compute under
    autocast that is opened here, because accelerate's own would turn their logits into float32. Parameters that
    `in_attention` does not name learn at `body_lr_multiplier` times the rate of the others. `measure(step)` is added to
    every record of a loss. `first_step` steps of the run came before the Trainer's own.
    Raises NonFiniteError before the optimizer step when loss or gradient is not finite, in all processes alike.
    """

    loss_is_scaled_for_ga = True
    is_distributed_loading_by_transformers = False  # the Trainer sets it, from 5.19 on

    def __init__(
        self,
        *args: Any,
        loss: Loss,
        bf16: bool,
        in_attention: Callable[[str], bool] = lambda name: True,
        body_lr_multiplier: float = 1.0,
        measure: Callable[[int], dict[str, float | None]] = lambda step: {},
        first_step: int = 0,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self.model_accepts_loss_kwargs = True  # makes the Trainer count the tokens of the accumulated batch
        self._loss = loss
        self._bf16 = bf16
        self._in_attention = in_attention
        self._body_lr_multiplier = body_lr_multiplier
        self._measure = measure
        self._first_step = first_step
        self._micro_batches: list[tuple[Tensor, dict[str, Any]]] = []  # of a step: each one's loss and what was fed

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        labels = inputs["labels"]
        feed = {name: value for name, value in inputs.items() if name != "labels"}
        with torch.autocast(self.args.device.type, torch.bfloat16, enabled=self._bf16):
            total = self._loss(model, feed, labels)
        if num_items_in_batch is None:
            num_items_in_batch = (labels[:, 1:] != IGNORED_LABEL).sum()
        elif self.args.average_tokens_across_devices:
            total = total * self.accelerator.num_processes  # the Trainer's gradient is a mean over processes
        loss = total / num_items_in_batch
        self._micro_batches.append((loss.detach(), feed))
        if self.is_deepspeed_enabled:  # which steps as soon as the last gradient is there
            self._require_finite_loss(loss.detach())
        return loss

    def create_optimizer(self, model: Any = None) -> Any:
        """Make AdamW, or what the arguments name, with a learning rate of its own for what is not attention."""
        if self.optimizer is not None:
            return self.optimizer
        model = self.model if model is None else model
        decayed = set(self.get_decay_parameter_names(model))
        groups: dict[tuple[bool, bool], list[Any]] = {(a, d): [] for a in (True, False) for d in (True, False)}
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                groups[self._in_attention(name), name in decayed].append(parameter)
        rate = self.args.learning_rate
        optimizer_class, options = self.get_optimizer_cls_and_kwargs(self.args, model)
        self.optimizer = optimizer_class(
            [
                {
                    "params": parameters,
                    "lr": rate if attention else rate * self._body_lr_multiplier,
                    "weight_decay": self.args.weight_decay if decays else 0.0,
                }
                for (attention, decays), parameters in groups.items()
                if parameters
            ],
            **options,
        )
        return self.optimizer

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """Make the schedule of `rate_factor`, in place of transformers' own, whose first step has the rate 0."""
        if self.lr_scheduler is None:
            factor = partial(
                rate_factor,
                Schedule(SchedulerType(self.args.lr_scheduler_type).value),
                warmup_steps=self.args.get_warmup_steps(num_training_steps),
                steps=num_training_steps,
            )
            scheduled: Any = optimizer or self.optimizer
            self.lr_scheduler = LambdaLR(scheduled, lambda done: factor(done + 1))
            self._created_lr_scheduler = True
        return self.lr_scheduler

    def log(self, logs: dict[str, Any], start_time: float | None = None) -> None:
        """Hand records to callbacks; no history is kept, which every checkpoint would write again."""
        if "loss" in logs:
            logs |= self._measure(self.state.global_step)
        pending = self.control.should_log and "loss" not in logs  # an evaluation does not take the loss's turn
        self.control = self.callback_handler.on_log(self.args, self.state, self.control, logs)
        self.control.should_log = pending

    def _get_grad_norm(self, *args: Any, **kwargs: Any) -> Any:
        # before every optimizer step; loss and norm of all processes, so that all of them stop or none
        norm = super()._get_grad_norm(*args, **kwargs)
        if norm is None:
            return None
        norm = norm.full_tensor() if hasattr(norm, "full_tensor") else torch.as_tensor(norm)
        # a loss may be infinite while its gradient is not: where the teacher rules a token out, say
        self._require_finite_loss(torch.stack([loss for loss, _ in self._micro_batches]).sum())
        if not math.isfinite(norm.item()):
            raise NonFiniteError(self._step, "gradient norm", norm.item())
        self._micro_batches.clear()
        return norm

    def _require_finite_loss(self, loss: Tensor) -> None:
        """Raise NonFiniteError, which says whose outputs are not finite, in all processes if one's loss is not."""
        values = self.accelerator.gather(loss.to(self.args.device).reshape(1)).tolist()
        value = next((value for value in values if not math.isfinite(value)), None)
        if value is None:
            return
        # the weights are still those that the loss was computed with: what was not finite is not finite again
        feed = next((feed for loss, feed in self._micro_batches if not loss.isfinite()), self._micro_batches[-1][1])
        with torch.autocast(self.args.device.type, torch.bfloat16, enabled=self._bf16):
            found = self._loss.are_finite(self.model, feed)
        everywhere = self.accelerator.gather(torch.tensor([found], device=self.args.device)).all(0).tolist()
        raise NonFiniteError(
            self._step, "loss", value, student_is_finite=everywhere[0], teacher_is_finite=everywhere[1]
        )

    @property
    def _step(self) -> int:
        """The step of the run that is under way, counted from 1."""
        return self._first_step + self.state.global_step + 1

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        super()._save_checkpoint(model, trial)
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            finish_checkpoint(Path(str(self.args.output_dir)) / f"checkpoint-{self.state.global_step}")
        self.accelerator.wait_for_everyone()

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        if not self.is_distributed_loading_by_transformers:  # else the shards hold the weights
            super().save_model(output_dir, _internal_call)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if not self.is_distributed_loading_by_transformers:
            super()._save_optimizer_and_scheduler(output_dir)
            return
        save_sharded(*self._sharded, Path(output_dir))
        if self.args.should_save:
            torch.save(self._scheduler.state_dict(), Path(output_dir) / SCHEDULER_NAME)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        if not self.is_distributed_loading_by_transformers:  # else weights come with the optimizer's state
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None or not self.is_distributed_loading_by_transformers:
            super()._load_optimizer_and_scheduler(checkpoint)
            return
        load_sharded(*self._sharded, Path(checkpoint))
        self._scheduler.load_state_dict(torch.load(Path(checkpoint) / SCHEDULER_NAME, weights_only=True))

    @property
    def _sharded(self) -> tuple[Any, Any]:
        """The model and its optimizer without what accelerate puts around it."""
        optimizer: Any = self.optimizer
        return self.model, optimizer.optimizer

    @property
    def _scheduler(self) -> Any:
        return self.lr_scheduler
