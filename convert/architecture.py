"""What kvconvert must know about a `model_type`, and what a checkpoint says about its own attention."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from .checkpoint import Checkpoint, TensorInfo
from .errors import CheckpointError, UnsupportedError

__all__ = ["Architecture", "AttentionShape", "read_attention"]

Config = Mapping[str, Any]


def no_sliding_window(config: Config, layer: int) -> bool:
    """For architectures whose layers all attend to the whole context."""
    return False


@dataclass(frozen=True)
class Architecture:
    """Where the attention tensors of one `model_type` are, and when its checkpoints cannot be converted.

    `refused_if` maps a config flag to the reason why a checkpoint that sets it is refused. `is_sliding(config, layer)`
    says whether a layer uses config's sliding_window when the config does not list `layer_types`.
    """

    model_type: str
    attention: str = "model.layers.{layer}.self_attn"
    q_proj: str = "q_proj"
    k_proj: str = "k_proj"
    v_proj: str = "v_proj"
    o_proj: str = "o_proj"
    refused_if: Mapping[str, str] = field(default_factory=dict)
    is_sliding: Callable[[Config, int], bool] = no_sliding_window

    def tensor_name(self, layer: int, projection: str, kind: str = "weight") -> str:
        """Full name of a projection ("q_proj", "k_proj", "v_proj", "o_proj") of a layer; kind is weight or bias."""
        return f"{self.attention.format(layer=layer)}.{getattr(self, projection)}.{kind}"

    def refusal(self, config: Config) -> str | None:
        """Why this checkpoint's configuration cannot be converted, or None."""
        if config.get("quantization_config"):
            return "the checkpoint is quantised; convert the unquantised original, then quantise the result"
        for flag, reason in self.refused_if.items():
            if config.get(flag):
                return reason
        return None


@dataclass(frozen=True)
class AttentionShape:
    """The numbers of a model's attention, as its tensors and its config agree on them.

    `windows` holds, per layer, the sliding window in tokens or None for full attention.
    """

    hidden_size: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    windows: tuple[int | None, ...]

    @property
    def num_hidden_layers(self) -> int:
        return len(self.windows)

    @property
    def kind(self) -> str:
        """The usual name: MHA, GQA or MQA."""
        if self.num_key_value_heads == self.num_attention_heads:
            return "MHA"
        return "MQA" if self.num_key_value_heads == 1 else "GQA"

    def with_key_value_heads(self, num_key_value_heads: int) -> AttentionShape:
        return replace(self, num_key_value_heads=num_key_value_heads)


def read_attention(checkpoint: Checkpoint, architecture: Architecture) -> AttentionShape:
    """The checkpoint's attention shape, every layer's tensors checked against config.json.

    A config that omits num_key_value_heads or head_dim (they have defaults that differ by class and version) is
    completed from the tensors. Raises CheckpointError where a tensor is missing or contradicts the config.
    """
    num_layers = checkpoint.config_int("num_hidden_layers")
    num_heads = checkpoint.config_int("num_attention_heads")
    queries = _tensor(checkpoint, architecture, 0, "q_proj")
    keys = _tensor(checkpoint, architecture, 0, "k_proj")
    if len(queries.shape) != 2 or queries.shape[0] % num_heads:
        raise CheckpointError(
            f"layer 0: q_proj has shape {list(queries.shape)}, which does not split into config.json's "
            f"num_attention_heads = {num_heads} ({queries.file})"
        )
    head_dim = checkpoint.config_int("head_dim", default=queries.shape[0] // num_heads)
    num_kv_heads = checkpoint.config_int("num_key_value_heads", default=max(keys.shape[0] // head_dim, 1))
    if num_heads % num_kv_heads:
        raise CheckpointError(
            f"{checkpoint.name}: num_attention_heads = {num_heads} is not a multiple of "
            f"num_key_value_heads = {num_kv_heads}"
        )
    shape = AttentionShape(
        hidden_size=queries.shape[1],
        num_attention_heads=num_heads,
        num_key_value_heads=num_kv_heads,
        head_dim=head_dim,
        windows=_windows(checkpoint, architecture, num_layers),
    )
    for layer in range(num_layers):
        _check_layer(checkpoint, architecture, shape, layer)
    beyond = architecture.tensor_name(num_layers, "k_proj")
    if beyond in checkpoint.tensors:
        raise CheckpointError(f"{beyond} exists, but config.json says num_hidden_layers = {num_layers}")
    return shape


def _windows(checkpoint: Checkpoint, architecture: Architecture, num_layers: int) -> tuple[int | None, ...]:
    config = checkpoint.config
    layer_types = config.get("layer_types")
    if not config.get("sliding_window"):
        return (None,) * num_layers
    window = checkpoint.config_int("sliding_window")
    if layer_types:
        return tuple(window if kind == "sliding_attention" else None for kind in layer_types)
    return tuple(window if architecture.is_sliding(config, layer) else None for layer in range(num_layers))


def _check_layer(checkpoint: Checkpoint, architecture: Architecture, shape: AttentionShape, layer: int) -> None:
    query_rows = shape.num_attention_heads * shape.head_dim
    kv_rows = shape.num_key_value_heads * shape.head_dim
    expected = {
        "q_proj": (query_rows, shape.hidden_size),
        "k_proj": (kv_rows, shape.hidden_size),
        "v_proj": (kv_rows, shape.hidden_size),
        "o_proj": (shape.hidden_size, query_rows),
    }
    for projection, wanted in expected.items():
        info = _tensor(checkpoint, architecture, layer, projection)
        if info.shape != wanted:
            raise _contradiction(info, wanted, shape, layer, projection)
        bias = checkpoint.tensors.get(architecture.tensor_name(layer, projection, "bias"))
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
                hint="config.json and the weights belong to different models, or one of them was edited",
            )
    return CheckpointError(
        f"layer {layer}: {projection} has shape {list(info.shape)}, config.json implies {list(wanted)} ({info.file})",
        hint="config.json and the weights belong to different models, or one of them was edited",
    )


def _tensor(checkpoint: Checkpoint, architecture: Architecture, layer: int, projection: str) -> TensorInfo:
    name = architecture.tensor_name(layer, projection)
    if name not in checkpoint.tensors:
        fused = architecture.attention.format(layer=layer) + ".qkv_proj.weight"
        if fused in checkpoint.tensors:
            raise UnsupportedError(f"{fused}: fused q/k/v projections are not supported by this version")
        raise CheckpointError(
            f"layer {layer}: {name} is missing from {checkpoint.name}",
            hint="the checkpoint is incomplete, or config.json's num_hidden_layers or model_type is wrong",
        )
    return checkpoint.tensors[name]
