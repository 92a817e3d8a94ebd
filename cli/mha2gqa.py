"""kvconvert mha2gqa and kvconvert mha2mqa: fewer K/V heads."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields, replace
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from .. import configs
from ..convert.architecture import Architecture
from ..convert.architectures import find_architecture
from ..convert.checkpoint import Checkpoint, open_checkpoint
from ..convert.device import default_device
from ..convert.errors import InputError
from ..convert.execute import check_source, execute
from ..convert.gqa import Gqa
from ..convert.output import check_file, check_free_space, check_output, existing_parent
from ..convert.plan import ConversionPlan
from ..convert.text import TextSource
from ..convert.translations import as_target
from .console import Terminal, human_bytes
from .options import (
    DataConfig,
    DryRun,
    Force,
    Json,
    Model,
    Output,
    Precision,
    PrecisionOption,
    Quiet,
    Revision,
    Split,
    TextField,
    TrustRemoteCode,
    accepts,
    default_output,
    parse_size,
)

__all__ = ["mha2gqa", "mha2mqa"]

_LONGEST_CALIBRATION_SEQUENCE = 1024
_OF_SVD = frozenset(
    {
        "calibration",
        "calibration_tokens",
        "text_field",
        "split",
        "data_config",
        "no_calibration",
        "no_refit",
        "precision",
        "device",
        "statistics",
        "save_statistics",
    }
)


class Method(StrEnum):
    mean = "mean"
    first = "first"
    random = "random"
    svd = "svd"


class Grouping(StrEnum):
    contiguous = "contiguous"
    similarity = "similarity"


@dataclass(frozen=True)
class Request:
    """What both commands take, beside the number of heads."""

    model: Model
    method: Annotated[
        Method,
        typer.Option(
            help="What a group's heads become: their mean, the first, fresh ones, or the best merge on a text."
        ),
    ] = Method.mean
    seed: Annotated[int, typer.Option(help="Seed of --method random.")] = 0
    calibration: Annotated[
        str | None,
        typer.Option(
            help="svd: text to measure on: files as for --data, or a dataset name. Default: the demo's text.",
            show_default=False,
        ),
    ] = None
    calibration_tokens: Annotated[int, typer.Option(min=1, help="svd: how many tokens of it.")] = 131072
    text_field: TextField = "text"
    split: Split = "train"
    data_config: DataConfig = None
    no_calibration: Annotated[bool, typer.Option("--no-calibration", help="svd: merge by the weights alone.")] = False
    no_refit: Annotated[
        bool, typer.Option("--no-refit", help="svd: keep the closed form; do not fit o_proj to the text.")
    ] = False
    precision: PrecisionOption = Precision.auto
    device: Annotated[
        str | None,
        typer.Option(
            help="svd: where text runs: cpu, cuda, cuda:1 … Default: a GPU if there is one.", show_default=False
        ),
    ] = None
    statistics: Annotated[
        Path | None, typer.Option(help="svd: measurements of an earlier run, in place of text.", show_default=False)
    ] = None
    save_statistics: Annotated[
        Path | None, typer.Option(help="svd: keep the measurements here.", show_default=False)
    ] = None
    output: Output = None
    max_shard_size: Annotated[str, typer.Option(help="Largest weight file, for example 5GB.")] = "5GB"
    revision: Revision = None
    trust_remote_code: TrustRemoteCode = False
    dry_run: DryRun = False
    force: Force = False
    as_json: Json = False
    quiet: Quiet = False

    def check(self) -> None:
        given = {field.name for field in fields(self) if getattr(self, field.name) != field.default}
        for name in sorted(given & _OF_SVD):
            if self.method is not Method.svd:
                option = f"--{name.replace('_', '-')}"
                raise InputError(f"{option} belongs to --method svd", hint="add --method svd, or leave it out")
        sources = [self.calibration is not None, self.no_calibration, self.statistics is not None]
        if sum(sources) > 1:
            raise InputError("give one of --calibration, --statistics and --no-calibration")
        if self.save_statistics is not None and (self.no_calibration or self.statistics is not None):
            raise InputError("--save-statistics needs text to measure on", hint="give --calibration")
        if self.save_statistics is not None and self.dry_run:
            raise InputError("--dry-run writes nothing, --save-statistics does", hint="leave out one of them")


@accepts(Request)
def mha2gqa(
    groups: Annotated[int, typer.Option("--groups", "-g", min=1, help="K/V heads of the result.", show_default=False)],
    request: Request,
    grouping: Annotated[
        Grouping, typer.Option(help="svd: which heads form a group, those that lose least together or neighbours.")
    ] = Grouping.similarity,
) -> None:
    """Pool K/V heads into fewer groups (GQA). A GQA checkpoint can be reduced further.

    Example: kvconvert mha2gqa --groups 8 model_dir --method svd --calibration text.jsonl
    """
    _convert(groups, f"gqa{groups}", request, grouping)


@accepts(Request)
def mha2mqa(request: Request) -> None:
    """Pool all K/V heads of a layer into one (MQA).

    Example: kvconvert mha2mqa model_dir --output model_dir-mqa
    """
    _convert(1, "mqa", request, Grouping.contiguous)


def _convert(num_key_value_heads: int, suffix: str, request: Request, grouping: Grouping) -> None:
    request.check()
    terminal = Terminal(as_json=request.as_json, quiet=request.quiet)
    settings = Gqa(num_key_value_heads, method=request.method.value, seed=request.seed, allow_same=request.force)
    max_shard_bytes = parse_size(request.max_shard_size)
    headers_only = request.dry_run and request.method is not Method.svd
    source = open_checkpoint(request.model, revision=request.revision, headers_only=headers_only)
    with as_target(source, settings.num_key_value_heads) as checkpoint:
        target = request.output or default_output(checkpoint, suffix)
        check_output(target, force=request.force, inputs=[checkpoint.path] if checkpoint.path else [])
        architecture = find_architecture(checkpoint)
        plan = replace(settings, method="mean").plan(checkpoint, architecture)  # whether it can be done, and its size
        summary: dict[str, Any] = {"output": str(target), "dry_run": request.dry_run}
        changes = plan.result.num_key_value_heads != plan.source.num_key_value_heads
        with _merged(plan, checkpoint, architecture, request, grouping, target, terminal, summary) as planned:
            plan = settings.plan(planned, architecture)
            summary |= _summary(plan)
            if request.dry_run:
                summary["plan"] = plan.to_json()
                terminal.result(summary, lambda console: _show(plan, console, f"would write {target}"))
                return
            with terminal.progress("converting", plan.bytes_out) as advance:
                result = execute(
                    plan,
                    planned,
                    target,
                    max_shard_bytes=max_shard_bytes,
                    force=request.force,
                    calibration=summary.get("calibration"),
                    progress=advance,
                )
    summary["opened_as"] = result.opened_as
    terminal.result(summary, lambda console: _show(plan, console, f"wrote {target} (opens as {result.opened_as})"))
    if request.method is Method.mean and changes and architecture.cross_attention is None:
        terminal.remark("the mean harms a decoder before uptraining; --method svd, on a text, keeps most of it")


@contextmanager
def _merged(
    plan: ConversionPlan,
    checkpoint: Checkpoint,
    architecture: Architecture,
    request: Request,
    grouping: Grouping,
    target: Path,
    terminal: Terminal,
    summary: dict[str, Any],
) -> Iterator[Checkpoint]:
    """The checkpoint to plan on: for svd, one whose heads are merged, in files beside `target` that live as long."""
    if request.method is not Method.svd or plan.result.num_key_value_heads == plan.source.num_key_value_heads:
        yield checkpoint
        return
    import torch

    from ..convert.architecture import read_attention
    from ..convert.calibration import read_calibration_text
    from ..convert.statistics import (
        LayerStatistics,
        StatisticsOrigin,
        fingerprint,
        open_statistics,
        save_statistics,
        statistics_bytes,
    )
    from ..convert.svd import MergeSettings, check_mergeable, merge_checkpoint, scratch_bytes

    device = request.device or str(default_device())
    try:
        torch.empty(1, device=device)
    except (AssertionError, RuntimeError) as error:  # torch has no error of its own for this
        raise InputError(
            f"--device {device}: this machine has none that works ({str(error).splitlines()[0]})"
        ) from error
    shape = read_attention(checkpoint, architecture)
    check_mergeable(checkpoint, architecture)
    check_source(checkpoint)
    beside = scratch_bytes(checkpoint, architecture) + (0 if request.dry_run else plan.bytes_out)
    if request.save_statistics is not None:
        check_file(request.save_statistics, outside=target)
        here, there = existing_parent(target), existing_parent(request.save_statistics)
        kept = statistics_bytes(shape)
        check_free_space(
            request.save_statistics, kept + (beside + kept if here.stat().st_dev == there.stat().st_dev else 0)
        )
        beside += kept
    check_free_space(target, beside)
    text = statistics = None
    if request.statistics is not None:
        statistics = open_statistics(request.statistics, checkpoint, architecture)
        terminal.remark("statistics hold no text to fit o_proj to, which text would allow")
    elif request.no_calibration:
        terminal.remark("merging by the weights alone, which can be worse than the mean; a text is better")
    else:
        if request.calibration is None:
            terminal.remark("calibrating on the demo's prose; text like the model's own training data is better")
        location = request.calibration or str(configs.DEMO / "uptrain.jsonl")
        longest = checkpoint.config_int(architecture.config_name("max_position_embeddings"), default=2048)
        sequence_length = min(_LONGEST_CALIBRATION_SEQUENCE, longest, request.calibration_tokens)
        text = read_calibration_text(
            checkpoint,
            TextSource(location, text_field=request.text_field, split=request.split, config=request.data_config),
            num_tokens=request.calibration_tokens,
            sequence_length=sequence_length,
        )
        if text.num_tokens <= request.calibration_tokens - sequence_length:
            terminal.remark(f"{location} gave {text.num_tokens} tokens, fewer than --calibration-tokens")
    merge = MergeSettings(
        plan.result.num_key_value_heads,
        grouping=grouping.value,
        refit=text is not None and not request.no_refit,
        precision=request.precision.chosen if text is not None else "fp32",
        device=device,
    )
    with (
        tempfile.TemporaryDirectory(dir=existing_parent(target), prefix=f".{target.name}.merging-") as scratch,
        terminal.progress("merging", shape.num_hidden_layers) as advance,
    ):
        origin = (
            StatisticsOrigin(fingerprint(checkpoint, architecture), text.description, text.num_tokens) if text else None
        )
        try:
            merged = merge_checkpoint(
                checkpoint,
                architecture,
                merge,
                Path(scratch),
                text=text,
                statistics=statistics,
                keep=request.save_statistics is not None,
                progress=advance,
            )
        except torch.OutOfMemoryError as error:
            raise InputError(f"{merge.device}: out of memory", hint="use another --device, for example cpu") from error
        if request.save_statistics is not None and origin is not None:
            save_statistics(
                request.save_statistics,
                LayerStatistics(origin, merged.gram),
                shape,
            )
        used = origin or (statistics.origin if statistics else None)
        summary["calibration"] = {**(asdict(used) if used else {"data": None}), **asdict(merge)}
        yield merged


def _summary(plan: ConversionPlan) -> dict[str, Any]:
    before, after = plan.cache_bytes_per_token
    return {
        "target": plan.target,
        "method": plan.method,
        "model_type": plan.model_type,
        "num_key_value_heads": {"source": plan.source.num_key_value_heads, "result": plan.result.num_key_value_heads},
        "cache_bytes_per_token": {"source": before, "result": after},
        "weight_bytes": {"source": plan.bytes_in, "result": plan.bytes_out},
        "layers": [asdict(layer) for layer in plan.layers],
    }


def _show(plan: ConversionPlan, console: Console, outcome: str) -> None:
    before, after = plan.cache_bytes_per_token
    pooled = sum(step.op is not None for step in plan.steps)
    console.print(f"{plan.model_type}: {plan.source.num_key_value_heads} → {plan.result.num_key_value_heads} K/V heads")
    console.print(f"  method      {plan.method}, {pooled} tensors pooled, {len(plan.steps) - pooled} copied")
    for layer in plan.layers:
        keys, values = min(layer.keys_retained), min(layer.values_retained)
        console.print(f"  layer {layer.layer:<5} keeps {keys:.1%} of the keys' energy, {values:.1%} of the values'")
    console.print(f"  K/V cache   {before} → {after} bytes per token (16-bit), 1/{before / after:g}")
    console.print(f"  weights     {human_bytes(plan.bytes_in)} → {human_bytes(plan.bytes_out)}")
    console.print(f"  {outcome}")
