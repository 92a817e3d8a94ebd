"""The files of a checkpoint that are not weights: tokenizer, generation config, chat template, licence."""

from __future__ import annotations

import shutil
from pathlib import Path

from .checkpoint import CONFIG_NAME, INDEX_NAME
from .output import PROVENANCE_NAME

__all__ = ["copy_companions"]

_WEIGHT_SUFFIXES = frozenset(
    {".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".onnx", ".gguf", ".ot", ".npz"}
)
# true of the source only: its card, its training
_NOT_COPIED = frozenset(
    {CONFIG_NAME, INDEX_NAME, "README.md", "pytorch_model.bin.index.json", "metrics.jsonl", PROVENANCE_NAME}
)
_COPIED_DIRECTORIES = ("additional_chat_templates",)


def copy_companions(source: Path, target: Path) -> list[str]:
    """Copy every companion file byte for byte; returns their names. Weights, config.json and README.md stay behind."""
    copied = []
    for path in sorted(source.iterdir()):
        skipped = path.suffix in _WEIGHT_SUFFIXES or path.name in _NOT_COPIED or path.name.startswith(".")
        if path.is_file() and not skipped:
            shutil.copyfile(path, target / path.name)
            copied.append(path.name)
        elif path.is_dir() and path.name in _COPIED_DIRECTORIES:
            shutil.copytree(path, target / path.name)
            copied.append(path.name)
    return copied
