"""What kvconvert must know about a `model_type`, and what a checkpoint says about its own attention."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from ..algebra.attention_shape import AttentionShape
from ..checkpoint.tensors import Checkpoint

__all__ = ["Architecture", "HeadTensor", "quantised_refusal"]

Config = Mapping[str, Any]


def no_sliding_window(config: Config, layer: int) -> bool:
    """For architectures whose layers all attend to the whole context."""
    return False


def every_layer_rotates(config: Any, layer: int) -> bool:
    """For architectures whose every layer has rotary positions."""
    return True


def no_layer_rotates(config: Any, layer: int) -> bool:
    """For architectures without rotary positions."""
    return False


def unordered_heads(config: Config) -> bool:
    """For architectures whose heads may change places."""
    return False


def any_number(config: Config, num_key_value_heads: int) -> str | None:
    """For architectures that can have every number of K/V heads that divides the query heads."""
    return None


def quantised_refusal(config: Config) -> str | None:
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
    qkv_interleaved: bool = False
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
    has otherwise. `heads_refusal(config, number)` says why the class cannot have so many, or None.
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
    qkv_interleaved: bool = False
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
    ordered_heads: Callable[[Config], bool] = unordered_heads
    config_names: Mapping[str, str] = field(default_factory=dict)
    read_heads: Callable[[Config], int] | None = None
    write_heads: Callable[[Config, int], Mapping[str, Any]] | None = None
    heads_refusal: Callable[[Config, int], str | None] = any_number
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
        return quantised_refusal(config)

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
                    qkv_interleaved=self.qkv_interleaved,
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
