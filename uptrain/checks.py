"""Whether a job can be run: everything that can be refused before the first byte is written."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from itertools import combinations

from ..convert.architectures.context import check_context, context_of
from ..convert.architectures.table import find_architecture
from ..convert.cache_check import check_runtime
from ..convert.checkpoint.loading import check_language_model, class_config
from ..convert.checkpoint.output import check_apart, check_output
from ..convert.checkpoint.tensors import Checkpoint
from ..convert.device import default_device
from ..convert.errors import DataError, InputError, OutputError, UnsupportedError
from ..convert.runtime.transformers_interface import require
from ..convert.text.documents import find_text
from ..convert.text.hub import check_dataset
from ..convert.text.sources import TextSource
from ..convert.text.tokens import check_tokenizers
from .job import UptrainJob, sweep_directory
from .launcher import uses_deepspeed
from .losses.attention_regression import require_same_size
from .rundir.record import SETTINGS_NAME, check_not_another_run, check_same_run, finished_before, replaces_output
from .teacher import as_teacher

__all__ = ["check_job", "of_eval_data"]


def check_job(job: UptrainJob, *, held_out: TextSource | None = None, force: bool = False) -> None:
    """Raise InputError for whatever can be refused before training; touches nothing.

    `held_out` is text that is read beside the job's own.
    """
    _check_places(job, held_out, force=force)
    _check_model(job)
    _check_needs(job)
    job.batch(job.execution.micro_batch or 1)
    _ = job.corpus
    _check_teacher(job)
    if not force and job.work.exists():
        check_same_run(job)


def _check_places(job: UptrainJob, held_out: TextSource | None, *, force: bool) -> None:
    """Raise InputError unless what is read is there, and nothing of it where something is written or removed."""
    inputs = [*job.places_read, *([held_out.path] if held_out is not None else [])]
    for place in (job.work, sweep_directory(job.output)):
        check_apart(place, inputs)
    if not finished_before(job):
        if not force and not replaces_output(job):
            check_not_another_run(job)
        check_output(job.output, force=force or replaces_output(job), inputs=inputs)
        _check_texts(job, held_out, asks_hub=force or not job.work.exists())
    if force and job.work.exists() and not (job.work / SETTINGS_NAME).exists():
        raise OutputError(f"{job.work} is in the way and not a run's", hint="remove it, or choose another --output")


def _check_texts(job: UptrainJob, held_out: TextSource | None, *, asks_hub: bool) -> None:
    """Raise InputError unless every text is there, and no text is read twice.

    The hub is not asked where a run goes on: its text may be packed already, and the machine without network.
    """
    read = [(source.text, "data", _contents(source.text, asks_hub=asks_hub)) for source in job.sources]
    if held_out is not None:
        with of_eval_data():
            read.append((held_out, "eval_data", _contents(held_out, asks_hub=asks_hub)))
    for (one, _, contents), (other, name, others) in combinations(read, 2):
        twice = sorted(contents & others)
        if twice and name == "eval_data":
            raise InputError(
                f"{other.location}: {twice[0][0]} is trained on, so that a score on it says nothing of other text",
                hint="hold out another split or file, or leave this out and a part of the documents is held out",
                settings=("eval_data", "eval_split"),
            )
        if twice:
            raise InputError(
                f"{one.location}: {twice[0][0]} is read twice", hint="name each text once, with its weight"
            )


def _contents(text: TextSource, *, asks_hub: bool) -> frozenset[tuple[str, str]]:
    """What is read of a text, equal where the same is read: each file, or the part of a dataset, with its field."""
    found = find_text(text)
    if found is not None:
        return frozenset((str(file.resolve()), text.text_field) for file in found.files)
    if asks_hub:
        check_dataset(text)
    config = f" {text.config}" if text.config else ""
    return frozenset({(f"split {text.chosen_split!r} of {text.location}{config}", text.text_field)})


@contextmanager
def of_eval_data() -> Iterator[None]:
    """Let an error of reading name the setting that the held-out text comes from."""
    try:
        yield
    except DataError as error:
        settings = tuple("eval_split" if name == "split" else name for name in error.settings)
        raise DataError(f"--eval-data: {error}", hint=error.hint, settings=settings) from error


def _check_model(job: UptrainJob) -> None:
    """Raise InputError unless its class works here, and can be trained on packed text of this length."""
    check_runtime(job.checkpoint.directory)
    architecture = find_architecture(job.checkpoint)
    if architecture.cross_attention is not None:
        raise UnsupportedError(
            f"{job.checkpoint.name}: uptrain takes decoders only, not the encoder-decoder {architecture.model_type}",
            hint="train it with transformers' Seq2SeqTrainer, which takes it as any other model",
        )
    if not architecture.separates_documents:
        raise UnsupportedError(
            f"{job.checkpoint.name}: in transformers' {architecture.model_type} documents that share a sequence see "
            "each other, so that uptrain, which packs them, would teach it nonsense"
        )
    _check_length(job, job.checkpoint)
    check_language_model(job.checkpoint)


def _check_length(job: UptrainJob, checkpoint: Checkpoint) -> None:
    """Raise UnsupportedError where blocks of text are longer than a model takes."""
    longest = context_of(checkpoint.full_config)
    check_context(longest, job.settings.sequence_length, name=checkpoint.name, what="sequence length")


def _check_teacher(job: UptrainJob) -> None:
    """Raise InputError for a teacher that cannot be one."""
    check_tokenizers(job.checkpoint.directory, job.teacher)
    teacher = job.inputs.teacher
    if teacher is None:
        return
    check_runtime(teacher.directory)
    trained_towards = as_teacher(teacher)
    _check_length(job, trained_towards)
    check_language_model(teacher)
    if job.settings.regresses:
        require_same_size(class_config(job.checkpoint.config), class_config(trained_towards.config))


def _check_needs(job: UptrainJob) -> None:
    """Raise InputError where the recipe's teacher, a compiler or a tracker is missing."""
    settings = job.settings
    if settings.uses_teacher and job.teacher is None:
        raise InputError(
            f"recipe {settings.recipe} needs the original model",
            hint="pass it as --teacher, or use --recipe pretraining",
        )
    if job.execution.micro_batch is None and uses_deepspeed():
        raise UnsupportedError(
            "what fits is measured before DeepSpeed shards anything", hint="say how many with --micro-batch"
        )
    if uses_deepspeed() and not _is_installed("deepspeed"):
        raise InputError(
            "accelerate's configuration asks for DeepSpeed, which is not installed", hint="pip install deepspeed"
        )
    if job.is_sharded:
        _require_sharding()
    if job.execution.compile:
        _require_compiler()
    for tracker in job.execution.report_to:
        if not _is_installed(tracker):
            raise InputError(f"--report-to {tracker}: {tracker} is not installed", hint=f"pip install {tracker}")


def _is_installed(package: str) -> bool:
    """Tell whether a package can be imported; a folder of its name, as wandb leaves behind, is none."""
    spec = find_spec(package)
    return spec is not None and spec.origin is not None


def _require_sharding() -> None:
    """Raise UnsupportedError where transformers cannot shard a model, unit by unit, while it loads it."""
    try:
        require("sharding")
    except ImportError as error:
        hint = "install transformers 5.23 or newer, or train without --fsdp"
        raise UnsupportedError(f"--fsdp cannot be used here: {error}", hint=hint) from error


def _require_compiler() -> None:
    """Raise UnsupportedError where torch.compile would not find what makes its kernels, which is no part of torch."""
    if default_device().type == "cpu":
        from torch._inductor.cpp_builder import get_cpp_compiler
        from torch._inductor.exc import InvalidCxxCompiler

        try:
            get_cpp_compiler()
        except InvalidCxxCompiler as error:
            asked = os.environ.get("CXX")
            missing = "no C++ compiler works here" + (f" (CXX is {asked})" if asked else "")
            raise UnsupportedError(
                f"--compile cannot be used: {missing}", hint="install one, such as g++, or leave --compile out"
            ) from error
        return
    from torch.utils._triton import has_triton

    if not has_triton():
        raise UnsupportedError(
            "--compile cannot be used: Triton is not installed, or does not know this device",
            hint="pip install triton, or leave --compile out",
        )
    if not any(map(shutil.which, filter(None, (os.environ.get("CC"), "gcc", "clang")))):
        raise UnsupportedError(
            "--compile cannot be used: Triton finds no C compiler", hint="install gcc, or leave --compile out"
        )
