"""K/V cache arithmetic (DESIGN §10): what a token, and a context, cost in the cache."""

from __future__ import annotations

from collections.abc import Sequence

__all__ = ["kv_cache_bytes", "kv_cache_bytes_per_token"]


def kv_cache_bytes_per_token(*, num_layers: int, values: int, bytes_per_value: int = 2) -> int:
    """Bytes that one more token takes, where each layer keeps so many `values` of it (AttentionShape.cached_values).

    2 bytes per value is a 16-bit cache.
    """
    return num_layers * values * bytes_per_value


def kv_cache_bytes(context_length: int, *, windows: Sequence[int | None], values: int, bytes_per_value: int = 2) -> int:
    """Bytes of a whole context of tokens. `windows` holds, per layer, the sliding window or None for full attention."""
    num_tokens = sum(context_length if window is None else min(context_length, window) for window in windows)
    return num_tokens * kv_cache_bytes_per_token(num_layers=1, values=values, bytes_per_value=bytes_per_value)
