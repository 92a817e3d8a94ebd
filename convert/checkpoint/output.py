"""Output places: checked before anything is written, and never overwritten unasked."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from ..errors import InputError, KvConvertError, OutputError
from .manifest import unlike_manifest

__all__ = [
    "CARD_NAME",
    "ELSEWHERE",
    "RECIPE_NAME",
    "at_work",
    "check_apart",
    "check_file",
    "check_free_space",
    "check_free_spaces",
    "check_output",
    "check_replaceable",
    "disk_errors",
    "existing_parent",
    "place_of",
]

CARD_NAME = "README.md"
RECIPE_NAME = "recipe.yaml"  # that a result was made by

ELSEWHERE = "choose another output"

_SPARE_BYTES = 64 * 2**20  # tokenizer, configs, index and file-system overhead
_HIDDEN_BYTES = 48  # that the name of a directory gets, besides its own, while it is made
_DISK_FULL_ERRNOS = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
# libraries in Rust and C++ hand the operating system's message on inside exceptions of their own
_DISK_FULL_TEXTS = (
    *(f"os error {number}" for number in sorted(_DISK_FULL_ERRNOS)),
    "No space left on device",
    "File too large",
    "PytorchStreamWriter failed",
    "unexpected pos ",  # of torch.save, where the last bytes of a file did not reach the disk
    "basic_ios::clear: iostream error",  # the same, where they did not when the file was closed
)


def place_of(output: Path) -> Path:
    """The absolute path of a place, with the links of the folders above it followed, but not one of its own name."""
    if output.name in ("", ".."):
        return Path(os.path.realpath(output))
    return Path(os.path.realpath(output.parent), output.name)


def check_output(output: Path, *, force: bool, inputs: Sequence[Path] = ()) -> None:
    """Raise OutputError unless `output` can be written without losing anything.

    It must not exist; with `force` it may be an empty directory, or one that holds what kvconvert wrote and nothing
    else. It must neither be nor contain any of `inputs`, nor what links in these lead to, and its nearest existing
    parent must be a writable directory of a file system that takes the name.
    """
    place = place_of(output)
    parent = existing_parent(place)
    _check_name(place, parent, output)
    check_apart(output, inputs)
    if place.is_symlink():
        raise OutputError(f"{output} is a symbolic link", hint=ELSEWHERE, settings=("output",))
    if place.exists() and not place.is_dir():
        raise OutputError(f"{output} is a file, not a directory", hint=ELSEWHERE, settings=("output",))
    if place.exists() and not force:
        raise OutputError(
            f"{output} already exists", hint=f"{ELSEWHERE}, or let it be replaced", settings=("output", "force")
        )
    if place.exists():
        check_replaceable(place, output)
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise OutputError(f"{output} cannot be created: {parent} is not a writable directory")


def check_replaceable(directory: Path, named: Path) -> None:
    """Raise OutputError unless a directory is empty, or holds the files of its manifest and no others.

    `named` is what messages call it. Names and sizes are compared, not the content of files.
    """
    if directory.is_symlink() or not directory.is_dir():
        raise OutputError(f"{named} is not a directory", hint=ELSEWHERE, settings=("output",))
    if os.path.ismount(directory):
        raise OutputError(
            f"{named} is where a disk is mounted, and cannot be replaced",
            hint="choose a directory in it",
            settings=("output",),
        )
    try:
        if not any(directory.iterdir()):
            return
        strange = unlike_manifest(directory, digests=False)
    except FileNotFoundError as error:
        raise at_work(named) from error
    if strange:
        more = f", and {len(strange) - 1} more" if len(strange) > 1 else ""
        raise OutputError(
            f"{named} is not as kvconvert wrote it, so it is not replaced: {strange[0]}{more}",
            hint=f"remove it yourself, or {ELSEWHERE}",
            settings=("output",),
        )


def at_work(named: Path) -> OutputError:
    """Make the error of an output that another run is replacing."""
    return OutputError(f"{named} is being replaced by another run", hint=ELSEWHERE, settings=("output",))


def _check_name(place: Path, parent: Path, output: Path) -> None:
    """Raise OutputError for a name that the file system cannot hold, of the place or of a folder that is to be made."""
    try:
        longest = os.pathconf(parent, "PC_NAME_MAX") if hasattr(os, "pathconf") else 255
        os.lstat(place)
    except (FileNotFoundError, NotADirectoryError):  # what is in the way is named by the check of the parent
        pass
    except OSError as error:
        raise OutputError(f"{output} cannot be created ({error.strerror})", hint=ELSEWHERE) from error
    new = [os.fsencode(name) for name in place.relative_to(parent).parts[:-1]]
    if any(len(name) > longest for name in new) or len(os.fsencode(place.name)) > longest - _HIDDEN_BYTES:
        raise OutputError(
            f"{output} cannot be created: a name is longer than {longest - _HIDDEN_BYTES} bytes",
            hint="choose a shorter name",
            settings=("output",),
        )


def check_apart(output: Path, inputs: Sequence[Path]) -> None:
    """Raise OutputError if `output`, which will be written or removed, is or contains any of `inputs`.

    Of a directory among these, what its links lead to counts too.
    """
    place = place_of(output)
    if not os.path.lexists(place):
        return
    real = Path(os.path.realpath(place))
    for path in inputs:
        for source in _links_and_self(path):
            read = Path(os.path.realpath(source))
            if read == real or real in read.parents:
                what = "is" if read == real else "holds"
                said = str(source) if read == Path(os.path.abspath(source)) else f"{read}, as {source}"
                raise OutputError(f"{output} {what} {said}, which is read", hint=ELSEWHERE, settings=("output",))


def _links_and_self(path: Path) -> Iterator[Path]:
    yield path
    if path.is_dir():
        for folder, folders, names in os.walk(path):
            yield from (found for name in (*folders, *names) if (found := Path(folder, name)).is_symlink())


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


def check_free_spaces(needs: Sequence[tuple[Path, int]]) -> None:
    """Raise OutputError unless all of these places can hold so many bytes more, those on one disk together."""
    disks: dict[int, list[tuple[Path, int]]] = {}
    for place, num_bytes in needs:
        disks.setdefault(existing_parent(place).stat().st_dev, []).append((place, num_bytes))
    for same in disks.values():
        check_free_space(same[0][0], sum(num_bytes for _, num_bytes in same))


def check_file(path: Path, *, outside: Path) -> None:
    """Raise OutputError unless a new file can be written at `path`, in a directory that exists and is not `outside`."""
    absolute = place_of(path)
    if os.path.lexists(absolute):
        raise OutputError(f"{path} already exists", hint="choose another name, or remove it")
    if place_of(outside) in absolute.parents:
        raise OutputError(f"{path} lies in {outside}, which is replaced", hint="choose another place for it")
    if not absolute.parent.is_dir() or not os.access(absolute.parent, os.W_OK):
        raise OutputError(f"{path} cannot be written: {absolute.parent} is not a writable directory")
    _check_name(absolute, absolute.parent, path)


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
    path, output = place_of(path), place_of(output)
    if path == output or path in output.parents:
        return True
    if output.parent not in path.parents:
        return False
    beside = path.relative_to(output.parent).parts[0]
    return beside == output.name or beside.startswith(f".{output.name}.")


def existing_parent(path: Path) -> Path:
    """Return the nearest directory above `path` that exists."""
    place = place_of(path)
    return next((parent for parent in place.parents if os.path.lexists(parent)), place)
