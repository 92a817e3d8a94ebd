"""Output places: checked before anything is written, complete or absent afterwards, and never overwritten unasked."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from ..errors import InputError, KvConvertError, OutputError

__all__ = [
    "CARD_NAME",
    "PROVENANCE_NAME",
    "check_apart",
    "check_file",
    "check_free_space",
    "check_output",
    "disk_errors",
    "existing_parent",
    "read_provenance",
    "staged_directory",
    "write_text",
]

CARD_NAME = "README.md"
PROVENANCE_NAME = "kvconvert.json"  # every directory that kvconvert wrote holds it

_SPARE_BYTES = 64 * 2**20  # tokenizer, configs, index and file-system overhead
_ELSEWHERE = "choose another output"
_DISK_FULL_ERRNOS = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
# libraries in Rust and C++ hand the operating system's message on inside exceptions of their own
_DISK_FULL_TEXTS = (
    *(f"os error {number}" for number in sorted(_DISK_FULL_ERRNOS)),
    "No space left on device",
    "File too large",
    "PytorchStreamWriter failed",
)


def read_provenance(directory: Path) -> dict[str, Any]:
    """Return the content of kvconvert.json, which says how a checkpoint was made; {} for one without the file."""
    path = directory / PROVENANCE_NAME
    return dict(json.loads(path.read_text())) if path.exists() else {}


def check_output(output: Path, *, force: bool, inputs: Sequence[Path] = ()) -> None:
    """Raise OutputError unless `output` can be written without losing anything.

    It must not exist; with `force` it may be an empty directory or one that kvconvert wrote. It must neither be nor
    contain any of `inputs`, and its nearest existing parent must be writable.
    """
    check_apart(output, inputs)
    if output.is_symlink():
        raise OutputError(f"{output} is a symbolic link", hint=_ELSEWHERE, settings=("output",))
    if output.exists() and not output.is_dir():
        raise OutputError(f"{output} is a file, not a directory", hint=_ELSEWHERE, settings=("output",))
    if output.exists() and not force:
        raise OutputError(
            f"{output} already exists", hint=f"{_ELSEWHERE}, or let it be replaced", settings=("output", "force")
        )
    if output.exists() and any(output.iterdir()) and not (output / PROVENANCE_NAME).exists():
        raise OutputError(
            f"{output} was not written by kvconvert (it holds no {PROVENANCE_NAME}), so it is not replaced",
            hint=f"remove it yourself, or {_ELSEWHERE}",
            settings=("output",),
        )
    parent = existing_parent(output)
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise OutputError(f"{output} cannot be created: {parent} is not a writable directory")


def check_apart(place: Path, inputs: Sequence[Path]) -> None:
    """Raise OutputError if `place`, which will be written or removed, is or contains any of `inputs`."""
    for path in inputs:
        if place.resolve() in (path.resolve(), *path.resolve().parents):
            what = "is" if place.resolve() == path.resolve() else "holds"
            raise OutputError(f"{place} {what} {path}, which is read", hint=_ELSEWHERE, settings=("output",))


def check_free_space(output: Path, num_bytes: int) -> None:
    """Raise OutputError if the file system of `output` cannot hold `num_bytes` more."""
    free = shutil.disk_usage(existing_parent(output)).free
    needed = num_bytes + _SPARE_BYTES
    if free < needed:
        raise OutputError(
            f"{output}: needs {needed / 1e9:.2f} GB, but its disk has {free / 1e9:.2f} GB free",
            hint="free some space, or choose another disk",
            settings=("output",),
        )


def check_file(path: Path, *, outside: Path) -> None:
    """Raise OutputError unless a new file can be written at `path`, in a directory that exists and is not `outside`."""
    if path.exists():
        raise OutputError(f"{path} already exists", hint="choose another name, or remove it")
    absolute = Path(os.path.abspath(path))
    if Path(os.path.abspath(outside)) in absolute.parents:
        raise OutputError(f"{path} lies in {outside}, which is replaced", hint="choose another place for it")
    if not absolute.parent.is_dir() or not os.access(absolute.parent, os.W_OK):
        raise OutputError(f"{path} cannot be written: {absolute.parent} is not a writable directory")


@contextmanager
def disk_errors(output: Path) -> Iterator[None]:
    """Turn what the operating system says of files into errors for people, while `output` is written.

    A full disk is an OutputError about `output`, and so is a place that cannot be written. A failure at any other file,
    one of the source for example, is an InputError that names that file.
    """
    try:
        yield
    except KvConvertError:
        raise
    except Exception as error:
        full = isinstance(error, OSError) and error.errno in _DISK_FULL_ERRNOS
        if full or any(text in str(error) for text in _DISK_FULL_TEXTS):
            raise OutputError(
                f"{output}: the disk is full ({_reason(error)})",
                hint="free some space, or choose another disk",
                settings=("output",),
            ) from error
        if isinstance(error, PermissionError | FileExistsError | NotADirectoryError):
            if isinstance(error.filename, str) and not _belongs_to(Path(error.filename), output):
                raise InputError(
                    f"{error.filename}: cannot be opened ({error.strerror})", hint="check the file and its permissions"
                ) from error
            raise OutputError(f"{output}: cannot be written ({_reason(error)})", settings=("output",)) from error
        raise


def _reason(error: Exception) -> str:
    """What an error says, without the path of a file that has another name while it is written."""
    strerror = error.strerror if isinstance(error, OSError) else None
    return strerror or " ".join(str(error).split())


def _belongs_to(path: Path, output: Path) -> bool:
    """Whether a path is `output`, in it, above it, or in one of the hidden neighbours that become it."""
    path, output = Path(os.path.abspath(path)), Path(os.path.abspath(output))
    if path == output or path in output.parents:
        return True
    if output.parent not in path.parents:
        return False
    beside = path.relative_to(output.parent).parts[0]
    return beside == output.name or beside.startswith(f".{output.name}.")


@contextmanager
def staged_directory(output: Path, *, force: bool = False) -> Iterator[Path]:
    """Yield a new directory beside `output`, which is renamed to it at the end, and removed where the block raises.

    With `force`, an existing `output` is replaced only at the very end. Errors of files are those of `disk_errors`;
    OutputError is raised too where `output` has come into being meanwhile. A KvConvertError of the block that names the
    new directory comes to name `output`, which is the place that people know.
    """
    named = output
    output = Path(os.path.abspath(output))
    staging = output.with_name(f".{output.name}.partial-{os.getpid()}")
    first_existing = existing_parent(output)
    try:
        with disk_errors(named):
            output.parent.mkdir(parents=True, exist_ok=True)
            shutil.rmtree(staging, ignore_errors=True)
            staging.mkdir()
            yield staging
            _publish(staging, output, force=force)
    except BaseException as error:
        shutil.rmtree(staging, ignore_errors=True)
        _remove_empty_parents(output.parent, first_existing)
        if isinstance(error, KvConvertError):
            error.args = (str(error).replace(str(staging), str(named)),)
        raise


def write_text(path: Path, text: str) -> None:
    """Write a text file in UTF-8 that is complete or absent: to a hidden file beside it, synced, then renamed."""
    partial = path.with_name(f".{path.name}.partial-{os.getpid()}")
    with partial.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)


def _publish(staging: Path, output: Path, *, force: bool) -> None:
    if not output.exists():
        staging.rename(output)
        return
    if not force:
        raise OutputError(f"{output} appeared while it was being written", hint=_ELSEWHERE, settings=("output",))
    replaced = output.with_name(f".{output.name}.replaced-{os.getpid()}")
    output.rename(replaced)
    try:
        staging.rename(output)
    except BaseException:
        replaced.rename(output)
        raise
    shutil.rmtree(replaced, ignore_errors=True)


def _remove_empty_parents(directory: Path, keep: Path) -> None:
    with suppress(OSError):
        while keep in directory.parents:
            directory.rmdir()
            directory = directory.parent


def existing_parent(path: Path) -> Path:
    """Return the nearest directory above `path` that exists."""
    absolute = Path(os.path.abspath(path))
    return next((parent for parent in absolute.parents if parent.exists()), absolute)
