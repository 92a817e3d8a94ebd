"""CrossLayerDecoder: a Llama-shaped decoder whose layers may share keys and values (CLA, arXiv 2405.12981).

This file and its neighbours stand alone: they are copied beside converted weights. Caches of transformers allocate
nothing for a layer that reads another's keys and values, which reach it in `shared_kv_states`.
"""

from collections import UserDict
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationMixin
from transformers.cache_utils import Cache, DynamicCache
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, PreTrainedModel
from transformers.models.llama.modeling_llama import (
    LlamaForCausalLM,
    LlamaMLP,
    LlamaRMSNorm,
    eager_attention_forward,
    rotate_half,
)
from transformers.models.phi3.modeling_phi3 import Phi3RotaryEmbedding
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from .configuration_cross_layer_decoder import CrossLayerDecoderConfig
from .transformers_interface import CACHE_NAME, refuse_unknown, require, take_cache

__all__ = ["CrossLayerDecoderForCausalLM", "CrossLayerDecoderModel", "CrossLayerDecoderPreTrainedModel"]

require("decoder")


class SharedKeyValues(UserDict[int, tuple[Tensor, Tensor]]):
    """Keys and values, (batch, num_key_value_heads, keys, head_dim), by the layer that computed them.

    No `dict`, because FSDP2 copies those, and what a layer adds would not reach the next one. accelerate moves it from
    one device to the next by `to`. `paged` holds what a paged cache told the attention of each of these layers.
    """

    def __init__(self) -> None:
        super().__init__()
        self.paged: dict[int, dict[str, Any]] = {}

    def to(self, device: torch.device, non_blocking: bool = False) -> "SharedKeyValues":
        for layer, (keys, values) in self.items():
            self[layer] = (keys.to(device, non_blocking=non_blocking), values.to(device, non_blocking=non_blocking))
        return self


class CrossLayerDecoderAttention(nn.Module):
    def __init__(self, config: CrossLayerDecoderConfig, layer_idx: int) -> None:
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.head_dim = config.head_dim
        self.num_key_value_groups = config.num_attention_heads // config.num_key_value_heads
        self.scaling = config.head_dim**-0.5
        self.is_causal = True
        sliding = config.layer_types[layer_idx] == "sliding_attention"
        self.sliding_window = config.sliding_window if sliding else None
        self.kv_source_layer = config.kv_source_layers[layer_idx]

        query_dim, kv_dim = (
            heads * config.head_dim for heads in (config.num_attention_heads, config.num_key_value_heads)
        )
        biased = config.attention_bias
        self.q_proj = nn.Linear(config.hidden_size, query_dim, bias="q_proj" in biased)
        self.o_proj = nn.Linear(query_dim, config.hidden_size, bias="o_proj" in biased)
        if config.qk_norm:
            self.q_norm = LlamaRMSNorm(config.head_dim, eps=config.rms_norm_eps)
        if self.kv_source_layer == layer_idx:
            self.k_proj = nn.Linear(config.hidden_size, kv_dim, bias="k_proj" in biased)
            self.v_proj = nn.Linear(config.hidden_size, kv_dim, bias="v_proj" in biased)
            if config.qk_norm:
                self.k_norm = LlamaRMSNorm(config.head_dim, eps=config.rms_norm_eps)

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Tensor | None,
        shared_kv_states: SharedKeyValues,
        past_key_values: Cache | None = None,
        cache: Cache | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        cache = take_cache(past_key_values, cache, kwargs)
        is_paged = cache is not None and not isinstance(cache, Cache)  # continuous batching from 5.24 on
        input_shape = hidden_states.shape[:-1]
        hidden_shape = (*input_shape, -1, self.head_dim)
        query_states = self.q_proj(hidden_states).view(hidden_shape)
        if self.config.qk_norm:
            query_states = self.q_norm(query_states)
        query_states = _rotate(query_states.transpose(1, 2), *position_embeddings)

        if self.kv_source_layer == self.layer_idx:
            key_states = self.k_proj(hidden_states).view(hidden_shape)
            if self.config.qk_norm:
                key_states = self.k_norm(key_states)
            key_states = _rotate(key_states.transpose(1, 2), *position_embeddings)
            value_states = self.v_proj(hidden_states).view(hidden_shape).transpose(1, 2)
            if cache is not None:
                key_states, value_states = cache.update(key_states, value_states, self.layer_idx, kwargs=kwargs)
            # not read back from the cache, which forgets what its window has left
            shared_kv_states[self.layer_idx] = (key_states, value_states)
            if is_paged:  # `update` changes kwargs
                shared_kv_states.paged[self.layer_idx] = kwargs
        else:
            key_states, value_states = shared_kv_states[self.kv_source_layer]
            if is_paged:
                kwargs = shared_kv_states.paged[self.kv_source_layer]

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


class CrossLayerDecoderLayer(GradientCheckpointingLayer):
    def __init__(self, config: CrossLayerDecoderConfig, layer_idx: int) -> None:
        super().__init__()
        self.input_layernorm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.self_attn = CrossLayerDecoderAttention(config, layer_idx)
        self.post_attention_layernorm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.mlp = LlamaMLP(config)

    def forward(self, hidden_states: Tensor, **kwargs: Any) -> Tensor:
        attended, _ = self.self_attn(self.input_layernorm(hidden_states), **kwargs)
        hidden_states = hidden_states + attended
        output: Tensor = hidden_states + self.mlp(self.post_attention_layernorm(hidden_states))
        return output


class CrossLayerDecoderPreTrainedModel(PreTrainedModel):
    config_class = CrossLayerDecoderConfig
    config: CrossLayerDecoderConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["CrossLayerDecoderLayer"]  # noqa: RUF012
    _skip_keys_device_placement = ["past_key_values", "cache"]  # noqa: RUF012
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _can_compile_fullgraph = True
    _supports_attention_backend = True
    _can_record_outputs = {  # noqa: RUF012
        "hidden_states": CrossLayerDecoderLayer,
        "attentions": CrossLayerDecoderAttention,
    }


class CrossLayerDecoderModel(CrossLayerDecoderPreTrainedModel):
    def __init__(self, config: CrossLayerDecoderConfig) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, config.pad_token_id)
        self.layers = nn.ModuleList(
            [CrossLayerDecoderLayer(config, layer) for layer in range(config.num_hidden_layers)]
        )
        self.norm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.rotary_emb = Phi3RotaryEmbedding(config)
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
        if self.training and self.gradient_checkpointing:
            self._refuse_reentrant_checkpoints()
        hidden_states = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        if use_cache and cache is None:
            cache = DynamicCache(config=self.config)
        if position_ids is None:
            past_length = cache.get_seq_length() if cache is not None else 0
            position_ids = torch.arange(hidden_states.shape[1], device=hidden_states.device)[None] + past_length

        masks: Any = attention_mask
        if not isinstance(masks, dict):  # `generate` makes the masks itself for a static cache
            masked = (self.config, hidden_states, attention_mask, cache, position_ids)
            makers = {"full_attention": create_causal_mask, "sliding_attention": create_sliding_window_causal_mask}
            masks = {kind: makers[kind](*masked) for kind in set(self.config.layer_types)}

        position_embeddings = self.rotary_emb(hidden_states, position_ids=position_ids)
        shared_kv_states = SharedKeyValues()
        for layer, layer_type in zip(self.layers, self.config.layer_types, strict=True):
            hidden_states = layer(
                hidden_states,
                position_embeddings=position_embeddings,
                attention_mask=masks[layer_type],
                shared_kv_states=shared_kv_states,
                position_ids=position_ids,
                **{CACHE_NAME: cache},
                **kwargs,
            )
        return BaseModelOutputWithPast(self.norm(hidden_states), cache)

    def _refuse_reentrant_checkpoints(self) -> None:
        """Raise ValueError: through what layers share they would lose gradients, silently."""
        if getattr(self._gradient_checkpointing_func, "keywords", {}).get("use_reentrant"):
            raise ValueError("layers that share keys and values need activation checkpointing with use_reentrant=False")


class CrossLayerDecoderForCausalLM(CrossLayerDecoderPreTrainedModel, GenerationMixin):
    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012
    _tp_plan = {"lm_head": "colwise_gather_output"}  # noqa: RUF012
    _pp_plan = {"lm_head": (["hidden_states"], ["logits"])}  # noqa: RUF012

    def __init__(self, config: CrossLayerDecoderConfig) -> None:
        super().__init__(config)
        self.model = CrossLayerDecoderModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    forward = LlamaForCausalLM.forward


def _rotate(states: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the first dims of each head, pairs (i, i + rotary_dim / 2); the other dims pass.

    states: (batch, heads, length, head_dim). cos and sin: (batch, length, rotary_dim).
    """
    cos, sin = cos[:, None], sin[:, None]
    turning, still = states[..., : cos.shape[-1]], states[..., cos.shape[-1] :]
    return torch.cat([turning * cos + rotate_half(turning) * sin, still], dim=-1)
