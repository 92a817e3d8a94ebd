"""What a work directory keeps of the text that a model is measured on."""

from __future__ import annotations

from collections.abc import Mapping
from hashlib import sha256
from typing import TYPE_CHECKING, Any

from ..checkpoint.overlay import Overlay
from ..checkpoint.tensors import tensor_bytes
from ..checkpoint.work_directory import WorkDirectory
from ..errors import InputError
from .statistics import LayerStatistics
from .text import CalibrationText

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["check_measurements", "keep_text", "kept_text"]

_PART, _FILE, _TOKEN_IDS = "text", "text.safetensors", "token_ids"


def keep_text(work: WorkDirectory, text: CalibrationText) -> CalibrationText:
    """Keep a text that took long to make, and return it."""
    Overlay(work.path).store({_TOKEN_IDS: text.token_ids}, _FILE)
    work.keep(_PART, text.description, [_FILE])
    return text


def kept_text(work: WorkDirectory) -> CalibrationText | None:
    """Return the text that an earlier run has kept, if there is one."""
    description = work.kept(_PART)
    return (
        None if description is None else CalibrationText(Overlay(work.path).read_file(_FILE)[_TOKEN_IDS], description)
    )


def check_measurements(
    work: WorkDirectory, measurements: CalibrationText | LayerStatistics | None, record: Mapping[str, Any]
) -> None:
    """Note what a text or statistics of one consist of; raise InputError where an earlier run has noted another.

    `record` is what the manifest says of them.
    """
    now = {
        "token_ids": _digest(measurements.token_ids) if isinstance(measurements, CalibrationText) else None,
        "statistics": record.get("statistics_file", {}).get("digest"),
    }
    was = work.kept(_PART)
    if was is None:
        work.keep(_PART, now)
    elif was != now:
        raise InputError(
            f"{work.path} was begun with another text than {record['data']} is now",
            hint="calibrate on the text that it was begun with, or choose another directory",
            settings=("work_dir",),
        )


def _digest(token_ids: Tensor) -> str:
    return sha256(f"{tuple(token_ids.shape)}".encode() + tensor_bytes(token_ids)).hexdigest()
