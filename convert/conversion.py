"""The conversion of a checkpoint, from its place to that of the result: what the commands call."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from typing_extensions import Doc

from ..configs import CALIBRATION_TEXT
from .algebra.attention_shape import LatentSizes
from .architectures.context import check_context
from .architectures.source import Source
from .calibration.fitting import DEFAULT_FIT
from .calibration.kept import check_measurements, keep_text, kept_text
from .calibration.statistics import (
    LayerStatistics,
    StatisticsOrigin,
    fingerprint,
    open_statistics,
    statistics_bytes,
)
from .calibration.statistics import save_statistics as write_statistics
from .calibration.text import CalibrationText, read_calibration_text
from .calibration.writing import SelfWriting, write_calibration_text
from .checkpoint.companions import find_companions
from .checkpoint.foreign import cached_repository
from .checkpoint.loading import check_source
from .checkpoint.manifest import digest_file
from .checkpoint.opening import open_checkpoint
from .checkpoint.output import check_file, check_free_spaces, check_output
from .checkpoint.source_files import weight_files
from .checkpoint.staging import check_renames, clear_leftovers, scratch_directory
from .checkpoint.tensors import Checkpoint
from .checkpoint.work_directory import WorkDirectory, bytes_below, check_work_directory, content_of, work_directory
from .describe.engines import head_kernels, latent_kernels
from .device import default_device, default_precision
from .errors import InputError
from .execute import DEFAULT_MAX_SHARD_BYTES, check_preparation, execute, rehearse
from .methods.cla import Cla
from .methods.gqa import Gqa
from .methods.method import Method
from .methods.mla import Mla
from .methods.prepared import Hardware, LayerReport, Measurements, Preparation, Prepared
from .plan import ConversionPlan
from .record import job_record, place_name, text_record
from .text.hub import pin_revision
from .text.sources import DocumentSeparator, LineDocuments, SkipBadLines, TextField, TextSource, parse_text

__all__ = ["Calibration", "Conversion", "Method", "Progress", "convert", "default_output", "no_progress"]

Progress = Callable[[str, int], AbstractContextManager[Callable[[int], object]]]
"""Called with what is done and how much of it there is; gives a function that is called with how much is done since."""

_LONGEST_SEQUENCE = 1024
_STATISTICS = "statistics"  # the part of a work directory that says which were saved
_OF_A_TEXT_THAT_IS_READ = ("text_field", "split", "config", "line_documents", "document_separator", "skip_bad_lines")


def no_progress(what: str, total: int) -> AbstractContextManager[Callable[[int], object]]:
    """Shows nothing."""
    return nullcontext(lambda done: None)


@dataclass(frozen=True)
class Calibration:
    """What a merge measures the model on: a text, statistics of an earlier run, or nothing but the weights.

    Raises InputError unless it is exactly one of them.
    """

    data: Annotated[
        str | Path | None,
        Doc(
            "Text to measure on: a file of text, JSON or parquet rows, a directory of them, or a dataset name; self: "
            "half of it the model writes first, half is the text that ships with kvconvert (a file of that name is "
            "./self)."
        ),
    ] = None
    num_tokens: Annotated[int, Doc("How many tokens of it.")] = 131072
    sequence_length: Annotated[
        int | None, Doc("Tokens of a sequence. Default: the longest that the model takes, at most 1024.")
    ] = None
    text_field: TextField = "text"
    split: Annotated[str | None, Doc("Split of a dataset. Default: train.")] = None
    config: Annotated[str | None, Doc("Configuration of a dataset.")] = None
    line_documents: LineDocuments = False
    document_separator: DocumentSeparator = None
    skip_bad_lines: SkipBadLines = False
    writing_seed: Annotated[int, Doc("Seed of the random numbers with which the model writes.")] = 0
    precision: Annotated[
        Literal["auto", "bf16", "fp32"],
        Doc("bf16: autocast over float32 weights; auto: where the machine is fast at it."),
    ] = "auto"
    device: Annotated[str | None, Doc("Where the text runs: cpu, cuda, cuda:1 … Default: a GPU if there is one.")] = (
        None
    )
    statistics: Annotated[Path | None, Doc("Measurements of an earlier run, in place of text.")] = None
    save_statistics: Annotated[Path | None, Doc("Keep the measurements in this file.")] = None
    weights_only: Annotated[bool, Doc("Merge by the weights alone, without a text.")] = False

    def __post_init__(self) -> None:
        if (self.data is not None) + (self.statistics is not None) + self.weights_only != 1:
            raise InputError("a calibration is one of data, statistics and weights_only")
        if self.save_statistics is not None and self.data is None:
            raise InputError("statistics are measured on a text, and none was given")
        if self.writing_seed and not self.is_self_written:
            raise InputError(
                f"a text that is read does not depend on the seed {self.writing_seed}",
                hint="leave it out, or let the model write the text: 'self'",
                settings=("writing_seed", "data"),
            )
        for name in _OF_A_TEXT_THAT_IS_READ if self.is_self_written else ():
            if getattr(self, name) != type(self).__dataclass_fields__[name].default:
                raise InputError(f"{name} is about a text that is read, and this one the model writes")
        if self.precision not in ("auto", "bf16", "fp32"):
            raise InputError(f"precision is {self.precision!r}, expected 'auto', 'bf16' or 'fp32'")

    @property
    def is_self_written(self) -> bool:
        """Whether the model writes the text itself, half of it."""
        return self.data == "self"

    @property
    def source(self) -> TextSource:
        """The text to read. Raises InputError where `data` names none."""
        defaults = TextSource(
            "",
            text_field=self.text_field,
            split=self.split,
            config=self.config,
            line_documents=self.line_documents,
            document_separator=self.document_separator,
            skip_bad_lines=self.skip_bad_lines,
        )
        return parse_text(str(self.data), defaults)

    @property
    def places_read(self) -> list[Path]:
        """The files and directories that are read, if they are on this machine."""
        read = self.data is not None and not self.is_self_written
        return [*([self.source.path] if read else []), *([self.statistics] if self.statistics else [])]


@dataclass(frozen=True)
class Conversion:
    """A conversion that was carried out, or with a dry run planned.

    `reports` says what merged heads kept, `calibration` what they were measured on and how they were made, and
    `opened_as` names the class that opens the result, None after a dry run. `left_behind` maps what lies beside the
    source's weights, and does not go with them, to the reason, in words; None where only headers were fetched.
    `unchecked_tokenizer` says why the tokenizer of a result in another class could not be compared with the source's,
    if it could not. `shared_bytes` counts bytes of weights whose place on the disk the source has too (reflinks).
    """

    output: Path
    plan: ConversionPlan
    reports: tuple[LayerReport, ...] = ()
    calibration: dict[str, Any] | None = None
    opened_as: str | None = None
    left_behind: Mapping[str, str] | None = None
    unchecked_tokenizer: str | None = None
    shared_bytes: int = 0

    def to_json(self) -> dict[str, Any]:
        """The conversion as an object for JSON."""
        plan = self.plan
        before, after = plan.cache_bytes_per_token
        source, result = plan.source, plan.result
        return {
            "output": str(self.output),
            "dry_run": self.opened_as is None,
            **({} if self.calibration is None else {"calibration": self.calibration}),
            **({} if result.latent is None else {"fast_kernels": latent_kernels(result.latent) is None}),
            "target": plan.target,
            "method": plan.method,
            "model_type": plan.model_type,
            "num_key_value_heads": {"source": source.num_key_value_heads, "result": result.num_key_value_heads},
            **({"head_dim": plan.head_dims} if plan.resizes_heads else {}),
            "num_key_value_layers": {"source": source.num_key_value_layers, "result": result.num_key_value_layers},
            "kv_source_layers": list(result.layer_grouping.sources) if result.layer_grouping else None,
            "latent": asdict(result.latent) if result.latent else None,
            "cache_bytes_per_token": {"source": before, "result": after},
            "weight_bytes": {"source": plan.bytes_in, "result": plan.bytes_out},
            "layers": [asdict(report) for report in self.reports],
            "left_behind": None if self.left_behind is None else dict(self.left_behind),
            "unchecked_tokenizer": self.unchecked_tokenizer,
            "shared_bytes": self.shared_bytes,
            **({"plan": plan.to_json()} if self.opened_as is None else {"opened_as": self.opened_as}),
        }


def convert(
    model: str | Path,
    method: Method,
    output: str | Path | None = None,
    *,
    calibration: Calibration | None = None,
    revision: str | None = None,
    max_shard_bytes: int = DEFAULT_MAX_SHARD_BYTES,
    allow_nonfinite: bool = False,
    force: bool = False,
    dry_run: bool = False,
    work_dir: str | Path | None = None,
    jobs: int | None = None,
    progress: Progress = no_progress,
    remark: Callable[[str], object] = lambda text: None,
) -> Conversion:
    """Convert the checkpoint in a directory, or of a hub id, and write the result to `output`, whole or not at all.

    Without `output` it is beside a local checkpoint, or in the current directory, with a suffix that says what it is.
    `calibration` is for methods that measure (merge="svd", Mla): without it they raise InputError. Weights that are
    infinite or not a number raise CheckpointError, unless `allow_nonfinite` keeps them as they are. With `force` a
    result that kvconvert wrote is replaced; with `dry_run` nothing is written, after the same checks, but for
    those of values. What is measured and made is kept in the directory `work_dir`, where that is given, layer by layer:
    after the run was ended, or was a `dry_run`, the same call goes on there, to the same bytes. `jobs` files are read
    and written side by side, by default one for each processor, at most 4. `remark` is called with what a person should
    know. Raises InputError (of it UnsupportedError, CheckpointError, DataError and OutputError) for what cannot be
    done, before anything is written.
    """
    headers_only = dry_run and not method.needs_measurements
    with ExitStack() as stack:
        # 1. what is refused before any work
        checkpoint = open_checkpoint(model, revision=revision, headers_only=headers_only)
        checkpoint.allow_nonfinite = allow_nonfinite
        for note in checkpoint.notes:
            remark(note)
        source = stack.enter_context(method.source(checkpoint))
        method.check(source)
        target = Path(output) if output is not None else default_output(source.checkpoint, method.suffix(source))
        if output is None and cached_repository(Path(checkpoint.name)) is not None:
            remark(f"{checkpoint.name} lies in the hub's cache: the result is {target} in the current directory")
        inputs = [] if calibration is None else calibration.places_read
        _check_place(target, source.checkpoint, inputs, force=force, remark=None if dry_run else remark)
        _check_calibration(method, calibration, source)
        _check_work(method, work_dir, target, [*inputs, *([checkpoint.path] if checkpoint.path else [])])
        if isinstance(method, Mla):
            _remark_on_sizes(method.latent_sizes(source.shape), source, remark)
        if isinstance(method, Gqa) and method.head_dim is not None and (kernels := head_kernels(method.head_dim)):
            remark(f"few engines have a fast kernel for heads of {method.head_dim}: {kernels}")
        # 2. the plan, where nothing has to be measured for it
        resolved: Method | None = None if method.needs_choice else method.resolve(source)
        plan = None if resolved is None else resolved.plan(source)
        if plan is not None and not plan.changes_cache:
            _check_nothing_kept(calibration, work_dir)
        made = _Made(resolved, plan)
        if method.needs_measurements and (plan is None or plan.changes_cache):
            assert calibration is not None
            kept_in = None if work_dir is None else Path(work_dir)
            job = _Measuring(source, target, calibration, kept_in, progress=progress, remark=remark)
            made = job.run(method, made, stack)
            _remark_on_steps(method, calibration, made.prepared, remark)
        resolved, plan, prepared, record = made.method, made.plan, made.prepared, made.record
        # 3. the result
        assert plan is not None
        if dry_run:
            rehearsed = rehearse(plan, source.checkpoint, target, prepared.overlay, force=force, inputs=inputs)
            left_behind, unchecked = rehearsed or (None, None)
            return Conversion(target, plan, prepared.reports, record, None, left_behind, unchecked)
        with progress("converting", plan.bytes_out) as advance:
            result = execute(
                plan,
                source.checkpoint,
                target,
                prepared.overlay,
                max_shard_bytes=max_shard_bytes,
                force=force,
                inputs=inputs,
                options=_options(
                    resolved, max_shard_bytes=max_shard_bytes, allow_nonfinite=allow_nonfinite, calibration=calibration
                ),
                calibration=record,
                jobs=jobs,
                progress=advance,
            )
        if made.work is not None:
            made.work.clear()
    for name, count in checkpoint.nonfinite.items():
        remark(f"{count} values of {name} are infinite or not a number, in {target} as in {checkpoint.name}")
    return Conversion(
        target,
        plan,
        prepared.reports,
        record,
        result.opened_as,
        result.left_behind,
        result.unchecked_tokenizer,
        result.shared_bytes,
    )


def _remark_on_steps(
    method: Method, calibration: Calibration, prepared: Prepared, remark: Callable[[str], object]
) -> None:
    """Say that a text was too short for the gradient steps that are the default, so that none were taken."""
    asked = getattr(method, "refit", False) and getattr(method, "fit_steps", 0) is None
    if asked and calibration.data is not None and prepared.reports and not any(each.fits for each in prepared.reports):
        remark(f"{calibration.num_tokens} tokens are too few to take and to judge gradient steps: none was taken")


def default_output(checkpoint: Checkpoint, suffix: str) -> Path:
    """Beside a local checkpoint, in the current directory for a hub id or what lies in its cache: `model_dir-gqa8`."""
    local = Path(checkpoint.name).expanduser()
    cached = cached_repository(local)
    if cached is not None:
        return Path(f"{cached[0].rpartition('/')[2]}-{suffix}")
    if local.is_dir():
        absolute = Path(os.path.abspath(local))
        return absolute.with_name(f"{absolute.name}-{suffix}")
    return Path(f"{checkpoint.name.rpartition('/')[2]}-{suffix}")


def _options(
    method: Method | None, *, max_shard_bytes: int, allow_nonfinite: bool, calibration: Calibration | None
) -> dict[str, Any]:
    """Every setting that the result depends on, for the manifest; where files lie is none."""
    settings = {} if method is None else asdict(method)  # type: ignore[call-overload]
    options = {"max_shard_bytes": max_shard_bytes, "allow_nonfinite": allow_nonfinite}
    return settings | options | _measured_on(calibration)


def _measured_on(calibration: Calibration | None) -> dict[str, Any]:
    places = ["data", "statistics", "save_statistics", "device"]
    if calibration is not None and not calibration.is_self_written:
        places.append("writing_seed")
    measured: dict[str, Any] = {}
    if calibration is not None:
        measured = {name: value for name, value in asdict(calibration).items() if name not in places}
    if calibration is not None and calibration.data is not None and not calibration.is_self_written:
        # the text may say some of it itself, in brackets
        measured |= {name: getattr(calibration.source, name) for name in ("text_field", "split", "config")}
    return measured


def _no_work() -> InputError:
    """Make the error of a work directory for a conversion that measures nothing."""
    return InputError(
        "nothing is measured for this conversion, so there is no work to keep",
        hint="leave the work directory out",
        settings=("work_dir",),
    )


def _check_work(method: Method, work_dir: str | Path | None, target: Path, inputs: Sequence[Path]) -> None:
    """Raise InputError where nothing is there to be kept, and OutputError for a place where it cannot be."""
    if work_dir is None:
        return
    if not method.needs_measurements:
        raise _no_work()
    check_work_directory(Path(work_dir), output=target, inputs=inputs)


def _check_nothing_kept(calibration: Calibration | None, work_dir: str | Path | None) -> None:
    """Raise InputError where something of measurements is to be kept, and none are made."""
    if calibration is not None and calibration.save_statistics:
        raise InputError("nothing is measured where no head is merged, so there are no statistics to save")
    if work_dir is not None:
        raise _no_work()


def _check_place(
    target: Path,
    checkpoint: Checkpoint,
    inputs: Sequence[Path],
    *,
    force: bool,
    remark: Callable[[str], object] | None,
) -> None:
    """Raise OutputError unless the target can be written.

    With a `remark` what a killed run left there is cleared, and it is tried whether directories can be renamed there.
    """
    if remark is not None:
        clear_leftovers(target, remark)
    check_output(target, force=force, inputs=[*([checkpoint.path] if checkpoint.path else []), *inputs])
    if remark is not None:
        check_renames(target)


def _check_calibration(method: Method, calibration: Calibration | None, source: Source) -> None:
    """Raise InputError unless what is measured on is what the method can use, and the model takes."""
    if not method.needs_measurements:
        if calibration is not None:
            raise InputError("nothing is measured for this conversion", hint="leave the calibration out")
        return
    if calibration is None:
        raise InputError("this conversion measures the model on a text", hint="give a calibration")
    if calibration.statistics is not None and not method.takes_statistics:
        raise InputError("this conversion needs a text, and statistics of one do not do", hint="give a text")
    if calibration.save_statistics is not None and not method.takes_statistics:
        raise InputError("statistics of this conversion cannot be used again", hint="do not save them")
    if (calibration.weights_only or calibration.statistics is not None) and method.text_need:
        raise InputError(method.text_need, hint="give a text")
    length = calibration.sequence_length
    if length is not None:
        check_context(source.longest_context, length, name=source.name, what="sequence length")


def _remark_on_sizes(latent: LatentSizes, source: Source, remark: Callable[[str], object]) -> None:
    """Say, before any work, what is not good about the sizes of a latent."""
    if latent.num_cached >= source.shape.cached_values:
        remark(
            f"the cache gets larger: {latent.num_cached} numbers of a layer and token in place of "
            f"{source.shape.cached_values}; ask for smaller sizes"
        )
    kernels = latent_kernels(latent)
    if kernels is not None:
        remark(f"no engine has a fast kernel for these sizes: {kernels}")


@contextmanager
def _memory_errors(hardware: Hardware) -> Iterator[None]:
    """Raise InputError where the device's memory does not do."""
    import torch

    try:
        yield
    except torch.OutOfMemoryError as error:
        raise InputError(
            f"{hardware.device}: out of memory", hint="use another device, for example cpu", settings=("device",)
        ) from error


@dataclass(frozen=True)
class _Made:
    """What a conversion has before its result is written: all of it is there after the measurements, if there are any.

    `work` keeps the tensors of `prepared` beyond the end of the run, where that was asked for.
    """

    method: Method | None
    plan: ConversionPlan | None
    prepared: Prepared = field(default_factory=Prepared)
    record: dict[str, Any] | None = None
    work: WorkDirectory | None = None


@dataclass(frozen=True)
class _Measuring:
    """The part of a conversion that measures the model, and makes tensors of what it finds."""

    source: Source
    target: Path
    calibration: Calibration
    work_dir: Path | None
    progress: Progress
    remark: Callable[[str], object]

    def run(self, method: Method, begun: _Made, stack: ExitStack) -> _Made:
        """Make what the result needs beside the source; its files are there until the stack is closed."""
        # 1. the text
        hardware = self.start(begun.plan)
        work = stack.enter_context(self.open_work(method, hardware))
        measurements, record = self.measure(method, hardware, work)
        # 2. what is chosen by measurement, and the plan of that
        resolved, plan = begun.method, begun.plan
        if resolved is None or plan is None:
            resolved = self.choose(method, measurements, hardware, work)
            plan = resolved.plan(self.source)
            self.check(plan)
        # 3. the tensors that the plan reads beside the source's
        record |= resolved.record(measurements, hardware)
        prepared = Prepared()
        if plan.overlay_bytes:
            scratch = work.path if work is not None else stack.enter_context(scratch_directory(self.target))
            prepared = self.prepare(resolved, measurements, hardware, scratch, work)
            self.save_statistics(prepared, measurements, record, work)
        return _Made(resolved, plan, prepared, record, work)

    def start(self, plan: ConversionPlan | None) -> Hardware:
        """What runs the text. Raises InputError for a device that does not work, and for what is not possible here."""
        import torch

        device = self.calibration.device or str(default_device())
        try:
            torch.empty(1, device=device)
        except (AssertionError, RuntimeError) as error:  # torch has no error of its own for this
            raise InputError(
                f"device {device!r}: this machine has none that works ({str(error).splitlines()[0]})"
            ) from error
        check_source(self.source.checkpoint)
        if plan is not None:
            self.check(plan)
        precision = default_precision() if self.calibration.precision == "auto" else self.calibration.precision
        return Hardware(device, "fp32" if self.calibration.weights_only else precision)

    def check(self, plan: ConversionPlan) -> None:
        """Raise what carrying out the plan would, before hours of measuring, and OutputError for too small a disk."""
        check_preparation(plan, self.source.checkpoint, self.target)
        after = plan.bytes_out + find_companions(self.source.checkpoint.original).num_bytes
        needs = [(self.target, after)]
        made = plan.overlay_bytes
        save = self.calibration.save_statistics
        if save is not None:
            clear_leftovers(save, self.remark)
            if not self._has_saved(save):
                check_file(save, outside=self.target)
            kept = statistics_bytes(self.source.shape)
            made += kept
            needs.append((save, kept))
        if self.work_dir is None:
            needs.append((self.target, made))
        else:  # of which an earlier run may have made a part
            needs.append((self.work_dir / "layer", max(made - bytes_below(self.work_dir), 0)))
        check_free_spaces(needs)

    def _has_saved(self, save: Path) -> bool:
        """Whether an earlier run, which this one goes on from, has saved the statistics."""
        if self.work_dir is None or not save.is_file() or save.is_symlink():
            return False
        noted: object = content_of(self.work_dir, _STATISTICS)
        return noted == digest_file(save.parent, save.name).to_json()

    def open_work(self, method: Method, hardware: Hardware) -> AbstractContextManager[WorkDirectory | None]:
        """The work directory of this conversion, where one was asked for."""
        if self.work_dir is None:
            return nullcontext()
        settings = asdict(method) | _measured_on(self.calibration)  # type: ignore[call-overload]
        # what another version may fit by: layers of two of them shall not meet in one result
        settings |= {name: value for name, value in DEFAULT_FIT.record.items() if name not in settings}
        with self.progress("comparing", len(weight_files(self.source.checkpoint.original))) as advance:
            job = job_record(
                self.source.checkpoint,
                conversion=type(method).__name__.lower(),
                settings=settings | {"save_statistics": self.calibration.save_statistics is not None},
                device=hardware.device,
                precision=hardware.precision,
                progress=advance,
            )
        return work_directory(self.work_dir, job, self.remark)

    def measure(
        self, method: Method, hardware: Hardware, work: WorkDirectory | None
    ) -> tuple[Measurements, dict[str, Any]]:
        """The text, or statistics of one, and what is noted of them.

        Raises InputError for a work directory that was begun with another text.
        """
        written = None
        if work is not None and self.calibration.is_self_written:
            written = kept_text(work) or keep_text(work, self._written_text(hardware))
        measurements, record = self._measurements(method, hardware, written)
        if work is not None and written is None:
            check_measurements(work, measurements, record)
        return measurements, record

    def _measurements(
        self, method: Method, hardware: Hardware, written: CalibrationText | None
    ) -> tuple[Measurements, dict[str, Any]]:
        if self.calibration.weights_only:
            worse = "is much worse than with a text" if isinstance(method, Mla) else "can be worse than the mean"
            self.remark(f"merging by the weights alone {worse}")
            return None, {"data": None, "num_tokens": 0}
        if self.calibration.statistics is not None:
            path = self.calibration.statistics
            statistics = open_statistics(path, self.source)
            origin = asdict(statistics.origin) | {"data": place_name(statistics.origin.data)}
            origin |= {"statistics_file": digest_file(path.parent, path.name).to_json()}
            if statistics.text is not None and isinstance(method, Gqa) and method.refit:
                self.remark("the text that is kept with these statistics is run again, to fit the layers to it")
                return statistics.text, origin
            if statistics.text is None:
                self.remark("statistics hold no text to fit the layers to, which text would allow")
            return statistics, origin
        if self.calibration.is_self_written:
            text = written or self._written_text(hardware)
            record: dict[str, Any] = {"data": text.description}
        else:
            # what is read has the commit of the record
            source = pin_revision(self.calibration.source, remark=self.remark)
            text = self._text(source)
            record = text_record(source, text.files)
        record |= {"num_tokens": text.num_tokens}
        if isinstance(method, Gqa | Cla) and method.merge == "svd":
            record |= {"model": fingerprint(self.source)}
        return text, record

    @property
    def _sequence_length(self) -> int:
        longest = self.source.longest_context or _LONGEST_SEQUENCE
        length = self.calibration.sequence_length or min(_LONGEST_SEQUENCE, longest)
        return min(length, self.calibration.num_tokens)

    def _written_text(self, hardware: Hardware) -> CalibrationText:
        """A text half of which the model writes: sequences of its own, and then as many of the shipped text.

        Half of each is a little worse than the better of them, whatever model that is (docs/measurements.md).
        """
        import torch

        shipped, length = TextSource(str(CALIBRATION_TEXT)), self._sequence_length
        num_read = self.calibration.num_tokens // length // 2
        num_written = self.calibration.num_tokens // length - num_read
        with self.progress("writing", num_written * length) as advance, _memory_errors(hardware):
            written = write_calibration_text(
                self.source,
                SelfWriting(shipped, seed=self.calibration.writing_seed),
                num_tokens=num_written * length,
                sequence_length=length,
                hardware=hardware,
                progress=advance,
            )
        if num_read == 0:
            return written
        read = read_calibration_text(
            self.source.checkpoint, shipped, num_tokens=num_read * length, sequence_length=length, remark=self.remark
        )
        description = f"{written.description}; and {len(read.token_ids)} sequences of {shipped.path.name}"
        return CalibrationText(torch.cat([written.token_ids, read.token_ids]), description)

    def _text(self, source: TextSource) -> CalibrationText:
        wanted, data = self.calibration.num_tokens, self.calibration.data
        text = read_calibration_text(
            self.source.checkpoint,
            source,
            num_tokens=wanted,
            sequence_length=self._sequence_length,
            remark=self.remark,
        )
        if text.num_tokens <= wanted - text.token_ids.shape[1]:
            self.remark(f"{data} gave {text.num_tokens} tokens, fewer than the {wanted} that were asked for")
        return text

    def choose(
        self, method: Method, measurements: Measurements, hardware: Hardware, work: WorkDirectory | None
    ) -> Method:
        """The method with what it chooses by measurement."""
        choice = None if work is None else work.kept("choice")
        if choice is not None:
            return method.with_choice(choice).resolve(self.source)
        with self.progress("choosing", self.source.shape.num_hidden_layers) as advance, _memory_errors(hardware):
            resolved = method.resolve(self.source, measurements, hardware, advance)
        if work is not None:
            work.keep("choice", resolved.choice)
        return resolved

    def prepare(
        self,
        method: Method,
        measurements: Measurements,
        hardware: Hardware,
        scratch: Path,
        work: WorkDirectory | None,
    ) -> Prepared:
        """The method's tensors, in files in `scratch`."""
        what = "compressing" if isinstance(method, Mla) else "merging"
        with self.progress(what, self.source.shape.num_hidden_layers) as advance, _memory_errors(hardware):
            keep_gram = self.calibration.save_statistics is not None
            return method.prepare(self.source, Preparation(scratch, measurements, hardware, keep_gram, advance, work))

    def save_statistics(
        self, prepared: Prepared, measurements: Measurements, record: dict[str, Any], work: WorkDirectory | None
    ) -> None:
        """Keep the Gram matrices where that was asked for, and beside them a text that the model wrote."""
        save = self.calibration.save_statistics
        if save is None or prepared.gram is None:
            return
        if not self._has_saved(save):
            origin = StatisticsOrigin(*(record[name] for name in ("model", "data", "num_tokens")))
            text = measurements if isinstance(measurements, CalibrationText) else None
            written = text if self.calibration.is_self_written else None  # any other can be read again
            write_statistics(save, LayerStatistics(origin, prepared.gram, written), self.source.shape)
        if work is not None and work.kept(_STATISTICS) is None:
            work.keep(_STATISTICS, digest_file(save.parent, save.name).to_json())
