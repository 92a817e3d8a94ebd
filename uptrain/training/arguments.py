"""What transformers' Trainer is told of a stage."""

from __future__ import annotations

from typing import Any

import torch
from transformers import TrainingArguments

from ...convert.runtime.transformers_interface import ACTIVATION_CHECKPOINTING
from ..job import UptrainJob
from ..observation import Observation
from ..recipe import Objective, Stage
from ..rundir.workdir import checkpoints_folder
from ..schedule import count_warmup_steps

__all__ = ["checkpoints_activations", "training_arguments"]

_ADAM_BETA2 = 0.95  # as language models are pretrained with (GPT-3, Llama), not PyTorch's 0.999


def training_arguments(
    job: UptrainJob, watch: Observation, stage: Stage, device: torch.device, *, micro_batch: int, peak_rate: float
) -> TrainingArguments:
    """Make the Trainer's arguments for a stage that takes `micro_batch` sequences at once on `device`."""
    settings, execution = job.settings, job.execution
    checkpointing: dict[str, Any] = {
        ACTIVATION_CHECKPOINTING: checkpoints_activations(job, stage),
        f"{ACTIVATION_CHECKPOINTING}_kwargs": {"use_reentrant": False},
    }
    arguments = TrainingArguments(
        output_dir=str(checkpoints_folder(job, stage)),
        max_steps=stage.steps,
        per_device_train_batch_size=micro_batch,
        gradient_accumulation_steps=job.batch(micro_batch).gradient_accumulation_steps,
        learning_rate=peak_rate,
        lr_scheduler_type=settings.lr_scheduler,
        warmup_steps=count_warmup_steps(settings.warmup_fraction, stage.steps),
        optim=settings.optimizer,
        weight_decay=settings.weight_decay,
        adam_beta2=_ADAM_BETA2,
        max_grad_norm=settings.max_grad_norm,
        use_cpu=device.type == "cpu",
        seed=settings.seed,
        logging_steps=watch.log_steps,
        logging_nan_inf_filter=False,  # it would hide a NaN and go on
        save_strategy="no",  # the Checkpoints callback asks for them
        train_sampling_strategy="sequential",  # the blocks are in their drawn order already
        remove_unused_columns=False,
        disable_tqdm=True,
        report_to=list(execution.report_to) or "none",
        run_name=job.output.name,
        ddp_find_unused_parameters=False,
        **checkpointing,
    )
    arguments.mixed_precision = "no"  # the trainer opens autocast itself, whatever a launcher says
    arguments._n_gpu = min(arguments.n_gpu, 1)  # several GPUs need a launcher; the Trainer would wrap in DataParallel
    return arguments


def checkpoints_activations(job: UptrainJob, stage: Stage) -> bool:
    """Tell whether activations are computed again in the backward pass of a stage.

    Attention regression keeps no feed-forward activations anyway, and its hooks are not there in a second pass.
    """
    return job.execution.activation_checkpointing and stage.objective is Objective.prediction
