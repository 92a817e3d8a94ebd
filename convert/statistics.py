"""Gram matrices of attention inputs, measured once on calibration text and kept in a file."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from safetensors import SafetensorError, safe_open

from .checkpoint import Checkpoint, tensor_bytes
from .errors import DataError
from .output import disk_errors
from .writer import TensorSpec, write_safetensors

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["LayerStatistics", "StatisticsOrigin", "fingerprint", "open_statistics", "save_statistics"]

_METADATA_KEY = "kvconvert_statistics"


@dataclass(frozen=True)
class StatisticsOrigin:
    """What statistics were measured on: the model's fingerprint, the text, and how many tokens of it."""

    model: str
    data: str
    num_tokens: int


@dataclass(frozen=True)
class LayerStatistics:
    """`gram(layer)` is E[x xᵀ] of the attention's input x with a 1 appended, (hidden_size + 1,) * 2, float64."""

    origin: StatisticsOrigin
    gram: Callable[[int], Tensor]


def fingerprint(checkpoint: Checkpoint) -> str:
    """Equal for checkpoints with the same config and the same tensors, by name, dtype and shape."""
    tensors = sorted((name, info.dtype, info.shape) for name, info in checkpoint.tensors.items())
    text = json.dumps([checkpoint.config, tensors], sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def save_statistics(path: Path, statistics: LayerStatistics, *, num_layers: int, hidden_size: int) -> None:
    """Write them to a safetensors file, one layer in memory at a time. Raises OutputError."""
    specs = [TensorSpec(_name(layer), "F64", (hidden_size + 1, hidden_size + 1)) for layer in range(num_layers)]
    metadata = {_METADATA_KEY: json.dumps(asdict(statistics.origin))}
    partial = path.with_name(f".{path.name}.partial")
    try:
        with disk_errors(path):
            for layer, (_, file) in enumerate(write_safetensors(partial, specs, metadata)):
                file.write(tensor_bytes(statistics.gram(layer)))
            partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def open_statistics(path: Path, checkpoint: Checkpoint) -> LayerStatistics:
    """Statistics from a file, read layer by layer. Raises DataError if they are not of this checkpoint."""
    try:
        with safe_open(path, "pt") as file:
            record = json.loads((file.metadata() or {})[_METADATA_KEY])
    except FileNotFoundError as error:
        raise DataError(f"{path}: no such file") from error
    except (SafetensorError, OSError, KeyError, ValueError) as error:
        raise DataError(f"{path}: not a file of statistics", hint="--save-statistics writes one") from error
    origin = StatisticsOrigin(**record)
    if origin.model != fingerprint(checkpoint):
        raise DataError(
            f"{path}: these statistics are of another model than {checkpoint.name}",
            hint="measure them again, with --calibration and --save-statistics",
        )

    def gram(layer: int) -> Tensor:
        with safe_open(path, "pt") as file:
            tensor: Tensor = file.get_tensor(_name(layer))
        return tensor

    return LayerStatistics(origin, gram)


def _name(layer: int) -> str:
    return f"layers.{layer}.gram"
