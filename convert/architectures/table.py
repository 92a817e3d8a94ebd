"""The architectures that kvconvert knows, one entry per `model_type`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import Any

from ..checkpoint.tensors import Checkpoint
from ..errors import UnsupportedError
from .architecture import Architecture, Config, no_layer_rotates

__all__ = ["ARCHITECTURES", "LATENT_ARCHITECTURES", "find_architecture", "known_architecture"]


def _sliding_layers(config: Any, layer: int) -> bool:
    return bool(config.layer_types[layer] == "sliding_attention")


def _only_heads(config: Config, num_key_value_heads: int) -> dict[str, Any]:
    """The entries that change in the config of a class that computes head_dim itself."""
    return {"num_key_value_heads": num_key_value_heads}


def _even_only(config: Config, num_key_value_heads: int) -> str | None:
    """Why DiffLlama cannot have so many K/V heads: its attention is the difference of two halves of them."""
    if num_key_value_heads % 2:
        return f"diffllama needs an even number of K/V heads, not {num_key_value_heads}"
    return None


def _bigcode_heads(config: Config) -> int:
    return 1 if config["multi_query"] else int(config["n_head"])


def _bigcode_one_or_all(config: Config, num_key_value_heads: int) -> str | None:
    if num_key_value_heads in (1, config["n_head"]):
        return None
    return f"gpt_bigcode has one K/V head or as many as query heads, not {num_key_value_heads}"


def _falcon_heads(config: Config) -> int:
    if config["new_decoder_architecture"]:
        return int(config["num_kv_heads"])
    return 1 if config["multi_query"] else int(config["num_attention_heads"])


def _falcon_with_heads(config: Config, num_key_value_heads: int) -> dict[str, Any]:
    """The entries that change in Falcon's config for so many K/V heads.

    Falcon's old architecture has one K/V head or all of them. Its new one, with one norm, computes the same and has any
    number. One head goes to the old one where possible, since transformers caches all query heads for the new one.
    """
    has_two_norms = config["new_decoder_architecture"] and config["num_ln_in_parallel_attn"] != 1
    if num_key_value_heads == 1 and not has_two_norms:
        return {"new_decoder_architecture": False, "multi_query": True, "num_kv_heads": 1}
    if config["new_decoder_architecture"]:
        return {"num_kv_heads": num_key_value_heads}
    return {
        "new_decoder_architecture": True,
        "num_ln_in_parallel_attn": 1,
        "multi_query": False,
        "num_kv_heads": num_key_value_heads,
    }


def _falcon_sequential(config: Config, num_key_value_heads: int) -> str | None:
    parallel = config["parallel_attn"] or config["new_decoder_architecture"]
    if parallel or num_key_value_heads in (1, config["num_attention_heads"]):
        return None
    return "a falcon whose branches are not parallel has one K/V head or as many as query heads"


_ENTRIES = (
    Architecture("apertus", key_norm="k_norm"),
    Architecture("arcee"),
    Architecture("bitnet", free_values=False),
    Architecture("cohere", interleaved_rotary=True, key_norm="k_norm"),
    Architecture("cohere2", interleaved_rotary=True, rotates=_sliding_layers),
    Architecture("cross_layer_decoder", key_norm="k_norm", query_norm="q_norm"),
    Architecture(
        "dbrx",
        sets_head_dim=False,
        autocasts=False,  # it adds what experts make in bf16 to float32
        attention="transformer.blocks.{layer}.norm_attn_norm.attn",
        qkv_proj="Wqkv",
        o_proj="out_proj",
        config_names={
            "num_hidden_layers": "n_layers",
            "num_attention_heads": "n_heads",
            "max_position_embeddings": "max_seq_len",
            "num_key_value_heads": "attn_config.kv_n_heads",
            "clip_qkv": "attn_config.clip_qkv",
        },
    ),
    Architecture("diffllama", heads_refusal=_even_only, free_values=False),
    Architecture("ernie4_5", interleaved_rotary=True),
    Architecture("exaone4", key_norm="k_norm"),
    Architecture(
        "falcon",
        sets_head_dim=False,
        attention="transformer.h.{layer}.self_attention",
        qkv_proj="query_key_value",
        qkv_interleaved=True,
        o_proj="dense",
        separates_documents=False,
        rotates=lambda config, layer: not config.alibi,
        ordered_heads=lambda config: bool(config.get("alibi")),
        read_heads=_falcon_heads,
        write_heads=_falcon_with_heads,
        heads_refusal=_falcon_sequential,
    ),
    Architecture("gemma"),
    Architecture("gemma2"),
    Architecture("gemma3_text", key_norm="k_norm"),
    Architecture("glm", interleaved_rotary=True),
    Architecture("glm4", interleaved_rotary=True),
    Architecture(
        "gpt_bigcode",
        sets_head_dim=False,
        attention="transformer.h.{layer}.attn",
        qkv_proj="c_attn",
        qkv_interleaved=True,
        o_proj="c_proj",
        read_heads=_bigcode_heads,
        write_heads=lambda config, number: {"multi_query": number == 1},
        heads_refusal=_bigcode_one_or_all,
        rotates=no_layer_rotates,
        config_names={
            "num_hidden_layers": "n_layer",
            "num_attention_heads": "n_head",
            "max_position_embeddings": "n_positions",
        },
    ),
    Architecture("granite"),
    Architecture("granitemoe"),
    Architecture(
        "grouped_bart",
        sets_head_dim=False,
        attention="model.decoder.layers.{layer}.self_attn",
        cross_attention="model.decoder.layers.{layer}.encoder_attn",
        o_proj="out_proj",
        config_names={"num_hidden_layers": "decoder_layers", "num_attention_heads": "decoder_attention_heads"},
        write_heads=_only_heads,
    ),
    Architecture(
        "grouped_decoder",
        key_norm="k_norm",
        rotates=lambda config, layer: config.position_embedding_type == "rotary",
        ordered_heads=lambda config: bool(config.get("alibi_slopes")),
    ),
    Architecture(
        "grouped_t5",
        sets_head_dim=False,
        attention="decoder.block.{layer}.layer.0.SelfAttention",
        cross_attention="decoder.block.{layer}.layer.1.EncDecAttention",
        q_proj="q",
        k_proj="k",
        v_proj="v",
        o_proj="o",
        config_names={
            "num_hidden_layers": "num_decoder_layers",
            "num_attention_heads": "num_heads",
            "max_position_embeddings": "n_positions",
        },
        write_heads=_only_heads,
    ),
    Architecture(
        "grouped_whisper",
        sets_head_dim=False,
        attention="model.decoder.layers.{layer}.self_attn",
        cross_attention="model.decoder.layers.{layer}.encoder_attn",
        o_proj="out_proj",
        config_names={
            "num_hidden_layers": "decoder_layers",
            "num_attention_heads": "decoder_attention_heads",
            "max_position_embeddings": "max_target_positions",
        },
        write_heads=_only_heads,
    ),
    Architecture("helium", interleaved_rotary=True, sets_head_dim=False),
    Architecture("hunyuan_v1_dense", key_norm="key_layernorm"),
    Architecture("hyperclovax"),
    Architecture("jais2"),
    Architecture("llama"),
    Architecture("mistral", slides=True),
    Architecture("mixtral", slides=True),
    Architecture("nanochat", always_normalised=True),
    Architecture("nemotron"),
    Architecture("olmo"),
    Architecture("olmo2", key_norm="k_norm"),
    Architecture("olmo3", key_norm="k_norm"),
    Architecture("olmoe", key_norm="k_norm"),
    Architecture("phi", o_proj="dense", key_norm="k_layernorm"),
    Architecture("phi3", qkv_proj="qkv_proj", slides=True),
    Architecture("phimoe", slides=True),
    Architecture("qwen2"),
    Architecture("qwen2_moe"),
    Architecture("qwen3", key_norm="k_norm"),
    Architecture("qwen3_moe", key_norm="k_norm", slides=True),
    Architecture("seed_oss"),
    Architecture("smollm3", rotates=lambda config, layer: bool(config.no_rope_layers[layer])),
    Architecture("stablelm", key_norm="k_layernorm.norms.{head}", sets_head_dim=False),
    Architecture("starcoder2", slides=True),
)

ARCHITECTURES: Mapping[str, Architecture] = MappingProxyType({entry.model_type: entry for entry in _ENTRIES})
"""The architectures with grouped attention, by `model_type`, with the names that a checkpoint with a head has."""

LATENT_ARCHITECTURES: Mapping[str, Architecture] = MappingProxyType(
    {"deepseek_v3": Architecture("deepseek_v3", interleaved_rotary=True, latent=True)}
)
"""The architectures with multi-head latent attention: a conversion can lead to them, and none starts from them."""


def known_architecture(model_type: object) -> Architecture | None:
    """Return the entry of a `model_type`, or None if there is none."""
    name = str(model_type)
    return ARCHITECTURES.get(name) or LATENT_ARCHITECTURES.get(name)


def _reasons() -> dict[str, str]:
    """For each `model_type` that is known and not in the table, the reason."""
    causes = {
        "its experts hold the query projections, so that fewer K/V heads would change them too": "jetmoe",
        "it has a vision part that this version does not know; convert its language model": "gemma3",
        "this version does not know its encoder-decoder class": "blenderbot m2m_100 marian mbart pegasus umt5",
        "its cache holds a latent, not keys and values": "deepseek_v2 minicpm3",
        # these have a route in translations.routes; a test holds that they are the same
        "its class has no grouped keys and values; a conversion to GQA or MQA gives it one that has": (
            "bart biogpt bloom codegen gpt2 gpt_neo gpt_neox gptj mpt mt5 opt persimmon qwen t5 whisper xglm"
        ),
    }
    return {model_type: cause for cause, model_types in causes.items() for model_type in model_types.split()}


_REASONS = _reasons()


def find_architecture(checkpoint: Checkpoint) -> Architecture:
    """Return the entry of the checkpoint's `model_type`, with tensor names as this checkpoint has them.

    Raises UnsupportedError, with the reason where one is known, for a `model_type` that is not in the table.
    """
    model_type = checkpoint.config.get("model_type")
    architecture = known_architecture(model_type)
    if architecture is None:
        reason = _REASONS.get(str(model_type), "kvconvert does not know this architecture")
        raise UnsupportedError(
            f"{checkpoint.name}: model_type {model_type!r} is not supported: {reason}",
            hint="docs/architectures.md lists what is supported",
        )
    return _located(architecture, checkpoint)


def _located(architecture: Architecture, checkpoint: Checkpoint) -> Architecture:
    """The entry with the checkpoint's tensor names.

    A base class saves without the first part (`model.`), and some classes for question answering have another.
    """
    cross = architecture.cross_attention
    for first in ("", "transformer."):
        renamed = replace(
            architecture,
            attention=first + architecture.attention.partition(".")[2],
            cross_attention=first + cross.partition(".")[2] if cross else None,
        )
        if renamed.tensor_name(0, "o_proj") in checkpoint.tensors:
            return renamed
    return architecture
