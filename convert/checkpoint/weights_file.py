"""A file of weights while it is written: bytes are moved by the operating system, and hashed on the way."""

from __future__ import annotations

import errno
import fcntl
import os
import struct
from hashlib import sha256
from pathlib import Path
from typing import Protocol

from ..errors import CheckpointError
from .files import create_file
from .manifest import FileDigest

__all__ = ["BLOCK_BYTES", "Sink", "WeightsFile"]

_FICLONERANGE = 0x4020940D  # linux/fs.h: have a range of one file share the blocks of another
BLOCK_BYTES = 4096  # of file systems that share blocks
_MOVED_TOGETHER = 2**20
_READ_BYTES = 16 * 2**20
_CANNOT = frozenset(
    {errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP, errno.ENOTTY, errno.EPERM, errno.EBADF}
)


class Sink(Protocol):
    """What takes the bytes of a tensor: those in memory, and those of an open file."""

    def write(self, data: bytes) -> object: ...

    def copy(self, descriptor: int, begin: int, data: memoryview) -> object: ...


class WeightsFile:
    """A new file that bytes are appended to, and the SHA-256 of what was appended.

    `shared_bytes` counts those whose blocks on the disk it shares with the source (reflinks, as on XFS and btrfs).
    Raises FileExistsError for a name that is taken.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.shared_bytes = 0
        self._file = create_file(path)
        self._digest = sha256()
        self._size = 0  # of what is written, or waits to be
        self._waiting: tuple[int, int, int] | None = None  # descriptor of a source, begin and end in it
        self._can_share = True
        self._can_copy = hasattr(os, "copy_file_range")

    def __enter__(self) -> WeightsFile:
        return self

    def __exit__(self, kind: type[BaseException] | None, *exception: object) -> None:
        try:
            if kind is None:
                self._move_waiting()
        finally:
            self._file.close()

    @property
    def digest(self) -> FileDigest:
        """Name, size and SHA-256 of what was appended so far."""
        return FileDigest(self.path.name, self.tell(), self._digest.hexdigest())

    def tell(self) -> int:
        """The number of bytes so far."""
        return self._size

    def write(self, data: bytes) -> None:
        """Append bytes."""
        self._move_waiting()
        self._write_at(self._size, data)
        self._size += len(data)
        self._digest.update(data)

    def copy(self, descriptor: int, begin: int, data: memoryview) -> None:
        """Append bytes of an open file, from position `begin` on. `data` holds them too, as a map of that file does.

        What lies together in that file is moved together.
        """
        end = begin + len(data)
        if self._waiting is not None and (self._waiting[0], self._waiting[2]) == (descriptor, begin):
            self._waiting = (descriptor, self._waiting[1], end)
        else:
            self._move_waiting()
            self._waiting = (descriptor, begin, end)
        self._size += len(data)
        if end - self._waiting[1] >= _MOVED_TOGETHER:
            self._move_waiting()
        self._digest.update(data)

    def _move_waiting(self) -> None:
        if self._waiting is None:
            return
        descriptor, begin, end = self._waiting
        self._waiting = None
        shift = self._size - end
        # blocks can be shared where a block of one file is a block of the other
        first, last = -(-begin // BLOCK_BYTES) * BLOCK_BYTES, end // BLOCK_BYTES * BLOCK_BYTES
        if shift % BLOCK_BYTES == 0 and first < last and self._share(descriptor, first, last, shift):
            self._move(descriptor, begin, first, shift)
            begin = last
        self._move(descriptor, begin, end, shift)

    def _share(self, descriptor: int, begin: int, end: int, shift: int) -> bool:
        """Share the blocks of a range, if the file system can."""
        if not self._can_share:
            return False
        request = struct.pack("=qQQQ", descriptor, begin, end - begin, begin + shift)
        try:
            fcntl.ioctl(self._file.fileno(), _FICLONERANGE, request)
        except OSError as error:
            if error.errno not in _CANNOT:
                raise
            self._can_share = False
            return False
        self.shared_bytes += end - begin
        return True

    def _move(self, descriptor: int, begin: int, end: int, shift: int) -> None:
        """Copy a range, without it passing through this process where the operating system can."""
        while begin < end and self._can_copy:
            try:
                moved = os.copy_file_range(descriptor, self._file.fileno(), end - begin, begin, begin + shift)
            except OSError as error:
                if error.errno not in _CANNOT:
                    raise
                self._can_copy = False
                break
            if not moved:
                raise CheckpointError("a file of the source became shorter while it was read")
            begin += moved
        while begin < end:
            data = os.pread(descriptor, min(end - begin, _READ_BYTES), begin)
            if not data:
                raise CheckpointError("a file of the source became shorter while it was read")
            self._write_at(begin + shift, data)
            begin += len(data)

    def _write_at(self, position: int, data: bytes) -> None:
        rest = memoryview(data)
        while rest:
            written = os.pwrite(self._file.fileno(), rest, position)
            rest, position = rest[written:], position + written
