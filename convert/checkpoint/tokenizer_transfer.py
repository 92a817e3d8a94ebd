"""A tokenizer that goes beside a checkpoint of another class than its own model's."""

from __future__ import annotations

import json
from pathlib import Path

from ..errors import DataError
from .output import write_text
from .tokenizer import has_tokenizer, load_tokenizer

__all__ = ["name_tokenizer"]


def name_tokenizer(source: Path, target: Path) -> None:
    """Write into `target` what the tokenizer's files in `source` leave to the `model_type`, which `target` changes.

    That is the tokenizer's class and special tokens, and tokenizer.json where there are only a vocabulary and merges.
    The files of a tokenizer that cannot be loaded stay as they were copied.
    """
    path = target / "tokenizer_config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        if "tokenizer_class" in config or not has_tokenizer(source):
            return
        tokenizer = load_tokenizer(source)
    except (DataError, ValueError):
        return
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None and not (target / "tokenizer.json").exists():
        backend.save(str(target / "tokenizer.json"))
    tokens = {name: str(token) for name, token in tokenizer.special_tokens_map.items() if isinstance(token, str)}
    config = tokens | config | {"tokenizer_class": type(tokenizer).__name__}
    write_text(path, json.dumps(config, indent=2, ensure_ascii=False) + "\n")
