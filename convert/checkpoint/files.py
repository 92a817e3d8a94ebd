"""Single files that kvconvert writes: new, complete or absent, and never written through a symbolic link."""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

__all__ = [
    "append_file",
    "copy_file",
    "create_file",
    "replaced_file",
    "sync_directory",
    "sync_tree",
    "write_text",
]

_NO_LINK = getattr(os, "O_NOFOLLOW", 0)
_NEW = os.O_WRONLY | os.O_CREAT | os.O_EXCL | _NO_LINK | getattr(os, "O_CLOEXEC", 0)


def create_file(path: Path) -> IO[bytes]:
    """Open a new file for writing. Raises FileExistsError for a name that is taken, by a link too."""
    return os.fdopen(os.open(path, _NEW, 0o666), "wb")


def append_file(path: Path) -> IO[bytes]:
    """Open a file to append to, which is made if there is none. Raises OSError where its name is a link."""
    return os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | _NO_LINK, 0o666), "ab")


@contextmanager
def replaced_file(path: Path) -> Iterator[IO[bytes]]:
    """Yield a new hidden file beside `path`, which is synced and takes its name at the end, unless the block raises.

    What had the name is replaced. If that was a link, the file that it leads to stays as it is.
    """
    partial = path.with_name(f".{path.name}.partial-{secrets.token_hex(4)}")
    try:
        with create_file(partial) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
        sync_directory(path.parent)
    finally:
        partial.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write a text file in UTF-8 that is complete or absent, as `replaced_file` says."""
    with replaced_file(path) as file:
        file.write(text.encode("utf-8"))


def copy_file(source: Path, target: Path) -> None:
    """Copy the bytes of a file to a new one. Raises FileExistsError for a name that is taken, by a link too."""
    with source.open("rb") as original, create_file(target) as copy:
        shutil.copyfileobj(original, copy, 2**20)


def sync_tree(directory: Path) -> None:
    """Have the disk take every file and folder below a directory, and the directory, before this returns."""
    for folder, _, names in os.walk(directory):
        for name in names:
            _sync(Path(folder, name), _NO_LINK)
        sync_directory(Path(folder))


def sync_directory(directory: Path) -> None:
    """Have the disk take the names in a directory before this returns."""
    _sync(directory, getattr(os, "O_DIRECTORY", 0))


def _sync(path: Path, flags: int) -> None:
    descriptor = os.open(path, os.O_RDONLY | flags)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
