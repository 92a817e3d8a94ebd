"""A directory that keeps what a job has finished, so that the same job goes on there after it was ended.

It begins empty, with `kvconvert-work.json`, which says what job it is. Parts are finished in an order that the job
fixes. Each has files, and after them a record that lists these with their digests, all of them whole or absent: a kill
at any moment costs the part that was being made. One process is at work in it at a time, by a lock (flock) on it.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from hashlib import sha256
from pathlib import Path
from typing import Any

from ..errors import CheckpointError, InputError, OutputError
from .differences import differences
from .files import write_text
from .json_files import read_object
from .manifest import digest_file, listed_files
from .output import disk_errors, existing_parent, place_of
from .staging import take_lock

__all__ = ["WorkDirectory", "bytes_below", "check_work_directory", "content_of", "work_directory"]

_JOB_NAME = "kvconvert-work.json"
_FILE = re.compile(r"[a-z]+(-\d{5})?\.safetensors")
# what files are called while `replaced_file` writes them
_PARTIAL = re.compile(r"\.(kvconvert-work|[a-z]+(-\d{5})?)\.(json|safetensors)\.partial-[0-9a-f]{8}")
_MAX_SHOWN = 3  # differences between two jobs
_ELSEWHERE = "choose a new or empty directory"


class WorkDirectory:
    """The parts of a job that are finished, in the directory `path`.

    Parts are asked for, and kept, in the order in which the job makes them. After one that is missing, or not as it was
    written, nothing counts: the rest of the job is done again. `remark` is called with what a person should know.
    """

    def __init__(self, path: Path, remark: Callable[[str], object]) -> None:
        self.path = path
        self.remark = remark
        self._goes_on = True
        self._names = [_JOB_NAME]  # of the files that are this job's, oldest first

    def kept(self, part: str) -> Any:
        """Return what was noted of a finished part; None for one that has to be made."""
        record = self.path / f"{part}.json"
        if not self._goes_on or not os.path.lexists(record):
            self._goes_on = False
            return None
        try:
            content, names = _read_part(record)
        except CheckpointError as error:
            self._goes_on = False
            self.remark(f"{error}: from here on all is made again")
            return None
        self._names += [*names, record.name]
        return content

    def keep(self, part: str, content: Any, files: Sequence[str] = ()) -> None:
        """Note that a part is finished: `files` of the directory belong to it, and `content` is a value of JSON."""
        record = self.path / f"{part}.json"
        with disk_errors(self.path):
            body = {"content": content, "files": [digest_file(self.path, name).to_json() for name in files]}
            write_text(record, json.dumps({**body, "digest": _digest(body)}) + "\n")
        self._names += [*files, record.name]

    def clear(self) -> None:
        """Remove the files of the job, and no others: the newest first, so that what is left can be gone on from."""
        for name in reversed(self._names):
            with suppress(OSError):
                (self.path / name).unlink(missing_ok=True)


def check_work_directory(path: Path, *, output: Path, inputs: Sequence[Path] = ()) -> None:
    """Raise OutputError unless a job can keep its work at `path`: a directory of its own, or none yet.

    It must be neither `output` nor in it, which does not exist before it is whole, nor any of `inputs` or in one.
    """
    place = place_of(path)
    for other, what in ((output, "made"), *((each, "read") for each in inputs)):
        within = place_of(other) if what == "made" else Path(os.path.realpath(other))
        if within in (place, *place.parents):
            raise OutputError(f"{path} is or lies in {other}, which is {what}", hint=_ELSEWHERE, settings=("work_dir",))
    if place.is_symlink():
        raise OutputError(f"{path} is a symbolic link", hint=_ELSEWHERE, settings=("work_dir",))
    if place.exists() and not place.is_dir():
        raise OutputError(f"{path} is a file, not a directory", hint=_ELSEWHERE, settings=("work_dir",))
    parent = place if place.exists() else existing_parent(place)
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise OutputError(f"{path} cannot be written: {parent} is not a writable directory", settings=("work_dir",))
    _check_content(place, path)


def bytes_below(path: Path) -> int:
    """Return how much the files of a directory hold, 0 where there is none."""
    return sum(file.stat().st_size for file in path.glob("*.safetensors") if file.is_file())


def content_of(path: Path, part: str) -> Any:
    """Return what was noted of a part in a directory that need not be open; None where that is not there."""
    try:
        return _read_part(path / f"{part}.json")[0]
    except CheckpointError:
        return None


@contextmanager
def work_directory(
    path: Path, job: Mapping[str, Any], remark: Callable[[str], object] = lambda text: None
) -> Iterator[WorkDirectory]:
    """Yield the directory of a job, which is made if there is none, and locked until the block ends.

    `job`, a value of JSON, is all that its parts depend on. Raises InputError, which says what differs, for the
    directory of another job, and OutputError for one that others use, or that another process is at work in. What a
    killed run was writing is removed. `remark` is called with a line for what is damaged.
    """
    place = place_of(path)
    with disk_errors(path):
        place.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(place, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        _lock(descriptor, path)
        _check_content(place, path)
        with disk_errors(path):
            for entry in place.iterdir():
                if _PARTIAL.fullmatch(entry.name):
                    entry.unlink()
            if not os.path.lexists(place / _JOB_NAME):
                write_text(place / _JOB_NAME, json.dumps(dict(job), indent=2) + "\n")
        _check_job(place / _JOB_NAME, job, path)
        yield WorkDirectory(place, remark)
    except (KeyboardInterrupt, SystemExit) as error:
        error.add_note(f"{path} keeps what is finished")
        raise
    finally:
        os.close(descriptor)


def _check_content(place: Path, named: Path) -> None:
    """Raise OutputError for a directory that holds files, and not those of a job."""
    if os.path.lexists(place / _JOB_NAME):
        return
    found = sorted(entry.name for entry in place.iterdir()) if place.exists() else []
    strange = [name for name in found if not _PARTIAL.fullmatch(name)]
    if strange:
        raise OutputError(
            f"{named} is no work directory, and holds {strange[0]}", hint=_ELSEWHERE, settings=("work_dir",)
        )


def _lock(descriptor: int, named: Path) -> None:
    with suppress(OSError):  # a file system without locks
        if not take_lock(descriptor):
            raise OutputError(
                f"{named}: another run is at work there", hint="wait for it, or choose another", settings=("work_dir",)
            )


def _check_job(path: Path, job: Mapping[str, Any], named: Path) -> None:
    try:
        was = read_object(path)
    except CheckpointError as error:
        raise OutputError(
            str(error), hint=f"{_ELSEWHERE}; nothing there can be used", settings=("work_dir",)
        ) from error
    now = json.loads(json.dumps(dict(job)))
    found = [*differences("", was, now), *(f"{key} was {was[key]!r}, now none" for key in was if key not in now)]
    if found:
        more = f"; and {len(found) - _MAX_SHOWN} more" if len(found) > _MAX_SHOWN else ""
        raise InputError(
            f"{named} holds the work of another conversion: {'; '.join(found[:_MAX_SHOWN])}{more}",
            hint="run the command that it was begun with, or choose another directory",
            settings=("work_dir",),
        )


def _read_part(record: Path) -> tuple[Any, list[str]]:
    """The content of a part, and the names of its files. Raises CheckpointError for what is not as it was written."""
    found = read_object(record)
    body = {name: found.get(name) for name in ("content", "files")}
    files = listed_files(body)
    if record.is_symlink() or found.get("digest") != _digest(body) or files is None:
        raise CheckpointError(f"{record} is not as it was written")
    for listed in files:
        file = record.parent / listed.name
        if not _FILE.fullmatch(listed.name) or file.is_symlink() or not file.is_file():
            raise CheckpointError(f"{file} is missing")
        if digest_file(file.parent, file.name) != listed:
            raise CheckpointError(f"{file} is not as it was written")
    return found["content"], [listed.name for listed in files]


def _digest(body: Mapping[str, Any]) -> str:
    return sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
