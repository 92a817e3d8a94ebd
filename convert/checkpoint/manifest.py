"""kvconvert.json: what made a directory, and the size and SHA-256 of every file in it.

Files are listed as OpenSSF's model signing lists them in its statements (`name`, `algorithm`, `digest`), with the size
added. The record holds nothing that differs between two machines that do the same. Some files of training do, as they
say when, where and how fast it went: their digests are in a file of their own, run_files.json.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path, PurePosixPath
from typing import Any

from ..errors import CheckpointError
from .files import write_text
from .json_files import read_object

__all__ = [
    "PROVENANCE_NAME",
    "RUN_FILES_NAME",
    "UNFINISHED_NAME",
    "FileDigest",
    "digest_file",
    "files_below",
    "files_of_the_run",
    "listed_files",
    "read_provenance",
    "renew_entries",
    "unlike_manifest",
    "write_manifest",
]

PROVENANCE_NAME = "kvconvert.json"  # every directory that kvconvert wrote holds it
UNFINISHED_NAME = ".kvconvert-unfinished"  # and this one while it is written
RUN_FILES_NAME = "run_files.json"  # lists what says when, where and how fast training went

_ALGORITHM = "sha256"
_RUN_FILES_KEY = "run_files"
_CHUNK_BYTES = 2**20


@dataclass(frozen=True)
class FileDigest:
    """A file below a directory: its name from there, with slashes, its size, and its SHA-256 in hexadecimal digits."""

    name: str
    size: int
    digest: str

    def to_json(self) -> dict[str, Any]:
        """The entry of the file in a manifest."""
        return {"name": self.name, "algorithm": _ALGORITHM, "digest": self.digest, "size": self.size}


def read_provenance(directory: Path) -> dict[str, Any]:
    """Return the content of kvconvert.json, which says how a checkpoint was made; {} for one without the file.

    Raises CheckpointError for a file that holds no JSON object.
    """
    path = directory / PROVENANCE_NAME
    return read_object(path) if path.exists() else {}


def write_manifest(
    directory: Path,
    record: Mapping[str, Any],
    known: Sequence[FileDigest] = (),
    *,
    of_the_run: Sequence[str] = (),
) -> None:
    """Write kvconvert.json, last of all files of a directory: a record of what made it, and the digest of every file.

    `known` are the digests of files that need not be read again. `of_the_run` are names of files, and of directories,
    that say when and where: run_files.json lists those of them that are there, and kvconvert.json says that it does.
    """
    found = {file.name: file for file in known}
    names = [name for name in files_below(directory) if name not in (PROVENANCE_NAME, UNFINISHED_NAME)]
    of_run = [name for name in names if name.partition("/")[0] in of_the_run]
    listed = [(found.get(name) or digest_file(directory, name)).to_json() for name in names if name not in of_run]
    content = {**{key: value for key, value in record.items() if key != _RUN_FILES_KEY}, "files": listed}
    if of_run:
        listed_of_run = [digest_file(directory, name).to_json() for name in of_run]
        _write_record(directory / RUN_FILES_NAME, {"files": listed_of_run})
        content[_RUN_FILES_KEY] = RUN_FILES_NAME
    _write_record(directory / PROVENANCE_NAME, content)


def _write_record(path: Path, content: Mapping[str, Any]) -> None:
    write_text(path, json.dumps(content, indent=2) + "\n")


def renew_entries(directory: Path, names: Sequence[str]) -> None:
    """Write the digests of files that were replaced or added on purpose into a manifest that lists its files."""
    record = read_provenance(directory)
    listed = listed_files(record)
    if listed is not None:
        added = [name for name in names if name not in {file.name for file in listed}]
        renewed = [digest_file(directory, file.name) if file.name in names else file for file in listed]
        renewed += [digest_file(directory, name) for name in added]
        _write_record(directory / PROVENANCE_NAME, {**record, "files": [file.to_json() for file in renewed]})


def listed_files(record: Mapping[str, Any]) -> list[FileDigest] | None:
    """The files that a manifest lists; None where it lists none in the form of `write_manifest`."""
    entries = record.get("files")
    if not isinstance(entries, list):
        return None
    found = []
    for entry in entries:
        if not isinstance(entry, dict) or entry.get("algorithm") != _ALGORITHM:
            return None
        name, size, digest = entry.get("name"), entry.get("size"), entry.get("digest")
        if not isinstance(name, str) or not isinstance(digest, str) or not isinstance(size, int):
            return None
        if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:  # of somebody who wants another file
            return None
        found.append(FileDigest(name, size, digest))
    return found


def files_of_the_run(directory: Path, record: Mapping[str, Any]) -> list[FileDigest] | None:
    """The files of training that run_files.json lists, none where a manifest, `record`, does not say that it does.

    None where it should, and does not. Raises CheckpointError for what is no JSON object.
    """
    if _RUN_FILES_KEY not in record:
        return []
    path = directory / RUN_FILES_NAME
    return listed_files(read_object(path)) if path.exists() else None


def unlike_manifest(directory: Path, *, digests: bool) -> list[str]:
    """Say in a line for each file how a directory differs from its manifest; nothing where they agree.

    Without `digests` only names and sizes are compared, which takes no time. Links are never what was written.
    """
    try:
        record = read_provenance(directory)
        listed, of_run = listed_files(record), files_of_the_run(directory, record)
    except CheckpointError as error:
        return [str(error)]
    for name, files in ((PROVENANCE_NAME, listed), (RUN_FILES_NAME, of_run)):
        if files is None:
            return [f"{name} {'does not list its files' if (directory / name).exists() else 'is missing'}"]
    listed = [*(listed or ()), *(of_run or ())]
    there = set(files_below(directory)) - {PROVENANCE_NAME, *([RUN_FILES_NAME] if _RUN_FILES_KEY in record else [])}
    return [
        *(line for file in listed if (line := _unlike(directory, file, digests=digests)) is not None),
        *(f"{name} is not in the manifest" for name in sorted(there - {file.name for file in listed})),
    ]


def _unlike(directory: Path, file: FileDigest, *, digests: bool) -> str | None:
    path = directory / file.name
    if path.is_symlink() or not path.is_file():
        return f"{file.name} is a symbolic link" if path.is_symlink() else f"{file.name} is missing"
    size = path.stat().st_size
    if size != file.size:
        return f"{file.name} has {size} bytes, and had {file.size}"
    if digests and digest_file(directory, file.name).digest != file.digest:
        return f"{file.name} has other bytes than were written"
    return None


def digest_file(directory: Path, name: str, *, see: Callable[[], object] = lambda: None) -> FileDigest:
    """Read a file below a directory, and return its digest; `see` is called for each part that was read."""
    digest, size = sha256(), 0
    buffer = bytearray(_CHUNK_BYTES)
    with (directory / name).open("rb", buffering=0) as file, memoryview(buffer) as view:
        while count := file.readinto(buffer):
            digest.update(view[:count])
            size += count
            see()
    return FileDigest(name, size, digest.hexdigest())


def files_below(directory: Path) -> Iterator[str]:
    """Yield the names of all that is below a directory and no directory, with slashes; links are not followed."""
    with os.scandir(directory) as entries:
        for entry in sorted(entries, key=lambda entry: entry.name):
            if entry.is_dir(follow_symlinks=False):
                yield from (f"{entry.name}/{name}" for name in files_below(Path(entry.path)))
            else:
                yield entry.name
