"""K/V cache arithmetic (DESIGN §10): what a token, and a context, cost in the cache."""

from __future__ import annotations

from collections.abc import Sequence

__all__ = ["kv_cache_bytes", "kv_cache_bytes_per_token"]


def kv_cache_bytes_per_token(
    *, num_layers: int, num_key_value_heads: int, head_dim: int, bytes_per_value: int = 2
) -> int:
    """Bytes that one more token takes: keys and values of every layer. 2 bytes per value is a 16-bit cache."""
    return 2 * num_layers * num_key_value_heads * head_dim * bytes_per_value


def kv_cache_bytes(
    context_length: int,
    *,
    windows: Sequence[int | None],
    num_key_value_heads: int,
    head_dim: int,
    bytes_per_value: int = 2,
) -> int:
    """Bytes of a whole context of tokens. `windows` holds, per layer, the sliding window or None for full attention."""
    num_tokens = sum(context_length if window is None else min(context_length, window) for window in windows)
    return num_tokens * kv_cache_bytes_per_token(
        num_layers=1, num_key_value_heads=num_key_value_heads, head_dim=head_dim, bytes_per_value=bytes_per_value
    )
