"""Errors for people, and the exit code of each.

KvConvertError            1
├── InputError            2   unusable input: arguments, checkpoint, data, output place
│   ├── CheckpointError       a checkpoint that is missing, damaged or contradicts itself
│   ├── UnsupportedError      a checkpoint or request that is sound but cannot be converted
│   ├── OutputError           a place that cannot be written
│   └── DataError             text that is missing, empty or too short
├── QualityGateError      3   a quality gate failed; the artefacts are kept
├── DivergedError         4   training produced a non-finite loss or gradient
└── PreemptedError        75  training was told to stop, saved, and can be resumed
"""

import re

__all__ = [
    "CheckpointError",
    "DataError",
    "DivergedError",
    "InputError",
    "KvConvertError",
    "OutputError",
    "PreemptedError",
    "QualityGateError",
    "UnsupportedError",
    "first_line",
    "in_one_line",
    "is_out_of_memory",
]


class KvConvertError(Exception):
    """One line for a person, an optional hint that says what to do, and the exit code of the command.

    `settings` names the arguments or fields that the hint asks to set, as the library spells them (`text_field`). A
    caller with another spelling, such as the command line with its options, adds its own.
    """

    exit_code = 1

    def __init__(self, message: str, *, hint: str | None = None, settings: tuple[str, ...] = ()) -> None:
        super().__init__(message)
        self.hint = hint
        self.settings = settings


class InputError(KvConvertError):
    """Unusable input: an argument, a checkpoint, a text, or a place for the output."""

    exit_code = 2


class CheckpointError(InputError):
    """A checkpoint that is missing or damaged, or contradicts itself."""


class UnsupportedError(InputError):
    """A checkpoint or request that is sound and cannot be converted or trained."""


class OutputError(InputError):
    """A place that cannot be written."""


class DataError(InputError):
    """A text or tokenizer that is missing, unreadable, empty or too short."""


class QualityGateError(KvConvertError):
    """A quality gate that a result did not pass; the result is kept."""

    exit_code = 3


class DivergedError(KvConvertError):
    """A training run whose loss or gradient became infinite or not a number."""

    exit_code = 4


class PreemptedError(KvConvertError):
    """A training run that was told to stop, saved its state, and can be resumed."""

    exit_code = 75


def first_line(error: BaseException) -> str:
    """Return the first line of an exception's message, or the name of its class where it has no message."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def in_one_line(error: BaseException, *, max_characters: int = 200) -> str:
    """Return the class and the whole message of an exception as one line, cut to `max_characters`.

    Shapes in it are written as lists, `[64, 32]`, however the library spells them.
    """
    text = re.sub(r"torch\.Size\((\[[\d, ]*\])\)", r"\1", f"{type(error).__name__}: {error}")
    return " ".join(text.split())[:max_characters]


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether memory ran out: Python's own error, torch's for an accelerator, or torch's for the CPU.

    torch is not imported: its class is known by name, and its error on the CPU is a RuntimeError known by its text.
    """
    names = {base.__name__ for base in type(error).__mro__}
    on_cpu = "DefaultCPUAllocator: can't allocate memory" in str(error)
    return on_cpu or bool(names & {"MemoryError", "OutOfMemoryError"})
