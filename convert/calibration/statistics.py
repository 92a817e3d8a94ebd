"""Gram matrices of attention inputs, measured once on calibration text and kept in a file."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from safetensors import SafetensorError, safe_open

from ..algebra.attention_shape import AttentionShape
from ..architectures.source import Source
from ..checkpoint.input_files import require_regular
from ..checkpoint.staging import staged_file
from ..checkpoint.tensors import tensor_bytes
from ..checkpoint.writer import TensorSpec, write_safetensors
from ..errors import DataError

if TYPE_CHECKING:
    from torch import Tensor

__all__ = [
    "LayerStatistics",
    "StatisticsOrigin",
    "fingerprint",
    "open_statistics",
    "save_statistics",
    "statistics_bytes",
]

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


def fingerprint(source: Source) -> str:
    """Return 16 hexadecimal digits of a hash of the config, the tensors' names, dtypes and shapes, and all o_projs."""
    checkpoint, architecture = source.checkpoint, source.architecture
    tensors = sorted((name, info.dtype, info.shape) for name, info in checkpoint.tensors.items())
    digest = hashlib.sha256(json.dumps([checkpoint.config, tensors], sort_keys=True, default=str).encode())
    for layer in range(checkpoint.config_int(architecture.config_name("num_hidden_layers"))):
        digest.update(tensor_bytes(checkpoint.read(architecture.tensor_name(layer, "o_proj"))))
    return digest.hexdigest()[:16]


def statistics_bytes(shape: AttentionShape) -> int:
    """What a file of statistics takes, without its header."""
    return shape.num_hidden_layers * 8 * (shape.hidden_size + 1) ** 2


def save_statistics(path: Path, statistics: LayerStatistics, shape: AttentionShape) -> None:
    """Write them to a safetensors file, one layer in memory at a time. Raises OutputError."""
    specs = [TensorSpec(_name(layer), "F64", (shape.hidden_size + 1,) * 2) for layer in range(shape.num_hidden_layers)]
    metadata = {_METADATA_KEY: json.dumps(asdict(statistics.origin))}
    with staged_file(path) as file:
        for layer, _ in enumerate(write_safetensors(file, specs, metadata)):
            file.write(tensor_bytes(statistics.gram(layer)))


def open_statistics(path: Path, source: Source) -> LayerStatistics:
    """Statistics from a file, read layer by layer. Raises DataError if they are not of this checkpoint."""
    try:
        require_regular(path)
        with safe_open(path, "pt") as file:
            origin = StatisticsOrigin(**json.loads((file.metadata() or {})[_METADATA_KEY]))
    except FileNotFoundError as error:
        raise DataError(f"{path}: no such file") from error
    except (SafetensorError, OSError, KeyError, TypeError, ValueError, RecursionError) as error:
        raise DataError(
            f"{path}: not a file of statistics",
            hint="a conversion keeps one where that is asked for",
            settings=("save_statistics",),
        ) from error
    if origin.model != fingerprint(source):
        raise DataError(
            f"{path}: these statistics are of another model than {source.name}",
            hint="measure them again on a text",
            settings=("data", "save_statistics"),
        )

    def gram(layer: int) -> Tensor:
        with safe_open(path, "pt") as file:
            tensor: Tensor = file.get_tensor(_name(layer))
        return tensor

    return LayerStatistics(origin, gram)


def _name(layer: int) -> str:
    return f"layers.{layer}.gram"
