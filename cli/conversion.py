"""What the conversion commands share: their options, and the way from them to the library and back."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from ..convert.conversion import Calibration, Conversion, Method, convert
from ..convert.methods.prepared import LayerReport
from ..pipeline import option_groups
from ..pipeline.conversion_options import calibration_of
from ..pipeline.values import parse_size
from .console import Terminal, human_bytes, show_left_behind
from .options import DryRun, Force, Given, Json, Output, Quiet, Revision, SettingsOptions, TrustRemoteCode

__all__ = ["ConversionRequest", "run_conversion", "text_options"]


@dataclass(frozen=True)
class ConversionRequest:
    """The options of every conversion beside those of its method and its text."""

    output: Output = None
    max_shard_size: Annotated[
        str, typer.Option(help="Largest weight file, for example 5GB.", rich_help_panel="Output")
    ] = "5GB"
    allow_nonfinite: Annotated[
        bool,
        typer.Option(
            "--allow-nonfinite",
            help="Keep weights that are infinite or not a number; otherwise they are refused.",
            rich_help_panel="Model",
        ),
    ] = False
    jobs: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Files read and written side by side. Default: one for each processor, at most 4.",
            show_default=False,
            rich_help_panel="Output",
        ),
    ] = None
    work_dir: Annotated[
        Path | None,
        typer.Option(
            "--work-dir",
            help="Keep what is measured and made of each layer in this directory, a new or empty one, so that the same "
            "command goes on there after it was ended, or after --dry-run. Emptied once the output is whole.",
            show_default=False,
            rich_help_panel="Output",
        ),
    ] = None
    revision: Revision = None
    trust_remote_code: TrustRemoteCode = False
    dry_run: DryRun = False
    force: Force = False
    as_json: Json = False
    quiet: Quiet = False


def text_options(*, omit: tuple[str, ...] = ()) -> SettingsOptions[Calibration]:
    """The options that say what to measure on."""
    return SettingsOptions(
        "text",
        option_groups.TEXT.without(*omit),
        "Text",
        types={"data": str | None},
        help={
            "data": "Text to measure on: files as for --data, or a dataset name. self: the model writes one half "
            "first, the other is the default (a file of that name is ./self). Default: a text of many kinds that ships "
            "with kvconvert; text like what the model will see is better.",
        },
    )


def run_conversion(model: str, method: Method, text: Given[Calibration], request: ConversionRequest) -> None:
    """Convert, and show the result. Raises InputError for options that contradict each other."""
    terminal = Terminal(as_json=request.as_json, quiet=request.quiet)
    calibration, is_default = None, False
    if method.needs_measurements:
        calibration, is_default = calibration_of(text, dry_run=request.dry_run)
    said = not is_default

    def progress(what: str, total: int) -> AbstractContextManager[Callable[[int], object]]:
        nonlocal said
        if not said:
            terminal.remark("calibrating on the text that ships with kvconvert; text like the model will see is better")
            said = True
        return terminal.progress(what, total)

    result = convert(
        model,
        method,
        request.output,
        calibration=calibration,
        revision=request.revision,
        max_shard_bytes=parse_size(request.max_shard_size),
        jobs=request.jobs,
        allow_nonfinite=request.allow_nonfinite,
        force=request.force,
        dry_run=request.dry_run,
        work_dir=request.work_dir,
        progress=progress,
        remark=terminal.remark,
    )
    terminal.result(result.to_json(), lambda console: _show(result, console))
    plan = result.plan
    if plan.method == "mean" and plan.changes_cache and not plan.source.cross_attention and not request.dry_run:
        terminal.remark("the mean harms a decoder before uptraining; --method svd, on a text, keeps most of it")


def _fit_of(layer: LayerReport) -> str:
    """What gradient steps did to the relative error of the layer, or of the first of layers that share."""
    if not layer.fits:
        return ""
    fit = layer.fits[0]
    if fit.loss_after < fit.loss_before:
        return f"; error {fit.loss_before:.3g} → {fit.loss_after:.3g}"
    return f"; error {fit.loss_before:.3g}, which {fit.steps} gradient steps did not lower"


def _show(result: Conversion, console: Console) -> None:
    plan = result.plan
    before, after = plan.cache_bytes_per_token
    source, shape = plan.source, plan.result
    made = sum(step.op is not None or step.overlay for step in plan.steps)
    if shape.latent is not None:
        latent = f"a latent of {shape.latent.kv_lora_rank} and a rotary key of {shape.latent.qk_rope_head_dim}"
        console.print(f"{plan.model_type}: {source.num_key_value_heads} K/V heads → {latent}")
    else:
        of_size, now = (f" of {size}" if plan.resizes_heads else "" for size in plan.head_dims.values())
        heads = f"{source.num_key_value_heads}{of_size} → {shape.num_key_value_heads}{now}"
        console.print(f"{plan.model_type}: {heads} K/V heads")
    if shape.layer_grouping is not None and source.layer_grouping is None:
        groups = ", ".join("-".join(map(str, (group[0], *group[1:][-1:]))) for group in shape.layer_grouping.groups)
        console.print(f"  K/V layers  {source.num_key_value_layers} → {shape.num_key_value_layers}: {groups}")
    names = [", ".join(map(str, layer.layers)) for layer in result.reports]
    width = max([5, *map(len, names)])
    if made:
        console.print(f"  method      {plan.method}, {made} tensors made, {len(plan.steps) - made} copied")
    for name, layer in zip(names, result.reports, strict=True):
        keys, values = min(layer.keys_retained), min(layer.values_retained)
        kept = f"keeps {keys:.1%} of the keys' energy, {values:.1%} of the values'"
        console.print(f"  layer {name:<{width}} {kept}{_fit_of(layer)}")
    console.print(f"  K/V cache   {before} → {after} bytes per token (16-bit), 1/{before / after:.4g}")
    shared = f", of which {human_bytes(result.shared_bytes)} share the source's place" if result.shared_bytes else ""
    console.print(f"  weights     {human_bytes(plan.bytes_in)} → {human_bytes(plan.bytes_out)}{shared}")
    show_left_behind(result.left_behind or {}, console)
    if result.unchecked_tokenizer is not None:
        console.print(f"  tokenizer   copied, not compared with the source's: {result.unchecked_tokenizer}")
    opened = result.opened_as
    console.print(f"  wrote {result.output} (opens as {opened})" if opened else f"  would write {result.output}")
