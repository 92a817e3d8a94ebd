"""What a work directory and an output say of the run that they belong to."""

from __future__ import annotations

import json
from pathlib import Path, PurePath
from typing import Any

from ...convert.checkpoint.differences import differences
from ...convert.checkpoint.manifest import read_provenance
from ...convert.errors import InputError, OutputError
from ..job import UptrainJob

__all__ = [
    "METRICS_NAME",
    "REPLACES_NAME",
    "SETTINGS_NAME",
    "begun_before",
    "changes",
    "check_not_another_run",
    "check_same_run",
    "finished_before",
    "held_out_scores",
    "replaces_output",
]

METRICS_NAME = "metrics.jsonl"
SETTINGS_NAME = "settings.json"
REPLACES_NAME = "force"
_OF_LENGTH = "its learning rate goes down over its steps"
_BEFORE = {"keep_best": False, "rate_from_start": False}  # what runs did that began before there were these settings


def finished_before(job: UptrainJob) -> bool:
    """Tell whether the output holds the result of this very run."""
    record = read_provenance(job.output).get("uptraining")
    return record is not None and not changes(record, job, finished=True)


def begun_before(job: UptrainJob) -> bool:
    """Tell whether the work directory holds this very run, not finished."""
    path = job.work / SETTINGS_NAME
    return path.exists() and not changes(json.loads(path.read_text()), job)


def replaces_output(job: UptrainJob) -> bool:
    """Tell whether the run that is under way began with force, so that it may replace an output."""
    path = job.work / SETTINGS_NAME
    return path.exists() and bool(json.loads(path.read_text()).get(REPLACES_NAME))


def check_same_run(job: UptrainJob) -> None:
    """Raise OutputError for a work directory that is not a run's, InputError for one of a run with other settings."""
    path = job.work / SETTINGS_NAME
    if not path.exists():
        raise OutputError(f"{job.work} is in the way and not a run's", hint="remove it, or choose another --output")
    changed = changes(json.loads(path.read_text()), job)
    if changed:
        why = f" ({_OF_LENGTH})" if _is_of_length(changed) else ""
        raise InputError(
            f"{job.work} holds an unfinished run with other settings: {'; '.join(changed)}{why}",
            hint="go on with the same settings, start over with --force, or choose another --output",
        )


def check_not_another_run(job: UptrainJob) -> None:
    """Raise OutputError, which says why it does not go on, for an output that is the result of another run."""
    record = read_provenance(job.output).get("uptraining")
    changed = [] if record is None else changes(record, job, finished=True)
    if changed and _is_of_length(changed):
        raise OutputError(
            f"{job.output} holds a finished run, which cannot go on ({changed[0]}): {_OF_LENGTH}, and its optimizer is "
            "gone",
            hint=f"uptrain {job.output} into another --output, or begin anew with --force",
        )
    if changed:
        raise OutputError(
            f"{job.output} holds the result of a run with other settings: {'; '.join(changed)}",
            hint="choose another --output, or replace it with --force",
        )


def _is_of_length(changed: list[str]) -> bool:
    """Whether two runs differ in their number of steps only."""
    return len(changed) == 1 and changed[0].startswith("steps was ")


def held_out_scores(folder: Path) -> dict[int, float]:
    """Read from the metrics in a folder the held-out nats per token after so many steps, in their order."""
    path = folder / METRICS_NAME
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    records = [json.loads(line) for line in lines if line.endswith("\n")]  # a killed run may have torn the last one
    return {row["step"]: row["eval_nats_per_token"] for row in records if "eval_nats_per_token" in row}


def changes(record: dict[str, Any], job: UptrainJob, *, finished: bool = False) -> list[str]:
    """Say what a record of a run has otherwise than the job; nothing where both are one run.

    Where model, teacher and text lie is no difference if they are the same. A text that was changed where it lies is a
    difference for a `finished` run; of one that goes on, packing tells whether it matters. One that is gone is none.
    """
    was, now = _BEFORE | record, job.record if finished else job.description
    for name in ("model", "teacher"):
        if was.get(f"{name}_fingerprint") == now[f"{name}_fingerprint"]:
            was[name] = now[name]
    sources = was.get("data") or []
    if len(sources) == len(now["data"]):
        was["data"] = [_at_its_place(one, other) for one, other in zip(sources, now["data"], strict=True)]
    found = list(differences("", {key: was.get(key) for key in now}, now))
    if finished and len(sources) == len(now["data"]):
        found += [
            f"the text of {other['text']['location']} has changed since"
            for one, other in zip(sources, now["data"], strict=True)
            if None not in (one.get("content"), other["content"]) and one["content"] != other["content"]
        ]
    return found


def _at_its_place(was: dict[str, Any], now: dict[str, Any]) -> dict[str, Any]:
    """A source as it was, at the place where it is now if it is the same text, or was a file of this name."""
    here, there = now["text"]["location"], was["text"]["location"]
    same = was.get("content") is not None and was["content"] == now["content"]
    gone = was.get("content") is not None and now["content"] is None
    location = here if same or (gone and PurePath(here).name == PurePath(there).name) else there
    return {**was, "text": {**was["text"], "location": location}, "content": now["content"]}
