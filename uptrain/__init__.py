"""Uptraining: a converted checkpoint is trained briefly, so that it recovers what the conversion lost.

    from kvconvert.uptrain import UptrainSettings, uptrain

    uptrain("model_dir-gqa8", data="text.jsonl", teacher="model_dir", tokens=1_000_000_000, output="recovered")

Nothing is printed: progress, metrics and remarks come through arguments. docs/uptraining.md says what can be chosen.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ..convert.text.sources import TextSource
    from .data.sources import WeightedSource
    from .plan import UptrainPlan, carry_out, plan_uptraining, summarise, uptrain
    from .recipe import Recipe, Trained
    from .request import Length, Machine, Monitoring, Schedule, TextSettings, Tracker, UptrainRequest, UptrainSettings
    from .run import UptrainResult
    from .training.processes import joined_processes

__all__ = [
    "Length",
    "Machine",
    "Monitoring",
    "Recipe",
    "Schedule",
    "TextSettings",
    "TextSource",
    "Tracker",
    "Trained",
    "UptrainPlan",
    "UptrainRequest",
    "UptrainResult",
    "UptrainSettings",
    "WeightedSource",
    "carry_out",
    "joined_processes",
    "plan_uptraining",
    "summarise",
    "uptrain",
]

# where each name is defined: what trains imports torch, which takes seconds, and is imported when it is asked for
_HOMES = {
    "TextSource": "..convert.text.sources",
    "WeightedSource": ".data.sources",
    "joined_processes": ".training.processes",
    **dict.fromkeys(("UptrainPlan", "carry_out", "plan_uptraining", "summarise", "uptrain"), ".plan"),
    **dict.fromkeys(("Recipe", "Trained"), ".recipe"),
    **dict.fromkeys(
        (
            *("Length", "Machine", "Monitoring", "Schedule", "TextSettings", "Tracker"),
            *("UptrainRequest", "UptrainSettings"),
        ),
        ".request",
    ),
    "UptrainResult": ".run",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name], __name__), name)
