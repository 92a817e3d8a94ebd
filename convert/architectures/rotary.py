"""How the keys of a checkpoint's layers rotate, as its class computes it."""

from __future__ import annotations

from typing import Any

from ..algebra.attention_shape import AttentionShape
from ..algebra.rotations import Rotary
from ..checkpoint.tensors import Checkpoint
from ..errors import UnsupportedError
from .architecture import Architecture

__all__ = ["read_rotary", "rotary_scaling", "score_scaling"]


def read_rotary(checkpoint: Checkpoint, architecture: Architecture, shape: AttentionShape, model: Any) -> list[Rotary]:
    """Return how the keys of each layer rotate, with the frequencies that its class computes.

    `model` is the checkpoint's class, of which buffers are read. Raises UnsupportedError for one that rotates keys and
    does not say how fast.
    """
    found = {name.rpartition("rotary_emb.")[2]: buffer for name, buffer in model.named_buffers()}
    kinds = getattr(model.config, "layer_types", None) or [""] * shape.num_hidden_layers
    context = checkpoint.config_int(architecture.config_name("max_position_embeddings"), default=2048)
    layers = []
    for layer, window in enumerate(shape.windows):
        buffer = found.get(f"{kinds[layer]}_inv_freq", found.get("inv_freq"))
        frequencies: tuple[float, ...] = ()
        if architecture.rotates(model.config, layer):
            if buffer is None:
                raise UnsupportedError(
                    f"{checkpoint.name}: {type(model).__name__} does not say how fast its keys rotate",
                    hint="take the mean of the heads instead",
                    settings=("merge",),
                )
            frequencies = tuple(buffer.tolist())
        longest = min(context, window or context)
        layers.append(Rotary(frequencies, architecture.interleaved_rotary, longest))
    return layers


def score_scaling(model: Any) -> float:
    """Return what the attention of a class multiplies the scores of queries and keys by."""
    return float(next(module.scaling for module in model.modules() if hasattr(module, "scaling")))


def rotary_scaling(model: Any) -> float:
    """Return what a class multiplies rotating queries and keys by beside rotating them: yarn's factor, or 1."""
    factors = (module.attention_scaling for module in model.modules() if hasattr(module, "attention_scaling"))
    return float(next(factors, 1.0))
