"""kvconvert mha2gqa and kvconvert mha2mqa: fewer K/V heads."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from ..convert.architectures import find_architecture
from ..convert.checkpoint import open_checkpoint
from ..convert.execute import execute
from ..convert.gqa import Gqa
from ..convert.output import check_output
from ..convert.plan import ConversionPlan
from ..convert.translations import as_target
from .console import Terminal, human_bytes
from .options import (
    DryRun,
    Force,
    Json,
    Model,
    Output,
    Quiet,
    Revision,
    TrustRemoteCode,
    default_output,
    parse_size,
)

__all__ = ["mha2gqa", "mha2mqa"]


class Method(StrEnum):
    mean = "mean"
    first = "first"
    random = "random"


MethodOption = Annotated[
    Method, typer.Option(help="What a group's heads become: their mean, the first, or fresh ones.")
]
Seed = Annotated[int, typer.Option(help="Seed of --method random.")]
MaxShardSize = Annotated[str, typer.Option(help="Largest weight file, for example 5GB.")]


def mha2gqa(
    model: Model,
    groups: Annotated[int, typer.Option("--groups", "-g", min=1, help="K/V heads of the result.", show_default=False)],
    method: MethodOption = Method.mean,
    seed: Seed = 0,
    output: Output = None,
    max_shard_size: MaxShardSize = "5GB",
    revision: Revision = None,
    trust_remote_code: TrustRemoteCode = False,
    dry_run: DryRun = False,
    force: Force = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Pool K/V heads into fewer groups (GQA). A GQA checkpoint can be reduced further.

    Example: kvconvert mha2gqa --groups 8 model_dir
    """
    settings = Gqa(groups, method=method.value, seed=seed, allow_same=force)
    terminal = Terminal(as_json=as_json, quiet=quiet)
    _convert(settings, f"gqa{groups}", model, output, max_shard_size, revision, dry_run, force, terminal)


def mha2mqa(
    model: Model,
    method: MethodOption = Method.mean,
    seed: Seed = 0,
    output: Output = None,
    max_shard_size: MaxShardSize = "5GB",
    revision: Revision = None,
    trust_remote_code: TrustRemoteCode = False,
    dry_run: DryRun = False,
    force: Force = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Pool all K/V heads of a layer into one (MQA).

    Example: kvconvert mha2mqa model_dir --output model_dir-mqa
    """
    settings = Gqa(1, method=method.value, seed=seed, allow_same=force)
    terminal = Terminal(as_json=as_json, quiet=quiet)
    _convert(settings, "mqa", model, output, max_shard_size, revision, dry_run, force, terminal)


def _convert(
    settings: Gqa,
    suffix: str,
    model: str,
    output: Path | None,
    max_shard_size: str,
    revision: str | None,
    dry_run: bool,
    force: bool,
    terminal: Terminal,
) -> None:
    max_shard_bytes = parse_size(max_shard_size)
    source = open_checkpoint(model, revision=revision, headers_only=dry_run)
    with as_target(source, settings.num_key_value_heads) as checkpoint:
        target = output or default_output(checkpoint, suffix)
        check_output(target, force=force, inputs=[checkpoint.path] if checkpoint.path else [])
        plan = settings.plan(checkpoint, find_architecture(checkpoint))
        summary = _summary(plan) | {"output": str(target), "dry_run": dry_run}
        if dry_run:
            terminal.result(
                summary | {"plan": plan.to_json()}, lambda console: _show(plan, console, f"would write {target}")
            )
            return
        with terminal.progress("converting", plan.bytes_out) as advance:
            result = execute(plan, checkpoint, target, max_shard_bytes=max_shard_bytes, force=force, progress=advance)
    summary["opened_as"] = result.opened_as
    terminal.result(summary, lambda console: _show(plan, console, f"wrote {target} (opens as {result.opened_as})"))


def _summary(plan: ConversionPlan) -> dict[str, Any]:
    before, after = plan.cache_bytes_per_token
    return {
        "target": plan.target,
        "method": plan.method,
        "model_type": plan.model_type,
        "num_key_value_heads": {"source": plan.source.num_key_value_heads, "result": plan.result.num_key_value_heads},
        "cache_bytes_per_token": {"source": before, "result": after},
        "weight_bytes": {"source": plan.bytes_in, "result": plan.bytes_out},
    }


def _show(plan: ConversionPlan, console: Console, outcome: str) -> None:
    before, after = plan.cache_bytes_per_token
    pooled = sum(step.op is not None for step in plan.steps)
    console.print(f"{plan.model_type}: {plan.source.num_key_value_heads} → {plan.result.num_key_value_heads} K/V heads")
    console.print(f"  method      {plan.method}, {pooled} tensors pooled, {len(plan.steps) - pooled} copied")
    console.print(f"  K/V cache   {before} → {after} bytes per token (16-bit), 1/{before / after:g}")
    console.print(f"  weights     {human_bytes(plan.bytes_in)} → {human_bytes(plan.bytes_out)}")
    console.print(f"  {outcome}")
