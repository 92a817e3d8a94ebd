"""The size of a K/V cache in bytes, per token and for a whole context."""

from __future__ import annotations

from collections.abc import Sequence

__all__ = ["kv_cache_bytes", "kv_cache_bytes_per_token"]


def kv_cache_bytes_per_token(*, num_layers: int, values: int, bytes_per_value: int = 2) -> int:
    """Return the bytes that one more token takes in the cache.

    num_layers: the layers that have a cache. values: how many numbers each of them keeps of a token
    (`AttentionShape.cached_values`). bytes_per_value: 2 for a cache in 16 bits.
    """
    return num_layers * values * bytes_per_value


def kv_cache_bytes(context_length: int, *, windows: Sequence[int | None], values: int, bytes_per_value: int = 2) -> int:
    """Return the bytes that the cache takes after `context_length` tokens.

    windows: for each layer that has a cache its sliding window in tokens, or None for full attention. values and
    bytes_per_value: as for `kv_cache_bytes_per_token`.
    """
    num_tokens = sum(context_length if window is None else min(context_length, window) for window in windows)
    return num_tokens * kv_cache_bytes_per_token(num_layers=1, values=values, bytes_per_value=bytes_per_value)
