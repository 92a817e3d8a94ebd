"""The numbers of a model's attention."""

from __future__ import annotations

from dataclasses import dataclass

from .layer_grouping import LayerGrouping

__all__ = ["AttentionShape", "LatentSizes"]


@dataclass(frozen=True)
class LatentSizes:
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
    latent: LatentSizes | None = None

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
