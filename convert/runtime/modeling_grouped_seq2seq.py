"""Encoder-decoder models whose decoder has fewer K/V heads than query heads (Ainslie et al. 2023, arXiv:2305.13245).

Self- and cross-attention of the decoder are grouped, as in the paper; the encoder has no cache and stays as it is.
Modules and tensors have the names of the stock classes; only the decoder's K and V projections are narrower. In
shapes: B batch, T query tokens, S key tokens, H query heads, K K/V heads, D head_dim, E hidden_size.
"""

from typing import Any

from torch import Tensor, nn
from transformers import BartForConditionalGeneration, T5ForConditionalGeneration, WhisperForConditionalGeneration
from transformers.cache_utils import Cache, EncoderDecoderCache
from transformers.integrations.sdpa_attention import repeat_kv
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.bart.modeling_bart import BartAttention
from transformers.models.t5.modeling_t5 import T5Attention, eager_attention_forward
from transformers.models.whisper.modeling_whisper import WhisperAttention

from .configuration_grouped_seq2seq import GroupedBartConfig, GroupedT5Config, GroupedWhisperConfig
from .transformers_interface import refuse_unknown, require, take_cache

__all__ = [
    "GroupedBartForConditionalGeneration",
    "GroupedT5ForConditionalGeneration",
    "GroupedWhisperForConditionalGeneration",
]

require("seq2seq")


def grouped_eager_attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> Any:
    """Eager attention of query (B, H, T, D) to key and value (B, K, S, D): each K/V head serves H / K query heads."""
    key, value = (repeat_kv(heads, module.num_key_value_groups) for heads in (key, value))  # (B, H, S, D)
    # T5's is that of the other two, and adds a position bias where there is one
    return eager_attention_forward(module, query, key, value, attention_mask, **kwargs)


class GroupedAttention(nn.Module):
    """Mixed into a stock attention class: narrower K and V projections, and a forward pass that knows of them."""

    projection_names = ("q_proj", "k_proj", "v_proj", "out_proj")
    scales_queries = False  # before they meet the keys, instead of the scores
    config: Any
    dropout: float
    scaling: float
    layer_idx: Any

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        num_heads, num_key_value_heads = self.config.decoder_attention_heads, self.config.num_key_value_heads
        self.num_key_value_groups = num_heads // num_key_value_heads  # read by sdpa, flash and flex attention
        for name in self.projection_names[1:3]:
            stock = getattr(self, name)  # (H · D, E)
            self.head_dim = stock.out_features // num_heads
            width = num_key_value_heads * self.head_dim
            setattr(self, name, nn.Linear(stock.in_features, width, bias=stock.bias is not None))  # (K · D, E)

    def forward(
        self,
        hidden_states: Tensor,
        key_value_states: Tensor | None = None,
        past_key_values: Cache | None = None,
        attention_mask: Tensor | None = None,
        cache: Cache | None = None,
        **kwargs: Any,
    ) -> Any:
        """Attend from hidden_states (B, T, E) to themselves, or to key_value_states (B, S, E) where those are given.

        Returns the output, (B, T, E), and the weights, (B, H, T, S), where the implementation has them. The cache
        holds K heads.
        """
        q, k, v, out = (getattr(self, name) for name in self.projection_names)
        heads = (-1, self.head_dim)

        given: Any = take_cache(past_key_values, cache, kwargs)
        refuse_unknown(self, kwargs)
        own, is_cached = given, False
        if isinstance(given, EncoderDecoderCache) and key_value_states is None:
            own = given.self_attention_cache
        elif isinstance(given, EncoderDecoderCache):
            own = given.cross_attention_cache
            is_cached = given.is_updated.get(self.layer_idx, False)
            given.is_updated[self.layer_idx] = True

        if is_cached:  # the encoder's output is the same at every step
            key, value = own.layers[self.layer_idx].keys, own.layers[self.layer_idx].values
        else:
            states = hidden_states if key_value_states is None else key_value_states
            key, value = (kv(states).unflatten(-1, heads).transpose(1, 2) for kv in (k, v))  # (B, K, S, D)
            if own is not None:
                key, value = own.update(key, value, self.layer_idx, kwargs=kwargs)

        query, scaling = q(hidden_states), self.scaling
        if self.scales_queries:
            query, scaling = query * scaling, 1.0
        query = query.unflatten(-1, heads).transpose(1, 2)  # (B, H, T, D)
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, grouped_eager_attention)
        dropout = self.dropout if self.training else 0.0
        output, weights = attend(self, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs)
        return out(output.flatten(-2)), weights


class GroupedT5Attention(GroupedAttention, T5Attention):
    """T5's: a bias for relative positions, per query head, which the first layer computes for all."""

    projection_names = ("q", "k", "v", "o")

    def forward(
        self,
        hidden_states: Tensor,
        mask: Tensor | None = None,
        key_value_states: Tensor | None = None,
        position_bias: Tensor | None = None,
        past_key_values: Cache | None = None,
        cache: Cache | None = None,
        **kwargs: Any,
    ) -> Any:
        """As the shared one, with `position_bias`, (1, H, T, S), added to the scores and returned in the middle."""
        cache = take_cache(past_key_values, cache, kwargs)
        if position_bias is None and self.has_relative_attention_bias:
            num_queries = num_keys = hidden_states.shape[1]
            num_past = 0
            if cache is not None:
                num_keys, _ = cache.get_mask_sizes(num_queries, self.layer_idx)
                num_past = cache.get_seq_length(self.layer_idx)
            position_bias = self.compute_bias(num_queries, num_keys, hidden_states.device, num_past)
        output, weights = super().forward(
            hidden_states, key_value_states, cache, mask, position_bias=position_bias, **kwargs
        )
        return output, position_bias, weights


class GroupedBartAttention(GroupedAttention, BartAttention):
    """BART's: just the shared one."""


class GroupedWhisperAttention(GroupedAttention, WhisperAttention):  # type: ignore[misc]  # stock: wrong annotation
    """Whisper's: the order of scaling is kept, since its outputs are sensitive to rounding."""

    scales_queries = True


def group_layers(decoder: Any, attention_class: type[GroupedBartAttention] | type[GroupedWhisperAttention]) -> None:
    """Replace self- and cross-attention in the layers of a BART or Whisper decoder, and initialise their weights."""
    for layer in decoder.layers:
        for name in ("self_attn", "encoder_attn"):
            stock = getattr(layer, name)
            grouped = attention_class(
                stock.embed_dim,
                stock.num_heads,
                stock.dropout,
                is_decoder=True,
                is_causal=stock.is_causal,
                config=stock.config,
                layer_idx=stock.layer_idx,
            )
            setattr(layer, name, grouped)
    decoder.init_weights()


class GroupedT5ForConditionalGeneration(T5ForConditionalGeneration):
    """T5 with grouped K/V heads in the decoder."""

    config: GroupedT5Config

    def __init__(self, config: GroupedT5Config) -> None:
        super().__init__(config)
        decoder: Any = self.decoder  # its own copy of the config has is_decoder
        for index, block in enumerate(decoder.block):
            block.layer[0].SelfAttention = GroupedT5Attention(decoder.config, index == 0, index, is_causal=True)
            block.layer[1].EncDecAttention = GroupedT5Attention(decoder.config, False, index)
        # the decoder's own: that of a class from outside transformers skips modules without direct parameters
        decoder.init_weights()


class GroupedBartForConditionalGeneration(BartForConditionalGeneration):
    """BART with grouped K/V heads in the decoder."""

    config: GroupedBartConfig

    def __init__(self, config: GroupedBartConfig) -> None:
        super().__init__(config)
        group_layers(self.model.decoder, GroupedBartAttention)


class GroupedWhisperForConditionalGeneration(WhisperForConditionalGeneration):
    """Whisper with grouped K/V heads in the decoder."""

    config: GroupedWhisperConfig

    def __init__(self, config: GroupedWhisperConfig) -> None:
        super().__init__(config)
        group_layers(self.model.decoder, GroupedWhisperAttention)
