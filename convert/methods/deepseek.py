"""A dense DeepSeek-V3, which transformers, vLLM and SGLang have, as what holds multi-head latent attention."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from ..algebra.attention_shape import LatentSizes
from ..algebra.latent import LatentAttention
from ..algebra.merge import RopePair
from ..architectures.source import Source
from ..checkpoint.tensors import torch_dtype

if TYPE_CHECKING:
    from torch import Tensor

__all__ = [
    "LatentLayout",
    "attention_shapes",
    "class_refusal",
    "fixed_tensors",
    "latent_tensors",
    "result_config",
    "rope_parameters",
]

_CONSTANT = 2.0**14  # of the channel that outweighs the rest of a latent: exact in every dtype, its square in float32
_SAME_FREQUENCY = 1e-6  # relative; float32 frequencies differ by about 1e-7
_STILL = ("default", "linear", "llama3", "yarn")  # frequencies that do not depend on length
_COPIED = (
    "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads hidden_act max_position_embeddings "
    "rms_norm_eps attention_dropout initializer_range tie_word_embeddings dtype torch_dtype "
    "bos_token_id eos_token_id pad_token_id"
)
_NO_EXPERTS: Mapping[str, Any] = MappingProxyType(
    {
        "n_routed_experts": 1,
        "n_shared_experts": 1,
        "num_experts_per_tok": 1,
        "n_group": 1,
        "topk_group": 1,
        "moe_layer_freq": 1,
        "norm_topk_prob": True,
        "routed_scaling_factor": 1.0,
        "scoring_func": "sigmoid",
        "topk_method": "noaux_tc",
        "num_nextn_predict_layers": 0,
    }
)
"""What engines ask of a config, though no layer has experts."""


@dataclass(frozen=True)
class LatentLayout:
    """How a layer's attention lies in DeepSeek's class.

    `constant`: the last channel of the latent is held constant by a bias. `query_bias`: queries have a latent too, with
    such a channel, which holds their biases. `rope_interleave`: rotary pairs are (2i, 2i + 1).
    """

    sizes: LatentSizes
    constant: bool
    query_bias: bool
    rope_interleave: bool


def class_refusal(source: Source) -> str | None:
    """Why DeepSeek's class cannot compute what the source's does, whatever the sizes and options of `Mla`; or None.

    The source is one that `as_latent_source` gives.
    """
    checkpoint, config = source.checkpoint, source.checkpoint.full_config
    refusal = source.architecture.refusal(checkpoint)
    if refusal:
        return refusal
    normalised = source.architecture.approximation(checkpoint)
    if normalised:
        return f"{normalised}, which a latent cannot hold; GQA, MQA and CLA can shrink its cache"
    if config.get("mlp_bias"):
        return "its MLP has biases, and deepseek_v3's has none; GQA and CLA keep them"
    longest = source.longest_context or math.inf
    if any(window is not None and window < longest for window in source.shape.windows):
        return (
            f"its layers see the last {config['sliding_window']} tokens only, and deepseek_v3 has no sliding window; "
            "for contexts within it set sliding_window to null in config.json, or max_position_embeddings to no more"
        )
    rope_type = (config.get("rope_parameters") or {}).get("rope_type", "default")
    if rope_type not in _STILL:
        return (
            f"its RoPE ({rope_type}) is none of those known to turn alike at every length of the text "
            f"({', '.join(_STILL)}); GQA and CLA keep it"
        )
    return None


def result_config(source: Source, layout: LatentLayout, rope_pairs: Sequence[RopePair]) -> dict[str, Any]:
    """config.json of the result, whose rotary key has these pairs."""
    config, shape, sizes = source.checkpoint.full_config, source.shape, layout.sizes
    nominal = source.nominal_frequencies
    parameters = None if nominal is None else rope_parameters(config, nominal, rope_pairs)
    if parameters is None or parameters["rope_type"] != "default":  # written are the frequencies that the class has
        parameters = rope_parameters(config, source.rotary[0].frequencies, rope_pairs)
    older = {"rope_theta": parameters["rope_theta"]}
    if parameters["rope_type"] != "default":
        older["rope_scaling"] = {name: value for name, value in parameters.items() if name != "rope_theta"}
    whole = str(config["architectures"][0]).endswith("ForCausalLM")
    return {
        **{name: config[name] for name in _COPIED.split() if name in config},
        "architectures": ["DeepseekV3ForCausalLM" if whole else "DeepseekV3Model"],
        "model_type": "deepseek_v3",
        "num_key_value_heads": shape.num_attention_heads,
        "q_lora_rank": shape.hidden_size + 1 if layout.query_bias else None,
        "kv_lora_rank": sizes.kv_lora_rank,
        "qk_rope_head_dim": sizes.qk_rope_head_dim,
        "qk_nope_head_dim": sizes.qk_nope_head_dim,
        "v_head_dim": sizes.v_head_dim,
        "attention_bias": layout.constant,
        "first_k_dense_replace": shape.num_hidden_layers,
        "moe_intermediate_size": config["intermediate_size"],
        **_NO_EXPERTS,
        "rope_parameters": parameters,
        **older,
        "rope_interleave": layout.rope_interleave,
    }


def attention_shapes(source: Source, layout: LatentLayout) -> dict[str, tuple[int, ...]]:
    """The shapes of the tensors of one layer's attention, by their names within the attention module."""
    latent, hidden_size, num_heads = layout.sizes, source.shape.hidden_size, source.shape.num_attention_heads
    query_rows = num_heads * (latent.qk_nope_head_dim + latent.qk_rope_head_dim)
    cached = latent.kv_lora_rank + latent.qk_rope_head_dim
    shapes: dict[str, tuple[int, ...]] = {"q_proj.weight": (query_rows, hidden_size)}
    if layout.query_bias:
        shapes = {
            "q_a_proj.weight": (hidden_size + 1, hidden_size),
            "q_a_proj.bias": (hidden_size + 1,),
            "q_a_layernorm.weight": (hidden_size + 1,),
            "q_b_proj.weight": (query_rows, hidden_size + 1),
        }
    shapes["kv_a_proj_with_mqa.weight"] = (cached, hidden_size)
    if layout.constant:
        shapes["kv_a_proj_with_mqa.bias"] = (cached,)
    shapes["kv_a_layernorm.weight"] = (latent.kv_lora_rank,)
    shapes["kv_b_proj.weight"] = (num_heads * (latent.qk_nope_head_dim + latent.v_head_dim), latent.kv_lora_rank)
    shapes["o_proj.weight"] = (hidden_size, num_heads * latent.v_head_dim)
    if layout.constant:
        shapes["o_proj.bias"] = (hidden_size,)
    return shapes


def fixed_tensors(layout: LatentLayout) -> tuple[str, ...]:
    """The tensors of one layer's attention that a fit leaves as they are, by their names within the attention module.

    They make a channel constant, where the layout has one, and weigh it against the others.
    """
    if not layout.constant:
        return ()
    norms = ("kv_a_proj_with_mqa.bias", "kv_a_layernorm.weight")
    queries = ("q_a_proj.weight", "q_a_proj.bias", "q_a_layernorm.weight")
    return (*norms, *(queries if layout.query_bias else ()))


def rope_parameters(
    config: Mapping[str, Any], source_frequencies: Sequence[float], rope_pairs: Sequence[RopePair]
) -> dict[str, Any]:
    """RoPE settings with the frequencies of `rope_pairs`: DeepSeek's own kind if a base gives them, else one by one."""
    frequencies = [source_frequencies[frequency] for frequency, _ in rope_pairs]
    theta = float(config["rope_parameters"]["rope_theta"])
    base = theta ** (len(frequencies) / len(source_frequencies))
    natural = [base ** (-index / len(frequencies)) for index in range(len(frequencies))]
    if all(math.isclose(*pair, rel_tol=_SAME_FREQUENCY) for pair in zip(frequencies, natural, strict=True)):
        return {"rope_type": "default", "rope_theta": base}
    factors = [theta ** (-index / len(frequencies)) / frequency for index, frequency in enumerate(frequencies)]
    # the only kind of RoPE in transformers with a factor for each frequency
    return {
        "rope_type": "longrope",
        "rope_theta": theta,
        "long_factor": factors,
        "short_factor": factors,
        "factor": 1.0,
        "attention_factor": 1.0,
        "original_max_position_embeddings": config["max_position_embeddings"],
    }


def latent_tensors(
    layer: LatentAttention, layout: LatentLayout, source: Source, index: int, *, scaling: float = 1.0
) -> dict[str, Tensor]:
    """The tensors of one layer's attention in DeepSeek's class, in the dtype of the source's.

    `scaling` multiplies the scores. Raises ValueError where the layer is not of the layout's sizes.
    """
    import torch

    checkpoint, architecture = source.checkpoint, source.architecture
    num_heads, dtype, rope_dim = len(layer.q), layer.latent.dtype, layout.sizes.qk_rope_head_dim
    latent, rope_key, queries = layer.latent.clone(), layer.rope_key, layer.q * scaling
    gains = torch.ones(len(latent), dtype=dtype)
    if layout.constant:
        latent[-1] *= _CONSTANT
        gains = _gains_beside_constant(len(latent), dtype)
    if layout.rope_interleave:
        order = torch.arange(rope_dim).view(2, -1).T.flatten()
        rope_key = rope_key[order]
        still, rotary = queries.split([queries.shape[1] - rope_dim, rope_dim], dim=1)
        queries = torch.cat([still, rotary[:, order]], dim=1)
    down = torch.cat([latent, rope_key])
    outputs = layer.o.unflatten(1, (num_heads, -1))  # (D, H, d)
    padding = layout.sizes.v_head_dim - outputs.shape[2]
    ups = torch.cat([layer.key_up, torch.nn.functional.pad(layer.value_up, (0, 0, 0, padding))], dim=1)
    tensors = {
        "kv_a_proj_with_mqa.weight": down[:, :-1],
        "kv_a_proj_with_mqa.bias": down[:, -1],
        "kv_a_layernorm.weight": gains,
        "kv_b_proj.weight": ups.repeat_interleave(num_heads // len(ups), dim=0).flatten(0, 1),
        "o_proj.weight": torch.nn.functional.pad(outputs, (0, padding)).flatten(1),
    }
    shapes = attention_shapes(source, layout)
    if "q_proj.weight" in shapes:
        tensors["q_proj.weight"] = queries.flatten(0, 1)[:, :-1]
    else:
        tensors |= _biased_queries(queries.flatten(0, 1))
    bias = architecture.tensor_name(index, "o_proj", "bias")
    tensors["o_proj.bias"] = checkpoint.read(bias) if bias in checkpoint.tensors else torch.zeros(len(outputs))
    prefix = architecture.attention.format(layer=index)
    saved_dtype = torch_dtype(checkpoint.tensors[architecture.tensor_name(index, "o_proj")].dtype)
    for name, shape in shapes.items():
        if tensors[name].shape != shape:
            raise ValueError(f"{name} has shape {list(tensors[name].shape)}, expected {list(shape)}")
    return {f"{prefix}.{name}": tensors[name].to(saved_dtype).contiguous() for name in shapes}


def _gains_beside_constant(size: int, dtype: Any) -> Tensor:
    """A norm's gains, (size,), with which a vector whose last channel is _CONSTANT stays as it is, but for 1 there."""
    import torch

    gains = torch.full((size,), _CONSTANT / size**0.5, dtype=dtype)
    gains[-1] = size**-0.5
    return gains


def _biased_queries(queries: Tensor) -> dict[str, Tensor]:
    """Queries, (rows, D + 1), as maps of x and of a constant channel beside it."""
    import torch

    num_inputs = queries.shape[1]
    bias = torch.zeros(num_inputs, dtype=queries.dtype)
    bias[-1] = _CONSTANT
    return {
        "q_a_proj.weight": torch.eye(num_inputs, dtype=queries.dtype)[:, :-1],
        "q_a_proj.bias": bias,
        "q_a_layernorm.weight": _gains_beside_constant(num_inputs, queries.dtype),
        "q_b_proj.weight": queries,
    }
