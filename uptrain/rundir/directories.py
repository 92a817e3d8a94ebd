"""Directories that a run holds for itself."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from ...convert.checkpoint.output import existing_parent, place_of
from ...convert.errors import OutputError

__all__ = ["sole_run_in"]


@contextmanager
def sole_run_in(directory: Path) -> Iterator[None]:
    """Hold a directory for this process, whether it exists or not. Raises OutputError if another process does.

    The lock lies beside the directory, so that it stays held while the directory is replaced. The operating system lets
    go of it when the process ends, however that ends.
    """
    place = place_of(directory)
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


def _remove_empty(directory: Path, *, keep: Path) -> None:
    """Remove directories that were made for the lock, if nothing else came into them."""
    with suppress(OSError):
        while keep in directory.parents:
            directory.rmdir()
            directory = directory.parent
