"""GPT-J and CodeGen as Phi: one norm for parallel branches, rotary pairs regrouped."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

from ..checkpoint.tensors import Checkpoint
from .common import common_config, linear, present_prefix, rope_config, same, whole, zeros
from .translation import Derived, Translation

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["CODEGEN_TO_PHI", "GPTJ_TO_PHI"]

_CODEGEN_BLOCKS = 4  # CodeGen's q, v and k lie in four blocks, one per accelerator of its training


def _gptj_to_phi_config(checkpoint: Checkpoint) -> dict[str, Any]:
    config = checkpoint.full_config
    hidden_size, num_heads = checkpoint.config_int("n_embd"), checkpoint.config_int("n_head")
    rotary_dim = checkpoint.config_int("rotary_dim")
    return common_config(checkpoint, "phi", "PhiForCausalLM") | {
        "hidden_act": config["activation_function"],
        "hidden_size": hidden_size,
        "intermediate_size": checkpoint.config_int("n_inner", default=4 * hidden_size),
        "layer_norm_eps": config["layer_norm_epsilon"],
        "max_position_embeddings": checkpoint.config_int("n_positions"),
        "num_attention_heads": num_heads,
        "num_hidden_layers": checkpoint.config_int("n_layer"),
        "num_key_value_heads": num_heads,
        **rope_config({"rope_theta": 10000, "partial_rotary_factor": rotary_dim * num_heads / hidden_size}),
    }


def _gptj_to_phi_tensors(checkpoint: Checkpoint) -> dict[str, Derived]:
    """Phi's tensors from GPT-J's or CodeGen's: rotary pairs become half-split, absent biases of attention zeros."""
    hidden_size, num_heads = checkpoint.config_int("n_embd"), checkpoint.config_int("n_head")
    rotary_dim = checkpoint.config_int("rotary_dim")
    half_split = partial(_half_split, num_heads=num_heads, rotary_dim=rotary_dim)
    prefix = present_prefix(checkpoint, "transformer.", "wte.weight")
    tensors = {
        "model.embed_tokens.weight": same(checkpoint, f"{prefix}wte.weight"),
        **linear(checkpoint, "model.final_layernorm", f"{prefix}ln_f"),
        **(linear(checkpoint, "lm_head", "lm_head") if "lm_head.weight" in checkpoint.tensors else {}),
    }
    for layer in range(checkpoint.config_int("n_layer")):
        old, new = f"{prefix}h.{layer}", f"model.layers.{layer}"
        tensors |= linear(checkpoint, f"{new}.input_layernorm", f"{old}.ln_1")
        square = (hidden_size, hidden_size)
        fused = f"{old}.attn.qkv_proj.weight"
        for index, projection in enumerate(("q_proj", "v_proj", "k_proj")):  # CodeGen's order
            reorder = whole if projection == "v_proj" else half_split
            if fused in checkpoint.tensors:
                derived = Derived((fused,), square, partial(_codegen_part, index=index, reorder=reorder))
            else:
                derived = Derived((f"{old}.attn.{projection}.weight",), square, reorder)
            tensors[f"{new}.self_attn.{projection}.weight"] = derived
            tensors[f"{new}.self_attn.{projection}.bias"] = zeros(derived)
        tensors |= linear(checkpoint, f"{new}.self_attn.dense", f"{old}.attn.out_proj")
        tensors |= linear(checkpoint, f"{new}.mlp.fc1", f"{old}.mlp.fc_in")
        tensors |= linear(checkpoint, f"{new}.mlp.fc2", f"{old}.mlp.fc_out")
    return tensors


def _codegen_part(tensor: Tensor, *, index: int, reorder: Any) -> Tensor:
    """q, v or k, reordered, of a projection whose rows are (4 blocks, 3, rows of the block)."""
    rows = tensor.shape[0] // (3 * _CODEGEN_BLOCKS)
    part = tensor.reshape(_CODEGEN_BLOCKS, 3, rows, *tensor.shape[1:])[:, index].reshape(-1, *tensor.shape[1:])
    reordered: Tensor = reorder(part)
    return reordered


def _half_split(projection: Tensor, *, num_heads: int, rotary_dim: int) -> Tensor:
    """The rows with each head's rotary pairs (2i, 2i + 1) moved to (i, i + rotary_dim / 2); other dims stay."""
    import torch

    heads = projection.reshape(num_heads, -1, *projection.shape[1:])
    even, odd = heads[:, 0:rotary_dim:2], heads[:, 1:rotary_dim:2]
    return torch.cat([even, odd, heads[:, rotary_dim:]], dim=1).reshape(projection.shape)


CODEGEN_TO_PHI = Translation("codegen", "phi", _gptj_to_phi_config, _gptj_to_phi_tensors)
GPTJ_TO_PHI = Translation("gptj", "phi", _gptj_to_phi_config, _gptj_to_phi_tensors)
