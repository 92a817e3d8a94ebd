"""Held-out nats per token while a model is trained."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ...convert.errors import DivergedError
from ...measure.finiteness import non_finite_logits
from ..data.blocks import validation_blocks
from ..job import UptrainJob
from ..losses.prediction import IGNORED_LABEL, prediction_loss_sum
from ..models import reshard
from ..recipe import LossWeights, Stage
from ..rundir.workdir import data_folder
from .metrics import Throughput

__all__ = ["PeriodicEvaluation", "under_autocast", "validation_score"]


class PeriodicEvaluation(TrainerCallback):
    """Scores held-out text every `every` steps of the run, before its first and after a stage's last.

    `report`, which receives the record, is the trainer's log; `keep` is called with each step that was scored. Every
    process scores the same text, since a sharded model runs only in all of them at once. Raises CheckpointError where
    the score is not finite before the first step, about the source `name`, and DivergedError where it is not later.
    """

    def __init__(
        self, score: Callable[[Any], float], stage: Stage, *, name: str, every: int, throughput: Throughput
    ) -> None:
        self.report: Callable[[dict[str, float]], object] = lambda record: None
        self.keep: Callable[[int], object] = lambda step: None
        self._score = score
        self._stage = stage
        self._name = name
        self._every = every
        self._throughput = throughput

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if state.global_step == self._stage.first_step == 0:
            self._run(kwargs["model"], 0)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        step = self._stage.first_step + state.global_step
        if step % self._every == 0 or state.global_step == state.max_steps:
            self._run(kwargs["model"], step)

    def _run(self, model: Any, step: int) -> None:
        start = time.monotonic()
        model.eval()
        nats = self._score(model)
        reshard(model)
        model.train()
        if not math.isfinite(nats) and step == 0:
            raise non_finite_logits(self._name, model, f"before the first step (held-out loss {nats})")
        if not math.isfinite(nats):
            raise DivergedError(
                f"step {step}: held-out loss is {nats} after it", hint="use a smaller --lr, and --force to start over"
            )
        self.report({"eval_nats_per_token": nats})
        if step > 0:
            self.keep(step)
        self._throughput.leave_out(time.monotonic() - start)


def validation_score(job: UptrainJob) -> Callable[[Any], float] | None:
    """Make the score of a model in nats per token on the validation slice; None where there is none."""
    blocks = validation_blocks(data_folder(job))
    if blocks is None:
        return None
    weights = LossWeights(kl=0.0, cross_entropy=1.0)

    @torch.no_grad()
    def score(model: Any) -> float:
        device = next(model.parameters()).device
        total = 0.0
        for index in range(len(blocks["labels"])):
            feed = {name: tensor[index : index + 1].to(device) for name, tensor in blocks.items()}
            labels = feed.pop("labels")
            total += prediction_loss_sum(model(**feed, use_cache=False).logits, labels, weights).item()
        return total / int((blocks["labels"][:, 1:] != IGNORED_LABEL).sum())

    return score


def under_autocast(score: Callable[[Any], float] | None, precision: str) -> Callable[[Any], float] | None:
    """Let a score run as the model is trained, under autocast with bf16: frozen weights may be in bfloat16."""
    if score is None or precision != "bf16":
        return score

    def scored(model: Any) -> float:
        with torch.autocast(next(model.parameters()).device.type, torch.bfloat16):
            return score(model)

    return scored
