"""Directories that appear whole or not at all: made beside their place, swapped in, and cleared up after a kill.

A directory that is being made lies beside its place under a hidden name, `.NAME.partial-HOST-BOOT-RANDOM`. HOST and
BOOT are digests of the machine's name and of its boot id, and its maker holds a lock (flock) on it, which the operating
system lets go of when the process ends, however that ends. So a later run tells what a killed one has left from what is
still at work, also where containers share process ids, and never touches what another machine may be writing.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import json
import os
import platform
import re
import secrets
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from hashlib import sha256
from pathlib import Path
from types import FrameType
from typing import IO, Literal

from ..errors import KvConvertError, OutputError
from .files import create_file, sync_directory, sync_tree
from .manifest import UNFINISHED_NAME
from .output import ELSEWHERE, at_work, check_output, check_replaceable, disk_errors, existing_parent, place_of

__all__ = [
    "check_renames",
    "clear_leftovers",
    "discard",
    "replaced_directory",
    "scratch_directory",
    "signals_held",
    "staged_directory",
    "staged_file",
    "take_lock",
]

_KINDS = ("partial", "replaced", "removed", "scratch")
_NAME = re.compile(rf"\.(?P<kind>{'|'.join(_KINDS)})-(?P<host>[0-9a-f]{{8}})-(?P<boot>[0-9a-f]{{8}})-[0-9a-f]{{8}}")
_SWAP_SECONDS = 60  # that another run may take to remove what it has replaced
_WAIT_SECONDS = 0.01
_EMPTY_SECONDS = 60  # a directory that is locked gets its marker within that
_SIGNALS = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name))
_NOREPLACE, _EXCHANGE = 1, 2  # of renameat2
_CANNOT = frozenset({errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP})

State = Literal["ended", "at work", "unknown"]


@contextmanager
def staged_directory(output: Path, *, force: bool = False, inputs: Sequence[Path] = ()) -> Iterator[Path]:
    """Yield a new directory beside `output`, which takes its place at the end, and is removed where the block raises.

    With `force`, what `check_output` allows to be replaced is replaced, at the very end and in one step where the file
    system can exchange two names (Linux's renameat2). The check is made before the block, and again of what was taken
    out of its place, before that is removed. Signals that end the process wait while the two are exchanged. Errors of
    files are those of `disk_errors`; OutputError is raised too where `output` has come into being meanwhile. A
    KvConvertError of the block that names the new directory comes to name `output`, the place that people know.
    """
    place = place_of(output)
    check_output(output, force=force, inputs=inputs)
    with _staged(output, place) as staging:
        _check_renames(staging, place, output)
        yield staging
        _publish(staging, place, output, check=check_replaceable if force else None)


@contextmanager
def replaced_directory(place: Path) -> Iterator[Path]:
    """Yield a new directory as `staged_directory` does, in place of one of a run's own, which needs no check."""
    with _staged(place, place_of(place)) as staging:
        yield staging
        _publish(staging, place_of(place), place, check=lambda directory, named: None)


@contextmanager
def scratch_directory(output: Path) -> Iterator[Path]:
    """Yield a new hidden directory beside `output`, for what is needed only while that is made."""
    with _beside(output, place_of(output), "scratch") as scratch:
        yield scratch


@contextmanager
def staged_file(place: Path) -> Iterator[IO[bytes]]:
    """Yield a new file that is synced and takes the name `place` at the end, where the block does not raise.

    Until then it lies in a hidden directory beside it, as `scratch_directory` says, which the next run clears up after
    a kill. Errors of files are those of `disk_errors`; OutputError is raised too where the name is taken meanwhile.
    """
    named = place_of(place)
    with scratch_directory(place) as scratch:
        whole = scratch / named.name
        with create_file(whole) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        _rename_new(whole, named)
        sync_directory(named.parent)


def check_renames(output: Path) -> None:
    """Raise OutputError where the file system does not let directories come to `output`, or what is there be replaced.

    It is tried with a hidden directory beside the place, and nothing is changed. A layer of a container image refuses
    it (EXDEV), so does where a directory is mounted (EBUSY), and some network file systems cannot do it at all.
    """
    with scratch_directory(output) as scratch:
        _check_renames(scratch, place_of(output), output)


def discard(directory: Path) -> None:
    """Remove a directory: its name is free at once, so that what cannot be deleted is never taken for a whole one."""
    if not directory.exists():
        return
    place = place_of(directory)
    removed = place.with_name(_name(place.name, "removed"))
    place.rename(removed)
    shutil.rmtree(removed, ignore_errors=True)


def clear_leftovers(output: Path, remark: Callable[[str], object]) -> None:
    """Remove what killed runs have left beside `output`, or put back what one had moved out of its place.

    What may be another run's that is still at work stays. `remark` is called with a line for each that is found.
    """
    place = place_of(output)
    with suppress(FileNotFoundError, NotADirectoryError, PermissionError), os.scandir(place.parent) as entries:
        found = sorted(entry.path for entry in entries if entry.is_dir(follow_symlinks=False))
        for path in map(Path, found):
            match = _NAME.fullmatch(path.name.removeprefix(f".{place.name}"))
            if match is not None and path.name.startswith(f".{place.name}."):
                _clear(path, match["kind"], _state(path, match["host"], match["boot"]), place, output, remark)


def _clear(path: Path, kind: str, state: State, place: Path, output: Path, remark: Callable[[str], object]) -> None:
    if state == "at work" or not os.path.lexists(path):  # which another run has just removed
        return
    if state == "unknown":
        remark(f"{path.name} lies beside {output.name}: remove it, unless a run on another machine is at work there")
        return
    with suppress(OSError):
        if kind == "replaced" and not os.path.lexists(place):
            _rename_new(path, place)
            sync_directory(place.parent)
            remark(f"{output}: put back, after a run that was to replace it had been killed")
        elif not any(path.iterdir()) and time.time() - path.stat().st_mtime < _EMPTY_SECONDS:
            return  # its maker is about to lock it
        elif kind in ("removed", "scratch") or (path / UNFINISHED_NAME).exists() or _is_replaceable(path):
            shutil.rmtree(path)
            remark(f"removed {path.name}, which a run that was killed had left beside {output.name}")
        else:
            remark(f"{path.name} lies beside {output.name}, and holds files that kvconvert did not write: look at it")


def _is_replaceable(path: Path) -> bool:
    try:
        check_replaceable(path, path)
    except OutputError:
        return False
    return True


def _state(path: Path, host: str, boot: str) -> State:
    """Whether the maker of a directory has ended: by its lock where it ran since this machine started, else by time."""
    here, since = _machine()
    if host != here:
        return "unknown"
    if boot != since:
        last = max((entry.stat(follow_symlinks=False).st_mtime for entry in os.scandir(path)), default=0.0)
        return "ended" if max(last, path.stat().st_mtime) < _started() else "unknown"
    try:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            return "ended" if take_lock(descriptor) else "at work"
        finally:
            os.close(descriptor)
    except OSError:  # a file system without locks
        return "unknown"


def _machine() -> tuple[str, str]:
    """Eight hexadecimal digits for the machine's name, and eight for the time since when it is up."""
    boot = Path("/proc/sys/kernel/random/boot_id")
    since = boot.read_text().strip() if boot.exists() else ""
    return _digits(platform.node()), _digits(since)


def _digits(text: str) -> str:
    return sha256(text.encode()).hexdigest()[:8]


def _started() -> float:
    """When this machine started, in seconds of the epoch; 0 where the system does not say."""
    with suppress(OSError, ValueError, StopIteration):
        lines = Path("/proc/stat").read_text().splitlines()
        return float(next(line for line in lines if line.startswith("btime ")).split()[1])
    return 0.0


def _name(name: str, kind: str) -> str:
    return f".{name}.{kind}-{'-'.join(_machine())}-{secrets.token_hex(4)}"


def _new(stack: ExitStack, parent: Path, name: str, kind: str) -> Path:
    """Make a directory that is locked and marked as unfinished, until the stack is closed, which removes it."""
    path = parent / _name(name, kind)
    stack.push(partial(_remove, path))  # before it is made, so that no signal comes between
    path.mkdir()
    descriptor = os.open(path, os.O_RDONLY)
    stack.callback(os.close, descriptor)
    with suppress(OSError):  # a file system without locks
        take_lock(descriptor)
    with create_file(path / UNFINISHED_NAME) as file:
        about = {"host": platform.node(), "pid": os.getpid(), "started": time.strftime("%Y-%m-%dT%H:%M:%S%z")}
        file.write(json.dumps(about).encode())
    return path


def _remove(path: Path, kind: type[BaseException] | None, *_: object) -> None:
    """Remove a directory at the end of a block, which an exception of some kind has ended, or none."""
    try:
        with signals_held(deliver=kind is None):  # a second signal would leave half of it
            shutil.rmtree(path, ignore_errors=True)
    except (KeyboardInterrupt, SystemExit):  # of a first signal, in the last moment before they are held
        with signals_held(deliver=False):
            shutil.rmtree(path, ignore_errors=True)
        raise


@contextmanager
def _beside(named: Path, place: Path, kind: str) -> Iterator[Path]:
    """Yield a new directory beside a place, whose parents are made; it and they are gone at the end, if empty."""
    first_existing = existing_parent(place)
    try:
        # a signal between the end of a block and what it is left by would skip that: it waits until all is removed
        with ExitStack() as held, disk_errors(named), ExitStack() as stack:
            place.parent.mkdir(parents=True, exist_ok=True)
            yield _new(stack, place.parent, place.name, kind)
            held.enter_context(signals_held())
    finally:
        _remove_empty_parents(place.parent, first_existing)


def _check_renames(beside: Path, place: Path, named: Path) -> None:
    """Raise OutputError unless directories can be renamed here, and what is at `place`, if anything.

    That is renamed to a directory that is not empty, which every file system refuses for this reason, if not for one
    that holds for the swap too.
    """
    one, other = beside / "one", beside / "other"
    one.mkdir()
    try:
        one.rename(other)
        if os.path.lexists(place):
            place.rename(beside)
            beside.rename(place)  # a file system that took it all the same
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise _cannot_replace(named, error) from error
    finally:
        for path in (one, other):
            with suppress(FileNotFoundError):
                path.rmdir()


def _cannot_replace(named: Path, error: OSError) -> OutputError:
    return OutputError(
        f"{named} cannot be put in place or replaced by renaming ({error.strerror})",
        hint="choose another output, where no layer of an image and no mount comes in between",
        settings=("output",),
    )


@contextmanager
def _staged(named: Path, place: Path) -> Iterator[Path]:
    staging = place
    try:
        with _beside(named, place, "partial") as staging:
            yield staging
    except KvConvertError as error:
        error.args = (str(error).replace(str(staging), str(named)),)
        raise
    except (KeyboardInterrupt, SystemExit) as error:
        if not getattr(error, "__notes__", None):
            error.add_note(f"nothing was written to {named}")
        raise


def _publish(staging: Path, place: Path, named: Path, *, check: Callable[[Path, Path], object] | None) -> None:
    """Move a directory to its place. With a `check`, one that is there is replaced, if that does not raise for it."""
    sync_tree(staging)
    published = False
    try:
        with signals_held():
            (staging / UNFINISHED_NAME).unlink()
            if not os.path.lexists(place):
                _rename_new(staging, place)
            elif check is None:
                raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(place))
            else:
                _swap(staging, place, named, check)
            published = True
            sync_directory(place.parent)
    except OSError as error:
        if error.errno in (errno.EXDEV, errno.EBUSY):
            raise _cannot_replace(named, error) from error
        if error.errno not in (errno.EEXIST, errno.ENOTEMPTY):
            raise
        raise OutputError(
            f"{named} appeared while it was being written", hint=ELSEWHERE, settings=("output",)
        ) from error
    except (KeyboardInterrupt, SystemExit) as error:
        if published:
            error.add_note(f"{named} is complete")
        raise


def _swap(staging: Path, place: Path, named: Path, check: Callable[[Path, Path], object]) -> None:
    """Put `staging` in the place of a directory, and remove that if `check` does not raise for it."""
    with _locked(place, named):
        check(place, named)
        if _renameat2(staging, place, _EXCHANGE):
            try:
                check(staging, named)
            except BaseException:
                _renameat2(staging, place, _EXCHANGE)
                raise
            shutil.rmtree(staging, ignore_errors=True)
            return
        replaced = place.with_name(_name(place.name, "replaced"))
        place.rename(replaced)
        try:
            check(replaced, named)
        except BaseException:
            replaced.rename(place)
            raise
        try:
            _rename_new(staging, place)
        except BaseException:
            if not os.path.lexists(place):  # else another run has put its result there
                replaced.rename(place)
            raise
        finally:
            shutil.rmtree(replaced, ignore_errors=True)


@contextmanager
def _locked(place: Path, named: Path) -> Iterator[None]:
    """Hold a directory, so that no run that clears up takes it for what a killed one has left, once it has moved.

    A run that is replacing it too is waited for, and what that put there is held. Raises OutputError after a minute.
    """
    last = time.monotonic() + _SWAP_SECONDS
    while True:
        try:
            descriptor = os.open(place, os.O_RDONLY | os.O_NOFOLLOW)
        except FileNotFoundError as error:  # between two renames of another run
            raise at_work(named) from error
        try:
            with suppress(OSError):  # a file system without locks
                while not take_lock(descriptor) and time.monotonic() < last:
                    time.sleep(_WAIT_SECONDS)
            if time.monotonic() >= last:
                raise at_work(named)
            if _is_at(descriptor, place):
                yield
                return
        finally:
            os.close(descriptor)


def _is_at(descriptor: int, place: Path) -> bool:
    with suppress(FileNotFoundError):
        return os.path.samestat(os.fstat(descriptor), os.lstat(place))
    return False


def take_lock(descriptor: int) -> bool:
    """Take the lock of a file; False where another process holds it. Raises OSError where there are no locks."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _rename_new(path: Path, place: Path) -> None:
    """Rename a file or directory. Raises FileExistsError where the name is taken, if the operating system can tell."""
    if not _renameat2(path, place, _NOREPLACE):
        path.rename(place)


def _renameat2(one: Path, other: Path, flags: int) -> bool:
    """Call Linux's renameat2; False where the operating system or the file system has no such flags."""
    function = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if function is None:
        return False
    here = -100  # AT_FDCWD
    if function(here, os.fsencode(one), here, os.fsencode(other), flags) == 0:
        return True
    number = ctypes.get_errno()
    if number in _CANNOT:
        return False
    raise OSError(number, os.strerror(number), str(one), None, str(other))


@contextmanager
def signals_held(*, deliver: bool = True) -> Iterator[None]:
    """Let signals that end the process wait until the block is done; without `deliver` they are dropped then.

    Only the main thread can hold signals, since Python runs their handlers there; in another the block just runs.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    caught: list[int] = []

    def hold(number: int, frame: FrameType | None) -> None:
        caught.append(number)

    previous = {number: signal.getsignal(number) for number in _SIGNALS}
    held = {number: handler for number, handler in previous.items() if handler not in (signal.SIG_IGN, None)}
    try:
        for number in held:
            signal.signal(number, hold)
        yield
    finally:
        for number, handler in held.items():
            signal.signal(number, handler)
        if caught and deliver:
            signal.raise_signal(caught[0])


def _remove_empty_parents(directory: Path, keep: Path) -> None:
    with suppress(OSError):
        while keep in directory.parents:
            directory.rmdir()
            directory = directory.parent
