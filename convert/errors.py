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
]


class KvConvertError(Exception):
    """One line for a person, an optional hint that says what to do, and the exit code of the command."""

    exit_code = 1

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        super().__init__(message)
        self.hint = hint


class InputError(KvConvertError):
    exit_code = 2


class CheckpointError(InputError):
    pass


class UnsupportedError(InputError):
    pass


class OutputError(InputError):
    pass


class DataError(InputError):
    pass


class QualityGateError(KvConvertError):
    exit_code = 3


class DivergedError(KvConvertError):
    exit_code = 4


class PreemptedError(KvConvertError):
    exit_code = 75
