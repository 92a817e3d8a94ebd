"""Files that others wrote: only regular ones are opened, and links that lead out of a checkpoint are told."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path
from typing import BinaryIO

__all__ = ["NotRegularError", "is_file", "leads_outside", "open_regular", "require_regular"]

_KINDS = {
    stat.S_IFIFO: "a named pipe",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFSOCK: "a socket",
    stat.S_IFDIR: "a directory",
}
# without waiting for whoever writes into a named pipe, and without a terminal taking over
_FLAGS = os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY
_CACHED_BLOBS = "blobs"
_CACHED_REPOSITORY = ("models--", "datasets--")


class NotRegularError(OSError):
    """What has the name of an input is no regular file; reading it could wait or go on for ever."""


def open_regular(path: Path) -> BinaryIO:
    """Open a regular file, or a link to one, to read its bytes. Raises OSError, NotRegularError for anything else."""
    try:
        descriptor = os.open(path, _FLAGS)
    except ValueError as error:  # of a name that no file can have
        raise OSError(errno.EINVAL, str(error), str(path)) from error
    except OSError as error:
        if error.errno != errno.ENXIO:  # of a socket
            raise
        require_regular(path)
        raise
    try:
        _judge(os.fstat(descriptor).st_mode, path)
        return os.fdopen(descriptor, "rb")
    except BaseException:
        os.close(descriptor)
        raise


def require_regular(path: Path) -> None:
    """Raise as `open_regular` does, for a file that a library opens by its name."""
    try:
        mode = os.stat(path).st_mode  # noqa: PTH116, as Path.stat raises ValueError for some names
    except ValueError as error:
        raise OSError(errno.EINVAL, str(error), str(path)) from error
    _judge(mode, path)


def _judge(mode: int, path: Path) -> None:
    if not stat.S_ISREG(mode):
        kind = _KINDS.get(stat.S_IFMT(mode), "something else")
        raise NotRegularError(errno.EINVAL, f"{kind}, not a regular file", str(path))


def is_file(path: Path) -> bool:
    """Return whether there is a regular file, or a link to one, of this name; False for a name that none can have."""
    try:
        require_regular(path)
    except OSError:
        return False
    return True


def leads_outside(path: Path, directory: Path) -> Path | None:
    """Return the place that a path in `directory` leads to through links, where that is outside; None where it is not.

    Inside is the directory, wherever it really is, and the files of a repository in the hub's cache, which a snapshot
    and a download into a directory link to.
    """
    real, home = Path(os.path.realpath(path)), Path(os.path.realpath(directory))
    in_cache = real.parent.name == _CACHED_BLOBS and real.parent.parent.name.startswith(_CACHED_REPOSITORY)
    return None if in_cache or real.is_relative_to(home) else real
