"""Settings that several methods have, and the check of their values."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

from ..errors import UnsupportedError

__all__ = ["Grouping", "require_choice", "require_ridge"]

Grouping = Literal["similarity", "contiguous"]
"""Which heads form a group: those that lose least together, or neighbours."""


def require_choice(what: str, value: str, known: Sequence[str]) -> None:
    """Raise UnsupportedError for a value that is not among the known ones."""
    if value not in known:
        raise UnsupportedError(f"unknown {what} {value!r}", hint=f"{what}s: {', '.join(known)}")


def require_ridge(refit_ridge: float) -> None:
    """Raise UnsupportedError for a pull of the refit that is negative, infinite or not a number."""
    if not (refit_ridge >= 0 and math.isfinite(refit_ridge)):
        raise UnsupportedError(f"refit_ridge = {refit_ridge}, expected a number from 0 on")
