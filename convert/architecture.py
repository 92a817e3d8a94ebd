"""What kvconvert must know about a `model_type`, and what a checkpoint says about its own attention."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from .checkpoint import Checkpoint, TensorInfo
from .errors import CheckpointError
from .layers import LayerGrouping

__all__ = ["Architecture", "AttentionShape", "HeadTensor", "Latent", "read_attention", "refuse_quantised"]

Config = Mapping[str, Any]

_OTHER_MODEL = "config.json and the weights belong to different models, or one of them was edited"


def no_sliding_window(config: Config, layer: int) -> bool:
    """For architectures whose layers all attend to the whole context."""
    return False


def every_layer_rotates(config: Any, layer: int) -> bool:
    """For architectures whose every layer has rotary positions."""
    return True


def no_layer_rotates(config: Any, layer: int) -> bool:
    """For architectures without rotary positions."""
    return False


def any_order(config: Config) -> bool:
    """For architectures whose heads may change places."""
    return False


def any_number(config: Config, num_key_value_heads: int) -> str | None:
    """For architectures that can have every number of K/V heads that divides the query heads."""
    return None


def refuse_quantised(config: Config) -> str | None:
    """Why a quantised checkpoint cannot be converted; None for others."""
    if config.get("quantization_config"):
        return "the checkpoint is quantised; convert the unquantised original, then quantise the result"
    return None


@dataclass(frozen=True)
class HeadTensor:
    """A tensor whose rows are heads, one after the other: first `num_query_heads` of them, then the K/V heads.

    `num_runs` says how often all K/V heads follow: twice where keys and values are in one tensor. `interleaved`: the
    rows are, for each K/V head, the query heads that read it, its key and its value. `is_norm` marks the gains of a
    norm.
    """

    name: str
    num_query_heads: int = 0
    num_runs: int = 1
    interleaved: bool = False
    is_norm: bool = False


@dataclass(frozen=True)
class Architecture:
    """Where the attention tensors of one `model_type` are, and how its config differs.

    `cross_attention` is where a decoder's second attention is, with the same names of projections. `qkv_proj` names
    the fused projection of an architecture that has one in place of q, k and v: rows [q; k; v], or, if `interleaved`,
    for each K/V head its query heads, key and value. `key_norm` names the norm of the projected keys, `{head}` in it a
    tensor per K/V head; where `always_normalised`, there is one without a tensor. `query_norm`, and `input_norm` before
    the attention, are asked for where layers share keys and values only.

    For merges that use what a model leaves free: `interleaved_rotary` has rotary pairs (2i, 2i + 1) in place of
    (i, i + half); `rotates(config, layer)`, given the class's config object, says whether a layer has rotary positions;
    not `free_values`: something other than a linear map lies between the heads' outputs and o_proj;
    `ordered_heads(config)`: what heads do depends on their position among the others.

    not `autocasts`: the class does not run under autocast. `latent`: keys and values are made of a cached latent (MLA).

    `separates_documents`: without an attention mask the class tells documents that share a sequence apart by their
    position_ids.

    `config_names` translates the usual names of config.json (a dot leads into a section). Where that is not enough,
    `read_heads(config)` gives the number of K/V heads, and `write_heads(config, number)` what the config of a result
    has otherwise. `refuse_heads(config, number)` says why the class cannot have so many, or None.
    `is_sliding(config, layer)` says whether a layer uses config's sliding_window when the config does not list
    `layer_types`.
    """

    model_type: str
    attention: str = "model.layers.{layer}.self_attn"
    cross_attention: str | None = None
    q_proj: str = "q_proj"
    k_proj: str = "k_proj"
    v_proj: str = "v_proj"
    o_proj: str = "o_proj"
    qkv_proj: str | None = None
    interleaved: bool = False
    key_norm: str | None = None
    query_norm: str | None = None
    input_norm: str = "input_layernorm"
    always_normalised: bool = False
    separates_documents: bool = True
    autocasts: bool = True
    latent: bool = False
    interleaved_rotary: bool = False
    rotates: Callable[[Any, int], bool] = every_layer_rotates
    free_values: bool = True
    ordered_heads: Callable[[Config], bool] = any_order
    config_names: Mapping[str, str] = field(default_factory=dict)
    read_heads: Callable[[Config], int] | None = None
    write_heads: Callable[[Config, int], Mapping[str, Any]] | None = None
    refuse_heads: Callable[[Config, int], str | None] = any_number
    is_sliding: Callable[[Config, int], bool] = no_sliding_window

    @property
    def attentions(self) -> tuple[str, ...]:
        """Where a layer's attention modules are: its self-attention and, in some decoders, its cross-attention."""
        return (self.attention,) if self.cross_attention is None else (self.attention, self.cross_attention)

    def tensor_name(self, layer: int, projection: str, kind: str = "weight", *, attention: str | None = None) -> str:
        """Full name of a projection ("q_proj", …, "o_proj", "qkv_proj") of a layer; kind is weight or bias.

        `attention` is one of `attentions`, the first unless given.
        """
        return f"{(attention or self.attention).format(layer=layer)}.{getattr(self, projection)}.{kind}"

    def input_norm_name(self, layer: int) -> str:
        """The gain of the norm before a layer's self-attention, where a class has it beside the attention."""
        return f"{self.attention.rpartition('.')[0].format(layer=layer)}.{self.input_norm}.weight"

    def config_name(self, name: str) -> str:
        return self.config_names.get(name, name)

    def result_config(self, config: Config, num_key_value_heads: int, head_dim: int) -> dict[str, Any]:
        """The config of a checkpoint with another number of K/V heads."""
        result: dict[str, Any] = copy.deepcopy(dict(config))
        if self.write_heads is not None:
            return {**result, **self.write_heads(config, num_key_value_heads)}
        result["head_dim"] = head_dim
        *sections, name = self.config_name("num_key_value_heads").split(".")
        section = result
        for part in sections:
            section = section[part]
        section[name] = num_key_value_heads
        return result

    def refusal(self, config: Config) -> str | None:
        """Why this checkpoint's configuration cannot be converted, or None."""
        if self.latent:
            return "its cache holds a latent, not keys and values"
        return refuse_quantised(config)

    def approximation(self, checkpoint: Checkpoint) -> str | None:
        """Why pooling is not a mean of what the heads compute, beyond being a mean of their weights; or None."""
        attention = self.attention.format(layer=0)
        normalised = self.key_norm and any(
            name.startswith(f"{attention}.{self.key_norm.split('.')[0]}.") for name in checkpoint.tensors
        )
        if normalised or self.always_normalised:
            return "keys are normalised after the projection: the norm of a mean is not the mean of the norms"
        if checkpoint.config_value(self.config_name("clip_qkv")) is not None:
            return "queries, keys and values are clipped after the projection"
        return None

    def key_value_tensors(self, checkpoint: Checkpoint, shape: AttentionShape, layer: int) -> list[HeadTensor]:
        """The tensors of a layer that hold one row, or one run of rows, per K/V head, in a single tensor each."""
        if self.qkv_proj is not None:
            candidates = [
                HeadTensor(
                    self.tensor_name(layer, "qkv_proj", kind, attention=attention),
                    shape.num_attention_heads,
                    num_runs=2,
                    interleaved=self.interleaved,
                )
                for attention in self.attentions
                for kind in ("weight", "bias")
            ]
        else:
            candidates = [
                HeadTensor(self.tensor_name(layer, projection, kind, attention=attention))
                for attention in self.attentions
                for projection in ("k_proj", "v_proj")
                for kind in ("weight", "bias")
            ]
        if self.key_norm is not None and "{head}" not in self.key_norm:
            for kind in ("weight", "bias"):
                name = self.tensor_name(layer, "key_norm", kind)
                if name in checkpoint.tensors and checkpoint.tensors[name].shape != (shape.head_dim,):
                    candidates.append(HeadTensor(name, is_norm=True))
        return [tensor for tensor in candidates if tensor.name in checkpoint.tensors]

    def key_norms_per_head(self, checkpoint: Checkpoint, shape: AttentionShape, layer: int) -> list[list[str]]:
        """Norms that have a tensor of their own per K/V head: for weight and bias, the names in the order of heads."""
        if self.key_norm is None or "{head}" not in self.key_norm:
            return []
        template = f"{self.attention}.{self.key_norm}"
        names = [
            [f"{template}.{kind}".format(layer=layer, head=head) for head in range(shape.num_key_value_heads)]
            for kind in ("weight", "bias")
        ]
        return [group for group in names if group[0] in checkpoint.tensors]


@dataclass(frozen=True)
class Latent:
    """The numbers of multi-head latent attention, as DeepSeek's config calls them."""

    kv_lora_rank: int
    qk_rope_head_dim: int
    qk_nope_head_dim: int
    v_head_dim: int

    @property
    def num_cached(self) -> int:
        """How many numbers a layer keeps of a token."""
        return self.kv_lora_rank + self.qk_rope_head_dim


@dataclass(frozen=True)
class AttentionShape:
    """The numbers of a model's attention, as its tensors and its config agree on them.

    `windows` holds, per layer, the sliding window in tokens or None for full attention. With `cross_attention` the
    cache holds as much again for each token of the encoder. `layer_grouping` says which layers share keys and values;
    without it each has its own. With `latent` the cache holds that and a rotary key in place of keys and values.
    """

    hidden_size: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    windows: tuple[int | None, ...]
    cross_attention: bool = False
    layer_grouping: LayerGrouping | None = None
    latent: Latent | None = None

    @property
    def cached_values(self) -> int:
        """How many numbers a layer with a cache of its own keeps there for a token."""
        if self.latent is not None:
            return self.latent.num_cached
        return 2 * self.num_key_value_heads * self.head_dim

    @property
    def num_hidden_layers(self) -> int:
        return len(self.windows)

    @property
    def key_value_windows(self) -> tuple[int | None, ...]:
        """The windows of the layers that have keys and values of their own, and so a cache."""
        if self.layer_grouping is None:
            return self.windows
        return tuple(self.windows[group[0]] for group in self.layer_grouping.groups)

    @property
    def num_key_value_layers(self) -> int:
        return len(self.key_value_windows)

    @property
    def kind(self) -> str:
        """The usual name: MHA, GQA or MQA, CLA where layers share keys and values, or MLA."""
        if self.latent is not None:
            return "MLA"
        if self.num_key_value_heads == self.num_attention_heads:
            heads = "MHA"
        else:
            heads = "MQA" if self.num_key_value_heads == 1 else "GQA"
        return heads if self.num_key_value_layers == self.num_hidden_layers else f"{heads} + CLA"


def read_attention(checkpoint: Checkpoint, architecture: Architecture) -> AttentionShape:
    """The checkpoint's attention shape, every layer's tensors checked against config.json.

    A config that omits num_key_value_heads or head_dim (they have defaults that differ by class and version) is
    completed from the tensors. Raises CheckpointError where a tensor is missing or contradicts the config.
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
    head_dim = checkpoint.config_int("head_dim", default=outputs.shape[1] // num_heads)
    if architecture.read_heads is not None:
        num_kv_heads = architecture.read_heads(checkpoint.config)
    else:
        num_kv_heads = checkpoint.config_int(
            architecture.config_name("num_key_value_heads"),
            default=_count_key_value_heads(checkpoint, architecture, num_heads, head_dim),
        )
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
    latent = Latent(*(checkpoint.config_int(field.name) for field in fields(Latent)))
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
    config = checkpoint.config
    layer_types = config.get("layer_types")
    if not config.get("sliding_window"):
        return (None,) * num_layers
    window = checkpoint.config_int("sliding_window")
    if layer_types:
        return tuple(window if kind == "sliding_attention" else None for kind in layer_types)
    return tuple(window if architecture.is_sliding(config, layer) else None for layer in range(num_layers))


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
        raise CheckpointError(
            f"layer {layer}: {name} is missing from {checkpoint.name}",
            hint="the checkpoint is incomplete, or config.json's num_hidden_layers or model_type is wrong",
        )
    return checkpoint.tensors[name]
