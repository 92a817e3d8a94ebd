"""GPT-2, OPT, GPT-Neo and GPTBigCode itself as GPTBigCode with one K/V head.

It is the native class with learned positions, and has one K/V head or all of them. With one, its fused projection has
the rows [q; k; v], and so have the views here.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

from ..checkpoint import Checkpoint
from ..translation import Derived, Translation
from .common import linear, present_prefix

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["GPT2", "GPT_BIGCODE", "GPT_NEO", "OPT"]

_OPT_OFFSET = 2  # OPT's position embeddings begin with two that no position uses


def _gpt2_refusal(checkpoint: Checkpoint) -> str | None:
    if checkpoint.config.get("add_cross_attention"):
        return "it has cross-attention, which GPTBigCode's native use has not"
    return None


def _gpt2_config(checkpoint: Checkpoint) -> dict[str, Any]:
    return _bigcode_config(checkpoint, num_positions="n_positions") | {
        "scale_attn_weights": checkpoint.config.get("scale_attn_weights", True),
    }


def _gpt2_tensors(checkpoint: Checkpoint) -> dict[str, Derived]:
    """GPT-2 stores its projections as (inputs, outputs)."""
    width, num_layers = checkpoint.config_int("n_embd"), checkpoint.config_int("n_layer")
    prefix = present_prefix(checkpoint, "transformer.", "wte.weight")
    tensors = _ends(checkpoint, prefix)
    for layer in range(num_layers):
        old, new = f"{prefix}h.{layer}", f"transformer.h.{layer}"
        for name in ("ln_1.weight", "ln_1.bias", "ln_2.weight", "ln_2.bias"):
            tensors[f"{new}.{name}"] = _same(checkpoint, f"{old}.{name}")
        for projection in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"):
            weight = f"{old}.{projection}.weight"
            shape = checkpoint.tensors[weight].shape[::-1] if weight in checkpoint.tensors else (width, width)
            tensors[f"{new}.{projection}.weight"] = Derived((weight,), shape, _transposed)
            tensors[f"{new}.{projection}.bias"] = _same(checkpoint, f"{old}.{projection}.bias")
        if checkpoint.config.get(
            "scale_attn_by_inverse_layer_idx"
        ):  # into the queries, which GPTBigCode does not scale
            scale = partial(_scaled_queries, num_rows=width, factor=1 / (layer + 1))
            fused = f"{new}.attn.c_attn"
            weight_now, bias_now = tensors[f"{fused}.weight"], tensors[f"{fused}.bias"]
            tensors[f"{fused}.weight"] = Derived(
                weight_now.reads, weight_now.shape, partial(_after, _transposed, scale)
            )
            tensors[f"{fused}.bias"] = Derived(bias_now.reads, bias_now.shape, scale)
    return tensors


def _opt_refusal(checkpoint: Checkpoint) -> str | None:
    config = checkpoint.config
    if config.get("word_embed_proj_dim", config.get("hidden_size")) != config.get("hidden_size"):
        return "its embeddings are narrower than its layers, which GPTBigCode has no projection for"
    if not config.get("do_layer_norm_before", True) or config.get("_remove_final_layer_norm"):
        return "it normalises after each branch, GPTBigCode before"
    if not config.get("layer_norm_elementwise_affine", True):
        return "its norms have no gains, GPTBigCode's have"
    return None


def _opt_config(checkpoint: Checkpoint) -> dict[str, Any]:
    return _bigcode_config(
        checkpoint,
        width="hidden_size",
        num_heads="num_attention_heads",
        num_layers="num_hidden_layers",
        inner="ffn_dim",
        num_positions="max_position_embeddings",
        activation="relu",
    )


def _opt_tensors(checkpoint: Checkpoint) -> dict[str, Derived]:
    width = checkpoint.config_int("hidden_size")
    num_positions = checkpoint.config_int("max_position_embeddings")
    decoder = present_prefix(checkpoint, "model.", "decoder.embed_tokens.weight") + "decoder."
    positions = f"{decoder}embed_positions.weight"
    tensors = {
        "transformer.wte.weight": _same(checkpoint, f"{decoder}embed_tokens.weight"),
        "transformer.wpe.weight": Derived((positions,), (num_positions, width), _without_offset),
        "transformer.ln_f.weight": _same(checkpoint, f"{decoder}final_layer_norm.weight"),
        "transformer.ln_f.bias": _same(checkpoint, f"{decoder}final_layer_norm.bias"),
    }
    if "lm_head.weight" in checkpoint.tensors:
        tensors["lm_head.weight"] = _same(checkpoint, "lm_head.weight")
    for layer in range(checkpoint.config_int("num_hidden_layers")):
        old, new = f"{decoder}layers.{layer}", f"transformer.h.{layer}"
        for kind in ("weight", "bias"):
            tensors[f"{new}.ln_1.{kind}"] = _same(checkpoint, f"{old}.self_attn_layer_norm.{kind}")
            tensors[f"{new}.ln_2.{kind}"] = _same(checkpoint, f"{old}.final_layer_norm.{kind}")
        tensors |= _stacked(checkpoint, f"{new}.attn.c_attn", f"{old}.self_attn", width)
        tensors |= linear(checkpoint, f"{new}.attn.c_proj", f"{old}.self_attn.out_proj", width)
        tensors |= linear(checkpoint, f"{new}.mlp.c_fc", f"{old}.fc1", checkpoint.config_int("ffn_dim"))
        tensors |= linear(checkpoint, f"{new}.mlp.c_proj", f"{old}.fc2", width)
    return tensors


def _neo_refusal(checkpoint: Checkpoint) -> str | None:
    config = checkpoint.config
    window = checkpoint.config_int("window_size", default=256)
    longest = checkpoint.config_int("max_position_embeddings", default=2048)
    if longest > window and "local" in str(config.get("attention_layers") or config.get("attention_types") or "local"):
        return (
            f"every other layer sees {window} tokens only, and GPTBigCode has no such window; it is exact up to a "
            f"context of {window}, but max_position_embeddings = {longest}"
        )
    return None


def _neo_config(checkpoint: Checkpoint) -> dict[str, Any]:
    return _bigcode_config(
        checkpoint,
        width="hidden_size",
        num_heads="num_heads",
        num_layers="num_layers",
        inner="intermediate_size",
        num_positions="max_position_embeddings",
    )


def _neo_tensors(checkpoint: Checkpoint) -> dict[str, Derived]:
    """GPT-Neo does not divide attention by √head_dim: its queries are multiplied by it."""
    width = checkpoint.config_int("hidden_size")
    inner = checkpoint.config_int("intermediate_size", default=4 * width)
    factor = (width // checkpoint.config_int("num_heads")) ** 0.5
    prefix = present_prefix(checkpoint, "transformer.", "wte.weight")
    tensors = _ends(checkpoint, prefix)
    for layer in range(checkpoint.config_int("num_layers")):
        old, new = f"{prefix}h.{layer}", f"transformer.h.{layer}"
        for name in ("ln_1.weight", "ln_1.bias", "ln_2.weight", "ln_2.bias"):
            tensors[f"{new}.{name}"] = _same(checkpoint, f"{old}.{name}")
        tensors |= _stacked(checkpoint, f"{new}.attn.c_attn", f"{old}.attn.attention", width, query_factor=factor)
        tensors |= linear(checkpoint, f"{new}.attn.c_proj", f"{old}.attn.attention.out_proj", width)
        tensors |= linear(checkpoint, f"{new}.mlp.c_fc", f"{old}.mlp.c_fc", inner)
        tensors |= linear(checkpoint, f"{new}.mlp.c_proj", f"{old}.mlp.c_proj", width)
    return tensors


def _starcoder_refusal(checkpoint: Checkpoint) -> str | None:
    if checkpoint.config.get("multi_query", True):
        return "it has one K/V head already"
    return None


def _starcoder_tensors(checkpoint: Checkpoint) -> dict[str, Derived]:
    """GPTBigCode with all K/V heads: the rows of its fused projection are (num_heads, 3, head_dim)."""
    num_heads = checkpoint.config_int("n_head")
    return {
        name: replace(_same(checkpoint, name), compute=partial(_ungrouped, num_heads=num_heads))
        if ".attn.c_attn." in name
        else _same(checkpoint, name)
        for name in checkpoint.tensors
    }


GPT2 = (Translation("gpt2", "gpt_bigcode", _gpt2_config, _gpt2_tensors, _gpt2_refusal),)
OPT = (Translation("opt", "gpt_bigcode", _opt_config, _opt_tensors, _opt_refusal),)
GPT_BIGCODE = (
    Translation(
        "gpt_bigcode", "gpt_bigcode", lambda checkpoint: checkpoint.config, _starcoder_tensors, _starcoder_refusal
    ),
)
GPT_NEO = (Translation("gpt_neo", "gpt_bigcode", _neo_config, _neo_tensors, _neo_refusal),)


def _bigcode_config(
    checkpoint: Checkpoint,
    *,
    width: str = "n_embd",
    num_heads: str = "n_head",
    num_layers: str = "n_layer",
    inner: str = "n_inner",
    num_positions: str,
    activation: str = "gelu_new",
) -> dict[str, Any]:
    """GPTBigCode's config from one whose names the arguments are; `activation` is that of a config without it."""
    config = checkpoint.config
    same = ("vocab_size", "initializer_range", "bos_token_id", "eos_token_id", "pad_token_id", "dtype", "torch_dtype")
    return {name: config[name] for name in (*same, "quantization_config") if name in config} | {
        "architectures": ["GPTBigCodeForCausalLM"],
        "model_type": "gpt_bigcode",
        "multi_query": False,
        "activation_function": config.get("activation_function", activation),
        "layer_norm_epsilon": config.get("layer_norm_epsilon", 1e-5),
        "n_embd": checkpoint.config_int(width),
        "n_head": checkpoint.config_int(num_heads),
        "n_inner": config.get(inner),
        "n_layer": checkpoint.config_int(num_layers),
        "n_positions": checkpoint.config_int(num_positions),
        "attn_pdrop": 0.0,
        "embd_pdrop": 0.0,
        "resid_pdrop": 0.0,
        "tie_word_embeddings": bool(config.get("tie_word_embeddings", True)),
    }


def _ends(checkpoint: Checkpoint, prefix: str) -> dict[str, Derived]:
    """Embeddings, final norm and, where the file has it, the output head of GPT-2 and GPT-Neo."""
    names = ("wte.weight", "wpe.weight", "ln_f.weight", "ln_f.bias")
    tensors = {f"transformer.{name}": _same(checkpoint, f"{prefix}{name}") for name in names}
    if "lm_head.weight" in checkpoint.tensors:
        tensors["lm_head.weight"] = _same(checkpoint, "lm_head.weight")
    return tensors


def _same(checkpoint: Checkpoint, name: str) -> Derived:
    return Derived((name,), checkpoint.tensors[name].shape if name in checkpoint.tensors else ())


def _stacked(
    checkpoint: Checkpoint, new: str, old: str, width: int, *, query_factor: float = 1.0
) -> dict[str, Derived]:
    """q, k and v as one projection with the rows [q; k; v], its bias zeros if they have none."""
    weights = tuple(f"{old}.{projection}.weight" for projection in ("q_proj", "k_proj", "v_proj"))
    biases = tuple(name.replace(".weight", ".bias") for name in weights)
    stack = partial(_stack, factor=query_factor)
    tensors = {f"{new}.weight": Derived(weights, (3 * width, width), stack)}
    if biases[0] in checkpoint.tensors:
        tensors[f"{new}.bias"] = Derived(biases, (3 * width,), stack)
    else:
        tensors[f"{new}.bias"] = Derived(weights[:1], (3 * width,), partial(_no_bias, num_rows=3 * width))
    return tensors


def _stack(queries: Tensor, keys: Tensor, values: Tensor, *, factor: float) -> Tensor:
    import torch

    return torch.cat([queries * factor, keys, values])


def _no_bias(weight: Tensor, *, num_rows: int) -> Tensor:
    return weight.new_zeros(num_rows)


def _ungrouped(fused: Tensor, *, num_heads: int) -> Tensor:
    """Rows (num_heads, 3, head_dim) as [q; k; v]."""
    return fused.reshape(num_heads, 3, -1, *fused.shape[1:]).transpose(0, 1).reshape(fused.shape)


def _transposed(tensor: Tensor) -> Tensor:
    return tensor.T


def _without_offset(positions: Tensor) -> Tensor:
    return positions[_OPT_OFFSET:]


def _scaled_queries(fused: Tensor, *, num_rows: int, factor: float) -> Tensor:
    scaled = fused.clone()
    scaled[:num_rows] *= factor
    return scaled


def _after(first: Any, second: Any, tensor: Tensor) -> Tensor:
    result: Tensor = second(first(tensor))
    return result
