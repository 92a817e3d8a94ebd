"""How long a context a model takes."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..checkpoint.loading import quiet_transformers
from ..checkpoint.remote_code import remote_code_allowed
from ..errors import CheckpointError, UnsupportedError, in_one_line

__all__ = ["check_context", "context_of", "longest_context"]

# what configs call it, where a class does not map its own name to the first one
_NAMES = (
    "max_position_embeddings",
    "n_positions",
    "max_seq_len",
    "seq_length",
    "max_target_positions",
    "max_sequence_length",
    "model_max_length",
    "n_ctx",
)
# kinds of RoPE whose config.json has the length before scaling, a factor further than which the model sees
_STRETCHED = frozenset({"linear", "dynamic", "ntk", "yarn"})


def longest_context(directory: str | Path) -> int | None:
    """Read from the config beside a checkpoint how many tokens a sequence may have; None where nothing limits it.

    What config.json leaves out is the class's default. Raises CheckpointError for a config that cannot be read.
    """
    from transformers import AutoConfig

    try:
        with quiet_transformers():
            config = AutoConfig.from_pretrained(directory, trust_remote_code=remote_code_allowed())
    except Exception as error:  # a config can be wrong in more ways than transformers has words for
        raise CheckpointError(f"{directory}: transformers cannot read its config ({in_one_line(error)})") from error
    return context_of(config.get_text_config(decoder=True).to_dict())


def context_of(config: Mapping[str, Any]) -> int | None:
    """Tell how many tokens a sequence may have, from the values of a text config; None where nothing limits it.

    RoPE that is stretched by a factor beyond its original length reaches so much further, where all layers have the
    same. Kinds that are not stretched so, such as llama3 and longrope, have the stretched length in the config already.
    """
    length = next((config[name] for name in _NAMES if isinstance(config.get(name), int) and config[name] > 0), None)
    if length is None:
        return None
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    kind, factor = rope.get("rope_type", rope.get("type")), rope.get("factor")
    if kind not in _STRETCHED or not isinstance(factor, int | float) or factor <= 1:
        return int(length)
    original = rope.get("original_max_position_embeddings")
    stretched = factor * (original if isinstance(original, int) else length)
    return max(int(length), int(stretched))


def check_context(longest: int | None, length: int, *, name: str, what: str) -> None:
    """Raise UnsupportedError if a length in tokens, `what` in words, is more than the `longest` that a model takes."""
    if longest is not None and length > longest:
        raise UnsupportedError(
            f"{what} {length} does not fit {name} (it takes {longest} tokens)",
            hint=f"use {longest} or less",
            settings=("window", "sequence_length"),
        )
