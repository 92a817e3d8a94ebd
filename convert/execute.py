"""Carries out a plan: streams one tensor at a time from the checkpoint to a staged directory."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import zip_longest
from pathlib import Path
from threading import Lock

from .cache_check import check_cache
from .checkpoint.companions import Companions, copy_companions, find_companions, link_companions
from .checkpoint.files import copy_file
from .checkpoint.finite import check_computed
from .checkpoint.loading import check_accepts, check_opens, check_source, knows_class
from .checkpoint.manifest import FileDigest, write_manifest
from .checkpoint.output import check_free_space, check_output
from .checkpoint.overlay import Overlay
from .checkpoint.runtime_code import copy_runtime_code
from .checkpoint.source_files import check_manifest, digest_source_file, weight_files
from .checkpoint.staging import staged_directory
from .checkpoint.tensors import Checkpoint, tensor_bytes
from .checkpoint.tokenizer_transfer import transfer_tokenizer
from .checkpoint.weights_file import BLOCK_BYTES, WeightsFile
from .checkpoint.writer import Shard, plan_shards, write_config, write_index
from .describe.card import write_card
from .errors import CheckpointError
from .parallel import default_jobs, run_side_by_side
from .plan import ConversionPlan, Step
from .record import conversion_record
from .runtime import RUNTIME_CLASSES
from .translations.routes import translated

__all__ = ["DEFAULT_MAX_SHARD_BYTES", "ExecutionResult", "check_preparation", "execute", "rehearse", "sketched"]

DEFAULT_MAX_SHARD_BYTES = 5_000_000_000
_SMALL_COMPANION_BYTES = 2**26  # a tokenizer has less


@dataclass(frozen=True)
class ExecutionResult:
    """A checkpoint that was written to `output`, and that opens in the class `opened_as` (`check_opens`).

    `left_behind` maps what lies beside the source's weights, and is not true of the result or not known to belong to
    it, to the reason, in words. `unchecked_tokenizer` says why the tokenizer of a result in another class could not be
    compared with the source's, if it could not. `shared_bytes` counts bytes of weights that take no place on the disk
    of their own, since the file system lets both checkpoints have the same blocks.
    """

    output: Path
    opened_as: str
    left_behind: Mapping[str, str]
    unchecked_tokenizer: str | None = None
    shared_bytes: int = 0


def execute(
    plan: ConversionPlan,
    source: Checkpoint,
    output: Path,
    overlay: Overlay | None = None,
    *,
    max_shard_bytes: int = DEFAULT_MAX_SHARD_BYTES,
    force: bool = False,
    inputs: Sequence[Path] = (),
    options: Mapping[str, object] | None = None,
    calibration: Mapping[str, object] | None = None,
    jobs: int | None = None,
    progress: Callable[[int], object] = lambda num_bytes: None,
) -> ExecutionResult:
    """Write the converted checkpoint to `output`, which appears only when whole and checked.

    `source` is the checkpoint that the plan was made for, as it is or translated already; `overlay` holds the tensors
    that a method prepared. So another process can carry out a plan that was written as JSON. `inputs` are files and
    directories besides the source, which are not replaced. `options` and `calibration` are noted in kvconvert.json.
    `jobs` files are read or written side by side (by default as `default_jobs` says); one tensor of each is in memory.
    `progress` is called with the number of bytes written since the last call. Raises OutputError for a place that
    exists or cannot hold the result, CheckpointError if the stock class does not accept the source or the result, if a
    tensor that the plan reads is not there, if a file has not the digest that it should have, or if a tensor has values
    that are not finite and the source does not allow them (`Checkpoint.allow_nonfinite`), and UnsupportedError if a
    computed tensor has such values.
    """
    checkpoint = source if source.route == plan.route else translated(source, plan.route)
    companions = find_companions(checkpoint.original)
    _check(plan, checkpoint, output, overlay, companions, force=force, inputs=inputs)
    source_type = checkpoint.original.config.get("model_type")
    with staged_directory(output, force=force, inputs=_read(checkpoint, inputs)) as staging:
        # 1. what may be refused, before the weights, which take long
        beside = copy_companions(companions, staging)
        unchecked = _complete_companions(plan, checkpoint, staging, output)
        # 2. the weights
        shards = plan_shards([step.writes for step in plan.steps], max_shard_bytes=max_shard_bytes)
        transfer = _Transfer(plan, checkpoint, overlay, staging, progress)
        written, read = transfer.run(shards, jobs or default_jobs())
        write_index(staging, shards)
        check_manifest(checkpoint.directory, read)
        # 3. what made it, and whether it opens
        record = conversion_record(plan, checkpoint, [*read, *beside], options=options or {}, calibration=calibration)
        write_card(checkpoint.directory, staging, record)
        write_manifest(staging, record, written)
        opened_as = check_opens(staging)
        if plan.model_type != source_type or plan.model_type in RUNTIME_CLASSES:
            check_cache(staging, name=str(output))
    return ExecutionResult(output, opened_as, companions.left_behind, unchecked, transfer.shared_bytes)


class _Transfer:
    """Weights on their way from a checkpoint into the files of another, in several threads."""

    def __init__(
        self,
        plan: ConversionPlan,
        checkpoint: Checkpoint,
        overlay: Overlay | None,
        staging: Path,
        progress: Callable[[int], object],
    ) -> None:
        self.shared_bytes = 0
        self._steps = {step.writes.name: step for step in plan.steps}
        self._checkpoint, self._overlay, self._staging = checkpoint, overlay, staging
        self._progress, self._lock = progress, Lock()

    def run(self, shards: Sequence[Shard], jobs: int) -> tuple[list[FileDigest], list[FileDigest]]:
        """Write all shards and read every file of the source once; return the digests of both."""
        _import_torch()
        directory = self._checkpoint.directory
        writing = [partial(self._write, shard) for shard in shards]
        reading = [partial(_digest, directory, name) for name in weight_files(self._checkpoint.original)]
        # a file is hashed while what is read of it is written, so that a cold disk is read once
        tasks = [task for pair in zip_longest(writing, reading) for task in pair if task is not None]
        with _processors_shared(jobs):
            done = dict(zip(tasks, run_side_by_side(tasks, jobs), strict=True))
        return [done[task] for task in writing], [done[task] for task in reading]

    def _write(self, shard: Shard, go_on: Callable[[], None]) -> FileDigest:
        with WeightsFile(self._staging / shard.name) as file:
            for spec in shard.write_tensors(file, data_begin=self._data_begin(shard)):
                go_on()
                self._write_tensor(self._steps[spec.name], file)
                with self._lock:
                    self._progress(spec.num_bytes)
        with self._lock:
            self.shared_bytes += file.shared_bytes
        return file.digest

    def _data_begin(self, shard: Shard) -> int:
        """Where tensors of a file have to begin for its blocks to be the source's; 0 where that does not matter."""
        before = 0
        for spec in shard.specs:
            step = self._steps[spec.name]
            if step.op is None and not step.overlay and spec.num_bytes >= BLOCK_BYTES:
                position = self._checkpoint.position(step.reads[0])
                if position is not None and (position - before) % 8 == 0:
                    return (position - before) % BLOCK_BYTES or BLOCK_BYTES
            before += spec.num_bytes
        return 0

    def _write_tensor(self, step: Step, file: WeightsFile) -> None:
        name, checkpoint = step.writes.name, self._checkpoint
        if step.overlay and self._overlay is not None:
            made = self._overlay.read(step.reads[0])
            check_computed(name, made)
            file.write(tensor_bytes(made))
        elif step.op is None:
            checkpoint.copy_bytes(step.reads[0], file)
        else:
            tensors = [checkpoint.read(read) for read in step.reads]
            made = step.op(*tensors)
            check_computed(name, made, tensors)
            file.write(tensor_bytes(made))


def _import_torch() -> None:
    """Import torch without collecting garbage, of which imports make none: a tenth of a small conversion's time."""
    import gc

    collects = gc.isenabled()
    gc.disable()
    try:
        import torch  # noqa: F401
    finally:
        if collects:
            gc.enable()


@contextmanager
def _processors_shared(jobs: int) -> Iterator[None]:
    """Let torch use in each of `jobs` threads its part of the processors, in threads that begin in the context.

    If each had all of them, they would wait for each other actively: half of the processor time of a conversion.
    """
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(max(before // jobs, 1))
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _digest(directory: Path, name: str, go_on: Callable[[], None]) -> FileDigest:
    return digest_source_file(directory, name, see=go_on)


def rehearse(
    plan: ConversionPlan,
    source: Checkpoint,
    output: Path,
    overlay: Overlay | None = None,
    *,
    force: bool = False,
    inputs: Sequence[Path] = (),
) -> tuple[Mapping[str, str], str | None] | None:
    """Make the checks of `execute` that need no weight; return its result's `left_behind` and `unchecked_tokenizer`.

    `source` is translated already. What goes beside the weights is made in a temporary directory, of links to the
    source's files, since these can be large. Returns None where only headers were fetched, so that there is nothing to
    make it of. Raises what `execute` raises, but for values of weights.
    """
    companions = None if source.original.path is None else find_companions(source.original)
    _check(plan, source, output, overlay, companions, force=force, inputs=inputs)
    return _rehearse_companions(plan, source, companions, output)


@contextmanager
def sketched(plan: ConversionPlan, source: Checkpoint) -> Iterator[Path]:
    """Yield a temporary directory that looks like the result of a plan to whoever reads headers, config and tokenizer.

    Its files of weights are holes of the right size, which take no disk. `source` is translated already.
    """
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        for name in find_companions(source.original).copied:
            path = source.directory / name
            if path.is_file() and "/" not in name and path.stat().st_size <= _SMALL_COMPANION_BYTES:
                copy_file(path, place / name)
        _complete_companions(plan, source, place, place)
        shards = plan_shards([step.writes for step in plan.steps], max_shard_bytes=DEFAULT_MAX_SHARD_BYTES)
        for shard in shards:
            with (place / shard.name).open("wb") as file:
                for spec in shard.write_tensors(file):
                    file.seek(spec.num_bytes, os.SEEK_CUR)
                file.truncate(file.tell())
        write_index(place, shards)
        yield place


def check_preparation(plan: ConversionPlan, source: Checkpoint, output: Path) -> None:
    """Raise what `execute` would raise for classes and for what goes beside the weights, before tensors are prepared.

    Preparing them takes hours for a large model.
    """
    _check_classes(plan, source, output)
    companions = None if source.original.path is None else find_companions(source.original)
    _rehearse_companions(plan, source, companions, output)


def _rehearse_companions(
    plan: ConversionPlan, source: Checkpoint, companions: Companions | None, output: Path
) -> tuple[Mapping[str, str], str | None] | None:
    """Make what goes beside the weights in a temporary directory, as `rehearse` says."""
    if companions is None:
        return None
    with tempfile.TemporaryDirectory() as folder:
        link_companions(companions, Path(folder))
        return companions.left_behind, _complete_companions(plan, source, Path(folder), output)


def _complete_companions(plan: ConversionPlan, checkpoint: Checkpoint, directory: Path, output: Path) -> str | None:
    """Write into a directory what goes beside the weights of `output` and is not the source's.

    Returns why a tokenizer was not compared with the source's, if it was not.
    """
    copy_runtime_code(plan.model_type, directory)
    write_config(plan.config, directory, source=checkpoint.directory)
    if plan.model_type == checkpoint.original.config.get("model_type"):
        return None
    return transfer_tokenizer(checkpoint.directory, directory, name=str(output))


def _check(
    plan: ConversionPlan,
    source: Checkpoint,
    output: Path,
    overlay: Overlay | None,
    companions: Companions | None,
    *,
    force: bool,
    inputs: Sequence[Path],
) -> None:
    """Raise an InputError unless a source, translated already, can be converted, by headers alone.

    What is checked is that everything is there that the plan reads, that the place can take the result, and that the
    classes of source and result accept the headers that each has.
    """
    _check_reads(plan, source, overlay)
    plan.check_readable(source)
    check_output(output, force=force, inputs=_read(source, inputs))
    check_free_space(output, plan.bytes_out + (0 if companions is None else companions.num_bytes))
    _check_classes(plan, source, output)


def _read(source: Checkpoint, inputs: Sequence[Path]) -> list[Path]:
    return [*inputs, *([source.path] if source.path else [])]


def _check_classes(plan: ConversionPlan, source: Checkpoint, output: Path) -> None:
    """Raise CheckpointError unless the classes of source and result accept the headers that each has."""
    check_source(source)
    if knows_class(plan.model_type):
        check_accepts(plan.config, [step.writes for step in plan.steps], str(output))


def _check_reads(plan: ConversionPlan, checkpoint: Checkpoint, overlay: Overlay | None) -> None:
    """Raise CheckpointError unless everything that the plan reads is there."""
    made = {} if overlay is None else overlay.files
    for step in plan.steps:
        for name in step.reads:
            if name not in (made if step.overlay else checkpoint.tensors):
                place = "what the method prepared" if step.overlay else checkpoint.name
                raise CheckpointError(
                    f"the plan reads {name}, which is not in {place}", hint="the plan was made for another checkpoint"
                )
