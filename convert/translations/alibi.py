"""Bloom, MPT and sequential Falcons (Falcon-RW): ALiBi (Press et al. 2021, arXiv 2108.12409)."""

from __future__ import annotations

import math
from typing import Any

from ..checkpoint.tensors import Checkpoint
from .common import head_part, present_prefix, qkv, rope_config, third
from .decoder import decoder_config, decoder_tensors, megatron_modules
from .translation import Derived, Translation

__all__ = ["BLOOM_TO_DECODER", "FALCON_TO_DECODER", "MPT_TO_DECODER"]


def _slopes(num_heads: int) -> list[float]:
    """ALiBi's slopes: 2^(-8/n), 2^(-16/n), … for n heads.

    Where n is no power of two, the slopes of the power of two below are followed by every other one of twice as many.
    """
    nearest = 2 ** math.floor(math.log2(num_heads))
    slopes = [2 ** (-8 * (head + 1) / nearest) for head in range(nearest)]
    return slopes + [2 ** (-4 * (2 * head + 1) / nearest) for head in range(num_heads - nearest)]


def _mpt_slopes(num_heads: int) -> list[float]:
    """MPT's slopes, for the next power of two n: every second one, then the others, as many as there are heads."""
    nearest = 2 ** math.ceil(math.log2(num_heads))
    slopes = [2 ** (-8 * (head + 1) / nearest) for head in range(nearest)]
    return slopes if nearest == num_heads else (slopes[1::2] + slopes[::2])[:num_heads]


def _bloom_refusal(checkpoint: Checkpoint) -> str | None:
    if checkpoint.full_config["apply_residual_connection_post_layernorm"]:
        return "its residual branches off after the norm, GroupedDecoder's before"
    return None


def _bloom_config(checkpoint: Checkpoint) -> dict[str, Any]:
    width, num_heads = checkpoint.config_int("hidden_size"), checkpoint.config_int("n_head")
    return decoder_config(
        checkpoint,
        hidden_size=width,
        num_attention_heads=num_heads,
        num_hidden_layers=checkpoint.config_int("n_layer"),
        intermediate_size=4 * width,
        max_position_embeddings=checkpoint.config_int("seq_length", default=2048),
        hidden_act="gelu_pytorch_tanh",
        layer_norm_eps=checkpoint.full_config["layer_norm_epsilon"],
        position_embedding_type="alibi",
        alibi_slopes=_slopes(num_heads),
        embedding_norm=True,
    )


def _bloom_tensors(checkpoint: Checkpoint) -> dict[str, Derived]:
    prefix = present_prefix(checkpoint, "transformer.", "word_embeddings.weight")
    tensors = _megatron_tensors(
        checkpoint,
        prefix,
        checkpoint.config_int("n_head"),
        checkpoint.config_int("n_layer"),
    )
    for kind in ("weight", "bias"):
        old = f"{prefix}word_embeddings_layernorm.{kind}"
        tensors[f"model.embedding_norm.{kind}"] = Derived((old,), (checkpoint.config_int("hidden_size"),))
    return tensors


def _mpt_refusal(checkpoint: Checkpoint) -> str | None:
    wanted = {
        "attn_type": "multihead_attention",
        "alibi": True,
        "alibi_bias_max": 8,  # transformers computes with 8 whatever the config says
        "prefix_lm": False,
        "qk_ln": False,
        "softmax_scale": None,
    }
    for name, value in wanted.items():
        found = checkpoint.config_value(f"attn_config.{name}")
        if found is not None and found != value:
            return f"GroupedDecoder has no counterpart of attn_config.{name} = {found!r}"
    return "its logits are scaled" if checkpoint.full_config["logit_scale"] else None


def _mpt_config(checkpoint: Checkpoint) -> dict[str, Any]:
    width, num_heads = checkpoint.config_int("d_model"), checkpoint.config_int("n_heads")
    return decoder_config(
        checkpoint,
        hidden_size=width,
        num_attention_heads=num_heads,
        num_hidden_layers=checkpoint.config_int("n_layers"),
        intermediate_size=4 * width,
        max_position_embeddings=checkpoint.config_int("max_seq_len"),
        hidden_act="gelu",
        layer_norm_eps=checkpoint.full_config["layer_norm_epsilon"],
        position_embedding_type="alibi",
        alibi_slopes=_mpt_slopes(num_heads),
        clip_qkv=checkpoint.config_value("attn_config.clip_qkv") or None,  # MPT takes 0 for no clipping
    )


def _mpt_tensors(checkpoint: Checkpoint) -> dict[str, Derived]:
    prefix = present_prefix(checkpoint, "transformer.", "wte.weight")
    return decoder_tensors(
        checkpoint,
        embeddings=f"{prefix}wte",
        final_norm=f"{prefix}norm_f",
        layers=f"{prefix}blocks.{{layer}}",
        num_hidden_layers=checkpoint.config_int("n_layers"),
        names={
            "input_layernorm": "norm_1",
            "post_attention_layernorm": "norm_2",
            "self_attn.o_proj": "attn.out_proj",
            "mlp.up_proj": "ffn.up_proj",
            "mlp.down_proj": "ffn.down_proj",
        },
        attention=lambda new, old: qkv(checkpoint, new, f"{old}.attn.Wqkv", third),
    )


def _falcon_refusal(checkpoint: Checkpoint) -> str | None:
    config = checkpoint.full_config
    if config["new_decoder_architecture"] or config["parallel_attn"]:
        return "its branches are parallel, GroupedDecoder's follow one another"
    if config["multi_query"]:
        return "it has one K/V head already"
    head_dim = checkpoint.config_int("hidden_size") // checkpoint.config_int("num_attention_heads")
    if config["alibi"] and not math.log2(math.sqrt(head_dim)).is_integer():
        return f"its ALiBi is rounded to bfloat16 before a division by √{head_dim}, which is not a power of two"
    return None


def _falcon_config(checkpoint: Checkpoint) -> dict[str, Any]:
    """GroupedDecoder's config for Falcon, which divides ALiBi by √head_dim too.

    Where √head_dim is a power of two, the division commutes with Falcon's rounding of ALiBi to bfloat16.
    """
    width, num_heads = checkpoint.config_int("hidden_size"), checkpoint.config_int("num_attention_heads")
    positions: dict[str, Any]
    if checkpoint.full_config["alibi"]:
        slopes = [slope / math.sqrt(width // num_heads) for slope in _slopes(num_heads)]
        positions = {"position_embedding_type": "alibi", "alibi_slopes": slopes, "alibi_bfloat16": True}
    else:
        positions = {
            "position_embedding_type": "rotary",
            **rope_config(checkpoint.full_config["rope_parameters"]),
        }
    return decoder_config(
        checkpoint,
        hidden_size=width,
        num_attention_heads=num_heads,
        num_hidden_layers=checkpoint.config_int("num_hidden_layers"),
        intermediate_size=checkpoint.config_int("ffn_hidden_size"),
        max_position_embeddings=checkpoint.config_int("max_position_embeddings"),
        hidden_act=checkpoint.full_config["activation"],
        layer_norm_eps=checkpoint.full_config["layer_norm_epsilon"],
        **positions,
    )


def _falcon_tensors(checkpoint: Checkpoint) -> dict[str, Derived]:
    prefix = present_prefix(checkpoint, "transformer.", "word_embeddings.weight")
    num_heads = checkpoint.config_int("num_attention_heads")
    return _megatron_tensors(checkpoint, prefix, num_heads, checkpoint.config_int("num_hidden_layers"))


def _megatron_tensors(checkpoint: Checkpoint, prefix: str, num_heads: int, num_layers: int) -> dict[str, Derived]:
    part = head_part(num_heads)
    return decoder_tensors(
        checkpoint,
        embeddings=f"{prefix}word_embeddings",
        final_norm=f"{prefix}ln_f",
        layers=f"{prefix}h.{{layer}}",
        num_hidden_layers=num_layers,
        names=megatron_modules("self_attention"),
        attention=lambda new, old: qkv(checkpoint, new, f"{old}.self_attention.query_key_value", part),
    )


FALCON_TO_DECODER = Translation("falcon", "grouped_decoder", _falcon_config, _falcon_tensors, _falcon_refusal)

BLOOM_TO_DECODER = Translation("bloom", "grouped_decoder", _bloom_config, _bloom_tensors, _bloom_refusal)
MPT_TO_DECODER = Translation("mpt", "grouped_decoder", _mpt_config, _mpt_tensors, _mpt_refusal)
