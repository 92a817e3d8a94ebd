"""One model, several targets: each converted, evaluated and perhaps uptrained, then compared."""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

from ..configs import CALIBRATION_TEXT
from ..convert.architectures.context import longest_context
from ..convert.checkpoint.files import write_text
from ..convert.checkpoint.json_files import read_object
from ..convert.checkpoint.opening import open_checkpoint
from ..convert.conversion import Calibration, Progress, convert, no_progress
from ..convert.describe.inspection import inspect_checkpoint
from ..convert.errors import InputError, OutputError
from ..convert.printable import jsonable
from ..convert.text.documents import check_text
from ..convert.text.sources import TextSource
from ..measure.benchmarking import benchmark
from ..measure.evaluation import EvaluationSettings, evaluate
from ..measure.speed import BenchmarkSettings
from .sweep_rows import Quality, Speed, SweepRow, as_csv, as_table, front
from .targets import Merge, Target, parse_target

if TYPE_CHECKING:
    from ..measure.perplexity import Evaluation

__all__ = ["Keep", "Sweep", "Uptraining", "sweep"]

Keep = Literal["best", "all", "none"]
"""Which models of a sweep stay: those that no other beats in cache and quality, all, or none."""

_SETTINGS, _RESULTS, _MODELS, _ROWS, _WORK = "sweep_settings.json", "sweep", "models", "rows", "work"


@dataclass(frozen=True)
class Uptraining:
    """How each target is uptrained, with the original as its teacher: on which text, for how many tokens."""

    data: Sequence[str]
    tokens: int
    sequence_length: int | None = None
    global_batch_tokens: int | None = None


@dataclass(frozen=True)
class Sweep:
    """What a sweep found: a row for each target in the order of the targets, and where tables and picture are.

    `front` names the targets that no other beats: none has at most the same cache and a smaller excess.
    """

    model: str
    original_cache_bytes_per_token: int
    original_perplexity: float
    method: str
    rows: tuple[SweepRow, ...]
    front: tuple[str, ...]
    files: tuple[Path, ...]

    def to_json(self) -> dict[str, Any]:
        """The sweep as an object for JSON."""
        content = asdict(self)
        return content | {"files": [str(path) for path in self.files]}

    def report(self) -> str:
        """The rows in Markdown, with what they are of, and how they are to be read."""
        lines = [
            f"{self.model} and what it can become; excess is the loss above it, in nats per token ± standard error.",
            "B/token: cache in 16 bits. Bold: no other target takes as little cache and loses less.",
        ]
        if any(row.speed for row in self.rows):
            lines.append(
                "Times faster: decoding, in turn with the original; bound: the ratio of the bytes that a step reads."
            )
        table = as_table(self.rows, self.original_cache_bytes_per_token, self.original_perplexity)
        return "\n".join([*lines, "", table, "", f"Scored: {self.method}."])


def sweep(
    model: str | Path,
    targets: Sequence[str],
    data: str | Path | Sequence[str | Path],
    output: str | Path,
    *,
    merge: Merge = "svd",
    calibration: Calibration | None = None,
    evaluation: EvaluationSettings | None = None,
    uptraining: Uptraining | None = None,
    speed: BenchmarkSettings | None = None,
    keep: Keep = "best",
    picture: bool = True,
    revision: str | None = None,
    progress: Progress = no_progress,
    remark: Callable[[str], object] = lambda text: None,
) -> Sweep:
    """Convert a checkpoint to each target (`parse_target`), evaluate it against the original, and compare all.

    `output` gets `sweep.json`, `sweep.csv`, `sweep.md`, with `picture` `sweep.png` and `sweep.svg`, and below `models/`
    the models that `keep` says. Models that are not to stay are removed as soon as that is known, so that the disk
    holds those of the front so far and one more. A target whose row is there is not done again, and a conversion or
    an uptraining that was ended goes on where it was: the same call ends with the same table. `calibration` is for
    targets that measure; by default it is the text that ships with kvconvert. With `speed` decoding is timed too, in
    turn with the original's.

    Raises InputError, before any work, for targets that the model cannot become, for texts that cannot be read and for
    contexts longer than it takes, and OutputError for a directory that holds anything else, or a sweep with other
    settings.
    """
    if keep not in get_args(Keep):
        raise InputError(f"keep is {keep!r}, expected one of {', '.join(get_args(Keep))}", settings=("keep",))
    if picture:
        from ..measure.pictures import require_matplotlib

        require_matplotlib()
    chosen = list({target.name: target for target in (parse_target(each, merge=merge) for each in targets)}.values())
    if not chosen:
        raise InputError("no target to convert to", settings=("targets",))
    texts = [str(data)] if isinstance(data, str | Path) else [str(each) for each in data]
    place = Path(output)
    with open_checkpoint(model, revision=revision) as checkpoint:
        source, cache = checkpoint.directory, inspect_checkpoint(checkpoint).cache_bytes_per_token
    calibration = calibration or Calibration(CALIBRATION_TEXT)
    evaluation = evaluation or EvaluationSettings()
    for target in chosen:
        _check(source, target, calibration)
    _check_texts(source, texts, evaluation, uptraining, speed)
    settings = _settings(source, texts, merge, calibration, evaluation, uptraining, speed)
    _claim(place, settings)
    job = _Job(str(model), source, texts, place, calibration, evaluation, uptraining, speed, keep, progress, remark)
    rows = dict[str, SweepRow]()
    for target in chosen:
        rows[target.name] = job.row(target)
        job.prune(list(rows.values()))
    first = job.method_and_original(chosen)
    kept = [replace(row, output=job.kept(row)) for row in rows.values()]
    result = Sweep(str(model), cache, first.original_perplexity, first.method, tuple(kept), front(kept), ())
    return replace(result, files=_write(place, result, picture=picture))


@dataclass
class _Original:
    """What evaluations said of the original, and how they were made."""

    original_perplexity: float
    method: str


@dataclass
class _Job:
    model: str
    source: Path
    texts: list[str]
    place: Path
    calibration: Calibration
    evaluation: EvaluationSettings
    uptraining: Uptraining | None
    speed: BenchmarkSettings | None
    keep: Keep
    progress: Progress
    remark: Callable[[str], object]

    def row(self, target: Target) -> SweepRow:
        """The row of a target, that of an earlier run if there is one."""
        file = self._row_file(target)
        if file.exists():
            self.remark(f"{target.name}: done before")
            return SweepRow.from_json(read_object(file)["row"])
        self.remark(f"{target.name}: converting")
        converted = self._converted(target)
        evaluated = self._evaluate(converted, f"{target.name}: evaluating")
        row = self._row(target, converted, evaluated)
        if self.uptraining is not None:
            recovered = self._uptrained(target, self.uptraining)
            after = self._evaluate(recovered, f"{target.name}: evaluating what was uptrained")
            row = replace(row, after=_quality(after), output=str(recovered))
        if self.speed is not None:
            row = replace(row, speed=self._speed(target, converted, self.speed))
        assert evaluated.against is not None
        about = {"original_perplexity": evaluated.against.original_perplexity, "method": evaluated.method}
        _write_json(file, about | {"row": asdict(row)})
        return row

    def prune(self, rows: Sequence[SweepRow]) -> None:
        """Remove the models that are not to stay, as far as that is known from these rows."""
        best = front(rows)
        for row in rows:
            folder = self.place / _MODELS / parse_target(row.target).folder
            uptrained = folder.with_name(f"{folder.name}-uptrained")
            if self.keep == "none" or (self.keep == "best" and row.target not in best):
                gone = [folder, uptrained]
            elif self.keep == "best" and uptrained.is_dir():
                gone = [folder]
            else:
                gone = []
            for each in gone:
                shutil.rmtree(each, ignore_errors=True)

    def kept(self, row: SweepRow) -> str | None:
        """Where the model of a row is, if it was kept."""
        return row.output if row.output is not None and Path(row.output).is_dir() else None

    def method_and_original(self, targets: Sequence[Target]) -> _Original:
        """What the rows say of the original, which they were all compared with on the same tokens."""
        content = read_object(self._row_file(targets[0]))
        return _Original(float(content["original_perplexity"]), str(content["method"]))

    def _row_file(self, target: Target) -> Path:
        return self.place / _ROWS / f"{target.folder}.json"

    def _converted(self, target: Target) -> Path:
        """The converted checkpoint; one that is there is complete, and its seconds are kept beside it."""
        folder = self.place / _MODELS / target.folder
        if folder.is_dir():
            return folder
        begun = time.monotonic()
        measures = target.method.needs_measurements
        work = self.place / _WORK / target.folder
        went_on = work.is_dir()
        convert(
            self.source,
            target.method,
            folder,
            calibration=self.calibration if measures else None,
            work_dir=work if measures else None,
            progress=self.progress,
            remark=self.remark,
        )
        seconds = None if went_on else round(time.monotonic() - begun, 1)
        _write_json(self._seconds_file(target), {"seconds": seconds})
        return folder

    def _seconds_file(self, target: Target) -> Path:
        return self.place / _ROWS / f"{target.folder}-seconds.json"

    def _row(self, target: Target, converted: Path, evaluated: Evaluation) -> SweepRow:
        file = self._seconds_file(target)
        with open_checkpoint(converted) as checkpoint:
            return SweepRow(
                target=target.name,
                cache_bytes_per_token=inspect_checkpoint(checkpoint).cache_bytes_per_token,
                weight_bytes=sum(info.num_bytes for info in checkpoint.tensors.values()),
                model_type=str(checkpoint.config["model_type"]),
                seconds=read_object(file)["seconds"] if file.exists() else None,
                before=_quality(evaluated),
                output=str(converted),
            )

    def _evaluate(self, model: Path, what: str) -> Evaluation:
        return evaluate(
            model,
            self.texts,
            against=self.source,
            settings=self.evaluation,
            progress=lambda _, total: self.progress(what, total),
        )

    def _speed(self, target: Target, model: Path, settings: BenchmarkSettings) -> tuple[Speed, ...]:
        """Decoding of the target in turn with the original; uptraining changes no speed."""
        points = benchmark(
            model,
            against=self.source,
            settings=settings,
            progress=lambda _, total: self.progress(f"{target.name}: benchmarking", total),
        ).points
        return tuple(
            Speed(
                point.batch,
                point.context,
                None if point.result is None else 1e3 * point.result.decode.median,
                None if point.original is None else 1e3 * point.original.decode.median,
                None if point.decode_gain is None else point.decode_gain.ratio,
                None if point.decode_gain is None else point.decode_gain.bound,
            )
            for point in points
        )

    def _uptrained(self, target: Target, how: Uptraining) -> Path:
        """The uptrained checkpoint; one that is there is complete, and a run that was ended goes on."""
        from ..uptrain import TextSettings, UptrainSettings, uptrain

        folder = self.place / _MODELS / target.folder
        recovered = folder.with_name(f"{folder.name}-uptrained")
        if recovered.is_dir():
            return recovered
        settings = UptrainSettings()
        settings = replace(
            settings,
            sequence_length=how.sequence_length or settings.sequence_length,
            global_batch_tokens=how.global_batch_tokens or settings.global_batch_tokens,
        )
        uptrain(
            folder,
            data=list(how.data),
            teacher=self.source,
            tokens=how.tokens,
            output=recovered,
            settings=settings,
            text=TextSettings(validation_fraction=0.0),
            progress=lambda what, total: self.progress(f"{target.name}: {what}", total),
            remark=self.remark,
        )
        return recovered


def _check(source: Path, target: Target, calibration: Calibration) -> None:
    """Raise InputError, which names the target, where the checkpoint cannot become it."""
    try:
        with open_checkpoint(source) as checkpoint, target.method.source(checkpoint) as view:
            target.method.check(view)
            if calibration.weights_only and target.method.text_need:
                raise InputError(target.method.text_need)
    except InputError as error:
        raise InputError(f"{target.name}: {error}", hint=error.hint, settings=("targets",)) from error


def _check_texts(
    source: Path,
    texts: Sequence[str],
    evaluation: EvaluationSettings,
    uptraining: Uptraining | None,
    speed: BenchmarkSettings | None,
) -> None:
    """Raise InputError where a text cannot be read, or a context is too long: hours before they would be needed."""
    from ..measure.held_out import check_window, default_window, load_windows

    window, stride = evaluation.cut(default_window(source, None))
    check_window(window, source, None)
    for text in texts:
        load_windows(source, evaluation.source(text), window=window, stride=stride, bos=evaluation.bos, max_windows=1)
    if speed is not None:
        longest, needed = longest_context(source), max(speed.contexts) + speed.num_new_tokens
        if longest is not None and needed > longest:
            raise InputError(
                f"a context of {max(speed.contexts)} and {speed.num_new_tokens} new tokens do not fit {source}, which "
                f"takes {longest}",
                hint=f"time contexts of {longest - speed.num_new_tokens} or less",
                settings=("benchmark",),
            )
    if uptraining is not None:
        from ..uptrain.data.sources import parse_source

        for text in uptraining.data:
            check_text(parse_source(text, TextSource("", usual_split="train")).text)


def _quality(evaluation: Evaluation) -> Quality:
    against = evaluation.against
    assert against is not None
    return Quality(
        evaluation.perplexity,
        against.excess_nats_per_token,
        against.excess_standard_error,
        against.kl_nats_per_token,
        against.top1_agreement,
    )


def _settings(
    source: Path,
    texts: Sequence[str],
    merge: Merge,
    calibration: Calibration,
    evaluation: EvaluationSettings,
    uptraining: Uptraining | None,
    speed: BenchmarkSettings | None,
) -> dict[str, Any]:
    """Everything that rows depend on but for the target, as JSON gives it back."""
    settings = {
        "model": _identity(source),
        "data": {text: _identity(Path(text)) for text in texts},
        "merge": merge,
        "calibration": asdict(calibration) | {"data": _identity(Path(str(calibration.data)))},
        "evaluation": asdict(evaluation),
        "speed": None if speed is None else asdict(speed),
        "uptraining": None
        if uptraining is None
        else asdict(uptraining) | {"data": {text: _identity(Path(text)) for text in uptraining.data}},
    }
    return dict(json.loads(json.dumps(settings, default=str)))


def _identity(path: Path) -> str:
    """A digest of names, sizes and times of what is at a place on this machine; of another place its name."""
    if not path.exists():
        return str(path)
    files = sorted(each for each in path.rglob("*") if each.is_file()) if path.is_dir() else [path]
    facts = [(str(each.relative_to(path)), each.stat().st_size, each.stat().st_mtime_ns) for each in files]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()


def _claim(place: Path, settings: Mapping[str, Any]) -> None:
    """Make the directory that of a sweep with these settings. Raises OutputError where it is anything else."""
    file = place / _SETTINGS
    if file.exists():
        found = read_object(file)
        if found != settings:
            other = ", ".join(name for name in settings if found.get(name) != settings[name])
            raise OutputError(
                f"{place} holds a sweep with another {other}",
                hint="choose another place, or remove that one",
                settings=("output",),
            )
        return
    if place.exists() and (not place.is_dir() or any(place.iterdir())):
        raise OutputError(f"{place} exists and is not a sweep's", hint="choose another place", settings=("output",))
    try:
        for folder in (place, place / _MODELS, place / _ROWS, place / _WORK):
            folder.mkdir(parents=True, exist_ok=True)
        _write_json(file, settings)
    except OSError as error:
        raise OutputError(f"{place}: cannot be written ({error.strerror})", settings=("output",)) from error


def _write(place: Path, result: Sweep, *, picture: bool) -> tuple[Path, ...]:
    """Write tables and picture, and return where they are."""
    files = [place / f"{_RESULTS}{ending}" for ending in (".json", ".csv", ".md")]
    write_text(files[1], as_csv(result.rows))
    write_text(files[2], f"{result.report()}\n")
    if picture:
        from ..measure.pictures import Point, draw_quality

        original = Point("original", result.original_cache_bytes_per_token, 0.0)
        points = [
            Point(
                row.target,
                row.cache_bytes_per_token,
                row.before.excess_nats_per_token,
                None if row.after is None else row.after.excess_nats_per_token,
                row.final.excess_standard_error,
            )
            for row in result.rows
        ]
        for ending in (".png", ".svg"):
            files.append(place / f"{_RESULTS}{ending}")
            draw_quality(files[-1], original, points)
    _write_json(files[0], replace(result, files=tuple(files)).to_json())
    return tuple(files)


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    write_text(path, json.dumps(jsonable(dict(content)), indent=2, allow_nan=False) + "\n")
