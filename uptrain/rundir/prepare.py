"""A run's work directory, begun or gone on with: its settings, the teacher and the packed text."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import ExitStack

from ...convert.checkpoint.output import check_free_space, staged_directory, write_text
from ...convert.errors import InputError, PreemptedError
from ..data.blocks import holds_shards, validation_blocks
from ..data.packing import build
from ..estimate.disk import disk_bytes, packed_tokens
from ..job import UptrainJob
from ..teacher import as_teacher, write_teacher
from .directories import discard, sole_run_in
from .record import REPLACES_NAME, SETTINGS_NAME
from .workdir import data_folder, translated_teacher

__all__ = ["no_held_out_text", "prepare"]


def no_held_out_text() -> InputError:
    """Make the error that trials end with which cannot be compared."""
    return InputError(
        "--lr-sweep compares held-out loss, and there is no held-out text",
        hint="pass --eval-data, or a --validation-fraction that holds out at least one block",
    )


def prepare(
    job: UptrainJob,
    held: ExitStack,
    *,
    begin: Callable[[], object],
    should_stop: Callable[[], bool],
    remark: Callable[[str], object],
    force: bool,
    needs_validation: bool,
) -> None:
    """Pack the training text into the work directory, or go on with it; an error before the first shard leaves nothing.

    `begin` is called once that directory is there and held, which it is until `held` is closed; `force` puts a new one
    in its place; `remark` is that of `build`. Raises InputError where a validation slice is needed and is empty.
    """
    held.enter_context(sole_run_in(job.work))
    if force:
        discard(job.work)
    created = not job.work.exists()
    try:
        if created:
            _create(job, force=force)
        begin()
        _prepare_teacher(job)
        build(
            job.corpus,
            data_folder(job),
            job.inputs.tokenizer,
            num_tokens=job.inputs.num_tokens,
            check_ids=job.inputs.check_ids,
            should_stop=should_stop,
            remark=remark,
        )
        if needs_validation and validation_blocks(data_folder(job)) is None:
            discard(job.work)  # nobody goes on with it
            raise no_held_out_text()
    except PreemptedError:
        raise
    except BaseException:
        if created and not holds_shards(data_folder(job)):
            discard(job.work)
        raise


def _create(job: UptrainJob, *, force: bool) -> None:
    """Begin a work directory, where the disk holds what the run takes at most."""
    tokens = job.settings.steps * job.settings.tokens_per_step
    check_free_space(job.output, disk_bytes(job.shape, packed_tokens(tokens, job.source_sizes)))
    with staged_directory(job.work) as staging:
        settings = job.description | {REPLACES_NAME: force}
        write_text(staging / SETTINGS_NAME, json.dumps(settings, indent=2) + "\n")


def _prepare_teacher(job: UptrainJob) -> None:
    """Write a teacher of a class that is not trained in one that is, unless that is done."""
    teacher = job.inputs.teacher
    if teacher is not None and not translated_teacher(job).exists() and as_teacher(teacher) is not teacher:
        write_teacher(teacher, translated_teacher(job))
