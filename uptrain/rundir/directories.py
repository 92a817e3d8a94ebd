"""Directories that a run holds for itself, and how they are given up."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from ...convert.checkpoint.output import existing_parent
from ...convert.errors import OutputError

__all__ = ["discard", "sole_run_in"]


@contextmanager
def sole_run_in(directory: Path) -> Iterator[None]:
    """Hold a directory for this process, whether it exists or not. Raises OutputError if another process does.

    The lock lies beside the directory, so that it stays held while the directory is replaced. The operating system lets
    go of it when the process ends, however that ends.
    """
    place = Path(os.path.abspath(directory))
    first_existing = existing_parent(place)
    place.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(place.with_name(f".{place.name}.lock"))
    try:
        lock.acquire(timeout=0)
    except Timeout as error:
        raise OutputError(
            f"{directory}: another process is at this run",
            hint="wait until it ends; several processes of one run need torchrun or accelerate launch",
        ) from error
    try:
        yield
    finally:
        with suppress(OSError):
            Path(lock.lock_file).unlink(missing_ok=True)  # while it is held: nobody else has locked this file yet
        lock.release()
        _remove_empty(place.parent, keep=first_existing)


def discard(directory: Path) -> None:
    """Remove a directory: its name is free at once, so that what cannot be deleted is never taken for a run."""
    if not directory.exists():
        return
    removed = directory.with_name(f".{directory.name}.removed-{os.getpid()}")
    shutil.rmtree(removed, ignore_errors=True)
    directory.rename(removed)
    shutil.rmtree(removed, ignore_errors=True)


def _remove_empty(directory: Path, *, keep: Path) -> None:
    """Remove directories that were made for the lock, if nothing else came into them."""
    with suppress(OSError):
        while keep in directory.parents:
            directory.rmdir()
            directory = directory.parent
