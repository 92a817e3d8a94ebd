"""The original as uptraining can read it: in a class that it knows."""

from __future__ import annotations

from pathlib import Path

from ..convert.architectures.source import Source
from ..convert.architectures.table import known_architecture
from ..convert.checkpoint.tensors import Checkpoint
from ..convert.errors import UnsupportedError
from ..convert.execute import execute
from ..convert.methods.gqa import Gqa
from ..convert.translations.routes import targets
from .estimate.size import measure_size

__all__ = ["as_teacher", "copied_bytes", "write_teacher"]


def as_teacher(checkpoint: Checkpoint) -> Checkpoint:
    """Return a teacher in a class that can be trained towards: the checkpoint itself, or one that computes the same.

    That one tells packed documents apart, which classes such as OPT do not. Raises UnsupportedError if there is none.
    """
    if known_architecture(checkpoint.config.get("model_type")) is not None:
        return checkpoint
    refusal = None
    for view in targets(checkpoint):
        if isinstance(view, UnsupportedError):
            refusal = refusal or view
            continue
        architecture, config = view.architecture, view.checkpoint.full_config
        refusal_of_heads = architecture.heads_refusal(config, view.shape.num_key_value_heads)
        if architecture.separates_documents and refusal_of_heads is None:
            return view.checkpoint
    raise refusal or UnsupportedError(f"{checkpoint.name}: no class that uptrain knows holds it")


def copied_bytes(checkpoint: Checkpoint) -> int:
    """Count the bytes that `write_teacher` writes of a teacher that has to be in another class, 0 of any other."""
    return 0 if as_teacher(checkpoint) is checkpoint else measure_size(checkpoint).num_bytes


def write_teacher(checkpoint: Checkpoint, output: Path) -> None:
    """Write the checkpoint, all of its heads, in the class of `as_teacher`, to `output`, whole or not at all."""
    view = Source.of(as_teacher(checkpoint))
    same_heads = Gqa(view.shape.num_key_value_heads, allow_same=True)
    execute(same_heads.plan(view), view.checkpoint, output)
