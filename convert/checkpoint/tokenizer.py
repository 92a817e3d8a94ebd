"""The tokenizer that lies beside a checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import DataError, in_one_line, is_out_of_memory
from .remote_code import remote_code_allowed

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["has_tokenizer", "load_tokenizer"]

_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "vocab.json",
    "vocab.txt",
    "spiece.model",
    "tokenizer.tiktoken",
    "qwen.tiktoken",
)


def has_tokenizer(directory: Path) -> bool:
    """Return whether a directory holds the files of a tokenizer."""
    return any((directory / name).exists() for name in _TOKENIZER_FILES)


def load_tokenizer(model: str | Path) -> PreTrainedTokenizerBase:
    """Return the tokenizer beside a checkpoint, a directory or a hub id.

    Raises DataError where there is none or it cannot be loaded.
    """
    from transformers import AutoTokenizer

    directory = Path(model)
    if directory.is_dir() and not has_tokenizer(directory):
        raise DataError(
            f"{model}: no tokenizer ({', '.join(_TOKENIZER_FILES[:3])} …) beside the weights",
            hint="copy the tokenizer files of the original model into this directory",
        )
    try:
        place = directory if directory.is_dir() else str(model)
        return AutoTokenizer.from_pretrained(place, trust_remote_code=remote_code_allowed())
    except Exception as error:  # the files of a tokenizer can be wrong in more ways than its library has words for
        if is_out_of_memory(error):
            raise
        raise DataError(f"{model}: the tokenizer cannot be loaded ({in_one_line(error)})") from error
