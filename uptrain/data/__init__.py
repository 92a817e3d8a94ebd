"""Training text: several weighted sources, packed into blocks on disk, and the samples of a run drawn from them."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .blocks import PackedBlocks
    from .corpus import Corpus
    from .packing import build
    from .sources import WeightedSource

__all__ = ["Corpus", "PackedBlocks", "WeightedSource", "build"]

# where each name is defined: blocks are tensors, and torch, which takes seconds, is imported when it is asked for
_HOMES = {"Corpus": ".corpus", "PackedBlocks": ".blocks", "WeightedSource": ".sources", "build": ".packing"}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name], __name__), name)
