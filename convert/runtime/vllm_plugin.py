"""Plugin of vLLM: with it, layers of a CrossLayerDecoder that share keys and values have one cache (vLLM 0.32).

vLLM finds `register` by the entry point `vllm.general_plugins`. Without it, vLLM's Transformers backend serves the same
tokens, and allocates a cache for every layer.
"""

from __future__ import annotations

from . import register as register_with_transformers

__all__ = ["register"]


def register() -> None:
    """Make vLLM and transformers in this process know the class."""
    from vllm import ModelRegistry

    register_with_transformers()
    name = "CrossLayerDecoderForCausalLM"
    if name not in ModelRegistry.get_supported_archs():
        ModelRegistry.register_model(name, f"{__package__}.vllm_model:{name}")
