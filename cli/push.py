"""kvconvert push."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from .. import pipeline
from .console import Terminal, human_bytes
from .options import DryRun, Json, Quiet, TrustRemoteCode

if TYPE_CHECKING:
    from ..pipeline import Push

__all__ = ["push"]


def push(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="A directory that kvconvert wrote.")],
    repository: Annotated[
        str, typer.Argument(metavar="REPOSITORY", help="Where it goes on the hub: org/name, made if there is none.")
    ],
    create_pr: Annotated[
        bool, typer.Option("--create-pr", help="Open a pull request instead of a commit to main.")
    ] = False,
    private: Annotated[
        bool | None,
        typer.Option(
            "--private/--public",
            help="Who sees a new repository. Default: private if the source of the conversion is private or gated on "
            "the hub, or if that cannot be known.",
            show_default=False,
        ),
    ] = None,
    run: Annotated[
        bool, typer.Option("--run/--no-run", help="Load the model, and run a short text through it, before it is sent.")
    ] = True,
    force: Annotated[
        bool, typer.Option("--force", help="Replace a model on the hub that kvconvert did not write.")
    ] = False,
    dry_run: DryRun = False,
    trust_remote_code: TrustRemoteCode = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Send a result to the hub, with its card and manifest, in one commit, after `verify` has passed.

    The token comes from HF_TOKEN or `hf auth login`. What is cut short shows nothing there, and goes on when run again.

    Example: kvconvert push model_dir-gqa8 org/model-gqa8 --dry-run
    """
    terminal = Terminal(as_json=as_json, quiet=quiet)
    result = pipeline.push(
        directory,
        repository,
        create_pr=create_pr,
        private=private,
        force=force,
        dry_run=dry_run,
        run=run,
        progress=terminal.progress,
        remark=terminal.remark,
    )
    terminal.result(asdict(result), lambda console: _show(result, console))


def _show(result: Push, console: Console) -> None:
    is_done = result.commit is not None
    console.print(f"{result.directory} {'is on the hub as' if is_done else 'would go to'} {result.repository}")
    kind = "a new repository" if result.is_new else "a repository that was there"
    console.print(f"  {'private' if result.private else 'public'}, {kind}: {result.visibility}")
    width = max(len(name) for name in (*(file.name for file in result.files), *result.removed))
    for file in result.files:
        console.print(f"  {file.name:<{width}}  {human_bytes(file.size)}{', there already' if file.was_there else ''}")
    for name in result.removed:
        console.print(f"  {name:<{width}}  {'removed' if is_done else 'would be removed'}: weights of another model")
    console.print(f"  {human_bytes(result.num_bytes_to_send)} {'were sent' if is_done else 'would be sent'}")
    if result.url is not None:
        console.print(f"  {result.url}")
