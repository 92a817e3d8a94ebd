"""run_status.json: what became of a run, for whoever cannot see its exit code.

Launchers swallow exit codes: torchrun returns 1 whatever its processes returned.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from ...convert.checkpoint.output import write_text
from ...convert.errors import DivergedError, KvConvertError, PreemptedError

__all__ = ["STATUS_NAME", "RunStatus", "read_status", "status_of_error", "write_status"]


STATUS_NAME = "run_status.json"
_INTERRUPTED, _TERMINATED = 130, 143


@dataclass(frozen=True)
class RunStatus:
    """`state` is running, preempted, diverged, failed, interrupted or finished; `exit_code` is None while running.

    A run that was killed without a word is still "running": its process is gone.
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


def write_status(folder: Path, status: RunStatus) -> None:
    write_text(folder / STATUS_NAME, json.dumps(asdict(status), indent=2) + "\n")


def read_status(folder: Path) -> RunStatus | None:
    path = folder / STATUS_NAME
    return RunStatus(**json.loads(path.read_text())) if path.exists() else None


def status_of_error(status: RunStatus, error: BaseException) -> RunStatus:
    """The status of a run that `error` ended."""
    if isinstance(error, PreemptedError):
        state, exit_code = "preempted", error.exit_code
    elif isinstance(error, DivergedError):
        state, exit_code = "diverged", error.exit_code
    elif isinstance(error, KeyboardInterrupt):
        state, exit_code = "interrupted", _INTERRUPTED
    elif isinstance(error, SystemExit):
        state, exit_code = "interrupted", _TERMINATED
    else:
        state, exit_code = "failed", error.exit_code if isinstance(error, KvConvertError) else 1
    text = " ".join(str(error).split())
    reason = text if isinstance(error, KvConvertError) else f"{type(error).__name__}: {text}".removesuffix(": ")
    return replace(status, state=state, exit_code=exit_code, reason=reason)
