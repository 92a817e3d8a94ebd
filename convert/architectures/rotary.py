"""How the keys of a checkpoint's layers rotate, as its class computes it."""

from __future__ import annotations

from typing import Any

from ..algebra.attention_shape import AttentionShape
from ..algebra.rotations import Rotary
from ..checkpoint.tensors import Checkpoint
from ..errors import UnsupportedError
from .architecture import Architecture

__all__ = ["read_rotary"]


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
