"""A run's work directory, begun or gone on with: its settings, the teacher and the packed text."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import ExitStack

from ...convert.checkpoint.files import write_text
from ...convert.checkpoint.output import check_free_space
from ...convert.checkpoint.source_files import digest_weights
from ...convert.checkpoint.staging import check_renames, clear_leftovers, discard, staged_directory
from ...convert.errors import InputError, PreemptedError
from ..data.blocks import holds_shards, validation_blocks, validation_sources
from ..data.packing import build
from ..estimate.disk import disk_bytes, packed_tokens
from ..job import UptrainJob
from ..teacher import as_teacher, write_teacher
from .directories import sole_run_in
from .record import REPLACES_NAME, SETTINGS_NAME
from .workdir import data_folder, translated_teacher

__all__ = ["no_held_out_text", "prepare", "why_nothing_is_held_out"]


_HOLD_OUT = "pass --eval-data, more text, or a larger --validation-fraction"


def no_held_out_text(what: str, why: str = "there is no held-out text") -> InputError:
    """Make the error of `what` was asked for, which cannot compare what it should, and say why."""
    return InputError(f"{what} compares held-out loss, and {why}", hint=_HOLD_OUT)


def why_nothing_is_held_out(job: UptrainJob) -> str | None:
    """Say why a validation fraction gives no block to score, of a text that is packed; None where it gives one."""
    if job.validation_fraction == 0:
        return "there is no held-out text"
    if validation_blocks(data_folder(job)) is not None:
        return None
    taken = f"a validation fraction of {job.validation_fraction:g}"
    left = sum(source.leftover_tokens or 0 for source in validation_sources(data_folder(job)))
    if left == 0:
        return f"{taken} holds out no document of this text"
    return f"{taken} holds out {left} tokens of this text, fewer than one block of {job.settings.sequence_length}"


def prepare(
    job: UptrainJob,
    held: ExitStack,
    *,
    begin: Callable[[], object],
    should_stop: Callable[[], bool],
    remark: Callable[[str], object],
    force: bool,
    compares: bool,
    wants_score: bool,
) -> None:
    """Pack the training text into the work directory, or go on with it; an error before the first shard leaves nothing.

    `begin` is called once that directory is there and held, which it is until `held` is closed; `force` puts a new one
    in its place; `remark` is that of `build`. Where a validation fraction gives nothing to score, InputError is raised
    for a trial, which `compares` by it, and for a user who asked for it (`wants_score`); else `remark` says so.
    """
    held.enter_context(sole_run_in(job.work))
    for place in (job.work, job.output):
        clear_leftovers(place, remark)
    check_renames(job.output)
    if force:
        discard(job.work)
    created = not job.work.exists()
    for model in (job.checkpoint, job.inputs.teacher):
        if model is not None:
            digest_weights(model)  # a damaged file is not trained on
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
            on_held_out=lambda: _check_held_out(job, remark=remark, compares=compares, wants_score=wants_score),
            remark=remark,
        )
    except PreemptedError:
        raise
    except BaseException:
        if created and not holds_shards(data_folder(job)):
            discard(job.work)
        raise


def _check_held_out(job: UptrainJob, *, remark: Callable[[str], object], compares: bool, wants_score: bool) -> None:
    """Say that nothing is held out, as an error where something has to be."""
    why = why_nothing_is_held_out(job)
    if why is not None and compares:
        raise no_held_out_text("--lr-sweep", why)
    if why is not None and wants_score and job.settings.keep_best:
        raise no_held_out_text("--keep-best", why)
    if why is not None and wants_score:
        raise InputError(why, hint=f"{_HOLD_OUT}; 0 holds out nothing")
    if why is not None and job.validation_fraction:
        remark(f"no held-out score: {why}")


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
