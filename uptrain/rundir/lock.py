"""One run at a time in a work directory."""

from __future__ import annotations

import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ...convert.errors import OutputError

__all__ = ["sole_run_in"]


_LOCK_NAME = "lock"


@contextmanager
def sole_run_in(work: Path) -> Iterator[None]:
    """Hold a work directory for this process. Raises OutputError if another one does.

    The operating system lets go of it when the process ends, however that ends.
    """
    with (work / _LOCK_NAME).open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise OutputError(
                f"{work}: another process is at this run",
                hint="wait until it ends; several processes of one run need torchrun or accelerate launch",
            ) from error
        except OSError:  # a file system without locks
            pass
        yield
