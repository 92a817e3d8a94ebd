"""Multi-head latent attention: keys and values of all heads in one latent (DeepSeek-V2, arXiv 2405.04434).

The result is a dense DeepSeek-V3, which transformers, vLLM and SGLang have.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from ..algebra.attention_shape import AttentionShape, LatentSizes
from ..algebra.latent import LatentAttention, RopePair
from ..algebra.rotations import Rotary
from ..architectures.architecture import Architecture
from ..architectures.attention import read_attention
from ..checkpoint.tensors import DTYPE_BYTES, Checkpoint, TensorInfo, torch_dtype
from ..errors import UnsupportedError
from ..plan import ConversionPlan, Step
from .merging import MergedCheckpoint

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["LATENT_NORMS", "ROPE_SELECTIONS", "Mla", "class_refusal", "latent_tensors", "rope_parameters"]

LATENT_NORMS = ("calibrated", "exact")
ROPE_SELECTIONS = ("high", "gain")

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
class Mla:
    """Cache `kv_lora_rank` numbers of keys and values together, and a rotary key of `qk_rope_head_dim` for all heads.

    `latent_norm`: DeepSeek's class normalises the latent. "exact" makes that harmless by a channel that is constant
    through a bias, and holds biases of the source; engines' own classes drop these biases. "calibrated" fits the latent
    to the norm and writes no bias. `rope_selection`: the frequencies of the rotary key are the highest ("high"), as
    those of a RoPE that every engine has, or those that gain most ("gain"), the same one perhaps more than once.
    `rope_interleave`: its pairs are (2i, 2i + 1), as engines other than transformers take for granted, or
    (i, i + half). `v_head_dim` pads the heads' values with zeros to a size that a kernel takes.
    """

    kv_lora_rank: int
    qk_rope_head_dim: int
    latent_norm: str = "calibrated"
    rope_selection: str = "high"
    rope_interleave: bool = True
    v_head_dim: int | None = None

    def __post_init__(self) -> None:
        for name, value, known in (
            ("latent norm", self.latent_norm, LATENT_NORMS),
            ("RoPE selection", self.rope_selection, ROPE_SELECTIONS),
        ):
            if value not in known:
                raise UnsupportedError(f"unknown {name} {value!r}", hint=f"possible: {', '.join(known)}")

    @property
    def constant(self) -> bool:
        """Whether a channel of the latent is constant."""
        return self.latent_norm == "exact"

    @property
    def num_rope_pairs(self) -> int:
        """Pairs of the rotary key."""
        return self.qk_rope_head_dim // 2

    def check(self, checkpoint: Checkpoint, architecture: Architecture, rotary: Sequence[Rotary]) -> None:
        """Raise UnsupportedError, with what would work, where the checkpoint cannot become this."""
        shape = read_attention(checkpoint, architecture)
        reason = class_refusal(checkpoint, architecture, shape) or self._bias_refusal(checkpoint, architecture)
        if reason:
            raise UnsupportedError(f"{checkpoint.name}: {reason}")
        self._check_sizes(checkpoint, shape, rotary[0])

    def plan(self, checkpoint: MergedCheckpoint, architecture: Architecture) -> ConversionPlan:
        """The plan for what compress_checkpoint made, `architecture` being the source's: everything is copied."""
        shape = read_attention(checkpoint.source, architecture)
        return ConversionPlan(
            target="mla",
            method="svd",
            model_type="deepseek_v3",
            source=shape,
            result=replace(shape, num_key_value_heads=shape.num_attention_heads, latent=self.latent_sizes(shape)),
            config=checkpoint.config,
            steps=tuple(Step.copy(info) for info in checkpoint.tensors.values()),
            bytes_in=sum(info.num_bytes for info in checkpoint.source.tensors.values()),
            layers=checkpoint.reports,
        )

    def latent_sizes(self, shape: AttentionShape) -> LatentSizes:
        """The sizes of the result. Each head's part without position is as large as its key was."""
        return LatentSizes(self.kv_lora_rank, self.qk_rope_head_dim, shape.head_dim, self.v_head_dim or shape.head_dim)

    def config(
        self, checkpoint: Checkpoint, architecture: Architecture, rotary: Rotary, rope_pairs: Sequence[RopePair]
    ) -> dict[str, Any]:
        """config.json of the result."""
        source = checkpoint.config
        shape = read_attention(checkpoint, architecture)
        parameters = rope_parameters(source, rotary, rope_pairs)
        older = {"rope_theta": parameters["rope_theta"]}
        if parameters["rope_type"] != "default":
            older["rope_scaling"] = {name: value for name, value in parameters.items() if name != "rope_theta"}
        whole = str(source["architectures"][0]).endswith("ForCausalLM")
        latent = self.latent_sizes(shape)
        return {
            **{name: source[name] for name in _COPIED.split() if name in source},
            "architectures": ["DeepseekV3ForCausalLM" if whole else "DeepseekV3Model"],
            "model_type": "deepseek_v3",
            "num_key_value_heads": shape.num_attention_heads,
            "q_lora_rank": shape.hidden_size + 1 if self._query_bias(checkpoint, architecture) else None,
            "kv_lora_rank": latent.kv_lora_rank,
            "qk_rope_head_dim": latent.qk_rope_head_dim,
            "qk_nope_head_dim": latent.qk_nope_head_dim,
            "v_head_dim": latent.v_head_dim,
            "attention_bias": self.constant,
            "first_k_dense_replace": shape.num_hidden_layers,
            "moe_intermediate_size": source["intermediate_size"],
            **_NO_EXPERTS,
            "rope_parameters": parameters,
            **older,
            "rope_interleave": self.rope_interleave,
        }

    def tensors(self, checkpoint: Checkpoint, architecture: Architecture) -> dict[str, TensorInfo]:
        """The tensors of the result: those of the attention in place of the source's, all others as they are."""
        shape = read_attention(checkpoint, architecture)
        attentions = {architecture.attention.format(layer=layer): layer for layer in range(shape.num_hidden_layers)}
        tensors: dict[str, TensorInfo] = {}
        for name, info in checkpoint.tensors.items():
            prefix = name.rpartition(".")[0].rpartition(".")[0]
            if prefix not in attentions:
                tensors[name] = info
            elif f"{prefix}.o_proj.weight" not in tensors:
                like = checkpoint.tensors[architecture.tensor_name(attentions[prefix], "o_proj")]
                for local, size in self.sizes(checkpoint, architecture, shape).items():
                    num_bytes = math.prod(size) * DTYPE_BYTES[like.dtype]
                    tensors[f"{prefix}.{local}"] = replace(
                        like, name=f"{prefix}.{local}", shape=size, begin=0, end=num_bytes
                    )
        return tensors

    def sizes(
        self, checkpoint: Checkpoint, architecture: Architecture, shape: AttentionShape
    ) -> dict[str, tuple[int, ...]]:
        """Of a layer's attention, by the names there."""
        latent, hidden_size, num_heads = self.latent_sizes(shape), shape.hidden_size, shape.num_attention_heads
        query_rows = num_heads * (latent.qk_nope_head_dim + latent.qk_rope_head_dim)
        cached = latent.kv_lora_rank + latent.qk_rope_head_dim
        sizes: dict[str, tuple[int, ...]] = {"q_proj.weight": (query_rows, hidden_size)}
        if self._query_bias(checkpoint, architecture):
            sizes = {
                "q_a_proj.weight": (hidden_size + 1, hidden_size),
                "q_a_proj.bias": (hidden_size + 1,),
                "q_a_layernorm.weight": (hidden_size + 1,),
                "q_b_proj.weight": (query_rows, hidden_size + 1),
            }
        sizes["kv_a_proj_with_mqa.weight"] = (cached, hidden_size)
        if self.constant:
            sizes["kv_a_proj_with_mqa.bias"] = (cached,)
        sizes["kv_a_layernorm.weight"] = (latent.kv_lora_rank,)
        sizes["kv_b_proj.weight"] = (num_heads * (latent.qk_nope_head_dim + latent.v_head_dim), latent.kv_lora_rank)
        sizes["o_proj.weight"] = (hidden_size, num_heads * latent.v_head_dim)
        if self.constant:
            sizes["o_proj.bias"] = (hidden_size,)
        return sizes

    def _query_bias(self, checkpoint: Checkpoint, architecture: Architecture) -> bool:
        """Whether queries need a constant channel too: DeepSeek's have no bias but through q_lora_rank."""
        return self.constant and architecture.tensor_name(0, "q_proj", "bias") in checkpoint.tensors

    def _bias_refusal(self, checkpoint: Checkpoint, architecture: Architecture) -> str | None:
        if self.constant or architecture.tensor_name(0, "o_proj", "bias") not in checkpoint.tensors:
            return None
        return "o_proj has a bias, which deepseek_v3 holds only with --latent-norm exact"

    def _check_sizes(self, checkpoint: Checkpoint, shape: AttentionShape, rotary: Rotary) -> None:
        rank, rope_dim = self.kv_lora_rank, self.qk_rope_head_dim
        if self.v_head_dim is not None and self.v_head_dim < shape.head_dim:
            raise UnsupportedError(
                f"{checkpoint.name}: v_head_dim = {self.v_head_dim}, and its values have {shape.head_dim} dims",
                hint=f"use {shape.head_dim} or more",
            )
        if rope_dim < 2 or rope_dim % 2:
            raise UnsupportedError(
                f"qk_rope_head_dim = {rope_dim}: rotary positions turn pairs of dims",
                hint=f"use an even number, for example {max(2, rope_dim - rope_dim % 2)}",
            )
        per_frequency = 1 if self.rope_selection == "high" else shape.num_key_value_heads
        if rope_dim > rotary.dims * per_frequency:
            most = rotary.dims * shape.num_key_value_heads
            more = f", or up to {most} with --rope-selection gain" if per_frequency < shape.num_key_value_heads else ""
            raise UnsupportedError(
                f"{checkpoint.name}: qk_rope_head_dim = {rope_dim}, and its heads have {rotary.dims} rotary dims",
                hint=f"use up to {rotary.dims * per_frequency}{more}",
            )
        most = min(shape.hidden_size, 2 * shape.num_key_value_heads * shape.head_dim) + self.constant
        least = 1 + self.constant
        if not least <= rank <= most:
            raise UnsupportedError(
                f"{checkpoint.name}: kv_lora_rank = {rank}; its keys and values have {most - self.constant} "
                f"independent directions{', and one more is constant' if self.constant else ''}",
                hint=f"use {least} to {most}; below {2 * shape.num_key_value_heads * shape.head_dim - rope_dim} the "
                "cache gets smaller",
            )


def class_refusal(checkpoint: Checkpoint, architecture: Architecture, shape: AttentionShape) -> str | None:
    """Why DeepSeek's class cannot compute what the checkpoint's does, whatever the sizes and options of `Mla`; or None.

    The checkpoint is one that `as_latent_source` gives.
    """
    config = checkpoint.config
    refusal = architecture.refusal(config)
    if refusal:
        return refusal
    normalised = architecture.approximation(checkpoint)
    if normalised:
        return f"{normalised}, which a latent cannot hold; mha2gqa, mha2mqa and mha2cla can shrink its cache"
    if config.get("mlp_bias"):
        return "its MLP has biases, and deepseek_v3's has none; mha2gqa and mha2cla keep them"
    context = checkpoint.config_int("max_position_embeddings", default=2048)
    if any(window is not None and window < context for window in shape.windows):
        return (
            f"its layers see the last {config['sliding_window']} tokens only, and deepseek_v3 has no sliding window; "
            "for contexts within it set sliding_window to null in config.json, or max_position_embeddings to no more"
        )
    rope_type = (config.get("rope_parameters") or {}).get("rope_type", "default")
    if rope_type not in _STILL:
        return (
            f"its RoPE ({rope_type}) is none of those known to turn alike at every length of the text "
            f"({', '.join(_STILL)}); mha2gqa and mha2cla keep it"
        )
    return None


def rope_parameters(config: Mapping[str, Any], rotary: Rotary, rope_pairs: Sequence[RopePair]) -> dict[str, Any]:
    """RoPE settings with the frequencies of `rope_pairs`: DeepSeek's own kind if a base gives them, else one by one."""
    frequencies = [rotary.frequencies[frequency] for frequency, _ in rope_pairs]
    theta = float(config["rope_parameters"]["rope_theta"])
    base = theta ** (len(frequencies) / len(rotary.frequencies))
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
    layer: LatentAttention,
    mla: Mla,
    checkpoint: Checkpoint,
    architecture: Architecture,
    index: int,
    scaling: float = 1.0,
) -> dict[str, Tensor]:
    """The tensors of one layer's attention in DeepSeek's class, in the dtype of the source's.

    `scaling` multiplies the scores. Raises ValueError where the layer is not of the sizes of `mla`.
    """
    import torch

    num_heads, dtype = len(layer.q), layer.latent.dtype
    latent, rope_key, queries = layer.latent.clone(), layer.rope_key, layer.q * scaling
    gains = torch.ones(len(latent), dtype=dtype)
    if mla.constant:
        latent[-1] *= _CONSTANT
        gains = _gains_beside_constant(len(latent), dtype)
    if mla.rope_interleave:
        order = torch.arange(mla.qk_rope_head_dim).view(2, -1).T.flatten()
        rope_key = rope_key[order]
        still, rotary = queries.split([queries.shape[1] - mla.qk_rope_head_dim, mla.qk_rope_head_dim], dim=1)
        queries = torch.cat([still, rotary[:, order]], dim=1)
    down = torch.cat([latent, rope_key])
    outputs = layer.o.unflatten(1, (num_heads, -1))  # (D, H, d)
    padding = (mla.v_head_dim or outputs.shape[2]) - outputs.shape[2]
    ups = torch.cat([layer.key_up, torch.nn.functional.pad(layer.value_up, (0, 0, 0, padding))], dim=1)
    tensors = {
        "kv_a_proj_with_mqa.weight": down[:, :-1],
        "kv_a_proj_with_mqa.bias": down[:, -1],
        "kv_a_layernorm.weight": gains,
        "kv_b_proj.weight": ups.repeat_interleave(num_heads // len(ups), dim=0).flatten(0, 1),
        "o_proj.weight": torch.nn.functional.pad(outputs, (0, padding)).flatten(1),
    }
    sizes = mla.sizes(checkpoint, architecture, read_attention(checkpoint, architecture))
    if "q_proj.weight" in sizes:
        tensors["q_proj.weight"] = queries.flatten(0, 1)[:, :-1]
    else:
        tensors |= _biased_queries(queries.flatten(0, 1))
    bias = architecture.tensor_name(index, "o_proj", "bias")
    tensors["o_proj.bias"] = checkpoint.read(bias) if bias in checkpoint.tensors else torch.zeros(len(outputs))
    prefix = architecture.attention.format(layer=index)
    saved_dtype = torch_dtype(checkpoint.tensors[architecture.tensor_name(index, "o_proj")].dtype)
    for name, size in sizes.items():
        if tensors[name].shape != size:
            raise ValueError(f"{name} has shape {list(tensors[name].shape)}, expected {list(size)}")
    return {f"{prefix}.{name}": tensors[name].to(saved_dtype).contiguous() for name in sizes}


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
