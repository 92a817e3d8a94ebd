"""The attention sizes of a checkpoint, read from its config and checked against its tensors."""

from __future__ import annotations

from dataclasses import fields

from ..algebra.attention_shape import AttentionShape, LatentSizes
from ..algebra.layer_grouping import LayerGrouping
from ..checkpoint.tensors import Checkpoint, TensorInfo
from ..errors import CheckpointError
from .architecture import Architecture

__all__ = ["read_attention"]

_OTHER_MODEL = "config.json and the weights belong to different models, or one of them was edited"


def read_attention(checkpoint: Checkpoint, architecture: Architecture) -> AttentionShape:
    """Return the sizes of the checkpoint's attention, after checking the shapes of every layer's tensors against them.

    Only headers are read. Where config.json leaves out num_key_value_heads or head_dim, whose defaults differ between
    classes and versions, they are taken from the tensors. Raises CheckpointError where a tensor is missing, or config
    and tensors disagree.
    """
    num_layers = checkpoint.config_int(architecture.config_name("num_hidden_layers"))
    num_heads = checkpoint.config_int(architecture.config_name("num_attention_heads"))
    if architecture.latent:
        return _read_latent_attention(checkpoint, architecture, num_layers, num_heads)
    outputs = _tensor(checkpoint, architecture, 0, "o_proj")  # (hidden_size, num_attention_heads · head_dim)
    if len(outputs.shape) != 2 or outputs.shape[1] % num_heads:
        raise CheckpointError(
            f"layer 0: {architecture.o_proj} has shape {list(outputs.shape)}, which does not split into config.json's "
            f"num_attention_heads = {num_heads} ({outputs.file})"
        )
    head_dim = outputs.shape[1] // num_heads
    if checkpoint.stated("head_dim") is not None:
        head_dim = checkpoint.config_int("head_dim")
    number = architecture.config_name("num_key_value_heads")
    if architecture.read_heads is not None:
        num_kv_heads = architecture.read_heads(checkpoint.full_config)
    elif checkpoint.stated(number) is not None:
        num_kv_heads = checkpoint.config_int(number)
    else:
        num_kv_heads = _count_key_value_heads(checkpoint, architecture, num_heads, head_dim)
    if num_heads % num_kv_heads:
        raise CheckpointError(
            f"{checkpoint.name}: num_attention_heads = {num_heads} is not a multiple of "
            f"num_key_value_heads = {num_kv_heads}"
        )
    shape = AttentionShape(
        hidden_size=outputs.shape[0],
        num_attention_heads=num_heads,
        num_key_value_heads=num_kv_heads,
        head_dim=head_dim,
        windows=_windows(checkpoint, architecture, num_layers),
        cross_attention=architecture.cross_attention is not None,
        layer_grouping=_layer_grouping(checkpoint, num_layers),
    )
    for layer in range(num_layers):
        for attention in architecture.attentions:
            _check_layer(checkpoint, architecture, shape, layer, attention)
    beyond = architecture.tensor_name(num_layers, "o_proj")
    if beyond in checkpoint.tensors:
        raise CheckpointError(f"{beyond} exists, but config.json says num_hidden_layers = {num_layers}")
    return shape


def _read_latent_attention(
    checkpoint: Checkpoint, architecture: Architecture, num_layers: int, num_heads: int
) -> AttentionShape:
    hidden_size = checkpoint.config_int("hidden_size")
    latent = LatentSizes(*(checkpoint.config_int(field.name) for field in fields(LatentSizes)))
    expected = {
        "kv_a_proj_with_mqa": (latent.kv_lora_rank + latent.qk_rope_head_dim, hidden_size),
        "kv_b_proj": (num_heads * (latent.qk_nope_head_dim + latent.v_head_dim), latent.kv_lora_rank),
        "o_proj": (hidden_size, num_heads * latent.v_head_dim),
    }
    for layer in range(num_layers):
        for projection, wanted in expected.items():
            name = f"{architecture.attention.format(layer=layer)}.{projection}.weight"
            info = _named(checkpoint, name, layer)
            if info.shape != wanted:
                raise CheckpointError(
                    f"layer {layer}: {projection} has shape {list(info.shape)}, config.json implies {list(wanted)} "
                    f"({info.file})",
                    hint=_OTHER_MODEL,
                )
    return AttentionShape(hidden_size, num_heads, num_heads, latent.v_head_dim, (None,) * num_layers, latent=latent)


def _layer_grouping(checkpoint: Checkpoint, num_layers: int) -> LayerGrouping | None:
    sources = checkpoint.config.get("kv_source_layers")
    if sources is None or sources == list(range(num_layers)):
        return None
    try:
        grouping = LayerGrouping(tuple(sources))
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{checkpoint.name}: config.json has a wrong kv_source_layers: {error}") from error
    if len(grouping.sources) != num_layers:
        raise CheckpointError(
            f"{checkpoint.name}: config.json has kv_source_layers for {len(grouping.sources)} layers, "
            f"and num_hidden_layers = {num_layers}"
        )
    return grouping


def _count_key_value_heads(checkpoint: Checkpoint, architecture: Architecture, num_heads: int, head_dim: int) -> int:
    if architecture.qkv_proj is None:
        rows = _tensor(checkpoint, architecture, 0, "k_proj").shape[0]
    else:
        rows = (_tensor(checkpoint, architecture, 0, "qkv_proj").shape[0] - num_heads * head_dim) // 2
    return max(rows // head_dim, 1)


def _windows(checkpoint: Checkpoint, architecture: Architecture, num_layers: int) -> tuple[int | None, ...]:
    config = checkpoint.full_config
    layer_types = config.get("layer_types")
    if not config.get("sliding_window"):
        return (None,) * num_layers
    window = checkpoint.config_int("sliding_window")
    if layer_types:
        return tuple(window if kind == "sliding_attention" else None for kind in layer_types)
    return (window if architecture.slides else None,) * num_layers


def _check_layer(
    checkpoint: Checkpoint, architecture: Architecture, shape: AttentionShape, layer: int, attention: str
) -> None:
    query_rows = shape.num_attention_heads * shape.head_dim
    kv_rows = shape.num_key_value_heads * shape.head_dim
    expected = {"o_proj": (shape.hidden_size, query_rows)}
    if architecture.qkv_proj is not None:
        expected["qkv_proj"] = (query_rows + 2 * kv_rows, shape.hidden_size)
    else:
        expected["q_proj"] = (query_rows, shape.hidden_size)
        if shape.layer_grouping is None or shape.layer_grouping.sources[layer] == layer:
            expected["k_proj"] = expected["v_proj"] = (kv_rows, shape.hidden_size)
    for projection, wanted in expected.items():
        info = _tensor(checkpoint, architecture, layer, projection, attention=attention)
        if info.shape != wanted:
            raise _contradiction(info, wanted, shape, layer, projection)
        bias = checkpoint.tensors.get(architecture.tensor_name(layer, projection, "bias", attention=attention))
        if bias is not None and bias.shape != wanted[:1]:
            raise _contradiction(bias, wanted[:1], shape, layer, f"{projection}.bias")


def _contradiction(
    info: TensorInfo, wanted: tuple[int, ...], shape: AttentionShape, layer: int, projection: str
) -> CheckpointError:
    if projection.startswith(("k_proj", "v_proj")) and info.shape[0] % shape.head_dim == 0:
        found = info.shape[0] // shape.head_dim
        if found != shape.num_key_value_heads:
            return CheckpointError(
                f"layer {layer}: {projection} has {found} heads, config.json says "
                f"num_key_value_heads = {shape.num_key_value_heads} ({info.file})",
                hint=_OTHER_MODEL,
            )
    return CheckpointError(
        f"layer {layer}: {projection} has shape {list(info.shape)}, config.json implies {list(wanted)} ({info.file})",
        hint=_OTHER_MODEL,
    )


def _tensor(
    checkpoint: Checkpoint, architecture: Architecture, layer: int, projection: str, *, attention: str | None = None
) -> TensorInfo:
    return _named(checkpoint, architecture.tensor_name(layer, projection, attention=attention), layer)


def _named(checkpoint: Checkpoint, name: str, layer: int) -> TensorInfo:
    if name not in checkpoint.tensors:
        file = checkpoint.original.unsaved.get(name)
        raise CheckpointError(
            f"layer {layer}: {name} is missing from {checkpoint.name}" + (f" (its index says: {file})" if file else ""),
            hint="the checkpoint is incomplete, or config.json's num_hidden_layers or model_type is wrong",
        )
    return checkpoint.tensors[name]
