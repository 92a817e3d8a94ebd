"""Running a recipe: each stage once, in order, and gone on with after an end."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..convert.checkpoint.files import write_text
from ..convert.checkpoint.json_files import read_object
from ..convert.checkpoint.output import disk_errors
from ..convert.checkpoint.staging import discard
from ..convert.conversion import Progress, no_progress
from ..convert.errors import InputError, KvConvertError, OutputError, PreemptedError, QualityGateError
from ..convert.printable import jsonable
from ..measure.gates import Gate, describe_failure
from .pushing import push
from .recipe_file import read_recipe
from .report import PAGE_NAME, write_report
from .run_records import STATUS_NAME, RunStatus, StageRecord, differences, see_files
from .run_stages import CONVERTED, EVALUATION_NAME, RECIPE_NAME, UPTRAINED, WORK, RunJob, Stage
from .story import Fact, story_of

if TYPE_CHECKING:
    pass

__all__ = ["FailedGatesError", "Run", "check_done_before", "run", "run_job", "stage_names", "why_again"]

_LOCK = ".lock"
_KEPT_STAGES = ("convert", "uptrain")  # which are never made again unasked


@dataclass(frozen=True)
class Run:
    """What a run ended with: where everything is, the model that it made, what each stage says, and the gates.

    `headline` has the figures that matter most, as the report begins with them.
    """

    output: Path
    model: Path
    stages: Mapping[str, StageRecord]
    gates: tuple[Gate, ...]
    headline: tuple[Fact, ...]
    files: tuple[Path, ...]

    @property
    def evaluation(self) -> dict[str, Any] | None:
        """What the evaluation found, as `evaluation.json` has it; None where quality was not measured."""
        return read_object(self.output / EVALUATION_NAME) if "evaluate" in self.stages else None

    def to_json(self) -> dict[str, Any]:
        """The run as an object for JSON."""
        return {
            "output": str(self.output),
            "model": str(self.model),
            "stages": {name: {"seconds": each.seconds, **each.summary} for name, each in self.stages.items()},
            "headline": [asdict(fact) for fact in self.headline],
            "gates": [asdict(gate) for gate in self.gates],
            "files": [str(path) for path in self.files],
        }


class FailedGatesError(QualityGateError):
    """A quality gate that a run did not pass: `run` says what it ended with, as all of it is done and kept."""

    def __init__(self, message: str, run: Run) -> None:
        super().__init__(message)
        self.run = run


def run(
    recipe: str | Path,
    *,
    overrides: Sequence[str] = (),
    output: str | Path | None = None,
    first: str | None = None,
    last: str | None = None,
    command: str = "",
    progress: Progress = no_progress,
    remark: Callable[[str], object] = lambda text: None,
    show: Callable[[dict[str, Any]], object] = lambda record: None,
) -> Run:
    """Carry out a recipe: convert, uptrain, evaluate, benchmark and report, as far as it has these sections.

    All goes into one directory, `output` or the recipe's: the checkpoints `converted/` and `uptrained/`,
    `evaluation.json`, `benchmark.json`, `report.md`, `report.html`, the recipe as it was run, and `run_status.json`,
    which says what is done. A stage is skipped where its settings, what it reads and what it wrote are as they were;
    after an end in its middle the same call goes on, and the checkpoints and the evaluation get the same bytes. A
    conversion or an uptraining that was made otherwise is never replaced unasked: `first` names a stage that is made
    again, with all after it. `last` names the one after which to stop. `overrides` are as for `read_recipe`, and
    `command` is what a person types to go on, for the status.

    Raises InputError before any work for whatever is wrong by then, FailedGatesError at the end, when the report is
    written, for a gate that failed, and what conversions and uptraining raise, such as PreemptedError.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise InputError(
            "a run of a recipe is one process, and a launcher has started several",
            hint="convert with --until convert, launch kvconvert uptrain --config RECIPE, then run goes on there",
        )
    file = read_recipe(recipe, overrides)
    job = RunJob.of(file, output=output, progress=progress, remark=remark, show=show, command=command)
    job.pin()
    job.check()
    return run_job(job, first=first, last=last)


def run_job(job: RunJob, *, first: str | None = None, last: str | None = None) -> Run:
    """Carry out the stages of a job from `first` to `last`, as `run` says."""
    stages = job.stages
    names = stage_names(job, first, last)
    _claim(job.place)
    with disk_errors(job.place), _locked(job.place):
        status = RunStatus.read(job.place) or RunStatus(str(job.file.path), job.command)
        status.state, status.exit_code, status.reason = "running", None, None
        status.command, status.process_id = job.command, os.getpid()
        try:
            # what is refused is refused before any work, and before anything is removed for it
            check_done_before(status, names, first)
            kept = names if first is None else names[: names.index(first)]
            status.stages = {name: record for name, record in status.stages.items() if name in kept}
            for stage in stages:
                why_again(job, stage, status)
            if "uptrain" in names[: names.index(last or names[-1]) + 1] and "uptrain" not in status.stages:
                job.check_uptraining(force=first is not None)
            if last in (None, "push"):
                job.check_push()
            _start_over(job.place, status, names, first)
            write_text(job.place / RECIPE_NAME, job.resolved)
            for stage in stages:
                _carry_out(job, stage, status)
                if stage.name == last:
                    status.state, status.stage, status.exit_code = "stopped", stage.name, 0
                    status.write(job.place)
                    return _result(job, status, ())
            status.stage = "report"
            status.write(job.place)
            files = write_report(job.place, job.file.recipe, status, job.resolved, job.model)
            failed = [gate for gate in _gates(status) if not gate.passed]
            if failed:
                raise FailedGatesError("; ".join(map(describe_failure, failed)), _result(job, status, files))
            if last != names[-1] and last is not None:
                status.state, status.exit_code = "stopped", 0
                status.write(job.place)
                return _result(job, status, files)
            if job.file.recipe.push is not None:
                job.remark(f"{job.place / PAGE_NAME} is written; pushing to {job.file.recipe.push.repo} …")
                _push(job, status)
            status.state, status.exit_code, status.stage = "finished", 0, None
            status.write(job.place)
        except BaseException as error:
            _fail(status, error)
            status.write(job.place)
            raise
        return _result(job, status, files)


def stage_names(job: RunJob, first: str | None = None, last: str | None = None) -> list[str]:
    """The stages of a run in order. Raises InputError for a first or a last one that is none of them."""
    names = [*(stage.name for stage in job.stages), "report", *(["push"] if job.file.recipe.push else [])]
    for name, option in ((first, "--from"), (last, "--until")):
        if name is not None and name not in names:
            raise InputError(
                f"{option} {name}: the recipe has no such stage", hint=f"its stages are {', '.join(names)}"
            )
    return names


def check_done_before(status: RunStatus | None, names: Sequence[str], first: str | None) -> None:
    """Raise InputError where a stage before the first one that is to be made again is not done."""
    for name in names[: names.index(first)] if first is not None else ():
        if status is None or name not in status.stages:
            raise InputError(f"--from {first}: {name} is not done yet", hint="leave --from out")


def why_again(job: RunJob, stage: Stage, status: RunStatus | None) -> str | None:
    """Why a stage has to be carried out, in a few words; None where it was done before of the same.

    Raises OutputError for one that was carried out otherwise, and is not to be made again unasked.
    """
    record = None if status is None else status.stages.get(stage.name)
    if record is None:
        return "not done yet"
    found = differences(record, stage.settings, stage.texts, job.place)
    if found and stage.name in _KEPT_STAGES:
        raise OutputError(
            f"{job.place}: {stage.name} was carried out otherwise: {'; '.join(found[:4])}",
            hint=f"--from {stage.name} makes it again, with all after it; or choose another --output",
        )
    return found[0] if found else None


def _carry_out(job: RunJob, stage: Stage, status: RunStatus) -> None:
    """Do a stage, unless it was done before of the same."""
    why = why_again(job, stage, status)
    if why is None:
        job.remark(f"{stage.name}: done before")
        return
    if stage.name in status.stages:
        job.remark(f"{stage.name}: again, as {why}")
    status.stage = stage.name
    status.stages.pop(stage.name, None)
    status.write(job.place)
    job.remark(f"{stage.name} …")
    begun = time.monotonic()
    texts = see_files(stage.texts, job.place)  # as they are now: what changes meanwhile is not what was read
    summary = stage.do()
    status.stages[stage.name] = StageRecord(
        settings=stage.settings,
        inputs=(*see_files(stage.inputs(), job.place, known=stage.known()), *texts),
        outputs=see_files(stage.outputs(), job.place, known=stage.known()),
        seconds=round(time.monotonic() - begun, 1),
        summary=dict(json.loads(json.dumps(jsonable(dict(summary)), default=str))),
        kvconvert_version=version("kvconvert"),
    )
    status.write(job.place)


def _push(job: RunJob, status: RunStatus) -> None:
    """Publish the model; what the hub has already is not sent again."""
    section = job.file.recipe.push
    assert section is not None
    status.stage = "push"
    status.write(job.place)
    begun = time.monotonic()
    done = push(
        job.model,
        section.repo,
        create_pr=section.create_pr,
        private=section.private,
        progress=job.progress,
        remark=job.remark,
    )
    status.stages["push"] = StageRecord(
        settings=section.model_dump(mode="json"),
        inputs=(),
        outputs=(),
        seconds=round(time.monotonic() - begun, 1),
        summary={"repository": done.repository, "private": done.private, "commit": done.commit, "url": done.url},
        kvconvert_version=version("kvconvert"),
    )


def _start_over(place: Path, status: RunStatus, names: Sequence[str], first: str | None) -> None:
    """Remove what the stage that is made again has made, and all after it."""
    if first is None:
        return
    status.write(place)
    made = {"convert": (CONVERTED, WORK), "uptrain": (UPTRAINED, f"{UPTRAINED}.uptraining")}
    for name in names[names.index(first) :]:
        for folder in made.get(name, ()):
            discard(place / folder)


def _claim(place: Path) -> None:
    """Make the directory that of a run. Raises OutputError where it holds anything else."""
    is_run = (place / STATUS_NAME).exists()
    is_empty = place.is_dir() and {path.name for path in place.iterdir()} <= {_LOCK}
    if os.path.lexists(place) and not is_run and not is_empty:
        raise OutputError(f"{place} exists and is not a run's", hint="choose another place with --output")
    try:
        place.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"{place}: cannot be made ({error.strerror})", hint="choose another --output") from error


@contextmanager
def _locked(place: Path) -> Iterator[None]:
    """Let no other process work in the directory. Raises OutputError where one does."""
    from filelock import FileLock, Timeout

    lock = FileLock(place / _LOCK, timeout=0)
    try:
        lock.acquire()
    except Timeout:
        raise OutputError(
            f"{place}: another run is at work there", hint="wait for it, or choose another --output"
        ) from None
    try:
        yield
    finally:
        lock.release()


def _result(job: RunJob, status: RunStatus, files: Sequence[Path]) -> Run:
    headline: tuple[Fact, ...] = ()
    if files:  # the report is written, so that all is there to be told
        headline = story_of(job.place, job.file.recipe, status, job.resolved, job.model).headline
    model = job.model if job.model.is_dir() else job.converted
    return Run(job.place, model, dict(status.stages), _gates(status), headline, tuple(files))


def _fail(status: RunStatus, error: BaseException) -> None:
    status.exit_code = error.exit_code if isinstance(error, KvConvertError) else 1
    if isinstance(error, KeyboardInterrupt):
        status.exit_code = 130
    elif isinstance(error, SystemExit) and isinstance(error.code, int):
        status.exit_code = error.code
    names: list[tuple[type[BaseException], str]] = [(PreemptedError, "preempted"), (QualityGateError, "gates failed")]
    status.state = next((name for kind, name in names if isinstance(error, kind)), "failed")
    status.reason = str(error) or type(error).__name__


def _gates(status: RunStatus) -> tuple[Gate, ...]:
    record = status.stages.get("evaluate")
    return () if record is None else tuple(Gate(**gate) for gate in record.summary["gates"])
