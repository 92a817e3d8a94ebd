"""Decoders with a LayerNorm before each of two sequential branches, as our GroupedDecoder.

A source class says once where its tensors are, and becomes a GroupedDecoder. From there TO_GPT_BIGCODE and TO_NEMOTRON
lead to two stock classes that can compute some of them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from ..algebra.heads import interleave_heads
from ..checkpoint.tensors import Checkpoint
from ..runtime import RUNTIME_CLASSES
from .common import linear, same
from .translation import Derived, Translation

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["TO_GPT_BIGCODE", "TO_NEMOTRON", "decoder_config", "decoder_tensors", "megatron_modules", "scaled_queries"]

_COPIED = (
    "vocab_size initializer_range tie_word_embeddings bos_token_id eos_token_id pad_token_id dtype torch_dtype "
    "quantization_config"
)


def decoder_config(
    checkpoint: Checkpoint,
    *,
    hidden_size: int,
    num_attention_heads: int,
    num_hidden_layers: int,
    intermediate_size: int,
    max_position_embeddings: int,
    hidden_act: str,
    **more: Any,
) -> dict[str, Any]:
    """Return GroupedDecoder's config: these sizes, `more` of its fields, and what the source's config says alike."""
    runtime = RUNTIME_CLASSES["grouped_decoder"]
    config = checkpoint.full_config
    copied = {name: config[name] for name in _COPIED.split() if name in config}
    if "init_std" in config:
        copied["initializer_range"] = config["init_std"]
    return {
        **copied,
        "architectures": [runtime.architecture],
        "auto_map": runtime.auto_map,
        "model_type": runtime.model_type,
        "hidden_size": hidden_size,
        "intermediate_size": intermediate_size,
        "num_hidden_layers": num_hidden_layers,
        "num_attention_heads": num_attention_heads,
        "num_key_value_heads": num_attention_heads,
        "head_dim": hidden_size // num_attention_heads,
        "hidden_act": hidden_act,
        "max_position_embeddings": max_position_embeddings,
        "position_embedding_type": "learned",
        **more,
    }


def decoder_tensors(
    checkpoint: Checkpoint,
    *,
    embeddings: str,
    final_norm: str,
    layers: str,
    num_hidden_layers: int,
    names: Mapping[str, str],
    attention: Callable[[str, str], dict[str, Derived]],
    positions: Derived | None = None,
    head: str = "lm_head",
    transposed: bool = False,
) -> dict[str, Derived]:
    """Return how GroupedDecoder's tensors are made.

    `embeddings`, `final_norm`, `head` and `layers`, with `{layer}` in it, are names of the source's modules. `names`
    maps the modules of a layer that are only renamed (norms, o_proj, up_proj, down_proj) to the source's.
    `attention(new, old)` gives q_proj, k_proj, v_proj and norms of queries and keys for the attention `new`, from the
    layer `old`. `transposed` says that the source stores projections as (inputs, outputs). A tied head may be absent.
    """
    tensors = {
        "model.embed_tokens.weight": same(checkpoint, f"{embeddings}.weight"),
        **linear(checkpoint, "model.norm", final_norm),
    }
    if f"{head}.weight" in checkpoint.tensors:
        tensors["lm_head.weight"] = same(checkpoint, f"{head}.weight")
    if positions is not None:
        tensors["model.embed_positions.weight"] = positions
    for layer in range(num_hidden_layers):
        new, old = f"model.layers.{layer}", layers.format(layer=layer)
        for module, source in names.items():
            is_projection = module.endswith("_proj")
            tensors |= linear(checkpoint, f"{new}.{module}", f"{old}.{source}", transposed=transposed and is_projection)
        tensors |= attention(f"{new}.self_attn", old)
    return tensors


def megatron_modules(attention: str) -> dict[str, str]:
    """Return the `names` of `decoder_tensors` for a source that names its modules as Megatron does."""
    return {
        "input_layernorm": "input_layernorm",
        "post_attention_layernorm": "post_attention_layernorm",
        "self_attn.o_proj": f"{attention}.dense",
        "mlp.up_proj": "mlp.dense_h_to_4h",
        "mlp.down_proj": "mlp.dense_4h_to_h",
    }


def scaled_queries(tensors: dict[str, Derived], new: str, factor: float) -> dict[str, Derived]:
    """Return the tensors with the queries of the attention `new` multiplied by `factor`."""

    def scale(derived: Derived) -> Derived:
        compute = derived.compute or (lambda tensor: tensor)
        return replace(derived, compute=lambda *read: compute(*read) * factor)

    names = [f"{new}.q_proj.{kind}" for kind in ("weight", "bias")]
    return tensors | {name: scale(tensors[name]) for name in names}


def _plain(config: Mapping[str, Any]) -> bool:
    special = ("clip_qkv", "qk_norm", "embedding_norm", "alibi_slopes")
    return not any(config.get(name) for name in special) and "sliding_attention" not in config.get("layer_types", ())


def _gpt_bigcode_refusal(checkpoint: Checkpoint) -> str | None:
    config = checkpoint.full_config
    if config["position_embedding_type"] == "learned" and _plain(config):
        return None
    return "GPTBigCode has learned positions, no window, no clipping, and norms before the branches only"


def _gpt_bigcode_config(checkpoint: Checkpoint) -> dict[str, Any]:
    config = checkpoint.full_config
    return {name: config[name] for name in _COPIED.split() if name in config} | {
        "architectures": ["GPTBigCodeForCausalLM"],
        "model_type": "gpt_bigcode",
        "multi_query": False,
        "activation_function": config["hidden_act"],
        "layer_norm_epsilon": config["layer_norm_eps"],
        "n_embd": config["hidden_size"],
        "n_head": config["num_attention_heads"],
        "n_inner": config["intermediate_size"],
        "n_layer": config["num_hidden_layers"],
        "n_positions": config["max_position_embeddings"],
        "attn_pdrop": 0.0,
        "embd_pdrop": 0.0,
        "resid_pdrop": 0.0,
        "tie_word_embeddings": config["tie_word_embeddings"] and config["embedding_multiplier"] == 1.0,
    }


def _gpt_bigcode_tensors(checkpoint: Checkpoint) -> dict[str, Derived]:
    """GPTBigCode's tensors; a multiplier of the embeddings is folded into them, which unties them from the head."""
    width, num_heads = checkpoint.config_int("hidden_size"), checkpoint.config_int("num_attention_heads")
    multiplier = checkpoint.full_config["embedding_multiplier"]
    embeddings = same(checkpoint, "model.embed_tokens.weight")
    tensors = {
        "transformer.wte.weight": embeddings,
        "transformer.wpe.weight": same(checkpoint, "model.embed_positions.weight"),
        **linear(checkpoint, "transformer.ln_f", "model.norm"),
    }
    if "lm_head.weight" in checkpoint.tensors:
        tensors["lm_head.weight"] = same(checkpoint, "lm_head.weight")
    if multiplier != 1.0:
        tensors.setdefault("lm_head.weight", embeddings)
        tensors["transformer.wte.weight"] = replace(embeddings, compute=lambda tensor: tensor * multiplier)
    names = {
        "ln_1": "input_layernorm",
        "ln_2": "post_attention_layernorm",
        "attn.c_proj": "self_attn.o_proj",
        "mlp.c_fc": "mlp.up_proj",
        "mlp.c_proj": "mlp.down_proj",
    }

    def fuse(*projections: Tensor) -> Tensor:
        import torch

        return interleave_heads(torch.cat(projections), num_heads, num_heads)

    for layer in range(checkpoint.config_int("num_hidden_layers")):
        new, old = f"transformer.h.{layer}", f"model.layers.{layer}"
        for module, source in names.items():
            tensors |= linear(checkpoint, f"{new}.{module}", f"{old}.{source}")
        for kind, shape in (("weight", (3 * width, width)), ("bias", (3 * width,))):
            reads = tuple(f"{old}.self_attn.{projection}.{kind}" for projection in ("q_proj", "k_proj", "v_proj"))
            tensors[f"{new}.attn.c_attn.{kind}"] = Derived(reads, shape, fuse)
    return tensors


def _nemotron_refusal(checkpoint: Checkpoint) -> str | None:
    config = checkpoint.full_config
    if config["position_embedding_type"] == "rotary" and _plain(config):
        return None
    return "Nemotron has rotary positions, no clipping, and norms before the branches only"


def _nemotron_config(checkpoint: Checkpoint) -> dict[str, Any]:
    dropped = ("auto_map", "layer_norm_eps", "position_embedding_type")
    return {name: value for name, value in checkpoint.config.items() if name not in dropped} | {
        "architectures": ["NemotronForCausalLM"],
        "model_type": "nemotron",
        "norm_eps": checkpoint.full_config["layer_norm_eps"],
        "attention_bias": True,
        "mlp_bias": True,
    }


def _nemotron_tensors(checkpoint: Checkpoint) -> dict[str, Derived]:
    """Nemotron's tensors, which have the same names; its norms multiply by 1 + weight, so that 1 is subtracted."""
    is_gain = ("norm.weight", "layernorm.weight")
    return {
        name: same(checkpoint, name, (lambda tensor: tensor - 1) if name.endswith(is_gain) else None)
        for name in checkpoint.tensors
    }


TO_GPT_BIGCODE = Translation(
    "grouped_decoder", "gpt_bigcode", _gpt_bigcode_config, _gpt_bigcode_tensors, _gpt_bigcode_refusal
)
TO_NEMOTRON = Translation("grouped_decoder", "nemotron", _nemotron_config, _nemotron_tensors, _nemotron_refusal)
