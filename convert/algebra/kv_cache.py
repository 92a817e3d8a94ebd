"""The size of a K/V cache in bytes: per token, for a whole context, in 16 bits or quantised, and in vLLM's blocks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from .attention_shape import AttentionShape

__all__ = [
    "CACHE_FORMATS",
    "VLLM_BLOCK_TOKENS",
    "CacheFormat",
    "cached_tokens",
    "kv_cache_bytes",
    "kv_cache_bytes_per_token",
    "num_blocks",
]

VLLM_BLOCK_TOKENS = 16
"""How many tokens a block of vLLM's cache has by default on a GPU. On a CPU, where it was measured, they are 128."""


def kv_cache_bytes_per_token(*, num_layers: int, values: int, bytes_per_value: int = 2) -> int:
    """Return the bytes that one more token takes in the cache.

    num_layers: the layers that have a cache. values: how many numbers each of them keeps of a token
    (`AttentionShape.cached_values`). bytes_per_value: 2 for a cache in 16 bits.
    """
    return num_layers * values * bytes_per_value


def cached_tokens(context_length: int, windows: Sequence[int | None]) -> int:
    """Return how many tokens all layers together keep after `context_length` tokens.

    windows: for each layer that has a cache its sliding window in tokens, or None for full attention.
    """
    return sum(context_length if window is None else min(context_length, window) for window in windows)


def kv_cache_bytes(context_length: int, *, windows: Sequence[int | None], values: int, bytes_per_value: int = 2) -> int:
    """Return the bytes that the cache takes after `context_length` tokens.

    windows: as for `cached_tokens`. values and bytes_per_value: as for `kv_cache_bytes_per_token`.
    """
    return cached_tokens(context_length, windows) * values * bytes_per_value


@dataclass(frozen=True)
class CacheFormat:
    """How a cache keeps its numbers: in `bits` each, with `scale_bytes` beside each vector that has a scale of its own.

    A vector is what one K/V head keeps of a token: its key, or its value. `engines` says who allocates just this.
    """

    name: str
    bits: int
    scale_bytes: int
    engines: str

    def holds(self, shape: AttentionShape) -> bool:
        """Return whether a cache of this shape can be kept so: a latent has no heads, which could have scales."""
        return shape.latent is None or not self.scale_bytes

    def bytes_per_token(self, shape: AttentionShape) -> int:
        """Return the bytes that one more token takes in all layers together, scales of vectors included.

        Raises ValueError for a shape that the format does not hold.
        """
        if not self.holds(shape):
            raise ValueError(f"a latent has no heads, and {self.name} has a scale for each")
        if shape.latent is None:
            layer = 2 * shape.num_key_value_heads * (-(-shape.head_dim * self.bits // 8) + self.scale_bytes)
        else:
            layer = -(-shape.latent.num_cached * self.bits // 8)
        return shape.num_key_value_layers * layer

    def sequence_bytes(self, shape: AttentionShape, context_length: int, encoder_length: int = 0) -> int:
        """Return the bytes of the cache of one sequence of `context_length` tokens.

        encoder_length: the tokens of the encoder, which each layer of a decoder with cross-attention keeps too. Raises
        ValueError as `bytes_per_token` does.
        """
        num_layers = shape.num_key_value_layers
        crossed = num_layers * encoder_length if shape.cross_attention else 0
        num_tokens = cached_tokens(context_length, shape.key_value_windows) + crossed
        return num_tokens * (self.bytes_per_token(shape) // num_layers)


CACHE_FORMATS = (
    CacheFormat("16-bit", 16, 0, "every engine, by default"),
    CacheFormat("fp8", 8, 0, "vLLM and SGLang; one scale for all keys of a layer and one for all values, not counted"),
    CacheFormat("int8", 8, 4, "vLLM's int8_per_token_head; a float32 scale for each head's key and value of a token"),
    CacheFormat("int4", 4, 4, "vLLM's int4_per_token_head; a float32 scale for each head's key and value of a token"),
)
"""The formats that a cache is planned in, after vLLM's v1/kv_cache_interface.py."""


def num_blocks(memory_bytes: int, *, bytes_per_token: int, block_tokens: int = VLLM_BLOCK_TOKENS) -> int:
    """Return how many blocks vLLM makes of a memory for the cache alone: each holds `block_tokens` in all layers.

    For a model without sliding windows. vLLM gives whole blocks to a sequence, so that one of T tokens takes
    ⌈T / block_tokens⌉ of them; the quotient is the "maximum concurrency" that it prints.
    """
    return memory_bytes // (bytes_per_token * block_tokens)
