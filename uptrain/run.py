"""One uptraining run, from a converted checkpoint and text to a recovered checkpoint."""

from __future__ import annotations

import gc
import shutil
import time
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from ..convert.architectures.table import find_architecture
from ..convert.checkpoint.companions import find_companions
from ..convert.checkpoint.manifest import read_provenance
from ..convert.checkpoint.output import disk_errors
from ..convert.checkpoint.staging import replaced_directory
from ..convert.checkpoint.tensors import CONFIG_NAME
from .checks import check_job
from .data.blocks import PackedBlocks
from .data.corpus import most_passes
from .estimate.cost import warn_of_passes
from .job import UptrainJob
from .observation import Observation
from .rundir.prepare import prepare
from .rundir.publish import publish, write_weights
from .rundir.record import finished_before, held_out_scores, replaces_output
from .rundir.start import Start, read_start
from .rundir.status import StatusFile
from .rundir.workdir import best_folder, checkpoints_folder, data_folder, last_saved, remove_work, stage_folder
from .settings import RunSettings
from .training.best import read_best, read_weights
from .training.context import RunContext
from .training.evaluation import under_autocast, validation_score
from .training.processes import Processes
from .training.stage import train_stage
from .training.stopping import StopRequests

__all__ = ["UptrainResult", "run_checked", "uptrain"]

_DISK_BYTES_PER_SECOND = 200e6  # a slow one's, before a checkpoint was written


@dataclass(frozen=True)
class UptrainResult:
    """What a run ended with.

    `passes` is how often the text was seen, of several sources the one that was seen most often; None stands for at
    most once, of text whose size is not known. `held_out` is the last score in nats per token, if any was taken, and
    `held_out_before` that before the first step; with `keep_best` the result is that of `kept_step`, and so is
    `held_out`. `start` is where the last stage began, if its learning rate follows from that. `seconds` and
    `tokens_per_second` are those since the start or the last resume.
    `left_behind` maps what lies beside the weights that were trained, and did not go to the output, to the reason, in
    words.
    """

    output: Path
    passes: float | None
    steps: int
    tokens: int
    objective: str
    settings: RunSettings
    seconds: float = 0.0
    tokens_per_second: float = 0.0
    held_out: float | None = None
    held_out_before: float | None = None
    kept_step: int | None = None
    start: Start | None = None
    left_behind: Mapping[str, str] = field(default_factory=dict)


def uptrain(job: UptrainJob, watch: Observation, *, force: bool = False) -> UptrainResult:
    """Check a job and run it, as `run_checked` does. Raises InputError for unusable input."""
    check_job(job, force=force)
    return run_checked(job, watch, force=force)


def run_checked(job: UptrainJob, watch: Observation, *, force: bool = False) -> UptrainResult:
    """Train a converted checkpoint and write the result, in the source's dtypes, to `job.output`.

    What is trained is in float32. Until the end everything is in `job.work`, from where a run that was stopped goes on
    by itself, bit-exactly if it is carried out in the same way; `force` starts over. A run that is finished is not run
    again. To be called after `check_job`, in every process of the run.
    Raises DivergedError on a non-finite loss or gradient (before the optimizer step), PreemptedError after SIGTERM,
    SIGINT or SIGUSR1 and before `watch.deadline`, once a checkpoint is saved.
    """
    processes = Processes()
    stop = StopRequests(deadline=watch.deadline, save_seconds=_checkpoint_bytes(job) / _DISK_BYTES_PER_SECOND)
    with disk_errors(job.work), stop, ExitStack() as held:
        finished = finished_before(job) and not force
        processes.wait()
        if finished:
            if processes.is_first:  # what a kill after the last rename has left
                remove_work(job)
            scores, record = held_out_scores(job.output), read_provenance(job.output)["uptraining"]
            kept_step = record.get("kept_step")
            return result_of(
                job,
                record["passes"],
                held_out=scores.get(kept_step, next(reversed(scores.values()), None)),
                held_out_before=scores.get(0),
                kept_step=kept_step,
                start=None if record.get("start") is None else Start(**record["start"]),
            )
        status = StatusFile(
            job.work,
            steps=job.settings.steps,
            tokens_per_step=job.settings.tokens_per_step,
            command=watch.command,
            writes=processes.is_first,
            note=watch.note,
        )
        context = RunContext(job, watch, processes, stop, status, find_architecture(job.checkpoint))
        return _run(context, held, force=force)


def _run(context: RunContext, held: ExitStack, *, force: bool) -> UptrainResult:
    job, watch, processes, status = context.job, context.watch, context.processes, context.status
    started = time.monotonic()

    # 1. the work directory: what is read is packed into it
    begun = not processes.is_first

    def begin() -> None:
        nonlocal begun
        begun = True
        status.reach(*last_saved(job))
        _tell_resumption(job, watch)

    try:
        if processes.is_first:
            prepare(
                job,
                held,
                begin=begin,
                should_stop=lambda: context.stop.requested,
                remark=watch.remark,
                force=force,
                compares=not watch.keep and watch.score is None,
                wants_score=watch.wants_score and watch.score is None,
            )
        processes.wait_long()
        scores = held_out_scores(job.work)  # of a run that goes on
        context.held_out, context.held_out_before = next(reversed(scores.values()), None), scores.get(0)
        context.best = read_best(best_folder(job))
        context.score = under_autocast(watch.score or validation_score(job), job.settings.precision)
        passes = most_passes(PackedBlocks(data_folder(job), num_samples=job.num_samples).passes)
        warning = None if passes is None else warn_of_passes(passes)
        if warning is not None:
            watch.remark(warning)

        # 2. the stages that are not done yet, each from the weights of the one before
        model, weights = _train_stages(context)

        # 3. the result
        if context.best is not None:
            context.held_out = context.best.nats_per_token
            if processes.is_first:
                weights = read_weights(best_folder(job), context.best)
        kept_step = None if context.best is None else context.best.step
        start = read_start(job.work)
        seconds = time.monotonic() - started
        processes.wait()  # all have read before the directory goes
        if processes.is_first:
            watch.trained(weights)
            if watch.keep:
                publish(
                    job,
                    model,
                    weights,
                    passes=passes,
                    kept_step=kept_step,
                    status=status.finished,
                    force=replaces_output(job),
                )
            remove_work(job)
        processes.wait_long()
    except BaseException as error:
        if begun:  # else the directory is another run's
            status.fail(error)
        raise
    done = job.settings.steps - context.steps_before
    return result_of(
        job,
        passes,
        seconds=seconds,
        steps_done=done,
        held_out=context.held_out,
        held_out_before=context.held_out_before,
        kept_step=kept_step,
        start=start,
    )


def _tell_resumption(job: UptrainJob, watch: Observation) -> None:
    step, _ = last_saved(job)
    if step:
        watch.remark(f"resuming from the checkpoint of step {step} of {job.settings.steps}")


def _train_stages(context: RunContext) -> tuple[Any, dict[str, torch.Tensor]]:
    """Train the stages that are not done; returns the last one's model and weights."""
    job, plan = context.job, context.job.settings.stages
    num_done = sum(stage_folder(job, stage).joinpath(CONFIG_NAME).exists() for stage in plan)
    source = stage_folder(job, plan[num_done - 1]) if num_done else job.checkpoint.directory
    for number, stage in enumerate(plan[num_done:-1], start=num_done):
        model, weights = train_stage(context, stage, source, is_first_here=number == num_done)
        source = stage_folder(job, stage)
        if context.processes.is_first:
            with replaced_directory(source) as staging:
                write_weights(model, weights, staging)
            shutil.rmtree(checkpoints_folder(job, stage), ignore_errors=True)
        context.status.reach(stage.last_step, source)
        context.processes.wait_long()
        del model, weights  # with the teacher, before those of the next stage come
        gc.collect()
    return train_stage(context, plan[-1], source, is_first_here=num_done == len(plan) - 1)


def result_of(
    job: UptrainJob,
    passes: float | None,
    *,
    seconds: float = 0.0,
    steps_done: int = 0,
    held_out: float | None = None,
    held_out_before: float | None = None,
    kept_step: int | None = None,
    start: Start | None = None,
) -> UptrainResult:
    """Make the result of a job, of which `steps_done` took `seconds`."""
    settings = job.settings
    return UptrainResult(
        output=job.output,
        passes=passes,
        steps=settings.steps,
        tokens=settings.steps * settings.tokens_per_step,
        objective=job.objective,
        settings=settings,
        seconds=seconds,
        tokens_per_second=steps_done * settings.tokens_per_step / max(seconds, 1e-9),
        held_out=held_out,
        held_out_before=held_out_before,
        kept_step=kept_step,
        start=start,
        left_behind=find_companions(job.checkpoint, same_attention=True).missing_from(job.output),
    )


def _checkpoint_bytes(job: UptrainJob) -> float:
    """Bytes that one process writes for a checkpoint: float32 weights and two moments."""
    num_shards = job.execution.num_processes if job.execution.fsdp else 1
    return 12 * job.checkpoint.num_parameters / num_shards
