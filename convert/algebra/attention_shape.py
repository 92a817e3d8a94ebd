"""The sizes of a model's attention: heads, dims, windows, and what its layers share or compress."""

from __future__ import annotations

from dataclasses import dataclass

from .layer_grouping import LayerGrouping

__all__ = ["AttentionShape", "LatentSizes"]


@dataclass(frozen=True)
class LatentSizes:
    """The sizes of multi-head latent attention (MLA, arXiv 2405.04434), as DeepSeek-V3's config calls them.

    A layer caches, of each token, a latent of `kv_lora_rank` numbers and a rotary key of `qk_rope_head_dim` that all
    heads share. Per head, `qk_nope_head_dim` dims of the key and `v_head_dim` dims of the value are made of the latent.
    """

    kv_lora_rank: int
    qk_rope_head_dim: int
    qk_nope_head_dim: int
    v_head_dim: int

    @property
    def num_cached(self) -> int:
        """How many numbers a layer caches of a token: the latent and the rotary key."""
        return self.kv_lora_rank + self.qk_rope_head_dim


@dataclass(frozen=True)
class AttentionShape:
    """The sizes of a model's attention, which are the same in all its layers.

    `windows` holds one entry per layer: its sliding window in tokens, or None for full attention. With
    `cross_attention`, the model is a decoder with an encoder, and its cache holds as much again for each token of the
    encoder. `layer_grouping` says which layers share keys and values; where it is None, each layer computes its own.
    Where `latent` is not None, a layer caches a latent and a rotary key in place of keys and values.
    """

    hidden_size: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    windows: tuple[int | None, ...]
    cross_attention: bool = False
    layer_grouping: LayerGrouping | None = None
    latent: LatentSizes | None = None

    @property
    def cached_values(self) -> int:
        """How many numbers a layer caches of a token, if it has a cache: a layer that reads another's has none."""
        if self.latent is not None:
            return self.latent.num_cached
        return 2 * self.num_key_value_heads * self.head_dim

    @property
    def num_hidden_layers(self) -> int:
        """The number of layers."""
        return len(self.windows)

    @property
    def key_value_windows(self) -> tuple[int | None, ...]:
        """The windows of those layers that compute keys and values, and so have a cache."""
        if self.layer_grouping is None:
            return self.windows
        return tuple(self.windows[group[0]] for group in self.layer_grouping.groups)

    @property
    def num_key_value_layers(self) -> int:
        """The number of layers that compute keys and values, and so have a cache."""
        return len(self.key_value_windows)

    @property
    def kind(self) -> str:
        """The usual name: MLA, or MHA, GQA or MQA, followed by " + CLA" where layers share keys and values."""
        if self.latent is not None:
            return "MLA"
        if self.num_key_value_heads == self.num_attention_heads:
            heads = "MHA"
        else:
            heads = "MQA" if self.num_key_value_heads == 1 else "GQA"
        return heads if self.num_key_value_layers == self.num_hidden_layers else f"{heads} + CLA"
