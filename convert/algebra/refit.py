"""The output projection of a changed layer, fitted to what the original layer gives on a text."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .linear import solve_ridge

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["refitted"]


def refitted(original: Tensor, closed_form: Tensor, cross: Tensor, normal: Tensor, ridge: float) -> Tensor:
    """Return the W that minimises E‖W_o z − W z'‖² + λ‖W − W'‖², a ridge regression that shrinks towards W'.

    W_o is `original`, the o_proj of the source, and W' is `closed_form`, that of the result, both (hidden_size,
    num_attention_heads · head_dim). z are the outputs of all heads of the source on a text, z' those of the result.
    cross: E[z z'ᵀ] and normal: E[z' z'ᵀ], float64, (num_attention_heads · head_dim) squared. λ is `ridge` times the
    mean diagonal of `normal`. Returns the shape and dtype of `closed_form`.
    """
    strength = ridge * normal.diagonal().mean()
    right = original @ cross + strength * closed_form.double()
    return solve_ridge(right, normal, strength).to(closed_form.dtype).contiguous()
