"""What a run of a recipe has done so far: which stages are done, what of, and what became of them."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ..convert.checkpoint.files import write_text
from ..convert.checkpoint.json_files import read_object
from ..convert.checkpoint.manifest import digest_file, files_below
from ..convert.errors import CheckpointError, InputError
from ..convert.printable import jsonable
from ..convert.text.sources import TextSource

__all__ = ["STATUS_NAME", "RunStatus", "SeenFile", "StageRecord", "differences", "see_files"]

STATUS_NAME = "run_status.json"
_WHOLE_BYTES = 2**30  # a text of terabytes is not read to know whether it has changed


@dataclass(frozen=True)
class SeenFile:
    """A file as it was when a stage was done: relative to the directory of the run, with its SHA-256.

    A file of the same size and time of change is taken for the same. Any other is read; where it has no digest, as a
    text of more than 1 GiB, it is another one.
    """

    path: str
    size: int
    modified_ns: int
    digest: str | None


@dataclass(frozen=True)
class StageRecord:
    """A stage that is done: its settings, what it read, what it wrote, and what it says of itself for the report."""

    settings: Mapping[str, Any]
    inputs: tuple[SeenFile, ...]
    outputs: tuple[SeenFile, ...]
    seconds: float
    summary: Mapping[str, Any]
    kvconvert_version: str

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> StageRecord:
        """The record that `asdict` made into an object."""
        seen = {name: tuple(SeenFile(**each) for each in content[name]) for name in ("inputs", "outputs")}
        return cls(**{**content, **seen})


@dataclass
class RunStatus:
    """What became of a run, as `run_status.json` has it.

    `state` is running, finished, stopped (before its last stage, as was asked), preempted, failed or "gates failed";
    `exit_code` is None while it runs. A run that was killed without a word is still "running": its process is gone.
    """

    recipe: str
    command: str
    state: str = "running"
    stage: str | None = None
    exit_code: int | None = None
    reason: str | None = None
    process_id: int = field(default_factory=os.getpid)
    stages: dict[str, StageRecord] = field(default_factory=dict)

    def write(self, place: Path) -> None:
        """Replace the file in the directory of the run, in one step."""
        write_text(place / STATUS_NAME, json.dumps(jsonable(asdict(self)), indent=1, allow_nan=False) + "\n")

    @classmethod
    def read(cls, place: Path) -> RunStatus | None:
        """The status in a directory, None where there is none. Raises InputError for a file that is none."""
        file = place / STATUS_NAME
        if not file.exists():
            return None
        try:
            content = read_object(file)
            stages = {name: StageRecord.from_json(each) for name, each in content["stages"].items()}
            return cls(**{**content, "stages": stages})
        except (CheckpointError, KeyError, TypeError, AttributeError) as error:
            raise InputError(
                f"{file}: is not what a run has written ({error})", hint="choose another output, or remove that one"
            ) from error


def see_files(paths: Iterable[Path], place: Path, *, known: Mapping[str, str] | None = None) -> tuple[SeenFile, ...]:
    """The files at some places, all those below where it is a directory; digests in `known`, by path, are not computed.

    What is not on this machine is left out: a name on the hub is part of the settings.
    """
    return tuple(_see(path, place, (known or {}).get(str(path))) for each in paths for path in _files_of(each))


def differences(record: StageRecord, settings: Mapping[str, Any], inputs: Sequence[Path], place: Path) -> list[str]:
    """Say in a few words each what is not as when a stage was done: of its settings, what it read, what it wrote."""
    found = [f"{key} was {_short(was)}, is {_short(new)}" for key, was, new in _changes(record.settings, settings)]
    before = {file.path for file in record.inputs}
    there = [os.path.relpath(path, place) for each in inputs for path in _files_of(each)]
    found += [f"{path} is new" for path in there if path not in before]
    for file in (*record.inputs, *record.outputs):
        path = place / file.path
        if not path.is_file():
            found.append(f"{file.path} is gone")
        elif not _is_same(path, file):
            found.append(f"{file.path} has other bytes")
    return found


def _see(path: Path, place: Path, digest: str | None) -> SeenFile:
    facts = path.stat()
    if digest is None and facts.st_size <= _WHOLE_BYTES:
        digest = digest_file(path.parent, path.name).digest
    return SeenFile(os.path.relpath(path, place), facts.st_size, facts.st_mtime_ns, digest)


def _is_same(path: Path, seen: SeenFile) -> bool:
    facts = path.stat()
    if facts.st_size != seen.size:
        return False
    if facts.st_mtime_ns == seen.modified_ns:
        return True
    return seen.digest is not None and digest_file(path.parent, path.name).digest == seen.digest


def _files_of(place: Path) -> Iterator[Path]:
    path = TextSource(str(place)).path
    if path.is_dir():
        yield from (path / name for name in files_below(path))
    elif path.is_file():
        yield path


def _changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[tuple[str, Any, Any]]:
    for key in sorted({*before, *now}):
        was, new = before.get(key), now.get(key)
        if isinstance(was, dict) and isinstance(new, dict):
            yield from ((f"{key}.{below}", one, other) for below, one, other in _changes(was, new))
        elif was != new:
            yield key, was, new


def _short(value: Any) -> str:
    text = "not given" if value is None else json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}…"
