"""An output projection fitted to what the original's attention gave."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .linear import solve_ridge

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["refitted"]


def refitted(original: Tensor, closed_form: Tensor, cross: Tensor, normal: Tensor, ridge: float) -> Tensor:
    """argmin over W of E‖W_o z − W z'‖² + λ‖W − W'‖², with W_o the original's o_proj and W' the closed form's.

    z are the original's head outputs, z' the merged model's; `cross` is E[z z'ᵀ] and `normal` E[z' z'ᵀ], (heads ·
    head_dim) squared; λ = ridge · mean diagonal of `normal`. In the dtype of the closed form.
    """
    strength = ridge * normal.diagonal().mean()
    right = original @ cross + strength * closed_form.double()
    # the diagonal gets λ rounded to float32: all measured results were computed so
    return solve_ridge(right, normal, strength.float()).to(closed_form.dtype).contiguous()
