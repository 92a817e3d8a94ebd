"""What a work directory and an output say of the run that they belong to."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ...convert.checkpoint.output import read_provenance
from ..job import UptrainJob, describe

__all__ = ["REPLACES_NAME", "SETTINGS_NAME", "begun_before", "changes", "finished_before", "replaces_output"]


SETTINGS_NAME = "settings.json"
REPLACES_NAME = "force"


def finished_before(job: UptrainJob) -> bool:
    """Whether the output holds the result of this very run."""
    record = read_provenance(job.output).get("uptraining")
    return record is not None and all(record.get(key) == value for key, value in describe(job).items())


def begun_before(job: UptrainJob) -> bool:
    """Whether the work directory holds this very run, not finished."""
    return (job.work / SETTINGS_NAME).exists() and not changes(job.work, describe(job))


def changes(work: Path, description: dict[str, Any]) -> list[str]:
    """What a run's work directory has otherwise."""
    saved = json.loads((work / SETTINGS_NAME).read_text())
    return [
        f"{key} was {saved.get(key)!r}, now {value!r}" for key, value in description.items() if saved.get(key) != value
    ]


def replaces_output(job: UptrainJob) -> bool:
    """Whether the run that is under way began with force, so that it may replace an output."""
    path = job.work / SETTINGS_NAME
    return path.exists() and bool(json.loads(path.read_text()).get(REPLACES_NAME))
