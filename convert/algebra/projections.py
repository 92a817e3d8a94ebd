"""The four projections of one attention layer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Projections"]


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
