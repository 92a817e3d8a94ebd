"""The loss of a stage."""

from __future__ import annotations

import json
import math
from typing import Any

import torch
from transformers import default_data_collator

from ...convert.architectures.table import find_architecture
from ...convert.checkpoint.files import write_text
from ...convert.checkpoint.opening import open_checkpoint
from ...measure.finiteness import non_finite_logits
from ..data.blocks import PackedBlocks
from ..losses.attention_regression import AttentionRegression
from ..losses.prediction import Loss, PredictionLoss
from ..recipe import Objective, Stage
from ..rundir.workdir import data_folder, teacher_folder
from .context import RunContext

__all__ = ["stage_loss"]

_SCALES_NAME = "attention_scales.json"
_NUM_SCALE_SAMPLES = 8


def stage_loss(context: RunContext, stage: Stage, student: Any, teacher: Any) -> Loss:
    """Make the loss of a stage between loaded models.

    The scales of attention regression come from the run's first samples and are kept in its work directory. Raises
    CheckpointError for a teacher whose attention is not finite.
    """
    job, processes = context.job, context.processes
    if stage.objective is Objective.prediction:
        return PredictionLoss(teacher, job.settings.weights)
    with open_checkpoint(teacher_folder(job)) as opened:
        architecture = find_architecture(opened)
    path = job.work / _SCALES_NAME
    scales = json.loads(path.read_text()) if path.exists() else ()
    processes.wait()  # all have looked before one writes
    loss = AttentionRegression(student, teacher, context.architecture, architecture, scales=scales)
    if not scales:
        blocks = PackedBlocks(data_folder(job), num_samples=min(_NUM_SCALE_SAMPLES, job.num_samples))
        feeds = (default_data_collator([blocks[index]]) for index in range(len(blocks)))
        device = processes.device
        with torch.autocast(device.type, torch.bfloat16, enabled=job.settings.precision == "bf16"):
            scales = loss.measure_scales(
                {name: tensor.to(device) for name, tensor in feed.items() if name != "labels"} for feed in feeds
            )
        broken = [index for index, scale in enumerate(scales) if not math.isfinite(scale)]
        if broken:
            raise non_finite_logits(str(job.teacher), teacher, f"from the attention of layer {broken[0]} on")
        if processes.is_first:
            write_text(path, json.dumps(scales) + "\n")
        processes.wait()
    return loss
