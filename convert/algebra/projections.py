"""The four projections of one attention layer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Projections"]


@dataclass(frozen=True)
class Projections:
    """The weights of one attention layer in float64, the bias of q, k and v (or zeros) as their last column.

    With a 1 appended to the input x, q · x is then the biased projection. The bias of o is left out, since no merge
    changes it.
    """

    q: Tensor  # (num_attention_heads · head_dim, hidden_size + 1)
    k: Tensor  # (num_key_value_heads · head_dim, hidden_size + 1)
    v: Tensor  # (num_key_value_heads · head_dim, hidden_size + 1)
    o: Tensor  # (hidden_size, num_attention_heads · head_dim)
