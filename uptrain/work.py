"""A run's work directory: what lies where in it, how it is begun or gone on with, and when it goes."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

from ..convert.checkpoint.opening import open_checkpoint
from ..convert.checkpoint.output import check_free_space, staged_directory, write_text
from ..convert.checkpoint.tensors import CONFIG_NAME
from ..convert.checkpoint.tokenizer import load_tokenizer
from ..convert.errors import InputError, PreemptedError
from .callbacks import StopRequests
from .checkpoints import last_complete, step_of
from .cost import disk_bytes, measure_size, packed_tokens
from .data import CorpusPacker, build, holds_shards, measure_sources, validation_blocks
from .jobs import REPLACES_NAME, SETTINGS_NAME, UptrainJob, corpus_of, describe
from .lock import sole_run_in
from .recipe import Stage
from .teacher import as_teacher, copied_bytes, write_teacher
from .trials import remove_sweep, sweep_that_chose

__all__ = [
    "checkpoints_folder",
    "data_folder",
    "last_saved",
    "no_held_out_text",
    "prepare",
    "remove_work",
    "stage_folder",
    "teacher_folder",
]


def no_held_out_text() -> InputError:
    """What trials that cannot be compared end with."""
    return InputError(
        "--lr-sweep compares held-out loss, and there is no held-out text",
        hint="pass --eval-data, or a --validation-fraction that holds out at least one block",
    )


def prepare(
    job: UptrainJob,
    stop: StopRequests,
    held: ExitStack,
    *,
    begin: Callable[[], object],
    save_steps: int,
    force: bool,
    held_out: bool,
) -> CorpusPacker:
    """Pack the training text into the work directory, or go on with it; an error before the first shard leaves nothing.

    `begin` is called once that directory is there and held, which it is until `held` is closed. Raises InputError where
    a validation slice has to be `held_out` and is empty. A checkpoint every `save_steps` counts in the space it needs.
    """
    tokenizer = load_tokenizer(job.checkpoint.directory)
    if job.work.exists():
        held.enter_context(sole_run_in(job.work))
    if force:
        shutil.rmtree(job.work, ignore_errors=True)
    created = False
    try:
        if not job.work.exists():
            check_free_space(job.output, _disk_bytes(job, tokenizer, save_steps=save_steps))
            with staged_directory(job.work) as staging:
                settings = describe(job) | {REPLACES_NAME: force}
                write_text(staging / SETTINGS_NAME, json.dumps(settings, indent=2) + "\n")
            created = True
            held.enter_context(sole_run_in(job.work))
        begin()
        _prepare_teacher(job)
        done = last_saved(job)[0] * job.settings.sequences_per_step
        packer = build(
            corpus_of(job), data_folder(job), tokenizer, first_sample=done, should_stop=lambda: stop.requested
        )
        if held_out and validation_blocks(data_folder(job)) is None:
            shutil.rmtree(job.work, ignore_errors=True)  # nobody goes on with it
            raise no_held_out_text()
        return packer
    except PreemptedError:
        raise
    except BaseException:
        if created and not holds_shards(data_folder(job)):
            shutil.rmtree(job.work, ignore_errors=True)
        raise


def _disk_bytes(job: UptrainJob, tokenizer: Any, *, save_steps: int) -> int:
    """What the run takes at most, as a dry run says it."""
    settings, teacher_copy_bytes = job.settings, 0
    if job.teacher is not None:
        with open_checkpoint(job.teacher) as opened:
            teacher_copy_bytes = copied_bytes(opened)
    tokens = settings.steps * settings.tokens_per_step
    sources = measure_sources(job.sources, tokenizer)
    return disk_bytes(
        measure_size(job.checkpoint),
        trained=settings.stages[-1].trained,
        num_packed_tokens=packed_tokens(tokens, sources, window_tokens=job.window_tokens(save_steps)),
        shares=job.shares_frozen,
        bf16=settings.precision == "bf16",
        after_stage=len(settings.stages) > 1,
        teacher_copy_bytes=teacher_copy_bytes,
    )


def _prepare_teacher(job: UptrainJob) -> None:
    """Write a teacher of a class that is not trained in one that is, unless that is done."""
    if job.teacher is None or _translated_teacher(job).exists():
        return
    with open_checkpoint(job.teacher) as opened:
        if as_teacher(opened) is not opened:
            write_teacher(opened, _translated_teacher(job))


def last_saved(job: UptrainJob) -> tuple[int, Path | None]:
    """The step up to which weights are saved, and where they are."""
    for stage in reversed(job.settings.stages):
        if stage_folder(job, stage).joinpath(CONFIG_NAME).exists():
            return stage.last_step, stage_folder(job, stage)
        last = last_complete(checkpoints_folder(job, stage))
        if last is not None:
            return stage.first_step + step_of(last), last
    return 0, None


def remove_work(job: UptrainJob) -> None:
    """Remove what the output does not need any more.

    Trials go first: without the work directory, ones that began with force would pass for trials of a run to come.
    """
    sweep = sweep_that_chose(job)
    if sweep is not None and job.output.exists():
        with suppress(OSError):
            remove_sweep(sweep)
    shutil.rmtree(job.work, ignore_errors=True)


def data_folder(job: UptrainJob) -> Path:
    return job.work / "data"


def checkpoints_folder(job: UptrainJob, stage: Stage) -> Path:
    return job.work / "checkpoints" / stage.name


def stage_folder(job: UptrainJob, stage: Stage) -> Path:
    """Where the weights that a stage ended with are, once it is finished."""
    return job.work / "stages" / stage.name


def teacher_folder(job: UptrainJob) -> Path:
    """Where the teacher is read from."""
    assert job.teacher is not None
    translated = _translated_teacher(job)
    return translated if translated.exists() else Path(job.teacher)


def _translated_teacher(job: UptrainJob) -> Path:
    return job.work / "teacher"
