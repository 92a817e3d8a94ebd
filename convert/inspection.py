"""What a checkpoint is and what it can become, from its headers alone."""

from __future__ import annotations

from dataclasses import dataclass

from .architecture import Architecture, AttentionShape, read_attention
from .architectures import find_architecture
from .checkpoint import Checkpoint
from .kv_cache import kv_cache_bytes, kv_cache_bytes_per_token
from .serving import Serving, serving
from .translations import as_native

__all__ = ["Inspection", "Target", "inspect_checkpoint"]

_CACHE_VALUE_BYTES = 2


@dataclass(frozen=True)
class Target:
    """A conversion: possible (with the numbers of groups it takes), or the reason why not."""

    command: str
    possible: bool
    reason: str
    groups: tuple[int, ...] = ()


@dataclass(frozen=True)
class Inspection:
    """Cache figures are computed for 16-bit keys and values; a sliding window bounds the context."""

    model: str
    model_type: str
    converts_to: str
    attention: str
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    hidden_size: int
    num_parameters: int
    dtype: str
    size_on_disk_bytes: int
    cache_bytes_per_token: int
    context_length: int
    cache_bytes_for_context: int
    targets: tuple[Target, ...]
    approximation: str | None
    serving: tuple[Serving, ...]


def inspect_checkpoint(checkpoint: Checkpoint, *, context_length: int | None = None) -> Inspection:
    """Read headers and config; no weight is touched. `context_length` defaults to the longest the model takes.

    A class that has no grouped attention is inspected as what it converts to. Raises UnsupportedError for an unknown
    architecture, CheckpointError where config and tensors disagree.
    """
    source, checkpoint = checkpoint, as_native(checkpoint)
    architecture = find_architecture(checkpoint)
    shape = read_attention(checkpoint, architecture)
    context = context_length or checkpoint.config_int(architecture.config_name("max_position_embeddings"), default=2048)
    return Inspection(
        model=checkpoint.name,
        model_type=str(source.config["model_type"]),
        converts_to=architecture.model_type,
        attention=shape.kind,
        num_hidden_layers=shape.num_hidden_layers,
        num_attention_heads=shape.num_attention_heads,
        num_key_value_heads=shape.num_key_value_heads,
        head_dim=shape.head_dim,
        hidden_size=shape.hidden_size,
        num_parameters=checkpoint.num_parameters,
        dtype=checkpoint.dtype,
        size_on_disk_bytes=source.size_on_disk_bytes,
        cache_bytes_per_token=kv_cache_bytes_per_token(
            num_layers=shape.num_hidden_layers,
            num_key_value_heads=shape.num_key_value_heads,
            head_dim=shape.head_dim,
            bytes_per_value=_CACHE_VALUE_BYTES,
        ),
        context_length=context,
        cache_bytes_for_context=kv_cache_bytes(
            context,
            windows=shape.windows,
            num_key_value_heads=shape.num_key_value_heads,
            head_dim=shape.head_dim,
            bytes_per_value=_CACHE_VALUE_BYTES,
        ),
        targets=_targets(checkpoint, architecture, shape),
        approximation=architecture.approximation(checkpoint),
        serving=serving(architecture.model_type),
    )


def _targets(checkpoint: Checkpoint, architecture: Architecture, shape: AttentionShape) -> tuple[Target, ...]:
    refusal = architecture.refusal(checkpoint.config)
    if refusal:
        return Target("mha2gqa", False, refusal), Target("mha2mqa", False, refusal)
    heads = shape.num_key_value_heads
    step = 2 if architecture.even_key_value_heads else 1
    groups = tuple(n for n in range(2, heads, step) if heads % n == 0)
    if architecture.only_one_or_all and heads > 1:
        gqa = Target("mha2gqa", False, f"its native class, {architecture.model_type}, takes one K/V head only")
    elif groups:
        gqa = Target("mha2gqa", True, f"--groups {' or '.join(map(str, groups))}", groups)
    elif heads == 1:
        gqa = Target("mha2gqa", False, "the model has one K/V head already")
    else:
        gqa = Target("mha2gqa", False, f"{heads} K/V heads have no divisor between 1 and {heads}")
    if heads == 1:
        return gqa, Target("mha2mqa", False, "the model is MQA already")
    if architecture.even_key_value_heads:
        return gqa, Target("mha2mqa", False, f"{architecture.model_type} needs an even number of K/V heads")
    return gqa, Target("mha2mqa", True, f"{heads} K/V heads become 1", (1,))
