"""A run's work directory, begun or gone on with: its settings, the teacher and the packed text."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

from ...convert.checkpoint.opening import open_checkpoint
from ...convert.checkpoint.output import check_free_space, staged_directory, write_text
from ...convert.checkpoint.tokenizer import load_tokenizer
from ...convert.errors import InputError, PreemptedError
from ..data.blocks import holds_shards, validation_blocks
from ..data.packing import CorpusPacker, build
from ..data.sources import measure_sources
from ..estimate.disk import disk_bytes, packed_tokens
from ..estimate.size import measure_size
from ..job import UptrainJob, corpus_of, describe
from ..teacher import as_teacher, copied_bytes, write_teacher
from .lock import sole_run_in
from .record import REPLACES_NAME, SETTINGS_NAME
from .workdir import data_folder, last_saved, translated_teacher

__all__ = ["no_held_out_text", "prepare"]


def no_held_out_text() -> InputError:
    """What trials that cannot be compared end with."""
    return InputError(
        "--lr-sweep compares held-out loss, and there is no held-out text",
        hint="pass --eval-data, or a --validation-fraction that holds out at least one block",
    )


def prepare(
    job: UptrainJob,
    held: ExitStack,
    *,
    should_stop: Callable[[], bool],
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
        packer = build(corpus_of(job), data_folder(job), tokenizer, first_sample=done, should_stop=should_stop)
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
    if job.teacher is None or translated_teacher(job).exists():
        return
    with open_checkpoint(job.teacher) as opened:
        if as_teacher(opened) is not opened:
            write_teacher(opened, translated_teacher(job))
