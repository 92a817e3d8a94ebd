"""One stage of a run: its models are loaded, trained to its end or until they are told to stop, and handed on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import PrinterCallback, TrainerCallback, default_data_collator
from transformers.integrations.integration_utils import TensorBoardCallback

from ...convert.checkpoint.loading import quiet_transformers
from ...convert.errors import DivergedError, InputError, KvConvertError, PreemptedError, UnsupportedError
from ...measure.finiteness import non_finite_logits
from ..launcher import uses_deepspeed
from ..losses.prediction import Loss
from ..models import compile_in_place, full_state, load_models, load_whole_models
from ..recipe import Objective, Stage, attention_names
from ..rundir.checkpoints import last_complete, remove_torn, step_of
from ..rundir.publish import TRACKS_NAME
from ..rundir.record import METRICS_NAME
from ..rundir.workdir import checkpoints_folder, last_saved, teacher_folder
from .arguments import training_arguments
from .context import RunContext
from .evaluation import PeriodicEvaluation
from .loss import stage_loss
from .metrics import MetricsLog, StepProgress, Throughput
from .micro_batch import stage_micro_batch
from .saving import Checkpoints
from .sharded import SHARDS_NAME
from .start import peak_learning_rate
from .trainer import NonFiniteError, UptrainTrainer

__all__ = ["train_stage"]


def train_stage(
    context: RunContext, stage: Stage, source: Path, *, is_first_here: bool
) -> tuple[Any, dict[str, torch.Tensor]]:
    """Train one stage from its last complete checkpoint, or from the weights in `source` where it has none.

    `is_first_here` says that this is the first stage that the process trains, so that the steps of its checkpoint are
    those that an earlier process did. Returns the model and its weights, which the first process holds whole. Raises
    DivergedError and PreemptedError, InputError for a checkpoint that was saved with another sharding, and
    UnsupportedError for a stage that DeepSpeed's configuration cannot train.
    """
    job, settings, watch = context.job, context.job.settings, context.watch
    torch.manual_seed(settings.seed)
    folder = checkpoints_folder(job, stage)

    # 1. models, loss, batch
    last = _last_checkpoint(context, stage, folder, is_first_here=is_first_here)
    teacher_at = teacher_folder(job) if stage.uses_teacher(settings.weights) else None
    student, teacher = load_models(job, stage, source, teacher_at, context.processes.device)
    loss = stage_loss(context, stage, student, teacher)
    peak_rate = peak_learning_rate(context, stage, student, teacher)
    micro_batch = stage_micro_batch(context, stage, student, loss)
    if job.execution.compile and stage.objective is Objective.prediction:
        compile_in_place(student, teacher)

    # 2. the trainer, and all that is done beside its steps
    throughput = Throughput(
        tokens_per_step=settings.tokens_per_step,
        last_step=stage.steps,
        flops_per_token=watch.flops_per_token.get(stage.name),
        peak_flops=None if watch.peak_flops is None else watch.peak_flops * job.execution.num_processes,
    )
    trainer = _trainer(context, stage, student, loss, throughput, micro_batch=micro_batch, peak_rate=peak_rate)

    # 3. steps, until the end or a stop
    with quiet_transformers():
        try:
            trainer.train(resume_from_checkpoint=str(last) if last else None)
        except DivergedError as error:
            raise _explained(error, context, student, teacher) from error
    done = trainer.state.global_step
    context.status.reach(stage.first_step + done, last_complete(folder))
    if done < stage.steps:
        raise PreemptedError(
            f"stopped at step {stage.first_step + done} of {settings.steps} ({context.stop.reason}); "
            f"saved in {job.work}",
            hint="run the same command again to go on",
        )

    # 4. whole weights in the first process
    weights = full_state(student, trainer.accelerator, trainer.model_wrapped)
    _require_finite(weights, stage)
    load_whole_models()
    trainer.accelerator.free_memory()
    return student, weights


def _explained(error: DivergedError, context: RunContext, student: Any, teacher: Any | None) -> KvConvertError:
    """Make the error that a run ends with: of the teacher or the source, if they are to blame, else of training.

    What the source computed counts until the first step of the run.
    """
    job = context.job
    if isinstance(error, NonFiniteError) and not error.teacher_is_finite:
        return non_finite_logits(str(job.teacher), teacher, f"({error})")
    _, good = last_saved(job)
    if isinstance(error, NonFiniteError) and not error.student_is_finite:
        if error.step == 1:
            return non_finite_logits(job.checkpoint.name, student, f"({error})")
        error = DivergedError(f"{error}; the student's logits are not finite", hint=error.hint)
    note = f"; the last good checkpoint is {good}" if good else "; no checkpoint was saved before it"
    return DivergedError(f"{error}{note}", hint=error.hint)


def _require_finite(weights: dict[str, torch.Tensor], stage: Stage) -> None:
    """Raise DivergedError for weights that a last step, whose loss nobody sees, has made infinite or no number."""
    broken = [name for name, tensor in weights.items() if not tensor.isfinite().all()]
    if broken:
        raise DivergedError(
            f"step {stage.last_step}: {len(broken)} tensors are not finite after it, first {broken[0]}",
            hint="use a smaller --lr, and --force to start over",
        )


def _last_checkpoint(context: RunContext, stage: Stage, folder: Path, *, is_first_here: bool) -> Path | None:
    """Find what the stage goes on from, if anything; remove torn checkpoints, and note where the stage stands."""
    if context.processes.is_first:
        for torn in remove_torn(folder):
            context.watch.remark(f"{torn} is not complete and was removed")
    context.processes.wait()
    last = last_complete(folder)
    step = stage.first_step + (step_of(last) if last else 0)
    if is_first_here:
        context.steps_before = step
    context.status.reach(step, last)
    if last is not None:
        _check_sharding(last, is_sharded=context.job.is_sharded)
    return last


def _check_sharding(checkpoint: Path, *, is_sharded: bool) -> None:
    """Raise InputError unless the checkpoint was saved as this run will read it.

    The Trainer would take weights from one of another kind, and begin optimizer and schedule anew without a word.
    """
    kinds = {"fsdp": "with --fsdp in several processes", "deepspeed": "with DeepSpeed", "whole": "without sharding"}
    saved = "whole"
    if (checkpoint / SHARDS_NAME).exists():
        saved = "fsdp"
    elif any(checkpoint.glob("global_step*")):
        saved = "deepspeed"
    own = "deepspeed" if uses_deepspeed() else "fsdp" if is_sharded else "whole"
    if saved != own:
        raise InputError(f"{checkpoint} was saved {kinds[saved]}", hint=f"go on {kinds[saved]}, not {kinds[own]}")


def _trainer(
    context: RunContext,
    stage: Stage,
    student: Any,
    loss: Loss,
    throughput: Throughput,
    *,
    micro_batch: int,
    peak_rate: float,
) -> UptrainTrainer:
    job, settings = context.job, context.job.settings
    names = attention_names([name for name, _ in student.named_parameters()], context.architecture)
    trainer = UptrainTrainer(
        model=student,
        loss=loss,
        bf16=settings.precision == "bf16",
        in_attention=names.__contains__,
        body_lr_multiplier=settings.body_lr_multiplier,
        measure=throughput.read,
        first_step=stage.first_step,
        args=training_arguments(
            job, context.watch, stage, context.processes.device, micro_batch=micro_batch, peak_rate=peak_rate
        ),
        train_dataset=context.samples(stage),
        data_collator=default_data_collator,
        callbacks=_callbacks(context, stage, throughput),
    )
    plugin = trainer.accelerator.state.deepspeed_plugin if trainer.is_deepspeed_enabled else None
    if plugin is not None and plugin.zero_stage == 3 and stage.objective is Objective.attention_regression:
        raise UnsupportedError(
            "ZeRO-3 gathers a layer's weights for its whole pass only, not for its attention alone",
            hint="use --fsdp or ZeRO-2, or leave the layer-wise stage out with --layerwise-fraction 0",
        )
    trainer.remove_callback(PrinterCallback)
    for callback in trainer.callback_handler.callbacks:
        if isinstance(callback, PeriodicEvaluation):
            callback.report = trainer.log
            if settings.keep_best:
                callback.keep = lambda step: context.keep_if_best(
                    step, lambda: full_state(student, trainer.accelerator, trainer.model_wrapped), student
                )
        if isinstance(callback, TensorBoardCallback) and callback.logging_dir is None:
            callback.logging_dir = str(job.work / TRACKS_NAME / stage.name)
    return trainer


def _callbacks(context: RunContext, stage: Stage, throughput: Throughput) -> list[TrainerCallback]:
    job, watch, folder = context.job, context.watch, checkpoints_folder(context.job, stage)
    log = MetricsLog(
        job.work / METRICS_NAME,
        stage,
        tokens_per_step=job.settings.tokens_per_step,
        throughput=throughput,
        show=context.show,
    )
    callbacks: list[TrainerCallback] = [log, StepProgress(watch.progress)]
    if context.score is not None:
        name = job.checkpoint.name
        callbacks.append(
            PeriodicEvaluation(context.evaluate, stage, name=name, every=watch.eval_steps, throughput=throughput)
        )
    # a result that cannot be written, on a full disk say, must not cost the steps before it
    at_end = watch.keep and stage == job.settings.stages[-1]
    saving = Checkpoints(watch.save_steps, at_end=at_end, on_save=lambda step: context.saved(stage, folder, step))
    return [*callbacks, saving, context.stop]
