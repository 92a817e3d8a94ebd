"""kvconvert demo: a recipe that ships with the package, run on the checkpoint that ships with it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .. import configs
from .options import DryRun, Json, Quiet
from .run import Overrides, carry_out

__all__ = ["demo"]


def demo(
    overrides: Overrides = None,
    output: Annotated[Path, typer.Option("--output", "-o", help="Directory of the run.")] = Path("kvconvert-demo"),
    dry_run: DryRun = False,
    force: Annotated[bool, typer.Option("--force", help="Run it again from its beginning.")] = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Run the demo's recipe: convert, uptrain, evaluate, benchmark, report. Needs no network.

    The recipe is configs/recipes/demo.yaml, and the same command goes on after an end.

    Example: kvconvert demo --output kvconvert-demo
    """
    carry_out(
        configs.RECIPES / "demo.yaml",
        overrides or (),
        output=output,
        first="convert" if force else None,
        dry_run=dry_run,
        as_json=as_json,
        quiet=quiet,
    )
