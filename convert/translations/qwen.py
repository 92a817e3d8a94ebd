"""The first Qwen, whose class transformers lacks, as Qwen2."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import Any

from ..checkpoint.tensors import Checkpoint
from .common import common_config, qkv, rope_config, same, third
from .translation import Derived, Translation

__all__ = ["QWEN_TO_QWEN2"]


_CLASS: Mapping[str, Any] = MappingProxyType(
    {
        "vocab_size": 151936,
        "hidden_size": 4096,
        "intermediate_size": 22016,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "initializer_range": 0.02,
        "layer_norm_epsilon": 1e-6,
        "no_bias": True,
        "rotary_emb_base": 10000,
        "rotary_pct": 1.0,
        "tie_word_embeddings": False,
    }
)
"""What the class beside Qwen's weights has where config.json says nothing (configuration_qwen.py of Qwen/Qwen-7B)."""


def _full_config(checkpoint: Checkpoint) -> dict[str, Any]:
    return {**_CLASS, **checkpoint.config}


def _refusal(checkpoint: Checkpoint) -> str | None:
    return None if _full_config(checkpoint)["no_bias"] else "its projections have biases, Qwen2's have not"


def _config(checkpoint: Checkpoint) -> dict[str, Any]:
    """Qwen2's config, with seq_length as the longest context: beyond it Qwen changes frequencies and scales queries."""
    config = _full_config(checkpoint)
    return common_config(replace(checkpoint, config=config), "qwen2", "Qwen2ForCausalLM") | {
        "hidden_act": "silu",
        "intermediate_size": config["intermediate_size"] // 2,  # Qwen counts both of its halves
        "max_position_embeddings": checkpoint.config_int("seq_length"),
        "rms_norm_eps": config["layer_norm_epsilon"],
        "use_sliding_window": False,
        **rope_config({"rope_theta": config["rotary_emb_base"], "partial_rotary_factor": config["rotary_pct"]}),
    }


def _tensors(checkpoint: Checkpoint) -> dict[str, Derived]:
    renamed = {"model.embed_tokens": "transformer.wte", "model.norm": "transformer.ln_f", "lm_head": "lm_head"}
    tensors: dict[str, Derived] = {}
    for layer in range(_full_config(checkpoint)["num_hidden_layers"]):
        new, old = f"model.layers.{layer}", f"transformer.h.{layer}"
        tensors |= qkv(checkpoint, f"{new}.self_attn", f"{old}.attn.c_attn", third)
        renamed |= {
            f"{new}.input_layernorm": f"{old}.ln_1",
            f"{new}.post_attention_layernorm": f"{old}.ln_2",
            f"{new}.self_attn.o_proj": f"{old}.attn.c_proj",
            f"{new}.mlp.up_proj": f"{old}.mlp.w1",
            f"{new}.mlp.gate_proj": f"{old}.mlp.w2",
            f"{new}.mlp.down_proj": f"{old}.mlp.c_proj",
        }
    return tensors | {f"{name}.weight": same(checkpoint, f"{source}.weight") for name, source in renamed.items()}


QWEN_TO_QWEN2 = Translation("qwen", "qwen2", _config, _tensors, _refusal)
