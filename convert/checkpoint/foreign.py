"""What people give in place of a checkpoint that transformers opens: what it is, and what to do with it."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from .layout import Listing

__all__ = ["cached_repository", "explanation", "file_explanation", "wrapped_names"]

_ADAPTER_NAME = "adapter_config.json"
_REPOSITORY = re.compile(r"models--(?P<id>.+)")
_SNAPSHOTS = "snapshots"
_MERGE = "load its base model, merge the adapter (peft's merge_and_unload), save the result, and convert that"


@dataclass(frozen=True)
class _Sign:
    """A pattern of names that shows what something is, and what to do with it."""

    pattern: str
    what: str
    remedy: str


# of files and folders; the first that fits is said
_CONTENTS = (
    _Sign(
        r".*\.gguf",
        "GGUF, which is for llama.cpp and mostly quantised",
        "give the checkpoint that it was made from; llama.cpp makes a GGUF file of the result",
    ),
    _Sign(
        r"consolidated\..*",
        "weights in the format of the publisher's own code",
        "give the checkpoint for transformers, or make it with the convert_*_weights_to_hf.py of transformers",
    ),
    _Sign(
        r"zero_to_fp32\.py|global_step\d+",
        "a checkpoint of DeepSpeed",
        "make safetensors files with its zero_to_fp32.py (safe_serialization), and put config.json beside them",
    ),
    _Sign(
        r".*\.distcp|shard-\d{5}-model-.*\.safetensors|pytorch_model_fsdp_\d+",
        "a distributed checkpoint",
        "load it with the code that saved it, and save the model whole with save_pretrained",
    ),
    _Sign(
        r"(model|pytorch_model)(-\d+-of-\d+)?\.(?!safetensors|bin)[\w-]+(-\d+-of-\d+)?\.(safetensors|bin)",
        "weights of a variant, which transformers opens only where it is asked for",
        "open it with transformers and its `variant`, and save it without",
    ),
    _Sign(
        r".*\.(msgpack|h5)",
        "weights for Flax or TensorFlow",
        "open it with transformers 4, which reads them, and save it for PyTorch",
    ),
    _Sign(r".*\.nemo|model_weights", "a checkpoint of NeMo", "export it for transformers with NeMo, and give that"),
)
# of tensors: what training wraps a model in
_WRAPPERS = (
    _Sign(r"(.*\.)?_orig_mod\.", "torch.compile", "save the model inside, `model._orig_mod.save_pretrained(…)`"),
    _Sign(r"(.*\.)?(_fsdp_wrapped_module|_checkpoint_wrapped_module)\.", "FSDP", "save it with a full state dict"),
    _Sign(r"(.*\.)?(lora_[AB]|lora_embedding_[AB]|base_layer)(\.|$)", "peft", _MERGE),
    _Sign(r"base_model\.model\.", "peft", "save the model inside, `model.merge_and_unload().save_pretrained(…)`"),
    _Sign(r"module\.", "DataParallel or DeepSpeed", "save the model inside, `model.module.save_pretrained(…)`"),
    _Sign(r"pretrained_model\.", "TRL", "save the model inside, `model.pretrained_model.save_pretrained(…)`"),
)


def explanation(listing: Listing, folders: Iterable[str] = ()) -> tuple[str, str] | None:
    """Return what a directory or repository without usable config or weights is, and what to do; None if nobody knows.

    `folders` are the names of the folders in it.
    """
    if listing.has(_ADAPTER_NAME):
        base = listing.read_json(_ADAPTER_NAME).get("base_model_name_or_path")
        return "holds an adapter, as of LoRA" + (f" for {base}" if base else "") + ", and no model", _MERGE
    found = _first_sign(sorted((*listing.names, *folders)))
    if found is not None:
        name, sign = found
        return f"holds {name}: {sign.what}", sign.remedy
    steps = [name for name in folders if re.fullmatch(r"checkpoint-\d+", name)]
    if steps:
        last = max(steps, key=lambda name: int(name.rpartition("-")[2]))
        remedy = f"give one of them, for example {listing.place}/{last}"
        return f"holds {len(steps)} checkpoints of a training run, and no model", remedy
    return None


def file_explanation(name: str) -> tuple[str, str] | None:
    """Return what a single file is by its name, and what to do; None if nobody knows."""
    found = _first_sign([name])
    return None if found is None else (found[1].what, found[1].remedy)


def _first_sign(names: Sequence[str]) -> tuple[str, _Sign] | None:
    """The first sign of `_CONTENTS` that one of the names is, and the name."""
    signs = ((name, sign) for sign in _CONTENTS for name in names if re.fullmatch(sign.pattern, name))
    return next(signs, None)


def cached_repository(path: Path) -> tuple[str, str | None] | None:
    """Return the hub id whose cache a directory is, and the commit where it is a snapshot; None for any other."""
    parts = Path(path).absolute().parts
    for index, part in enumerate(parts):
        found = _REPOSITORY.fullmatch(part)
        if found and (Path(*parts[: index + 1]) / _SNAPSHOTS).is_dir():
            below = parts[index + 1 :]
            commit = below[1] if len(below) > 1 and below[0] == _SNAPSHOTS else None
            return found["id"].replace("--", "/", 1), commit
    return None


def wrapped_names(names: Iterable[str]) -> tuple[str, str] | None:
    """Return what is wrong with names of tensors that training has wrapped, and what to do; None for usual names."""
    for name in names:
        for sign in _WRAPPERS:
            if re.match(sign.pattern, name):
                return f"its tensors are named as {sign.what} wraps a model, for example {name}", sign.remedy
    return None
