"""The files of a checkpoint that go with its weights: tokenizer, generation config, chat template, licence."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from ..errors import DataError
from .output import CARD_NAME, PROVENANCE_NAME, write_text
from .tensors import CONFIG_NAME, INDEX_NAME
from .tokenizer import has_tokenizer, load_tokenizer

__all__ = ["copy_companions", "name_tokenizer"]

_WEIGHT_SUFFIXES = frozenset(
    {".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".onnx", ".gguf", ".ot", ".npz"}
)
# true of the source only: its card, its training
_NOT_COPIED = frozenset(
    {CONFIG_NAME, INDEX_NAME, CARD_NAME, "pytorch_model.bin.index.json", "metrics.jsonl", PROVENANCE_NAME}
)
_NOT_COPIED_PREFIXES = (".", "configuration_", "modeling_", "transformers_interface")
_COPIED_DIRECTORIES = ("additional_chat_templates",)


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


def copy_companions(source: Path, target: Path) -> list[str]:
    """Copy the files of `source` that go with its weights to `target`, byte for byte; returns their names.

    Not copied are weights, config.json, README.md and the code of the source's class, which cannot group heads.
    """
    copied = []
    for path in sorted(source.iterdir()):
        skipped = (
            path.suffix in _WEIGHT_SUFFIXES or path.name in _NOT_COPIED or path.name.startswith(_NOT_COPIED_PREFIXES)
        )
        if path.is_file() and not skipped:
            shutil.copyfile(path, target / path.name)
            copied.append(path.name)
        elif path.is_dir() and path.name in _COPIED_DIRECTORIES:
            shutil.copytree(path, target / path.name)
            copied.append(path.name)
    return copied
