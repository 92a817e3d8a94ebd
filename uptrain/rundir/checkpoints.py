"""Checkpoints of a run: complete, with the size of every file written down, or ignored."""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path

from ...convert.checkpoint.files import write_text

__all__ = ["MARKER_NAME", "finish_checkpoint", "last_complete", "remove_torn", "step_of"]


MARKER_NAME = "COMPLETE.json"
_KEPT = 2
_NAME = re.compile(r"checkpoint-\d+")  # others are copies that somebody made


def step_of(checkpoint: Path) -> int:
    """Read the number of optimizer steps from the name `checkpoint-N`."""
    return int(checkpoint.name.rpartition("-")[2])


def finish_checkpoint(checkpoint: Path) -> None:
    """Flush a checkpoint to the disk and mark it complete; then remove those before the last two.

    The marker holds the size in bytes of every file, since a crash of the machine may leave a file short.
    """
    sizes = {}
    for path in _files(checkpoint):
        with path.open("rb") as file:
            os.fsync(file.fileno())
        sizes[str(path.relative_to(checkpoint))] = path.stat().st_size
    write_text(checkpoint / MARKER_NAME, json.dumps(sizes, indent=2) + "\n")
    complete = [path for path in _checkpoints(checkpoint.parent) if _is_complete(path)]
    for old in complete[:-_KEPT]:
        (old / MARKER_NAME).unlink()  # first, so that one that is half removed is not taken for complete
        shutil.rmtree(old)


def last_complete(folder: Path) -> Path | None:
    """Find the newest complete checkpoint of a folder, if there is one."""
    return next((path for path in reversed(_checkpoints(folder)) if _is_complete(path)), None)


def remove_torn(folder: Path) -> list[Path]:
    """Remove checkpoints that are not complete; returns them."""
    torn = [path for path in _checkpoints(folder) if not _is_complete(path)]
    for path in torn:
        shutil.rmtree(path)
    return torn


def _checkpoints(folder: Path) -> list[Path]:
    named = (path for path in folder.glob("checkpoint-*") if _NAME.fullmatch(path.name) and path.is_dir())
    return sorted(named, key=step_of)


def _files(checkpoint: Path) -> list[Path]:
    return sorted(path for path in checkpoint.rglob("*") if path.is_file() and path.name != MARKER_NAME)


def _is_complete(checkpoint: Path) -> bool:
    try:
        sizes: dict[str, int] = json.loads((checkpoint / MARKER_NAME).read_text())
    except (OSError, ValueError):
        return False
    return sizes == {str(path.relative_to(checkpoint)): path.stat().st_size for path in _files(checkpoint)}
