"""GPT-NeoX (Pythia): parallel blocks are Phi's, sequential ones Nemotron's."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

from ..checkpoint import Checkpoint
from ..translation import Derived, Translation
from .common import common_config, linear, present_prefix, rope_config, whole, zeros

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["GPT_NEOX"]


def _neox_is_sequential(checkpoint: Checkpoint) -> str | None:
    if checkpoint.config.get("use_parallel_residual", True):
        return None
    return "its residual is sequential"


def _neox_to_phi_config(checkpoint: Checkpoint) -> dict[str, Any]:
    config = checkpoint.config
    return common_config(checkpoint, "phi", "PhiForCausalLM") | {
        "hidden_act": config.get("hidden_act", "gelu"),
        "intermediate_size": checkpoint.config_int("intermediate_size"),
        "layer_norm_eps": config.get("layer_norm_eps", 1e-5),
        "max_position_embeddings": checkpoint.config_int("max_position_embeddings", default=2048),
        **rope_config(checkpoint, config.get("rotary_pct", 0.25), config.get("rotary_emb_base", 10000)),
    }


def _neox_to_nemotron_config(checkpoint: Checkpoint) -> dict[str, Any]:
    config = _neox_to_phi_config(checkpoint)
    epsilon = config.pop("layer_norm_eps")
    return config | {
        "architectures": ["NemotronForCausalLM"],
        "model_type": "nemotron",
        "norm_eps": epsilon,
        "attention_bias": True,
        "mlp_bias": True,
    }


def _neox_to_phi_tensors(checkpoint: Checkpoint) -> dict[str, Derived]:
    num_heads, hidden_size = checkpoint.config_int("num_attention_heads"), checkpoint.config_int("hidden_size")
    inner = checkpoint.config_int("intermediate_size")
    prefix = present_prefix(checkpoint, "gpt_neox.", "embed_in.weight")
    tensors = _neox_ends(checkpoint, prefix, "model.final_layernorm")
    tensors["lm_head.bias"] = zeros(tensors["lm_head.weight"])
    for layer in range(checkpoint.config_int("num_hidden_layers")):
        old, new = f"{prefix}layers.{layer}", f"model.layers.{layer}"
        # Phi has one norm for both branches: each branch takes its own gain and shift into its first projection
        norm = f"{old}.input_layernorm"
        tensors[f"{new}.input_layernorm.weight"] = Derived((f"{norm}.weight",), (hidden_size,), _ones_like)
        tensors[f"{new}.input_layernorm.bias"] = Derived((f"{norm}.bias",), (hidden_size,), _zeros_like)
        fused = f"{old}.attention.query_key_value"
        for index, projection in enumerate(("q_proj", "k_proj", "v_proj")):
            part = partial(_neox_part, index=index, num_heads=num_heads)
            tensors |= _folded(checkpoint, f"{new}.self_attn.{projection}", fused, norm, part, hidden_size, hidden_size)
        tensors |= linear(checkpoint, f"{new}.self_attn.dense", f"{old}.attention.dense", hidden_size)
        mlp_norm = f"{old}.post_attention_layernorm"
        tensors |= _folded(
            checkpoint, f"{new}.mlp.fc1", f"{old}.mlp.dense_h_to_4h", mlp_norm, whole, inner, hidden_size
        )
        tensors |= linear(checkpoint, f"{new}.mlp.fc2", f"{old}.mlp.dense_4h_to_h", hidden_size)
    return tensors


def _neox_to_nemotron_tensors(checkpoint: Checkpoint) -> dict[str, Derived]:
    num_heads, hidden_size = checkpoint.config_int("num_attention_heads"), checkpoint.config_int("hidden_size")
    inner = checkpoint.config_int("intermediate_size")
    prefix = present_prefix(checkpoint, "gpt_neox.", "embed_in.weight")
    tensors = _neox_ends(checkpoint, prefix, "model.norm")
    gain = tensors["model.norm.weight"]
    tensors["model.norm.weight"] = Derived(gain.reads, gain.shape, _minus_one)
    for layer in range(checkpoint.config_int("num_hidden_layers")):
        old, new = f"{prefix}layers.{layer}", f"model.layers.{layer}"
        for norm in ("input_layernorm", "post_attention_layernorm"):  # Nemotron's norms multiply by 1 + weight
            tensors[f"{new}.{norm}.weight"] = Derived((f"{old}.{norm}.weight",), (hidden_size,), _minus_one)
            tensors[f"{new}.{norm}.bias"] = Derived((f"{old}.{norm}.bias",), (hidden_size,))
        fused = f"{old}.attention.query_key_value"
        for index, projection in enumerate(("q_proj", "k_proj", "v_proj")):
            part = partial(_neox_part, index=index, num_heads=num_heads)
            name = f"{new}.self_attn.{projection}"
            tensors[f"{name}.weight"] = Derived((f"{fused}.weight",), (hidden_size, hidden_size), part)
            tensors[f"{name}.bias"] = (
                Derived((f"{fused}.bias",), (hidden_size,), part)
                if f"{fused}.bias" in checkpoint.tensors
                else zeros(tensors[f"{name}.weight"])
            )
        tensors |= linear(checkpoint, f"{new}.self_attn.o_proj", f"{old}.attention.dense", hidden_size)
        tensors |= linear(checkpoint, f"{new}.mlp.up_proj", f"{old}.mlp.dense_h_to_4h", inner)
        tensors |= linear(checkpoint, f"{new}.mlp.down_proj", f"{old}.mlp.dense_4h_to_h", hidden_size)
    return tensors


def _neox_ends(checkpoint: Checkpoint, prefix: str, final_norm: str) -> dict[str, Derived]:
    """Embedding, final norm and output head of GPT-NeoX; files name the head embed_out, newer ones lm_head."""
    hidden_size, vocab_size = checkpoint.config_int("hidden_size"), checkpoint.config_int("vocab_size")
    head = "embed_out.weight" if "embed_out.weight" in checkpoint.tensors else "lm_head.weight"
    embedding = f"{prefix}embed_in.weight"
    if head not in checkpoint.tensors and checkpoint.config.get("tie_word_embeddings"):
        head = embedding
    return {
        "model.embed_tokens.weight": Derived((embedding,), (vocab_size, hidden_size)),
        f"{final_norm}.weight": Derived((f"{prefix}final_layer_norm.weight",), (hidden_size,)),
        f"{final_norm}.bias": Derived((f"{prefix}final_layer_norm.bias",), (hidden_size,)),
        "lm_head.weight": Derived((head,), (vocab_size, hidden_size)),
    }


def _folded(
    checkpoint: Checkpoint, new: str, old: str, norm: str, part: Any, num_rows: int, num_columns: int
) -> dict[str, Derived]:
    """A projection of norm(x)·γ + β as one of norm(x): W → W diag(γ), b → b + W β."""
    weight, gain, shift = f"{old}.weight", f"{norm}.weight", f"{norm}.bias"
    bias = (f"{old}.bias",) if f"{old}.bias" in checkpoint.tensors else ()
    return {
        f"{new}.weight": Derived((weight, gain), (num_rows, num_columns), partial(_fold_gain, part=part)),
        f"{new}.bias": Derived((weight, shift, *bias), (num_rows,), partial(_fold_shift, part=part)),
    }


def _fold_gain(weight: Tensor, gain: Tensor, *, part: Any) -> Tensor:
    folded: Tensor = part(weight) * gain
    return folded


def _fold_shift(weight: Tensor, shift: Tensor, bias: Tensor | None = None, *, part: Any) -> Tensor:
    folded: Tensor = part(weight) @ shift
    return folded if bias is None else folded + part(bias)


def _neox_part(tensor: Tensor, *, index: int, num_heads: int) -> Tensor:
    """q, k or v of a projection whose rows are (num_heads, 3, head_dim)."""
    head_dim = tensor.shape[0] // (3 * num_heads)
    return tensor.reshape(num_heads, 3, head_dim, *tensor.shape[1:])[:, index].reshape(-1, *tensor.shape[1:])


def _minus_one(tensor: Tensor) -> Tensor:
    return tensor - 1


def _ones_like(tensor: Tensor) -> Tensor:
    return tensor.new_ones(tensor.shape)


def _zeros_like(tensor: Tensor) -> Tensor:
    return tensor.new_zeros(tensor.shape)


GPT_NEOX = (
    Translation("gpt_neox", "phi", _neox_to_phi_config, _neox_to_phi_tensors, _neox_is_sequential),
    Translation("gpt_neox", "nemotron", _neox_to_nemotron_config, _neox_to_nemotron_tensors),
)
