"""Several steps as one: what converts, uptrains and measures in one call, and can be ended and gone on with.

    from kvconvert.pipeline import push, run, sweep

    model = run("recipe.yaml").model
    push(model, "org/name", dry_run=True)
    sweep("model_dir", ["gqa:2", "mqa", "cla2"], "held_out.jsonl", "sweep").rows

Prints nothing; docs/recipes.md explains the run, docs/sweep.md the sweep, docs/ci.md the push.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .pushing import Push, PushedFile, push
    from .recipe_file import RecipeFile, read_recipe
    from .recipe_schema import Recipe, json_schema
    from .run_plan import RunPlan, StagePlan, plan_run
    from .running import FailedGatesError, Run, run
    from .sweep_rows import SweepRow
    from .sweeping import Sweep, Uptraining, sweep
    from .targets import Target, parse_target

__all__ = [
    "FailedGatesError",
    "Push",
    "PushedFile",
    "Recipe",
    "RecipeFile",
    "Run",
    "RunPlan",
    "StagePlan",
    "Sweep",
    "SweepRow",
    "Target",
    "Uptraining",
    "json_schema",
    "parse_target",
    "plan_run",
    "push",
    "read_recipe",
    "run",
    "sweep",
]

# where each name is defined: most of it needs torch, which takes seconds, and is imported when asked for
_HOMES = {
    "FailedGatesError": ".running",
    "Push": ".pushing",
    "PushedFile": ".pushing",
    "Recipe": ".recipe_schema",
    "RecipeFile": ".recipe_file",
    "Run": ".running",
    "RunPlan": ".run_plan",
    "StagePlan": ".run_plan",
    "Sweep": ".sweeping",
    "SweepRow": ".sweep_rows",
    "Target": ".targets",
    "Uptraining": ".sweeping",
    "json_schema": ".recipe_schema",
    "parse_target": ".targets",
    "plan_run": ".run_plan",
    "push": ".pushing",
    "read_recipe": ".recipe_file",
    "run": ".running",
    "sweep": ".sweeping",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name], __name__), name)
