"""kvconvert inspect."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated

import typer
from rich.console import Console

from ..convert.checkpoint import open_checkpoint
from ..convert.inspection import Inspection, inspect_checkpoint
from .console import Terminal, human_bytes, human_count
from .options import Json, Model, Quiet, Revision

__all__ = ["inspect"]


def inspect(
    model: Model,
    context: Annotated[
        int | None,
        typer.Option(
            min=1, help="Context length for the cache figure. Default: the model's longest.", show_default=False
        ),
    ] = None,
    revision: Revision = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Show what a checkpoint is, what its K/V cache costs and what it can become. Reads headers only.

    Example: kvconvert inspect model_dir --context 32768
    """
    terminal = Terminal(as_json=as_json, quiet=quiet)
    with open_checkpoint(model, revision=revision, headers_only=True) as checkpoint:
        inspection = inspect_checkpoint(checkpoint, context_length=context)
    terminal.result(asdict(inspection), lambda console: show_inspection(inspection, console))


def show_inspection(inspection: Inspection, console: Console) -> None:
    context = f"{human_bytes(inspection.cache_bytes_for_context)} for {inspection.context_length} tokens"
    size = f"{human_count(inspection.num_parameters)}, {inspection.dtype}"
    rows = {
        "architecture": f"{inspection.model_type} ({inspection.attention})"
        + (f", converts to {inspection.converts_to}" if inspection.converts_to != inspection.model_type else ""),
        "layers": str(inspection.num_hidden_layers),
        "query heads": str(inspection.num_attention_heads),
        "K/V heads": str(inspection.num_key_value_heads),
        "head_dim": str(inspection.head_dim),
        "parameters": f"{size}, {human_bytes(inspection.size_on_disk_bytes)} on disk",
        "K/V cache": f"{inspection.cache_bytes_per_token} bytes per token, {context} (16-bit)",
    }
    for target in inspection.targets:
        rows[target.command] = target.reason if target.possible else f"not possible: {target.reason}"
    rows["served by"] = ", ".join(
        f"{engine.engine} ({engine.evidence}{': ' + engine.how if engine.how else ''})"
        for engine in inspection.serving
        if engine.works
    )
    if inspection.approximation:
        rows["note"] = f"pooling is only approximate: {inspection.approximation}"
    console.print(inspection.model)
    for label, text in rows.items():
        console.print(f"  {label:<13} {text}")
