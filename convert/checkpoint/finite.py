"""Values that are infinite or not numbers, in what is read and in what is computed."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from ..errors import UnsupportedError

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["check_computed", "count_nonfinite"]


def count_nonfinite(tensor: Tensor) -> int:
    """Return how many values of a tensor of floats, of any shape, are infinite or not a number."""
    if tensor.dtype.itemsize == 1:  # torch has few operations on floats of 8 bits
        tensor = tensor.float()
    if not tensor.numel():
        return 0
    least, most = tensor.aminmax()  # as fast as a copy, and not finite if any value is not
    if least.isfinite() and most.isfinite():
        return 0
    return int(tensor.numel() - tensor.isfinite().sum())


def check_computed(name: str, tensor: Tensor, sources: Iterable[Tensor] = ()) -> None:
    """Raise UnsupportedError where a computed tensor has a value that is not finite, unless one of `sources` has."""
    count = count_nonfinite(tensor)
    if not count or any(map(count_nonfinite, sources)):
        return
    dtype = str(tensor.dtype).removeprefix("torch.")
    raise UnsupportedError(
        f"{name}: {count} of {tensor.numel()} computed values are not finite in {dtype}",
        hint="save the checkpoint in bfloat16 or float32 first, which hold larger values"
        if dtype == "float16"
        else "another method may do; please report the checkpoint",
    )
