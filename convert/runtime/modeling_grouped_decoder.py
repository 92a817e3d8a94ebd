"""GroupedDecoder: grouped-query attention for decoders with learned positions, ALiBi or RoPE that no stock class holds.

This file and its neighbours stand alone: they are copied beside converted weights. Attention goes through transformers'
interface, so that sdpa, eager and flex attention run it and, without ALiBi, flash attention and vLLM's Transformers
backend.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationMixin
from transformers.activations import ACT2FN
from transformers.cache_utils import Cache, DynamicCache
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, PreTrainedModel
from transformers.models.llama.modeling_llama import LlamaForCausalLM
from transformers.models.persimmon.modeling_persimmon import PersimmonRotaryEmbedding, apply_rotary_pos_emb
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from .configuration_grouped_decoder import GroupedDecoderConfig
from .transformers_interface import CACHE_NAME, refuse_unknown, require, take_cache

__all__ = ["GroupedDecoderForCausalLM", "GroupedDecoderModel", "GroupedDecoderPreTrainedModel"]

require("decoder")

_TAKE_POSITION_BIAS = ("eager", "sdpa", "flex_attention")


def eager_attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    position_bias: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor]:
    """Attention in steps. query: (batch, num_attention_heads, …), key and value: (batch, num_key_value_heads, …)."""
    key, value = (states.repeat_interleave(module.num_key_value_groups, dim=1) for states in (key, value))
    scores = query @ key.transpose(2, 3) * scaling
    for addend in (position_bias, attention_mask):
        if addend is not None:
            scores = scores + addend
    weights = nn.functional.softmax(scores, dim=-1, dtype=torch.float32).to(query.dtype)
    weights = nn.functional.dropout(weights, p=dropout, training=module.training)
    return (weights @ value).transpose(1, 2).contiguous(), weights


class GroupedDecoderAttention(nn.Module):
    """Grouped-query attention (Ainslie et al. 2023, arXiv 2305.13245)."""

    def __init__(self, config: GroupedDecoderConfig, layer_idx: int) -> None:
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.head_dim = config.head_dim
        self.num_key_value_groups = config.num_attention_heads // config.num_key_value_heads
        self.scaling = config.head_dim**-0.5
        self.is_causal = True
        sliding = config.layer_types[layer_idx] == "sliding_attention"
        self.sliding_window = config.sliding_window if sliding else None
        self.q_proj = nn.Linear(config.hidden_size, config.num_attention_heads * config.head_dim)
        self.k_proj = nn.Linear(config.hidden_size, config.num_key_value_heads * config.head_dim)
        self.v_proj = nn.Linear(config.hidden_size, config.num_key_value_heads * config.head_dim)
        self.o_proj = nn.Linear(config.num_attention_heads * config.head_dim, config.hidden_size)
        if config.qk_norm:
            self.q_norm = nn.LayerNorm(config.head_dim, eps=config.layer_norm_eps)
            self.k_norm = nn.LayerNorm(config.head_dim, eps=config.layer_norm_eps)

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor] | None,
        attention_mask: Tensor | None,
        past_key_values: Cache | None = None,
        cache: Cache | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        cache = take_cache(past_key_values, cache, kwargs)
        input_shape = hidden_states.shape[:-1]
        projected = [projection(hidden_states) for projection in (self.q_proj, self.k_proj, self.v_proj)]
        if self.config.clip_qkv is not None:
            projected = [states.clamp(-self.config.clip_qkv, self.config.clip_qkv) for states in projected]
        heads = [states.view(*input_shape, -1, self.head_dim).transpose(1, 2) for states in projected]
        query_states, key_states, value_states = heads
        if self.config.qk_norm:
            query_states, key_states = self.q_norm(query_states), self.k_norm(key_states)
        if position_embeddings is not None:
            cos, sin = position_embeddings
            query_states, key_states = _rotate(query_states, key_states, cos, sin)
        if cache is not None:
            key_states, value_states = cache.update(key_states, value_states, self.layer_idx, kwargs=kwargs)

        attention_interface: Callable[..., Any] = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention_forward
        )
        attn_output, attn_weights = attention_interface(
            self,
            query_states,
            key_states,
            value_states,
            attention_mask,
            dropout=self.config.attention_dropout if self.training else 0.0,
            scaling=self.scaling,
            sliding_window=self.sliding_window,
            **kwargs,
        )
        return self.o_proj(attn_output.reshape(*input_shape, -1).contiguous()), attn_weights


class GroupedDecoderMLP(nn.Module):
    def __init__(self, config: GroupedDecoderConfig) -> None:
        super().__init__()
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size)
        self.act_fn = ACT2FN[config.hidden_act]

    def forward(self, hidden_states: Tensor) -> Tensor:
        output: Tensor = self.down_proj(self.act_fn(self.up_proj(hidden_states)))
        return output


class GroupedDecoderLayer(GradientCheckpointingLayer):
    def __init__(self, config: GroupedDecoderConfig, layer_idx: int) -> None:
        super().__init__()
        self.input_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.self_attn = GroupedDecoderAttention(config, layer_idx)
        self.post_attention_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.mlp = GroupedDecoderMLP(config)

    def forward(self, hidden_states: Tensor, **kwargs: Any) -> Tensor:
        attended, _ = self.self_attn(self.input_layernorm(hidden_states), **kwargs)
        hidden_states = hidden_states + attended
        output: Tensor = hidden_states + self.mlp(self.post_attention_layernorm(hidden_states))
        return output


class GroupedDecoderPreTrainedModel(PreTrainedModel):
    config_class = GroupedDecoderConfig
    config: GroupedDecoderConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["GroupedDecoderLayer"]  # noqa: RUF012
    _skip_keys_device_placement = ["past_key_values", "cache"]  # noqa: RUF012
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _can_compile_fullgraph = True
    _supports_attention_backend = True
    _can_record_outputs = {  # noqa: RUF012
        "hidden_states": GroupedDecoderLayer,
        "attentions": GroupedDecoderAttention,
    }


class GroupedDecoderModel(GroupedDecoderPreTrainedModel):
    def __init__(self, config: GroupedDecoderConfig) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        if config.position_embedding_type == "learned":
            self.embed_positions = nn.Embedding(config.max_position_embeddings, config.hidden_size)
        elif config.position_embedding_type == "rotary":
            self.rotary_emb = PersimmonRotaryEmbedding(config)
        if config.embedding_norm:
            self.embedding_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.layers = nn.ModuleList([GroupedDecoderLayer(config, layer) for layer in range(config.num_hidden_layers)])
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.gradient_checkpointing = False
        self.post_init()

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | dict[str, Tensor] | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        cache: Cache | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        cache = take_cache(past_key_values, cache, kwargs)
        refuse_unknown(self, kwargs)
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give exactly one of input_ids and inputs_embeds")
        hidden_states = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        if use_cache and cache is None:
            cache = DynamicCache(config=self.config)
        if position_ids is None:
            past_length = cache.get_seq_length() if cache is not None else 0
            position_ids = torch.arange(hidden_states.shape[1], device=hidden_states.device)[None] + past_length

        masks: dict[str, Any]
        if isinstance(attention_mask, dict):  # `generate` makes the masks itself for a static cache
            masks, attention_mask = attention_mask, None
        else:
            masked = (self.config, hidden_states, attention_mask, cache, position_ids)
            masks = {"full_attention": create_causal_mask(*masked)}
            if "sliding_attention" in self.config.layer_types:
                masks["sliding_attention"] = create_sliding_window_causal_mask(*masked)

        hidden_states = hidden_states * self.config.embedding_multiplier
        position_embeddings = None
        if self.config.position_embedding_type == "learned":
            hidden_states = hidden_states + self.embed_positions(position_ids)
        elif self.config.position_embedding_type == "rotary":
            position_embeddings = self.rotary_emb(hidden_states, position_ids=position_ids)
        else:
            self._refuse_paged_alibi(kwargs)
            kwargs["position_bias"] = self._alibi(hidden_states, attention_mask, position_ids, cache)
        if self.config.embedding_norm:
            hidden_states = self.embedding_norm(hidden_states)
        for layer, layer_type in zip(self.layers, self.config.layer_types, strict=True):
            hidden_states = layer(
                hidden_states,
                position_embeddings=position_embeddings,
                attention_mask=masks[layer_type],
                position_ids=position_ids,
                **{CACHE_NAME: cache},
                **kwargs,
            )
        return BaseModelOutputWithPast(self.norm(hidden_states), cache)

    def _refuse_paged_alibi(self, kwargs: dict[str, Any]) -> None:
        """Raise ValueError in continuous batching, whose attention over pages has no place for a position bias."""
        if "read_index" in kwargs:
            raise ValueError("continuous batching takes no position bias, which ALiBi needs: use generate")

    def _alibi(
        self, hidden_states: Tensor, attention_mask: Tensor | None, position_ids: Tensor, cache: Cache | None
    ) -> Tensor:
        """Slope · distance of key and query, (batch, num_attention_heads, queries, keys) in the dtype of the states.

        Raises ValueError for an implementation of attention that would leave it out.
        """
        if self.config._attn_implementation not in _TAKE_POSITION_BIAS:
            raise ValueError(
                f"{self.config._attn_implementation} attention takes no position bias, which ALiBi needs; these do: "
                f"{', '.join(_TAKE_POSITION_BIAS)}"
            )
        num_queries, device = hidden_states.shape[1], hidden_states.device
        num_keys = cache.get_mask_sizes(num_queries, 0)[0] if cache is not None else num_queries
        if attention_mask is not None and attention_mask.dim() == 2 and attention_mask.shape[1] == num_keys:
            keys = (attention_mask.cumsum(-1) - 1) * attention_mask
        elif num_keys == num_queries:
            keys = position_ids
        else:
            keys = torch.arange(num_keys, device=device)[None]
        slopes = torch.tensor(self.config.alibi_slopes, device=device)[None, :, None, None]
        if self.config.alibi_bfloat16:
            bias = slopes.bfloat16() * keys[:, None, None, :]
        else:
            bias = slopes * (keys[:, None, None, :] - position_ids[:, None, :, None])
        return bias.to(hidden_states.dtype).expand(-1, -1, num_queries, -1)


class GroupedDecoderForCausalLM(GroupedDecoderPreTrainedModel, GenerationMixin):
    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012
    _tp_plan = {"lm_head": "colwise_gather_output"}  # noqa: RUF012
    _pp_plan = {"lm_head": (["hidden_states"], ["logits"])}  # noqa: RUF012

    def __init__(self, config: GroupedDecoderConfig) -> None:
        super().__init__(config)
        self.model = GroupedDecoderModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    forward = LlamaForCausalLM.forward


def _rotate(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Rotate the first dims of each head, pairs (i, i + rotary_dim / 2); the other dims pass."""
    rotary_dim = cos.shape[-1]
    rotated = apply_rotary_pos_emb(query[..., :rotary_dim], key[..., :rotary_dim], cos, sin)
    query, key = (
        torch.cat([turned, states[..., rotary_dim:]], dim=-1)
        for turned, states in zip(rotated, (query, key), strict=True)
    )
    return query, key
