"""Where soak.py runs what it ends: processes that are forked, in namespaces of their own, and disks that are small."""

from __future__ import annotations

import ctypes
import os
import sys
import traceback
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

__all__ = ["MOUNTS", "NOT_ALLOWED", "PROCESS_IDS", "forked", "in_namespace", "mount_disk", "unmount"]

MOUNTS, PROCESS_IDS, _USERS = 0x00020000, 0x20000000, 0x10000000  # of unshare(2)
_REMOUNT, _RECURSIVE, _PRIVATE = 32, 0x4000, 1 << 18  # of mount(2)
NOT_ALLOWED = 77
_FAILED = 3


def forked(act: Callable[[], int]) -> int:
    """Start a process that does something and ends with the code that it returns; returns its id."""
    sys.stdout.flush()
    child = os.fork()
    if child:
        return child
    code = _FAILED
    try:
        code = act()
    except BaseException:
        traceback.print_exc()
    finally:
        sys.settrace(None)
        sys.stderr.flush()
        os._exit(code)


def in_namespace(kind: int, act: Callable[[], int]) -> int:
    """Start a process as `forked` does, with mounts or process ids of its own; it ends with NOT_ALLOWED without them.

    Of process ids it gets the first, 1, as every other that is started in this way.
    """

    def enter() -> int:
        library = ctypes.CDLL(None, use_errno=True)
        user, group = os.getuid(), os.getgid()
        if not hasattr(library, "unshare"):
            return NOT_ALLOWED
        if library.unshare(kind):
            if library.unshare(kind | _USERS):
                return NOT_ALLOWED
            Path("/proc/self/setgroups").write_text("deny")
            Path("/proc/self/uid_map").write_text(f"0 {user} 1")
            Path("/proc/self/gid_map").write_text(f"0 {group} 1")
        if kind == MOUNTS and library.mount(None, b"/", None, _RECURSIVE | _PRIVATE, None):
            return NOT_ALLOWED
        status = os.waitpid(forked(act), 0)[1]
        return os.waitstatus_to_exitcode(status) % 256

    return forked(enter)


def mount_disk(place: Path, num_bytes: int, *, again: bool = False) -> bool:
    """Mount a file system in memory that holds so many bytes, or give one that is there another size."""
    flags = _REMOUNT if again else 0
    options = f"size={num_bytes}".encode()
    return bool(ctypes.CDLL(None).mount(b"soak", os.fsencode(place), b"tmpfs", flags, options) == 0)


def unmount(place: Path) -> None:
    """Take away what is mounted there."""
    with suppress(OSError):
        ctypes.CDLL(None).umount2(os.fsencode(place), 2)
