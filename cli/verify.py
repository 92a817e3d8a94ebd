"""kvconvert verify."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from .. import measure
from ..convert.errors import CheckpointError
from .console import Terminal
from .options import Json, Quiet, TrustRemoteCode

if TYPE_CHECKING:
    from ..measure import Verification

__all__ = ["verify"]


def verify(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="A directory that kvconvert wrote.")],
    against: Annotated[
        str | None,
        typer.Option(
            help="The original: tensors that were copied have to be its own, byte for byte, and those that mean or "
            "first computed are computed again.",
            show_default=False,
        ),
    ] = None,
    run: Annotated[
        bool, typer.Option("--run/--no-run", help="Load the model, and run a short text through it.")
    ] = True,
    trust_remote_code: TrustRemoteCode = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Check that a result is what its manifest says, byte for byte, and that it opens and runs.

    Exits with 2 where it is not, and names each file and tensor.

    Example: kvconvert verify model_dir-gqa8 --against model_dir
    """
    terminal = Terminal(as_json=as_json, quiet=quiet)
    result = measure.verify(directory, against=against, run=run, see=lambda name: terminal.remark(f"checking {name}"))
    terminal.result(result.to_json(), lambda console: _show(result, console))
    if not result.ok:
        more = f", and {len(result.problems) - 1} more" if len(result.problems) > 1 else ""
        raise CheckpointError(f"{directory} is not as kvconvert wrote it: {result.problems[0]}{more}")


def _show(result: Verification, console: Console) -> None:
    for check in result.checks:
        console.print(f"  {'passed' if check.passed else 'FAILED'}  {check.name}: {check.what}")
        for problem in check.problems:
            console.print(f"          {problem}")
