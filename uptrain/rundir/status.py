"""run_status.json: what became of a run, for whoever cannot see its exit code.

Launchers swallow exit codes: torchrun returns 1 whatever its processes returned.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from ...convert.checkpoint.files import write_text
from ...convert.checkpoint.output import disk_errors
from ...convert.errors import DivergedError, InputError, KvConvertError, PreemptedError, is_out_of_memory

__all__ = ["STATUS_NAME", "RunStatus", "StatusFile", "read_status", "status_of_error", "write_status"]

STATUS_NAME = "run_status.json"
_INTERRUPTED, _TERMINATED = 130, 143


@dataclass(frozen=True)
class RunStatus:
    """How far a run is, or how it ended.

    `state` is running, preempted, diverged, failed, interrupted or finished; `exit_code` is None while running. A run
    that was killed without a word is still "running": its process is gone.
    """

    state: str
    exit_code: int | None
    step: int
    steps: int
    tokens: int
    reason: str | None
    last_checkpoint: str | None
    resume_command: str
    process_id: int


class StatusFile:
    """The status of what goes on in a folder, kept up to date.

    `writes` is False in all processes of a run but the first. `note` receives each status that is written.
    """

    def __init__(
        self,
        folder: Path,
        *,
        steps: int,
        tokens_per_step: int,
        command: str,
        writes: bool,
        note: Callable[[RunStatus], object] = lambda status: None,
    ) -> None:
        self._folder = folder
        self._tokens_per_step = tokens_per_step
        self._writes = writes
        self._note = note
        self.now = RunStatus(
            state="running",
            exit_code=None,
            step=0,
            steps=steps,
            tokens=0,
            reason=None,
            last_checkpoint=None,
            resume_command=command,
            process_id=os.getpid(),
        )

    @property
    def finished(self) -> RunStatus:
        """The status of the end, with all steps done."""
        now = self._at(self.now.steps)
        return replace(now, state="finished", exit_code=0, last_checkpoint=None)

    def reach(self, step: int, checkpoint: Path | str | None = None) -> None:
        """Write how far the run is; without a checkpoint, the last one stays."""
        self.now = self._at(step) if checkpoint is None else replace(self._at(step), last_checkpoint=str(checkpoint))
        if self._writes:
            write_status(self._folder, self.now)
            self._note(self.now)

    def fail(self, error: BaseException) -> None:
        """Write how the run ended, if its folder is there; on a disk that is full, over the status that is there."""
        if not self._writes or not self._folder.exists():
            return
        status = status_of_error(self.now, _as_told(error, self._folder))
        try:
            write_status(self._folder, status)
        except OSError:
            with suppress(OSError):  # which must not hide the error
                _overwrite_status(self._folder, status)

    def _at(self, step: int) -> RunStatus:
        return replace(self.now, step=step, tokens=step * self._tokens_per_step)


def write_status(folder: Path, status: RunStatus) -> None:
    """Write a status into a folder."""
    write_text(folder / STATUS_NAME, json.dumps(asdict(status), indent=2) + "\n")


def _overwrite_status(folder: Path, status: RunStatus) -> None:
    """Write a status into the file that is there, whose block on the disk holds any status: none is asked for."""
    text = json.dumps(asdict(status), indent=2) + "\n"
    with (folder / STATUS_NAME).open("r+b") as file:
        file.write(text.encode())
        file.truncate()
        file.flush()
        os.fsync(file.fileno())


def _as_told(error: BaseException, folder: Path) -> BaseException:
    """The error that people are told of, which for one of the operating system is another."""
    try:
        with disk_errors(folder):
            raise error
    except BaseException as told:
        return told


def read_status(folder: Path) -> RunStatus | None:
    """Read the status in a folder, None if there is none."""
    path = folder / STATUS_NAME
    return RunStatus(**json.loads(path.read_text())) if path.exists() else None


def status_of_error(status: RunStatus, error: BaseException) -> RunStatus:
    """Make the status of a run that `error` ended."""
    if isinstance(error, PreemptedError):
        state, exit_code = "preempted", error.exit_code
    elif isinstance(error, DivergedError):
        state, exit_code = "diverged", error.exit_code
    elif isinstance(error, KeyboardInterrupt):
        state, exit_code = "interrupted", _INTERRUPTED
    elif isinstance(error, SystemExit):
        state, exit_code = "interrupted", _TERMINATED
    else:
        unusable = isinstance(error, KvConvertError) or is_out_of_memory(error)
        state, exit_code = "failed", getattr(error, "exit_code", InputError.exit_code) if unusable else 1
    text = " ".join(str(error).split())
    reason = text if isinstance(error, KvConvertError) else f"{type(error).__name__}: {text}".removesuffix(": ")
    return replace(status, state=state, exit_code=exit_code, reason=reason)
