"""What kvconvert must know of a `model_type`: where its attention tensors are, and how its config and class differ."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from ..algebra.attention_shape import AttentionShape
from ..checkpoint.tensors import Checkpoint

__all__ = ["Architecture", "HeadTensor"]

Config = Mapping[str, Any]


def every_layer_rotates(config: Any, layer: int) -> bool:
    """Return True: every layer has rotary positions. The default of `Architecture.rotates`."""
    return True


def no_layer_rotates(config: Any, layer: int) -> bool:
    """Return False: no layer has rotary positions."""
    return False


def unordered_heads(config: Config) -> bool:
    """Return False: heads compute the same in any order. The default of `Architecture.ordered_heads`."""
    return False


def any_number(config: Config, num_key_value_heads: int) -> str | None:
    """Return None: every number of K/V heads that divides the query heads is possible."""
    return None


@dataclass(frozen=True)
class HeadTensor:
    """A tensor whose rows are heads one after the other: first `num_query_heads` query heads, then all K/V heads.

    All K/V heads follow `num_runs` times: twice where keys and values are in one tensor. Where `qkv_interleaved`, the
    rows are in another order: for each K/V head the query heads that read it, then its key, then its value. `is_norm`
    marks the gains of a norm, which are one row per head too.
    """

    name: str
    num_query_heads: int = 0
    num_runs: int = 1
    qkv_interleaved: bool = False
    is_norm: bool = False


@dataclass(frozen=True)
class Architecture:
    """A `model_type`: where its attention tensors are, how its config differs from the usual one, what its class does.

    **Tensors.** `attention` is the module of a layer's self-attention, and `cross_attention` that of a decoder's second
    attention, whose projections have the same names. `qkv_proj` names the fused projection of a class that has one in
    place of q_proj, k_proj and v_proj; its rows are [q; k; v], or, where `qkv_interleaved`, for each K/V head its query
    heads, its key and its value. `key_norm` names the norm of the projected keys; with `{head}` in the name there is
    one tensor per K/V head. A class that normalises keys without a tensor is `always_normalised`. `query_norm`, and
    `input_norm` before the attention, are used only where layers come to share keys and values.

    **Computation.** `rotates(config, layer)`, which gets the class's config object, says whether a layer has rotary
    positions; their pairs are dims (2i, 2i + 1) where `interleaved_rotary`, else (i, i + half). Where `free_values` is
    False, something other than a linear map lies between the heads' outputs and o_proj, so that values cannot be
    merged in closed form. `ordered_heads(config)` says whether what a head does depends on its number (ALiBi), so that
    heads cannot be reordered. Where `latent`, keys and values are made of a cached latent (MLA).

    **Training.** A class that cannot run under autocast has `autocasts` False. Where `separates_documents`, the class
    tells documents that share a sequence apart by position_ids that restart, without an attention mask.

    **Config.** `config_names` translates the usual names of config.json; a dot leads into a section. Where that does
    not do, `read_heads(config)` gives the number of K/V heads and `write_heads(config, number)` the entries that change
    for another number. `heads_refusal(config, number)` says why the class cannot have so many, or returns None. Where
    `sets_head_dim` is False, the class computes the size of its heads of other entries than head_dim.
    Where the config has no `layer_types`, all layers have its sliding_window if the class `slides`, or none has. These
    functions get the config with the values that its class has (`Checkpoint.full_config`).
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
    slides: bool = False
    sets_head_dim: bool = True

    @property
    def attentions(self) -> tuple[str, ...]:
        """The attention modules of a layer, `{layer}` in their names: self-attention, and cross-attention in some."""
        return (self.attention,) if self.cross_attention is None else (self.attention, self.cross_attention)

    def tensor_name(self, layer: int, projection: str, kind: str = "weight", *, attention: str | None = None) -> str:
        """Return the full name of a tensor of a layer's attention.

        projection: a field of this class ("q_proj", …, "o_proj", "qkv_proj", "key_norm"). kind: "weight" or "bias".
        attention: one of `attentions`, the self-attention unless given.
        """
        return f"{(attention or self.attention).format(layer=layer)}.{getattr(self, projection)}.{kind}"

    def input_norm_name(self, layer: int) -> str:
        """Return the name of the gain of the norm before a layer's self-attention."""
        return f"{self.attention.rpartition('.')[0].format(layer=layer)}.{self.input_norm}.weight"

    def config_name(self, name: str) -> str:
        """Return what this architecture's config.json calls the usual `name`, for example n_layer."""
        return self.config_names.get(name, name)

    def result_config(self, checkpoint: Checkpoint, num_key_value_heads: int, head_dim: int) -> dict[str, Any]:
        """Return a copy of the config for `num_key_value_heads` K/V heads of `head_dim` dims, under its own names."""
        result: dict[str, Any] = copy.deepcopy(checkpoint.config)
        if "num_key_value_heads" in result:  # beside a name of the class's own, which engines do not know
            result["num_key_value_heads"] = num_key_value_heads
        if self.write_heads is not None:
            return {**result, **self.write_heads(checkpoint.full_config, num_key_value_heads)}
        result["head_dim"] = head_dim
        *sections, name = self.config_name("num_key_value_heads").split(".")
        section = result
        for part in sections:
            section = section.setdefault(part, {})
        section[name] = num_key_value_heads
        return result

    def refusal(self, checkpoint: Checkpoint) -> str | None:
        """Return why a checkpoint cannot be converted whatever is asked for, or None if nothing forbids it."""
        if self.latent:
            return "its cache holds a latent, not keys and values"
        return checkpoint.original.quantised

    def approximation(self, checkpoint: Checkpoint) -> str | None:
        """Return why the mean of heads' weights does not give the mean of their keys or values, or None if it does."""
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
        """Return the tensors of a layer that hold all its K/V heads, those of projections and of per-head gains."""
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
        """Return the names of key norms that have one tensor per K/V head.

        Returns a list for the weights and one for the biases, where there are any, each in the order of heads.
        """
        if self.key_norm is None or "{head}" not in self.key_norm:
            return []
        template = f"{self.attention}.{self.key_norm}"
        names = [
            [f"{template}.{kind}".format(layer=layer, head=head) for head in range(shape.num_key_value_heads)]
            for kind in ("weight", "bias")
        ]
        return [group for group in names if group[0] in checkpoint.tensors]
