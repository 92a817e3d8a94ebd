"""Several steps as one: what converts, uptrains and measures in one call, and can be ended and gone on with.

    from kvconvert.pipeline import sweep

    sweep("model_dir", ["gqa:2", "mqa", "cla2"], "held_out.jsonl", "sweep").rows

Prints nothing; docs/sweep.md explains it.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .sweep_rows import SweepRow
    from .sweeping import Sweep, Uptraining, sweep
    from .targets import Target, parse_target

__all__ = ["Sweep", "SweepRow", "Target", "Uptraining", "parse_target", "sweep"]

# where each name is defined: most of it needs torch, which takes seconds, and is imported when asked for
_HOMES = {
    "Sweep": ".sweeping",
    "SweepRow": ".sweep_rows",
    "Target": ".targets",
    "Uptraining": ".sweeping",
    "parse_target": ".targets",
    "sweep": ".sweeping",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name], __name__), name)
