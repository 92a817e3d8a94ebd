"""Persimmon: partial rotary positions, and a LayerNorm of each head's queries and keys."""

from __future__ import annotations

from typing import Any

from ..checkpoint.tensors import Checkpoint
from .common import head_part, linear, present_prefix, qkv, rope_config
from .decoder import decoder_config, decoder_tensors, megatron_modules
from .translation import Derived, Translation

__all__ = ["PERSIMMON_TO_DECODER"]


def _config(checkpoint: Checkpoint) -> dict[str, Any]:
    config = checkpoint.full_config
    return decoder_config(
        checkpoint,
        hidden_size=checkpoint.config_int("hidden_size"),
        num_attention_heads=checkpoint.config_int("num_attention_heads"),
        num_hidden_layers=checkpoint.config_int("num_hidden_layers"),
        intermediate_size=checkpoint.config_int("intermediate_size"),
        max_position_embeddings=checkpoint.config_int("max_position_embeddings"),
        hidden_act=config["hidden_act"],
        layer_norm_eps=config["layer_norm_eps"],
        qk_norm=config["qk_layernorm"],
        position_embedding_type="rotary",
        **rope_config(config["rope_parameters"]),
    )


def _tensors(checkpoint: Checkpoint) -> dict[str, Derived]:
    part = head_part(checkpoint.config_int("num_attention_heads"))
    prefix = present_prefix(checkpoint, "model.", "embed_tokens.weight")

    def attention(new: str, old: str) -> dict[str, Derived]:
        tensors = qkv(checkpoint, new, f"{old}.self_attn.query_key_value", part)
        if checkpoint.full_config["qk_layernorm"]:
            tensors |= linear(checkpoint, f"{new}.q_norm", f"{old}.self_attn.q_layernorm")
            tensors |= linear(checkpoint, f"{new}.k_norm", f"{old}.self_attn.k_layernorm")
        return tensors

    return decoder_tensors(
        checkpoint,
        embeddings=f"{prefix}embed_tokens",
        final_norm=f"{prefix}final_layernorm",
        layers=f"{prefix}layers.{{layer}}",
        num_hidden_layers=checkpoint.config_int("num_hidden_layers"),
        names=megatron_modules("self_attn"),
        attention=attention,
    )


PERSIMMON_TO_DECODER = Translation("persimmon", "grouped_decoder", _config, _tensors)
