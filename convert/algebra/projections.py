"""The four projections of one attention layer."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Projections", "repeat_key_value_heads"]


@dataclass(frozen=True)
class Projections:
    """Float64 projections of a layer: q, k and v with their bias (or zeros) as last column.

    q: (num_attention_heads · head_dim, hidden_size + 1). k and v: (num_key_value_heads · head_dim, hidden_size + 1).
    o: (hidden_size, num_attention_heads · head_dim), without its bias, which no merge touches.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    o: Tensor


def repeat_key_value_heads(projections: Projections, num_key_value_heads: int, head_dim: int) -> Projections:
    """The same function with more K/V heads, each standing several times in a row: a class with so many can run it."""

    def repeated(rows: Tensor) -> Tensor:
        heads = rows.unflatten(0, (-1, head_dim))  # (K, D, E + 1)
        result: Tensor = heads.repeat_interleave(num_key_value_heads // len(heads), dim=0).flatten(0, 1)
        return result

    return replace(projections, k=repeated(projections.k), v=repeated(projections.v))
