"""T5, mT5, BART and Whisper: decoders with self- and cross-attention, whose classes have no grouped attention.

Only the config changes: the tensors of the grouped classes have the names that the stock classes give them.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from types import MappingProxyType
from typing import Any

from ..checkpoint.tensors import Checkpoint
from ..runtime import RUNTIME_CLASSES
from .common import same
from .translation import Derived, Translation

__all__ = ["BART_TO_GROUPED", "MT5_TO_GROUPED", "T5_TO_GROUPED", "WHISPER_TO_GROUPED"]


def _refusal(checkpoint: Checkpoint, *, class_names: tuple[str, ...]) -> str | None:
    saved_as = (checkpoint.full_config.get("architectures") or [class_names[0]])[0]
    if saved_as in class_names:
        return None
    return f"it is a {saved_as}; of this model_type only {class_names[0]} has a class with grouped attention"


def _config(checkpoint: Checkpoint, *, model_type: str, fixed: Mapping[str, Any]) -> dict[str, Any]:
    """The config of a grouped class.

    `fixed` are values that the source's class computes with, whatever its config says.
    """
    runtime = RUNTIME_CLASSES[model_type]
    config = {**checkpoint.full_config, **fixed}
    return config | {
        "architectures": [runtime.architecture],
        "auto_map": runtime.auto_map,
        "model_type": model_type,
        "num_key_value_heads": config.get("num_heads", config.get("decoder_attention_heads")),
    }


def _tensors(checkpoint: Checkpoint) -> dict[str, Derived]:
    return {name: same(checkpoint, name) for name in checkpoint.tensors}


def _translation(
    model_type: str,
    target: str,
    class_names: tuple[str, ...],
    *,
    fixed: Mapping[str, Any] = MappingProxyType({}),
) -> Translation:
    return Translation(
        model_type,
        target,
        partial(_config, model_type=target, fixed=fixed),
        _tensors,
        partial(_refusal, class_names=class_names),
    )


BART_TO_GROUPED = _translation("bart", "grouped_bart", ("BartForConditionalGeneration", "BartModel"))
MT5_TO_GROUPED = _translation(
    "mt5",
    "grouped_t5",
    ("MT5ForConditionalGeneration", "MT5Model"),
    # T5 divides the decoder's outputs by √d_model unless its config says this, mT5 never does
    fixed={"tie_word_embeddings": False},
)
T5_TO_GROUPED = _translation("t5", "grouped_t5", ("T5ForConditionalGeneration", "T5WithLMHeadModel", "T5Model"))
WHISPER_TO_GROUPED = _translation("whisper", "grouped_whisper", ("WhisperForConditionalGeneration", "WhisperModel"))
