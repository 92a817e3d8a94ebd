"""GPT-2, OPT, GPT-Neo, BioGPT, XGLM, GPTBigCode with all K/V heads: a table of positions is added to embeddings."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from ..checkpoint.tensors import Checkpoint
from .common import head_part, linear, present_prefix, qkv, same, third
from .decoder import decoder_config, decoder_tensors, scaled_queries
from .translation import Derived, Translation

if TYPE_CHECKING:
    from torch import Tensor

__all__ = [
    "BIOGPT_TO_DECODER",
    "GPT2_TO_DECODER",
    "GPT_BIGCODE_TO_DECODER",
    "GPT_NEO_TO_DECODER",
    "OPT_TO_DECODER",
    "XGLM_TO_DECODER",
]

_FAIRSEQ_OFFSET = 2  # the tables of OPT, BioGPT and XGLM begin with two positions that no token has
_GPT2_MODULES = {
    "input_layernorm": "ln_1",
    "post_attention_layernorm": "ln_2",
    "mlp.up_proj": "mlp.c_fc",
    "mlp.down_proj": "mlp.c_proj",
}
_FAIRSEQ_MODULES = {
    "input_layernorm": "self_attn_layer_norm",
    "post_attention_layernorm": "final_layer_norm",
    "self_attn.o_proj": "self_attn.out_proj",
    "mlp.up_proj": "fc1",
    "mlp.down_proj": "fc2",
}


def _cross_attention_refusal(checkpoint: Checkpoint) -> str | None:
    return "it has cross-attention" if checkpoint.full_config["add_cross_attention"] else None


def _gpt2_config(checkpoint: Checkpoint) -> dict[str, Any]:
    width = checkpoint.config_int("n_embd")
    return decoder_config(
        checkpoint,
        hidden_size=width,
        num_attention_heads=checkpoint.config_int("n_head"),
        num_hidden_layers=checkpoint.config_int("n_layer"),
        intermediate_size=checkpoint.config_int("n_inner", default=4 * width),
        max_position_embeddings=checkpoint.config_int("n_positions"),
        hidden_act=checkpoint.full_config["activation_function"],
        layer_norm_eps=checkpoint.full_config["layer_norm_epsilon"],
    )


def _gpt2_tensors(checkpoint: Checkpoint) -> dict[str, Derived]:
    """GroupedDecoder's tensors from GPT-2's, which stores projections as (inputs, outputs)."""

    def attention(new: str, old: str) -> dict[str, Derived]:
        tensors = qkv(checkpoint, new, f"{old}.attn.c_attn", third, transposed=True)
        return _with_scale(checkpoint, tensors, new)

    return _gpt2_like_tensors(checkpoint, checkpoint.config_int("n_layer"), attention, transposed=True)


def _with_scale(checkpoint: Checkpoint, tensors: dict[str, Derived], new: str) -> dict[str, Derived]:
    """The tensors with queries that make up for scores that the source scales by another factor than 1 / √head_dim."""
    config = checkpoint.full_config
    head_dim = checkpoint.config_int("n_embd") // checkpoint.config_int("n_head")
    factor = 1.0 if config["scale_attn_weights"] else math.sqrt(head_dim)
    if config.get("scale_attn_by_inverse_layer_idx"):
        factor /= int(new.split(".")[2]) + 1  # model.layers.N.self_attn
    return tensors if factor == 1.0 else scaled_queries(tensors, new, factor)


def _gpt2_like_tensors(
    checkpoint: Checkpoint,
    num_layers: int,
    attention: Callable[[str, str], dict[str, Derived]],
    *,
    o_proj: str = "attn.c_proj",
    transposed: bool = False,
) -> dict[str, Derived]:
    prefix = present_prefix(checkpoint, "transformer.", "wte.weight")
    return decoder_tensors(
        checkpoint,
        embeddings=f"{prefix}wte",
        positions=same(checkpoint, f"{prefix}wpe.weight"),
        final_norm=f"{prefix}ln_f",
        layers=f"{prefix}h.{{layer}}",
        num_hidden_layers=num_layers,
        names=_GPT2_MODULES | {"self_attn.o_proj": o_proj},
        attention=attention,
        transposed=transposed,
    )


def _bigcode_refusal(checkpoint: Checkpoint) -> str | None:
    return "it has one K/V head already" if checkpoint.full_config["multi_query"] else None


def _bigcode_tensors(checkpoint: Checkpoint) -> dict[str, Derived]:
    part = head_part(checkpoint.config_int("n_head"))

    def attention(new: str, old: str) -> dict[str, Derived]:
        return _with_scale(checkpoint, qkv(checkpoint, new, f"{old}.attn.c_attn", part), new)

    return _gpt2_like_tensors(checkpoint, checkpoint.config_int("n_layer"), attention)


def _neo_config(checkpoint: Checkpoint) -> dict[str, Any]:
    """GroupedDecoder's config for GPT-Neo, whose layers attend to the whole context and to a window by turns."""
    width, window = checkpoint.config_int("hidden_size"), checkpoint.config_int("window_size")
    num_layers = checkpoint.config_int("num_layers")
    longest = checkpoint.config_int("max_position_embeddings")
    kinds = checkpoint.full_config["attention_layers"]
    windows: dict[str, Any] = {}
    if "local" in kinds and window < longest:
        names = {"global": "full_attention", "local": "sliding_attention"}
        windows = {"layer_types": [names[kind] for kind in kinds], "sliding_window": window}
    return decoder_config(
        checkpoint,
        hidden_size=width,
        num_attention_heads=checkpoint.config_int("num_heads"),
        num_hidden_layers=num_layers,
        intermediate_size=checkpoint.config_int("intermediate_size", default=4 * width),
        max_position_embeddings=longest,
        hidden_act=checkpoint.full_config["activation_function"],
        layer_norm_eps=checkpoint.full_config["layer_norm_epsilon"],
        **windows,
    )


def _neo_tensors(checkpoint: Checkpoint) -> dict[str, Derived]:
    """GroupedDecoder's tensors from GPT-Neo's, with queries times √head_dim, which it does not divide scores by."""
    factor = math.sqrt(checkpoint.config_int("hidden_size") // checkpoint.config_int("num_heads"))

    def attention(new: str, old: str) -> dict[str, Derived]:
        return scaled_queries(_separate(checkpoint, new, f"{old}.attn.attention"), new, factor)

    return _gpt2_like_tensors(
        checkpoint, checkpoint.config_int("num_layers"), attention, o_proj="attn.attention.out_proj"
    )


def _opt_refusal(checkpoint: Checkpoint) -> str | None:
    config = checkpoint.full_config
    if config["word_embed_proj_dim"] != config["hidden_size"]:
        return "its embeddings are narrower than its layers, which GroupedDecoder has no projection for"
    if not config["do_layer_norm_before"] or config["_remove_final_layer_norm"]:
        return "it normalises after each branch, GroupedDecoder before"
    if not config["layer_norm_elementwise_affine"]:
        return "its norms have no gains, GroupedDecoder's have"
    return None


def _opt_config(checkpoint: Checkpoint) -> dict[str, Any]:
    return decoder_config(
        checkpoint,
        hidden_size=checkpoint.config_int("hidden_size"),
        num_attention_heads=checkpoint.config_int("num_attention_heads"),
        num_hidden_layers=checkpoint.config_int("num_hidden_layers"),
        intermediate_size=checkpoint.config_int("ffn_dim"),
        max_position_embeddings=checkpoint.config_int("max_position_embeddings"),
        hidden_act=checkpoint.full_config["activation_function"],
    )


def _opt_tensors(checkpoint: Checkpoint) -> dict[str, Derived]:
    prefix = present_prefix(checkpoint, "model.", "decoder.embed_tokens.weight") + "decoder."
    return _fairseq_tensors(checkpoint, prefix, checkpoint.config_int("num_hidden_layers"), "final_layer_norm")


def _biogpt_config(checkpoint: Checkpoint) -> dict[str, Any]:
    width = checkpoint.config_int("hidden_size")
    return decoder_config(
        checkpoint,
        hidden_size=width,
        num_attention_heads=checkpoint.config_int("num_attention_heads"),
        num_hidden_layers=checkpoint.config_int("num_hidden_layers"),
        intermediate_size=checkpoint.config_int("intermediate_size"),
        max_position_embeddings=checkpoint.config_int("max_position_embeddings"),
        hidden_act=checkpoint.full_config["hidden_act"],
        embedding_multiplier=math.sqrt(width) if checkpoint.full_config["scale_embedding"] else 1.0,
    )


def _biogpt_tensors(checkpoint: Checkpoint) -> dict[str, Derived]:
    prefix = present_prefix(checkpoint, "biogpt.", "embed_tokens.weight")
    num_layers = checkpoint.config_int("num_hidden_layers")
    return _fairseq_tensors(checkpoint, prefix, num_layers, "layer_norm", head="output_projection")


def _xglm_config(checkpoint: Checkpoint) -> dict[str, Any]:
    width = checkpoint.config_int("d_model")
    return decoder_config(
        checkpoint,
        hidden_size=width,
        num_attention_heads=checkpoint.config_int("attention_heads"),
        num_hidden_layers=checkpoint.config_int("num_layers"),
        intermediate_size=checkpoint.config_int("ffn_dim"),
        max_position_embeddings=checkpoint.config_int("max_position_embeddings"),
        hidden_act=checkpoint.full_config["activation_function"],
        embedding_multiplier=math.sqrt(width) if checkpoint.full_config["scale_embedding"] else 1.0,
    )


def _xglm_tensors(checkpoint: Checkpoint) -> dict[str, Derived]:
    """GroupedDecoder's tensors from XGLM's, whose computed positions become a table, which uptraining may change."""
    prefix = present_prefix(checkpoint, "model.", "embed_tokens.weight")
    num_positions, width = checkpoint.config_int("max_position_embeddings"), checkpoint.config_int("d_model")
    padding = checkpoint.full_config["pad_token_id"]
    positions = Derived(
        (f"{prefix}embed_tokens.weight",),
        (num_positions, width),
        lambda tensor: _sinusoids(num_positions, width, padding=padding).to(tensor.dtype),
    )
    num_layers = checkpoint.config_int("num_layers")
    return _fairseq_tensors(checkpoint, prefix, num_layers, "layer_norm", positions=positions)


def _fairseq_tensors(
    checkpoint: Checkpoint,
    prefix: str,
    num_layers: int,
    final_norm: str,
    *,
    positions: Derived | None = None,
    head: str = "lm_head",
) -> dict[str, Derived]:
    """GroupedDecoder's tensors from those of OPT, BioGPT or XGLM, which name the modules of a layer alike."""
    return decoder_tensors(
        checkpoint,
        embeddings=f"{prefix}embed_tokens",
        positions=positions or _without_offset(checkpoint, f"{prefix}embed_positions.weight"),
        final_norm=f"{prefix}{final_norm}",
        layers=f"{prefix}layers.{{layer}}",
        num_hidden_layers=num_layers,
        names=_FAIRSEQ_MODULES,
        attention=lambda new, old: _separate(checkpoint, new, f"{old}.self_attn"),
        head=head,
    )


def _separate(checkpoint: Checkpoint, new: str, old: str) -> dict[str, Derived]:
    tensors: dict[str, Derived] = {}
    for projection in ("q_proj", "k_proj", "v_proj"):
        tensors |= linear(checkpoint, f"{new}.{projection}", f"{old}.{projection}")
    return tensors


def _without_offset(checkpoint: Checkpoint, name: str) -> Derived:
    num_rows, *width = same(checkpoint, name).shape
    return Derived((name,), (num_rows - _FAIRSEQ_OFFSET, *width), lambda tensor: tensor[_FAIRSEQ_OFFSET:])


def _sinusoids(num_positions: int, width: int, *, padding: int | None) -> Tensor:
    """Sines, then cosines, of position / 10000^(i / (width / 2 - 1)) (tensor2tensor's form), (num_positions, width).

    XGLM takes the padding token's id for a row of its table, and sets that to zero.
    """
    import torch

    half = width // 2
    frequencies = torch.exp(torch.arange(half, dtype=torch.float32) * -(math.log(10000) / (half - 1)))
    angles = (torch.arange(num_positions, dtype=torch.float32) + _FAIRSEQ_OFFSET)[:, None] * frequencies
    table = torch.nn.functional.pad(torch.cat([angles.sin(), angles.cos()], dim=1), (0, width % 2))
    if padding is not None and _FAIRSEQ_OFFSET <= padding < num_positions + _FAIRSEQ_OFFSET:
        table[padding - _FAIRSEQ_OFFSET] = 0
    return table


BIOGPT_TO_DECODER = Translation("biogpt", "grouped_decoder", _biogpt_config, _biogpt_tensors)
GPT2_TO_DECODER = Translation("gpt2", "grouped_decoder", _gpt2_config, _gpt2_tensors, _cross_attention_refusal)
GPT_BIGCODE_TO_DECODER = Translation("gpt_bigcode", "grouped_decoder", _gpt2_config, _bigcode_tensors, _bigcode_refusal)
GPT_NEO_TO_DECODER = Translation("gpt_neo", "grouped_decoder", _neo_config, _neo_tensors)
OPT_TO_DECODER = Translation("opt", "grouped_decoder", _opt_config, _opt_tensors, _opt_refusal)
XGLM_TO_DECODER = Translation("xglm", "grouped_decoder", _xglm_config, _xglm_tensors, _cross_attention_refusal)
