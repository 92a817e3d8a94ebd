"""The output projection of a changed layer, fitted to what the original layer gives on a text."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .linear import pseudo_inverse, solve_ridge

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["refitted"]

_RIDGE_OF_FLOAT32 = 2e-5
"""The ridge, over the number of columns, from which on float32 does: the condition of the normal equations is then at
most 5e4, which float32 can solve to three digits, and the objective, which is flat at its least, to six."""


def refitted(original: Tensor, closed_form: Tensor, cross: Tensor, normal: Tensor, ridge: float) -> Tensor:
    """Return the W that minimises E‖W_o z − W z'‖² + λ‖W − W'‖², a ridge regression that shrinks towards W'.

    W_o is `original`, the o_proj of the source, and W' is `closed_form`, that of the result, both (hidden_size,
    num_attention_heads · head_dim). z are the outputs of all heads of the source on a text, z' those of the result.
    cross: E[z z'ᵀ] and normal: E[z' z'ᵀ], float64, (num_attention_heads · head_dim) squared. λ is `ridge` times the
    mean diagonal of `normal`. Returns the shape and dtype of `closed_form`.

    Columns of W' that are zero belong to heads that nothing reads, and to dims that pad a head: they stay zero, and
    outputs z' that are always zero leave W' as it is. Neither takes part in the mean diagonal. With λ = 0, W' is kept
    wherever `normal` does not decide.

    The moments are sums of products in float32, and so is the fit done in float32 where λ is large enough for that: the
    objective is the same but for rounding (`test_a_fit_in_float32_loses_nothing`).
    """
    decided = (closed_form.count_nonzero(0) > 0) & (normal.diagonal() > 0)
    if not decided.all():
        fitted = closed_form.clone()
        if decided.any():
            parts = closed_form[:, decided], cross[:, decided], normal[decided][:, decided]
            fitted[:, decided] = refitted(original, *parts, ridge)
        return fitted
    if ridge >= _RIDGE_OF_FLOAT32 * len(normal):
        original, cross, normal = original.float(), cross.float(), normal.float()
    strength = ridge * normal.diagonal().mean()
    right, wanted = original @ cross, closed_form.to(normal.dtype)
    if strength > 0:
        solution = solve_ridge(right + strength * wanted, normal, strength)
    else:
        solution = wanted + (right - wanted @ normal) @ pseudo_inverse(normal)
    return solution.to(closed_form.dtype).contiguous()
