"""Where the last stage of a run starts from, as its work directory and its result say it."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from ...convert.checkpoint.files import write_text

__all__ = ["Start", "read_start", "write_start"]

_START_NAME = "start.json"


@dataclass(frozen=True)
class Start:
    """The divergence from the teacher that the last stage of a run starts with, and the peak rate that follows.

    The divergence is in nats per predicted token, and was measured on the first samples of the stage.
    """

    kl_nats_per_token: float
    peak_learning_rate: float


def read_start(work: Path) -> Start | None:
    """Read from a work directory where the run's last stage started; None where that is not measured."""
    path = work / _START_NAME
    return Start(**json.loads(path.read_text())) if path.exists() else None


def write_start(work: Path, start: Start) -> None:
    """Write into a work directory where the run's last stage starts."""
    write_text(work / _START_NAME, json.dumps(asdict(start)) + "\n")
