"""kvconvert.json: what made a directory, and the size and SHA-256 of every file in it.

Files are listed as OpenSSF's model signing lists them in its statements (`name`, `algorithm`, `digest`), with the size
added. The record holds nothing that differs between two machines that do the same.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

from ..errors import CheckpointError
from .files import write_text
from .json_files import read_object

__all__ = [
    "PROVENANCE_NAME",
    "UNFINISHED_NAME",
    "FileDigest",
    "digest_file",
    "files_below",
    "listed_files",
    "read_provenance",
    "renew_entries",
    "unlike_manifest",
    "write_manifest",
]

PROVENANCE_NAME = "kvconvert.json"  # every directory that kvconvert wrote holds it
UNFINISHED_NAME = ".kvconvert-unfinished"  # and this one while it is written

_ALGORITHM = "sha256"
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


def write_manifest(directory: Path, record: Mapping[str, Any], known: Sequence[FileDigest] = ()) -> None:
    """Write kvconvert.json, last of all files of a directory: a record of what made it, and the digest of every file.

    `known` are the digests of files that need not be read again.
    """
    found = {file.name: file for file in known}
    names = (name for name in files_below(directory) if name not in (PROVENANCE_NAME, UNFINISHED_NAME))
    listed = [(found.get(name) or digest_file(directory, name)).to_json() for name in names]
    write_text(directory / PROVENANCE_NAME, json.dumps({**record, "files": listed}, indent=2) + "\n")


def renew_entries(directory: Path, names: Sequence[str]) -> None:
    """Write the digests of files that were replaced on purpose into a manifest that lists its files."""
    record = read_provenance(directory)
    listed = listed_files(record)
    if listed is not None:
        renewed = [digest_file(directory, file.name) if file.name in names else file for file in listed]
        write_text(
            directory / PROVENANCE_NAME,
            json.dumps({**record, "files": [file.to_json() for file in renewed]}, indent=2) + "\n",
        )


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
        found.append(FileDigest(name, size, digest))
    return found


def unlike_manifest(directory: Path, *, digests: bool) -> list[str]:
    """Say in a line for each file how a directory differs from its manifest; nothing where they agree.

    Without `digests` only names and sizes are compared, which takes no time. Links are never what was written.
    """
    try:
        listed = listed_files(read_provenance(directory))
    except CheckpointError as error:
        return [str(error)]
    if listed is None:
        what = "does not list its files" if (directory / PROVENANCE_NAME).exists() else "is missing"
        return [f"{PROVENANCE_NAME} {what}"]
    there = set(files_below(directory)) - {PROVENANCE_NAME}
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
