"""Llama-shaped decoders as our CrossLayerDecoder, whose layers can share keys and values."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from ..architectures.attention import read_attention
from ..architectures.table import find_architecture
from ..checkpoint.tensors import OLD_BUFFERS, Checkpoint
from ..runtime import RUNTIME_CLASSES
from .common import rope_config, same
from .translation import Derived, Translation

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["CROSS_LAYER", "CROSS_LAYER_DECODER", "LATENT_SOURCES"]

CROSS_LAYER_DECODER = "cross_layer_decoder"
_COPIED = (
    "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads hidden_act max_position_embeddings "
    "original_max_position_embeddings rms_norm_eps attention_dropout mlp_bias initializer_range tie_word_embeddings "
    "dtype torch_dtype quantization_config"
)


@dataclass(frozen=True)
class _LlamaShaped:
    """A class whose function CrossLayerDecoder can compute, and what its translation must know.

    `qk_norm` says that queries and keys are normalised head by head. `fused` maps a projection
    whose rows are several of CrossLayerDecoder's projections to their names.
    """

    model_type: str
    qk_norm: bool = False
    fused: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    def translation(self) -> Translation:
        """Return the translation to CrossLayerDecoder."""
        return Translation(self.model_type, CROSS_LAYER_DECODER, self.make_config, self.make_tensors)

    def make_config(self, checkpoint: Checkpoint) -> dict[str, Any]:
        """Return CrossLayerDecoder's config, in which every layer computes its keys and values."""
        runtime = RUNTIME_CLASSES[CROSS_LAYER_DECODER]
        config = checkpoint.full_config
        architecture = find_architecture(checkpoint)
        shape = read_attention(checkpoint, architecture)
        windows = [window for window in shape.windows if window is not None]
        rope_parameters = rope_config(config["rope_parameters"])["rope_parameters"]
        if self.model_type == "phi3" and rope_parameters["rope_type"] in ("su", "yarn"):
            rope_parameters["rope_type"] = "longrope"  # its older names
        biased = [
            projection
            for projection in ("q_proj", "k_proj", "v_proj", "o_proj")
            if architecture.tensor_name(0, projection, "bias") in checkpoint.tensors
        ]
        return {
            **{name: config[name] for name in _COPIED.split() if name in config},
            "architectures": [runtime.architecture],
            "auto_map": runtime.auto_map,
            "model_type": runtime.model_type,
            "num_key_value_heads": shape.num_key_value_heads,
            "head_dim": shape.head_dim,
            "kv_source_layers": list(range(shape.num_hidden_layers)),
            "attention_bias": [] if architecture.qkv_proj else biased,
            "qk_norm": self.qk_norm,
            "layer_types": ["sliding_attention" if window else "full_attention" for window in shape.windows],
            "sliding_window": windows[0] if windows else None,
            "rope_parameters": rope_parameters,
        }

    def make_tensors(self, checkpoint: Checkpoint) -> dict[str, Derived]:
        """Return CrossLayerDecoder's tensors: copies, and parts of fused projections."""
        tensors: dict[str, Derived] = {}
        shape = read_attention(checkpoint, find_architecture(checkpoint))
        rows = {
            "q_proj": shape.num_attention_heads * shape.head_dim,
            "k_proj": shape.num_key_value_heads * shape.head_dim,
            "v_proj": shape.num_key_value_heads * shape.head_dim,
        }
        for name in checkpoint.tensors:
            module, _, kind = name.rpartition(".")
            parent, _, projection = module.rpartition(".")
            if projection in self.fused:
                tensors |= _parts(checkpoint, name, f"{parent}.", f".{kind}", self.fused[projection], rows)
            elif not OLD_BUFFERS.search(name):
                tensors[name] = same(checkpoint, name)
        return tensors


def _parts(
    checkpoint: Checkpoint, name: str, prefix: str, suffix: str, projections: tuple[str, ...], rows: Mapping[str, int]
) -> dict[str, Derived]:
    """The projections whose rows follow one another in a tensor; those without an entry in `rows` have equal shares."""
    num_rows, *columns = checkpoint.tensors[name].shape
    found: dict[str, Derived] = {}
    begin = 0
    for projection in projections:
        end = begin + rows.get(projection, num_rows // len(projections))

        def take(tensor: Tensor, begin: int = begin, end: int = end) -> Tensor:
            return tensor[begin:end]

        found[f"{prefix}{projection}{suffix}"] = Derived((name,), (end - begin, *columns), take)
        begin = end
    return found


_SOURCES = (
    _LlamaShaped("llama"),
    _LlamaShaped("mistral"),
    _LlamaShaped("phi3", fused={"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}),
    _LlamaShaped("qwen2"),
    _LlamaShaped("qwen3", qk_norm=True),
    _LlamaShaped("seed_oss"),
)
CROSS_LAYER: Mapping[str, Translation] = MappingProxyType(
    {source.model_type: source.translation() for source in _SOURCES}
)
"""The translations to CrossLayerDecoder, by the `model_type` that they start from."""

LATENT_SOURCES = tuple(source.model_type for source in _SOURCES if not source.qk_norm)
"""The sources that can also get a latent: not those with per-head key norms, which DeepSeek-V3's class has not."""
