"""What the conversion commands share: their options, and the way from a checkpoint to a written result."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields, replace
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from .. import configs
from ..convert.architectures.architecture import Architecture
from ..convert.architectures.table import find_architecture
from ..convert.checkpoint.output import check_file, check_free_space, check_output, existing_parent
from ..convert.checkpoint.tensors import Checkpoint
from ..convert.device import default_device
from ..convert.errors import InputError
from ..convert.execute import check_source, execute
from ..convert.methods.cla import Cla
from ..convert.methods.gqa import Gqa
from ..convert.plan import ConversionPlan
from ..convert.text.sources import TextSource
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
    default_output,
    parse_size,
)

if TYPE_CHECKING:
    from ..convert.calibration.statistics import LayerStatistics
    from ..convert.calibration.text import CalibrationText

__all__ = [
    "OF_TEXT",
    "ConversionRequest",
    "Grouping",
    "calibration_text",
    "check_device",
    "checked_output",
    "convert",
    "finish",
    "memory_errors",
]

OF_TEXT = frozenset({"calibration", "calibration_tokens", "text_field", "split", "data_config", "precision", "device"})

_LONGEST_CALIBRATION_SEQUENCE = 1024


class Grouping(StrEnum):
    contiguous = "contiguous"
    similarity = "similarity"


@dataclass(frozen=True)
class ConversionRequest:
    """The options of every conversion, with those for text to measure on. Commands add --method and its own."""

    model: Model
    calibration: Annotated[
        str | None,
        typer.Option(
            help="Text to measure on: files as for --data, or a dataset name. Default: the demo's text.",
            show_default=False,
        ),
    ] = None
    calibration_tokens: Annotated[int, typer.Option(min=1, help="How many tokens of it.")] = 131072
    text_field: TextField = "text"
    split: Split = "train"
    data_config: DataConfig = None
    no_refit: Annotated[
        bool, typer.Option("--no-refit", help="svd: keep the closed form; do not fit o_proj to the text.")
    ] = False
    precision: PrecisionOption = Precision.auto
    device: Annotated[
        str | None,
        typer.Option(
            help="Where that text runs: cpu, cuda, cuda:1 … Default: a GPU if there is one.", show_default=False
        ),
    ] = None
    output: Output = None
    max_shard_size: Annotated[str, typer.Option(help="Largest weight file, for example 5GB.")] = "5GB"
    revision: Revision = None
    trust_remote_code: TrustRemoteCode = False
    dry_run: DryRun = False
    force: Force = False
    as_json: Json = False
    quiet: Quiet = False

    @property
    def terminal(self) -> Terminal:
        return Terminal(as_json=self.as_json, quiet=self.quiet)

    def refuse(self, names: frozenset[str], belongs_to: str) -> None:
        """Raise InputError for the first of these options that was given: it would be ignored."""
        for field in sorted(fields(self), key=lambda field: field.name):
            if field.name in names and getattr(self, field.name) != field.default:
                option = f"--{field.name.replace('_', '-')}"
                raise InputError(f"{option} belongs to {belongs_to}", hint=f"add {belongs_to}, or leave it out")


def convert(
    checkpoint: Checkpoint,
    settings: Gqa | Cla,
    request: ConversionRequest,
    suffix: str,
    *,
    grouping: str,
    text: CalibrationText | None = None,
    no_calibration: bool = False,
    statistics: Path | None = None,
    save_statistics: Path | None = None,
) -> None:
    """Plan, merge where the method asks for it, write and report. `text` is that of a command that has read it."""
    target = checked_output(checkpoint, request, suffix)
    architecture = find_architecture(checkpoint)
    plan = replace(settings, method="mean").plan(checkpoint, architecture)  # whether it can be done, and its size
    summary: dict[str, Any] = {"output": str(target), "dry_run": request.dry_run}
    if text is not None:
        summary["calibration"] = {"data": text.description, "num_tokens": text.num_tokens}
    merge = _Merge(plan, checkpoint, architecture, request, target, grouping, no_calibration, statistics)
    changes = plan.result != plan.source
    with (
        merge.merged(text, save_statistics, summary)
        if settings.method == "svd" and changes
        else _as_it_is(checkpoint) as planned
    ):
        finish(settings.plan(planned, architecture), planned, target, request, summary)
    if request.dry_run:
        return
    if settings.method == "mean" and changes and architecture.cross_attention is None:
        request.terminal.remark("the mean harms a decoder before uptraining; --method svd, on a text, keeps most of it")


def finish(
    plan: ConversionPlan, checkpoint: Checkpoint, target: Path, request: ConversionRequest, summary: dict[str, Any]
) -> None:
    """Write what the plan says, unless only that is asked for, and report it with what `summary` holds."""
    terminal = request.terminal
    summary |= _summary(plan)
    if request.dry_run:
        summary["plan"] = plan.to_json()
        terminal.result(summary, lambda console: _show(plan, console, f"would write {target}"))
        return
    with terminal.progress("converting", plan.bytes_out) as advance:
        result = execute(
            plan,
            checkpoint,
            target,
            max_shard_bytes=parse_size(request.max_shard_size),
            force=request.force,
            calibration=summary.get("calibration"),
            progress=advance,
        )
    summary["opened_as"] = result.opened_as
    terminal.result(summary, lambda console: _show(plan, console, f"wrote {target} (opens as {result.opened_as})"))


def checked_output(checkpoint: Checkpoint, request: ConversionRequest, suffix: str) -> Path:
    """Where the result goes. Raises OutputError where it cannot, and InputError for a wrong --max-shard-size."""
    parse_size(request.max_shard_size)
    target = request.output or default_output(checkpoint, suffix)
    check_output(target, force=request.force, inputs=[checkpoint.path] if checkpoint.path else [])
    return target


@contextmanager
def _as_it_is(checkpoint: Checkpoint) -> Iterator[Checkpoint]:
    yield checkpoint


def check_device(request: ConversionRequest) -> str:
    """The device for text. Raises InputError for one that does not work."""
    import torch

    device = request.device or str(default_device())
    try:
        torch.empty(1, device=device)
    except (AssertionError, RuntimeError) as error:  # torch has no error of its own for this
        raise InputError(
            f"--device {device}: this machine has none that works ({str(error).splitlines()[0]})"
        ) from error
    return device


@contextmanager
def memory_errors(device: str) -> Iterator[None]:
    """Raise InputError where the device's memory does not do."""
    import torch

    try:
        yield
    except torch.OutOfMemoryError as error:
        raise InputError(f"{device}: out of memory", hint="use another --device, for example cpu") from error


def calibration_text(checkpoint: Checkpoint, architecture: Architecture, request: ConversionRequest) -> CalibrationText:
    """The text that the request asks to measure on, the demo's where it names none. Raises DataError."""
    from ..convert.calibration.text import read_calibration_text

    terminal = request.terminal
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
    return text


@dataclass(frozen=True)
class _Merge:
    """A merge as it was asked for: what `plan` makes, with --method svd."""

    plan: ConversionPlan
    checkpoint: Checkpoint
    architecture: Architecture
    request: ConversionRequest
    target: Path
    grouping: str
    no_calibration: bool
    statistics: Path | None

    @contextmanager
    def merged(
        self, text: CalibrationText | None, save_statistics: Path | None, summary: dict[str, Any]
    ) -> Iterator[Checkpoint]:
        """The checkpoint with its heads merged, in files beside the target that live as long."""
        from ..convert.calibration.statistics import LayerStatistics, StatisticsOrigin, fingerprint
        from ..convert.calibration.statistics import save_statistics as save
        from ..convert.methods.merging import MergeSettings, check_mergeable, merge_checkpoint

        checkpoint, architecture, terminal = self.checkpoint, self.architecture, self.request.terminal
        device = check_device(self.request)
        check_mergeable(checkpoint, architecture)
        check_source(checkpoint)
        self._check_space(save_statistics)
        statistics = self._statistics()
        if text is None and statistics is None and not self.no_calibration:
            text = calibration_text(checkpoint, architecture, self.request)
        sharing = self.plan.result.layer_grouping
        merge = MergeSettings(
            self.plan.result.num_key_value_heads,
            kv_source_layers=sharing.sources if sharing else None,
            grouping=self.grouping,
            refit=text is not None and not self.request.no_refit,
            precision=self.request.precision.chosen if text is not None else "fp32",
            device=device,
        )
        shape = self.plan.source
        origin = statistics.origin if statistics else None
        if text is not None:
            origin = StatisticsOrigin(fingerprint(checkpoint, architecture), text.description, text.num_tokens)
        with (
            tempfile.TemporaryDirectory(
                dir=existing_parent(self.target), prefix=f".{self.target.name}.merging-"
            ) as scratch,
            terminal.progress("merging", shape.num_hidden_layers) as advance,
        ):
            with memory_errors(device):
                merged = merge_checkpoint(
                    checkpoint,
                    architecture,
                    merge,
                    Path(scratch),
                    text=text,
                    statistics=statistics,
                    keep=save_statistics is not None,
                    progress=advance,
                )
            if save_statistics is not None and origin is not None:
                save(save_statistics, LayerStatistics(origin, merged.gram), shape)
            summary["calibration"] = {**(asdict(origin) if origin else {"data": None}), **asdict(merge)}
            yield merged

    def _check_space(self, save_statistics: Path | None) -> None:
        """Raise OutputError where merged tensors, statistics and the result do not fit."""
        from ..convert.calibration.statistics import statistics_bytes
        from ..convert.methods.merging import scratch_bytes

        beside = scratch_bytes(self.checkpoint, self.architecture)
        beside += 0 if self.request.dry_run else self.plan.bytes_out
        if save_statistics is not None:
            check_file(save_statistics, outside=self.target)
            here, there = existing_parent(self.target), existing_parent(save_statistics)
            kept = statistics_bytes(self.plan.source)
            same_disk = here.stat().st_dev == there.stat().st_dev
            check_free_space(save_statistics, kept + (beside + kept if same_disk else 0))
            beside += kept
        check_free_space(self.target, beside)

    def _statistics(self) -> LayerStatistics | None:
        from ..convert.calibration.statistics import open_statistics

        terminal = self.request.terminal
        if self.no_calibration:
            terminal.remark("merging by the weights alone, which can be worse than the mean; a text is better")
        if self.statistics is None:
            return None
        terminal.remark("statistics hold no text to fit o_proj to, which text would allow")
        return open_statistics(self.statistics, self.checkpoint, self.architecture)


def _summary(plan: ConversionPlan) -> dict[str, Any]:
    before, after = plan.cache_bytes_per_token
    return {
        "target": plan.target,
        "method": plan.method,
        "model_type": plan.model_type,
        "num_key_value_heads": {"source": plan.source.num_key_value_heads, "result": plan.result.num_key_value_heads},
        "num_key_value_layers": {
            "source": plan.source.num_key_value_layers,
            "result": plan.result.num_key_value_layers,
        },
        "kv_source_layers": list(plan.result.layer_grouping.sources) if plan.result.layer_grouping else None,
        "latent": asdict(plan.result.latent) if plan.result.latent else None,
        "cache_bytes_per_token": {"source": before, "result": after},
        "weight_bytes": {"source": plan.bytes_in, "result": plan.bytes_out},
        "layers": [asdict(layer) for layer in plan.layers],
    }


def _show(plan: ConversionPlan, console: Console, outcome: str) -> None:
    before, after = plan.cache_bytes_per_token
    source, result = plan.source, plan.result
    made = sum(step.op is not None for step in plan.steps)
    if result.latent is not None:
        latent = f"a latent of {result.latent.kv_lora_rank} and a rotary key of {result.latent.qk_rope_head_dim}"
        console.print(f"{plan.model_type}: {source.num_key_value_heads} K/V heads → {latent}")
    else:
        console.print(f"{plan.model_type}: {source.num_key_value_heads} → {result.num_key_value_heads} K/V heads")
    if result.layer_grouping is not None and source.layer_grouping is None:
        groups = ", ".join("-".join(map(str, (group[0], *group[1:][-1:]))) for group in result.layer_grouping.groups)
        console.print(f"  K/V layers  {source.num_key_value_layers} → {result.num_key_value_layers}: {groups}")
    names = [", ".join(map(str, layer.layers)) for layer in plan.layers]
    width = max([5, *map(len, names)])
    if made:
        console.print(f"  method      {plan.method}, {made} tensors pooled, {len(plan.steps) - made} copied")
    for name, layer in zip(names, plan.layers, strict=True):
        keys, values = min(layer.keys_retained), min(layer.values_retained)
        console.print(f"  layer {name:<{width}} keeps {keys:.1%} of the keys' energy, {values:.1%} of the values'")
    console.print(f"  K/V cache   {before} → {after} bytes per token (16-bit), 1/{before / after:.4g}")
    console.print(f"  weights     {human_bytes(plan.bytes_in)} → {human_bytes(plan.bytes_out)}")
    console.print(f"  {outcome}")
