"""The architectures that kvconvert knows, one entry per `model_type`."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from .architecture import Architecture, Config
from .checkpoint import Checkpoint
from .errors import UnsupportedError

__all__ = ["ARCHITECTURES", "find_architecture"]

_HEAD_NORM = (
    "its keys are normalised per head after the projection, and this version only pools projections without such norms"
)


def _every_layer(config: Config, layer: int) -> bool:
    return True


def _even_layers(config: Config, layer: int) -> bool:
    return layer % 2 == 0


def _all_but_every_fourth_layer(config: Config, layer: int) -> bool:
    return bool((layer + 1) % int(config.get("sliding_window_pattern") or 4))


def _qwen2_layers(config: Config, layer: int) -> bool:
    return bool(config.get("use_sliding_window")) and layer >= int(config.get("max_window_layers", 28))


_ENTRIES = (
    Architecture("arcee"),
    Architecture("bitnet"),
    Architecture("cohere", refused_if={"use_qk_norm": _HEAD_NORM}),
    Architecture("cohere2", is_sliding=_all_but_every_fourth_layer),
    Architecture("ernie4_5"),
    Architecture("gemma"),
    Architecture("gemma2", is_sliding=_even_layers),
    Architecture("glm"),
    Architecture("glm4"),
    Architecture("granite"),
    Architecture("granitemoe"),
    Architecture("helium"),
    Architecture("hyperclovax"),
    Architecture("jais2"),
    Architecture("llama"),
    Architecture("mistral", is_sliding=_every_layer),
    Architecture("mixtral", is_sliding=_every_layer),
    Architecture("nemotron"),
    Architecture("olmo"),
    Architecture("phi", o_proj="dense", refused_if={"qk_layernorm": _HEAD_NORM}),
    Architecture("phimoe", is_sliding=_every_layer),
    Architecture("qwen2", is_sliding=_qwen2_layers),
    Architecture("qwen2_moe", is_sliding=_qwen2_layers),
    Architecture("seed_oss"),
    Architecture("smollm3"),
    Architecture("stablelm", refused_if={"qk_layernorm": _HEAD_NORM}),
    Architecture("starcoder2", is_sliding=_every_layer),
)

ARCHITECTURES: Mapping[str, Architecture] = MappingProxyType({entry.model_type: entry for entry in _ENTRIES})


def _reasons() -> dict[str, str]:
    """Why known architectures are not in the table."""
    causes = {
        "its keys are normalised after the projection, and this version only pools projections without such norms": (
            "apertus exaone4 gemma3 gemma3_text hunyuan_v1_dense nanochat olmo2 olmo3 olmoe qwen3 qwen3_moe"
        ),
        "its query, key and value projections are one fused tensor, which this version does not take apart": (
            "dbrx falcon jetmoe persimmon phi3 qwen"
        ),
        "its class has no grouped keys and values, and this version does not convert to another class": (
            "biogpt bloom codegen gpt2 gpt_neo gpt_neox gptj mpt opt xglm"
        ),
        "its class has either one K/V head or all of them, and this version does not convert it": "gpt_bigcode",
        "encoder-decoder models are not converted by this version": "bart flan-t5 marian mbart mt5 pegasus t5 whisper",
        "its cache holds a latent, not keys and values": "deepseek_v2 deepseek_v3 minicpm3",
        "its attention takes the difference of two heads, which pooling does not preserve": "diffllama",
    }
    return {model_type: cause for cause, model_types in causes.items() for model_type in model_types.split()}


_REASONS = _reasons()


def find_architecture(checkpoint: Checkpoint) -> Architecture:
    """The entry of the checkpoint's `model_type`. Raises UnsupportedError when there is none."""
    model_type = checkpoint.config.get("model_type")
    if not isinstance(model_type, str) or model_type not in ARCHITECTURES:
        reason = _REASONS.get(str(model_type), "kvconvert does not know this architecture")
        raise UnsupportedError(
            f"{checkpoint.name}: model_type {model_type!r} is not supported: {reason}",
            hint=f"supported: {', '.join(ARCHITECTURES)}",
        )
    return ARCHITECTURES[model_type]
