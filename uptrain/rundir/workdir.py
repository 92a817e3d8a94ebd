"""What lies where in a run's work directory, how far the run is, and when the directory goes."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

from ...convert.checkpoint.staging import discard
from ...convert.checkpoint.tensors import CONFIG_NAME
from ..job import UptrainJob
from ..recipe import Stage
from .checkpoints import last_complete, step_of
from .trials import remove_sweep, sweep_that_chose

__all__ = [
    "best_folder",
    "checkpoints_folder",
    "data_folder",
    "last_saved",
    "remove_work",
    "stage_folder",
    "teacher_folder",
    "translated_teacher",
]


def data_folder(job: UptrainJob) -> Path:
    """Name the folder of the packed text."""
    return job.work / "data"


def checkpoints_folder(job: UptrainJob, stage: Stage) -> Path:
    """Name the folder of the checkpoints of a stage."""
    return job.work / "checkpoints" / stage.name


def stage_folder(job: UptrainJob, stage: Stage) -> Path:
    """Name the folder of the weights that a stage ended with, which is there once the stage is finished."""
    return job.work / "stages" / stage.name


def best_folder(job: UptrainJob) -> Path:
    """Name the folder of the weights with the best held-out score."""
    return job.work / "best"


def teacher_folder(job: UptrainJob) -> Path:
    """Name the folder that the teacher is read from."""
    assert job.teacher is not None
    translated = translated_teacher(job)
    return translated if translated.exists() else Path(job.teacher)


def translated_teacher(job: UptrainJob) -> Path:
    """Name the folder of a teacher that was copied into another class."""
    return job.work / "teacher"


def last_saved(job: UptrainJob) -> tuple[int, Path | None]:
    """Find the step up to which weights are saved, and where they are."""
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
    discard(job.work)
