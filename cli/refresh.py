"""kvconvert refresh."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .console import Terminal
from .options import Json, Quiet

__all__ = ["refresh"]


def refresh(
    directory: Annotated[
        Path, typer.Argument(metavar="DIR", help="A checkpoint on this machine, in a class of kvconvert's.")
    ],
    force: Annotated[
        bool, typer.Option("--force", help="Replace code, too, that no kvconvert wrote as it is.")
    ] = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Renew the code beside converted weights for the transformers of today. Nothing else in DIR changes.

    The installed class first proves on a few tokens that it computes the same with a cache as without.

    Example: kvconvert refresh model_dir-cla2
    """
    from ..convert.cache_check import refresh as renew

    terminal = Terminal(as_json=as_json, quiet=quiet)
    renewed = renew(directory, force=force)
    text = f"{directory}: renewed {', '.join(renewed)}" if renewed else f"{directory}: its code is up to date"
    terminal.result({"directory": str(directory), "renewed": list(renewed)}, lambda console: console.print(text))
