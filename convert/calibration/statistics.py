"""Gram matrices of attention inputs, measured once on calibration text and kept in a file, with a text of its own."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
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
from .text import CalibrationText

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
_TOKEN_IDS = "text.token_ids"


@dataclass(frozen=True)
class StatisticsOrigin:
    """What statistics were measured on: the model's fingerprint, the text, and how many tokens of it."""

    model: str
    data: str
    num_tokens: int


@dataclass(frozen=True)
class LayerStatistics:
    """`gram(layer)` is E[x xᵀ] of the attention's input x with a 1 appended, (hidden_size + 1,) * 2, float64.

    `text` is the text that they were measured on, where it is kept with them.
    """

    origin: StatisticsOrigin
    gram: Callable[[int], Tensor]
    text: CalibrationText | None = None


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
    """Write them to a safetensors file, one layer in memory at a time, and their text. Raises OutputError."""
    specs = [TensorSpec(_name(layer), "F64", (shape.hidden_size + 1,) * 2) for layer in range(shape.num_hidden_layers)]
    tensors: list[Callable[[], Tensor]] = [partial(statistics.gram, layer) for layer in range(shape.num_hidden_layers)]
    if statistics.text is not None:
        ids = statistics.text.token_ids
        specs.append(TensorSpec(_TOKEN_IDS, "I64", tuple(ids.shape)))
        tensors.append(lambda: ids)
    metadata = {_METADATA_KEY: json.dumps(asdict(statistics.origin))}
    with staged_file(path) as file:
        for tensor, _ in zip(tensors, write_safetensors(file, specs, metadata), strict=True):
            file.write(tensor_bytes(tensor()))


def open_statistics(path: Path, source: Source) -> LayerStatistics:
    """Statistics from a file, read layer by layer. Raises DataError if they are not of this checkpoint."""
    try:
        require_regular(path)
        with safe_open(path, "pt") as file:
            origin = StatisticsOrigin(**json.loads((file.metadata() or {})[_METADATA_KEY]))
            has_text = _TOKEN_IDS in file.keys()  # noqa: SIM118, it is no dict
            token_ids = file.get_tensor(_TOKEN_IDS) if has_text else None
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

    return LayerStatistics(origin, gram, None if token_ids is None else CalibrationText(token_ids, origin.data))


def _name(layer: int) -> str:
    return f"layers.{layer}.gram"
