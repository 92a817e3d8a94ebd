"""The peak learning rate of a stage, which may follow from where it starts."""

from __future__ import annotations

import math
from typing import Any

import torch

from ..losses.prediction import IGNORED_LABEL, prediction_loss_sum
from ..models import reshard
from ..recipe import LossWeights, Stage
from ..rundir.start import Start, read_start, write_start
from ..settings import rate_for_start
from .context import RunContext

__all__ = ["peak_learning_rate"]

_TOKENS = 16384  # the mean divergence of so many tokens is known to some percent, and its root to half of that


def peak_learning_rate(context: RunContext, stage: Stage, student: Any, teacher: Any) -> float:
    """Choose the peak learning rate of a stage: its own, or where the job asks for it, one that follows from its start.

    That is measured once, on the first samples of the stage, and kept in the work directory: a run that goes on has the
    same rate, whatever carries it out. A start that is not finite keeps the stage's rate; the first step refuses it.
    """
    job = context.job
    if not job.settings.rate_from_start or stage != job.settings.stages[-1]:
        return stage.learning_rate
    found = read_start(job.work)
    context.processes.wait()  # all have looked before one writes
    if found is None:
        kl = _divergence(context, stage, student, teacher)
        if context.processes.is_first and math.isfinite(kl):
            write_start(job.work, Start(kl, rate_for_start(stage.learning_rate, kl)))
        context.processes.wait()
        found = read_start(job.work)
    if found is None:
        return stage.learning_rate
    context.watch.remark(
        f"divergence from the teacher at the start {found.kl_nats_per_token:.4f} nats/token: "
        f"peak learning rate {found.peak_learning_rate:.2g}"
    )
    return found.peak_learning_rate


@torch.no_grad()
def _divergence(context: RunContext, stage: Stage, student: Any, teacher: Any) -> float:
    """Mean KL(teacher ‖ student) in nats per predicted token of the stage's first samples, as the first process has it.

    Every process computes the same samples, since a sharded model runs only in all of them at once.
    """
    samples, weights = context.samples(stage), LossWeights()
    total, count = 0.0, 0
    device = context.processes.device
    with torch.autocast(device.type, torch.bfloat16, enabled=context.job.settings.precision == "bf16"):
        for index in range(min(len(samples), math.ceil(_TOKENS / context.job.settings.sequence_length))):
            feed = {name: tensor[None].to(device) for name, tensor in samples[index].items()}
            labels = feed.pop("labels")
            logits, wanted = (model(**feed, use_cache=False).logits for model in (student, teacher))
            total += prediction_loss_sum(logits, labels, weights, teacher_logits=wanted).item()
            count += int((labels[:, 1:] != IGNORED_LABEL).sum())
    for model in (student, teacher):
        reshard(model)
    return total / count
