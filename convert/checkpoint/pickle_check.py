"""Whether a pickle of tensors may be loaded: its sizes, what it calls, and how much work it makes, before any of it.

The pickle is read as torch's own restricted unpickler reads it, without making anything of it. That one runs no code,
but it lets a few kilobytes make gigabytes (`bytearray(n)` a thousand times) or hours (a tuple that holds a tuple twice,
forty deep, as the key of a dict).
"""

from __future__ import annotations

import pickletools
import tarfile
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from io import BytesIO
from itertools import islice
from pathlib import Path
from typing import IO, Any, BinaryIO, cast

from .input_files import open_regular
from .json_files import shortened

__all__ = ["is_zip_of_torch", "problem_of_pickles", "problem_of_zip"]

_MAX_OPERATIONS = 2**20  # a tensor takes about forty
_MAX_WORK = 2**24  # values in values, each counted for all that hold it; a tensor takes about a hundred
_NUM_PREAMBLES = 3  # of the format before torch 1.6: a magic number, the protocol and sizes of the machine's integers
_ZIP_BEGINNING = b"PK\x03\x04"  # by which torch itself tells the format
_STORAGE_ITEMS = (
    5  # "storage", its type, its key, its device and how many values it has; once also what it is a part of
)
_ATOMS = frozenset({"BININT", "BININT1", "BININT2", "BINFLOAT", "BINUNICODE", "SHORT_BINSTRING", "LONG1"})
_CONSTANTS = {"NONE": None, "NEWFALSE": False, "NEWTRUE": True}
_EMPTY = frozenset({"EMPTY_TUPLE", "EMPTY_LIST", "EMPTY_DICT", "EMPTY_SET"})
_TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}
_GROWING = {"APPEND": 1, "BUILD": 1, "SETITEM": 2}
_FROM_TYPE = "torch._tensor _rebuild_from_type_v2"
_CALLED = frozenset(  # by files of tensors: none makes more than it is given
    {
        "collections OrderedDict",
        "torch Size",
        "torch device",
        "torch.nn.parameter Parameter",
        "torch._utils _rebuild_parameter",
        "torch._utils _rebuild_parameter_with_state",
        "torch._utils _rebuild_sparse_tensor",
        "torch._utils _rebuild_tensor",
        "torch._utils _rebuild_tensor_v2",
        "torch._utils _rebuild_tensor_v3",
        "torch.serialization _get_layout",
        _FROM_TYPE,
    }
)


class _ProblemError(Exception):
    """Why a pickle is not loaded."""


@dataclass(eq=False)
class _Value:
    """A value of a pickle: a global by its name, a tuple with its items, or anything else that has a size.

    `size` counts the value and all that is in it, as often as it is; `held` is true once another value holds it.
    """

    size: int = 1
    name: str = ""
    items: Sequence[Any] = ()
    held: bool = False


def is_zip_of_torch(path: Path) -> bool:
    """Whether torch takes a file for one of the format since torch 1.6."""
    with open_regular(path) as file:
        return file.read(len(_ZIP_BEGINNING)) == _ZIP_BEGINNING


def problem_of_zip(path: Path) -> str | None:
    """Say what keeps a pytorch_model.bin that is a zip file from being loaded; None for nothing.

    Raises the errors of a damaged file as the libraries do.
    """
    import torch

    num_bytes = path.stat().st_size
    with zipfile.ZipFile(path) as archive:
        entries = archive.infolist()
    packed = next((entry.filename for entry in entries if entry.compress_type != zipfile.ZIP_STORED), None)
    if packed is not None:
        return f"{shortened(packed)} in it is compressed, which torch never writes"
    declared = sum(entry.file_size for entry in entries)
    if declared > num_bytes:
        return f"says that it holds {declared} bytes, and has {num_bytes}"
    # a zip file can hold several data.pkl: this is the one that torch takes
    content = torch._C.PyTorchFileReader(str(path)).get_record("data.pkl")
    return _problem(BytesIO(content), len(content), num_bytes)


def problem_of_pickles(path: Path) -> str | None:
    """Say what keeps a pytorch_model.bin of before torch 1.6 from being loaded, as `problem_of_zip` does."""
    if tarfile.is_tarfile(path):
        return "a tar file, a format that torch left in 2017"
    num_bytes = path.stat().st_size
    with open_regular(path) as file:
        for _ in range(_NUM_PREAMBLES):
            problem = _problem(file, num_bytes, None)
            if problem is not None:
                return problem
        # the tensors, and the names of the storages that follow
        return _problem(file, num_bytes, num_bytes) or _problem(file, num_bytes, None)


class _Remainder:
    """What is left of a file, where a text that says it is longer is read to the end and takes no more memory."""

    def __init__(self, file: BinaryIO, num_bytes: int) -> None:
        self._file = file
        self._num_bytes = num_bytes
        self.readline = file.readline
        self.tell = file.tell

    def read(self, num_bytes: int) -> bytes:
        return self._file.read(min(num_bytes, self._num_bytes))


def _problem(file: BinaryIO, num_bytes: int, most: int | None) -> str | None:
    """Why a pickle should not be loaded; `most` is what no size in it and no sum of its storages can exceed."""
    machine = _Machine(most)
    operations = pickletools.genops(cast("IO[bytes]", _Remainder(file, num_bytes)))
    try:
        for operation, argument, _ in islice(operations, _MAX_OPERATIONS):
            if most is not None and isinstance(argument, int) and abs(argument) > most:
                return f"says that a tensor has {shortened(argument)} values or bytes, and the file has {most} bytes"
            if operation.name == "STOP":
                return None
            machine.step(operation.name, argument)
    except _ProblemError as problem:
        return str(problem)
    return "more operations than a file of tensors needs"


class _Machine:
    """The stack and the memo of torch's unpickler, which hold sizes in place of values.

    Operations that torch does not know are refused as torch does it: LookupError is raised, as for an empty stack.
    """

    def __init__(self, most: int | None) -> None:
        self._stack: list[Any] = []
        self._marked: list[list[Any]] = []
        self._memo: dict[int, Any] = {}
        self._storages: set[Any] = set()
        self._stored = 0
        self._most = most
        self._work = 0

    def step(self, name: str, argument: Any) -> None:
        """Take one operation. Raises _ProblemError."""
        if name in _ATOMS:
            self._stack.append(argument)
        elif name in _CONSTANTS:
            self._stack.append(_CONSTANTS[name])
        elif name in _EMPTY:
            self._stack.append(_Value())
        elif name == "GLOBAL":
            self._stack.append(_Value(name=argument))
        elif name in _TUPLES:
            items = [self._stack.pop() for _ in range(_TUPLES[name])]
            self._stack.append(self._holding(items[::-1]))
        elif name in _GROWING:
            items = [self._stack.pop() for _ in range(_GROWING[name])]
            self._grow(self._stack[-1], items)
        elif name in ("BINGET", "LONG_BINGET"):
            self._stack.append(self._memo[argument])
        elif name in ("BINPUT", "LONG_BINPUT"):
            self._memo[argument] = self._stack[-1]
        else:
            self._step_with_marks_or_calls(name)

    def _step_with_marks_or_calls(self, name: str) -> None:
        if name == "MARK":
            self._marked.append(self._stack)
            self._stack = []
        elif name == "TUPLE":
            items = self._pop_mark()
            self._stack.append(self._holding(items))
        elif name in ("APPENDS", "SETITEMS"):
            items = self._pop_mark()
            self._grow(self._stack[-1], items)
        elif name in ("REDUCE", "NEWOBJ"):
            arguments, called = self._stack.pop(), self._stack.pop()
            _check_call(called, arguments)
            self._stack.append(self._holding([arguments]))
        elif name == "BINPERSID":
            self._count_storage(self._stack.pop())
            self._stack.append(_Value())
        elif name != "PROTO":
            raise LookupError(f"torch does not read the operation {name}")

    def _pop_mark(self) -> list[Any]:
        items, self._stack = self._stack, self._marked.pop()
        return items

    def _holding(self, items: Sequence[Any]) -> _Value:
        holder = _Value(items=items)
        self._grow(holder, items)
        return holder

    def _grow(self, holder: Any, items: Sequence[Any]) -> None:
        """Put items into a value, which is complete before another holds it, so that its size stays what it was."""
        if not isinstance(holder, _Value) or holder.held:
            raise _ProblemError("a value in it is changed after another holds it, which torch never writes")
        for item in items:
            size = 1
            if isinstance(item, _Value):
                item.held, size = True, item.size
            holder.size += size
            self._work += size
        if self._work > _MAX_WORK:
            raise _ProblemError("says that values hold each other more often than tensors need")

    def _count_storage(self, identifier: Any) -> None:
        """Note the size of a storage. Raises _ProblemError where all of them are larger than the file."""
        if isinstance(identifier, int):  # of one that was there before
            return
        items = identifier.items if isinstance(identifier, _Value) else ()
        kind, _, key, device, num_values = (*items, *[None] * _STORAGE_ITEMS)[:_STORAGE_ITEMS]
        named = all(isinstance(item, str | bytes) for item in (kind, key, device))
        if not named or not isinstance(num_values, int):
            raise _ProblemError("names a storage otherwise than torch does")
        if key not in self._storages:
            self._storages.add(key)
            self._stored += num_values
        if self._most is not None and self._stored > self._most:
            raise _ProblemError(
                f"says that its storages have {self._stored} values, and the file has {self._most} bytes"
            )


def _check_call(called: Any, arguments: Any) -> None:
    """Raise _ProblemError unless a function is one that files of tensors call, also where it is called by another."""
    name = called.name if isinstance(called, _Value) else ""
    if name == _FROM_TYPE:
        first = arguments.items[0] if isinstance(arguments, _Value) and arguments.items else None
        name = first.name if isinstance(first, _Value) and first.name != _FROM_TYPE else ""
    if name not in _CALLED:
        what = shortened(name.replace(" ", ".")) if name else "what is no function"
        raise _ProblemError(f"calls {what}, which no file of tensors does")
