"""Choices that settings of several methods have."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from ..errors import UnsupportedError

__all__ = ["Grouping", "require_choice"]

Grouping = Literal["similarity", "contiguous"]
"""Which heads form a group: those that lose least together, or neighbours."""


def require_choice(what: str, value: str, known: Sequence[str]) -> None:
    """Raise UnsupportedError for a value that is not among the known ones."""
    if value not in known:
        raise UnsupportedError(f"unknown {what} {value!r}", hint=f"{what}s: {', '.join(known)}")
