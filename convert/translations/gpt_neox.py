"""GPT-NeoX (Pythia): parallel blocks are Phi's, sequential ones Nemotron's."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from ..checkpoint.tensors import Checkpoint
from .common import common_config, head_part, linear, present_prefix, qkv, rope_config, same, zeros
from .decoder import decoder_config, decoder_tensors, megatron_modules
from .translation import Derived, Translation

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["GPT_NEOX_TO_DECODER", "GPT_NEOX_TO_PHI"]


def _is_sequential(checkpoint: Checkpoint) -> str | None:
    return None if checkpoint.full_config["use_parallel_residual"] else "its branches follow one another"


def _phi_config(checkpoint: Checkpoint) -> dict[str, Any]:
    config = checkpoint.full_config
    return common_config(checkpoint, "phi", "PhiForCausalLM") | {
        "hidden_act": config["hidden_act"],
        "intermediate_size": checkpoint.config_int("intermediate_size"),
        "layer_norm_eps": config["layer_norm_eps"],
        "max_position_embeddings": checkpoint.config_int("max_position_embeddings"),
        **rope_config(checkpoint.full_config["rope_parameters"]),
    }


def _phi_tensors(checkpoint: Checkpoint) -> dict[str, Derived]:
    num_heads, hidden_size = checkpoint.config_int("num_attention_heads"), checkpoint.config_int("hidden_size")
    inner = checkpoint.config_int("intermediate_size")
    prefix = present_prefix(checkpoint, "gpt_neox.", "embed_in.weight")
    tensors = {
        "model.embed_tokens.weight": same(checkpoint, f"{prefix}embed_in.weight"),
        **linear(checkpoint, "model.final_layernorm", f"{prefix}final_layer_norm"),
    }
    head = _head(checkpoint, prefix)
    if f"{head}.weight" in checkpoint.tensors:
        tensors |= linear(checkpoint, "lm_head", head)
    part = head_part(num_heads)
    for layer in range(checkpoint.config_int("num_hidden_layers")):
        old, new = f"{prefix}layers.{layer}", f"model.layers.{layer}"
        # Phi has one norm for both branches: each branch takes its own gain and shift into its first projection
        norm = f"{old}.input_layernorm"
        gain = same(checkpoint, f"{norm}.weight", lambda tensor: tensor.new_ones(tensor.shape))
        tensors |= {f"{new}.input_layernorm.weight": gain, f"{new}.input_layernorm.bias": zeros(gain)}
        for index, projection in enumerate(("q_proj", "k_proj", "v_proj")):

            def take(tensor: Tensor, index: int = index) -> Tensor:
                return part(tensor, index)

            fused = f"{old}.attention.query_key_value"
            shape = (hidden_size, hidden_size)
            tensors |= _folded(checkpoint, f"{new}.self_attn.{projection}", fused, norm, shape, take)
        tensors |= linear(checkpoint, f"{new}.self_attn.dense", f"{old}.attention.dense")
        mlp, mlp_norm = f"{old}.mlp.dense_h_to_4h", f"{old}.post_attention_layernorm"
        tensors |= _folded(checkpoint, f"{new}.mlp.fc1", mlp, mlp_norm, (inner, hidden_size))
        tensors |= linear(checkpoint, f"{new}.mlp.fc2", f"{old}.mlp.dense_4h_to_h")
    return tensors


def _decoder_config(checkpoint: Checkpoint) -> dict[str, Any]:
    phi = _phi_config(checkpoint)
    copied = "hidden_size num_attention_heads num_hidden_layers intermediate_size max_position_embeddings hidden_act"
    return decoder_config(
        checkpoint,
        **{name: phi[name] for name in (*copied.split(), "layer_norm_eps")},
        position_embedding_type="rotary",
        **rope_config(checkpoint.full_config["rope_parameters"]),
    )


def _decoder_tensors(checkpoint: Checkpoint) -> dict[str, Derived]:
    prefix = present_prefix(checkpoint, "gpt_neox.", "embed_in.weight")
    part = head_part(checkpoint.config_int("num_attention_heads"))
    return decoder_tensors(
        checkpoint,
        embeddings=f"{prefix}embed_in",
        final_norm=f"{prefix}final_layer_norm",
        layers=f"{prefix}layers.{{layer}}",
        num_hidden_layers=checkpoint.config_int("num_hidden_layers"),
        names=megatron_modules("attention"),
        attention=lambda new, old: qkv(checkpoint, new, f"{old}.attention.query_key_value", part),
        head=_head(checkpoint, prefix),
    )


def _head(checkpoint: Checkpoint, prefix: str) -> str:
    """The name of the output head: embed_out, lm_head in newer files, and that of the embeddings where it is tied."""
    for name in ("embed_out", "lm_head"):
        if f"{name}.weight" in checkpoint.tensors:
            return name
    return f"{prefix}embed_in" if checkpoint.full_config["tie_word_embeddings"] else "lm_head"


def _folded(
    checkpoint: Checkpoint,
    new: str,
    old: str,
    norm: str,
    shape: tuple[int, int],
    part: Callable[[Tensor], Tensor] = lambda tensor: tensor,
) -> dict[str, Derived]:
    """A projection of norm(x)·γ + β as one of norm(x): W → W diag(γ), b → b + W β."""

    def fold_gain(weight: Tensor, gain: Tensor) -> Tensor:
        return part(weight) * gain

    def fold_shift(weight: Tensor, shift: Tensor, bias: Tensor | None = None) -> Tensor:
        folded = part(weight) @ shift
        return folded if bias is None else folded + part(bias)

    weight = f"{old}.weight"
    bias = (f"{old}.bias",) if f"{old}.bias" in checkpoint.tensors else ()
    return {
        f"{new}.weight": Derived((weight, f"{norm}.weight"), shape, fold_gain),
        f"{new}.bias": Derived((weight, f"{norm}.bias", *bias), shape[:1], fold_shift),
    }


GPT_NEOX_TO_PHI = Translation("gpt_neox", "phi", _phi_config, _phi_tensors, _is_sequential)
GPT_NEOX_TO_DECODER = Translation("gpt_neox", "grouped_decoder", _decoder_config, _decoder_tensors)
