"""What a work directory and an output say of the run that they belong to."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ...convert.checkpoint.output import read_provenance
from ...convert.errors import InputError, OutputError
from ..job import UptrainJob

__all__ = [
    "METRICS_NAME",
    "REPLACES_NAME",
    "SETTINGS_NAME",
    "begun_before",
    "check_same_run",
    "finished_before",
    "held_out_scores",
    "replaces_output",
]

METRICS_NAME = "metrics.jsonl"
SETTINGS_NAME = "settings.json"
REPLACES_NAME = "force"
_BEFORE = {"keep_best": False}  # what runs did that began before there was the setting


def finished_before(job: UptrainJob) -> bool:
    """Tell whether the output holds the result of this very run."""
    record = read_provenance(job.output).get("uptraining")
    return record is not None and not _changes(record, job)


def begun_before(job: UptrainJob) -> bool:
    """Tell whether the work directory holds this very run, not finished."""
    path = job.work / SETTINGS_NAME
    return path.exists() and not _changes(json.loads(path.read_text()), job)


def replaces_output(job: UptrainJob) -> bool:
    """Tell whether the run that is under way began with force, so that it may replace an output."""
    path = job.work / SETTINGS_NAME
    return path.exists() and bool(json.loads(path.read_text()).get(REPLACES_NAME))


def check_same_run(job: UptrainJob) -> None:
    """Raise OutputError for a work directory that is not a run's, InputError for one of a run with other settings."""
    path = job.work / SETTINGS_NAME
    if not path.exists():
        raise OutputError(f"{job.work} is in the way and not a run's", hint="remove it, or choose another --output")
    changed = _changes(json.loads(path.read_text()), job)
    if changed:
        raise InputError(
            f"{job.work} holds an unfinished run with other settings: {'; '.join(changed)}",
            hint="go on with the same settings, start over with --force, or choose another --output",
        )


def held_out_scores(folder: Path) -> dict[int, float]:
    """Read from the metrics in a folder the held-out nats per token after so many steps, in their order."""
    path = folder / METRICS_NAME
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    records = [json.loads(line) for line in lines if line.endswith("\n")]  # a killed run may have torn the last one
    return {row["step"]: row["eval_nats_per_token"] for row in records if "eval_nats_per_token" in row}


def _changes(record: dict[str, Any], job: UptrainJob) -> list[str]:
    """What a record has otherwise than the job."""
    return [
        f"{key} was {record.get(key)!r}, now {value!r}"
        for key, value in job.description.items()
        if record.get(key, _BEFORE.get(key)) != value
    ]
