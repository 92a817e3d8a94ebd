"""kvconvert sweep."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from .. import configs, measure, pipeline
from ..convert.conversion import Calibration
from ..convert.errors import InputError
from ..measure.evaluation import EvaluationSettings
from ..pipeline import option_groups
from ..pipeline.targets import GRAMMAR
from ..pipeline.values import parse_count
from .console import Terminal
from .conversion import text_options
from .options import Data, Given, Json, Model, Quiet, Revision, SettingsOptions, TrustRemoteCode, accepts

if TYPE_CHECKING:
    from rich.console import Console

    from ..measure import BenchmarkSettings
    from ..pipeline import Sweep, Uptraining

__all__ = ["sweep"]

_EVALUATION = SettingsOptions(
    "settings",
    option_groups.EVALUATION.without("samples"),
    "Scoring",
)
# what says how a text is read is that of --data; a calibration text that needs other settings says them in brackets
_CALIBRATION = text_options(
    omit=(
        *("text_field", "split", "config", "line_documents", "document_separator", "skip_bad_lines"),
        *("data", "statistics", "save_statistics", "weights_only"),
    )
)


@dataclass(frozen=True)
class Request:
    """What is compared, and what stays of it."""

    targets: Annotated[str, typer.Option(help=f"What to convert to, separated by commas: {GRAMMAR}.")]
    method: Annotated[
        Literal["svd", "mean"],
        typer.Option(help="How heads and layers are merged; a latent is always calibrated.", rich_help_panel="Text"),
    ] = "svd"
    calibration: Annotated[
        str | None,
        typer.Option(
            help="Text that merges measure the model on, as for conversions. Default: a text of many kinds that ships "
            "with kvconvert.",
            show_default=False,
            rich_help_panel="Text",
        ),
    ] = None
    uptrain: Annotated[
        str | None,
        typer.Option(
            help="Uptrain each target for so many tokens, for example 1M, with MODEL as its teacher.",
            show_default=False,
            rich_help_panel="Uptraining",
        ),
    ] = None
    uptrain_data: Annotated[
        list[str] | None,
        typer.Option(
            help="Text to uptrain on, as for uptrain --data; repeatable.",
            show_default=False,
            rich_help_panel="Uptraining",
        ),
    ] = None
    uptrain_sequence_length: Annotated[
        int | None,
        typer.Option(min=2, help="Tokens of a sequence in training.", show_default=False, rich_help_panel="Uptraining"),
    ] = None
    uptrain_global_batch_tokens: Annotated[
        int | None,
        typer.Option(min=1, help="Tokens of an optimizer step.", show_default=False, rich_help_panel="Uptraining"),
    ] = None
    benchmark: Annotated[
        str | None,
        typer.Option(
            help="Time decoding too, in turn with MODEL, at each batch x context, for example 1x1024,8x4096.",
            show_default=False,
            rich_help_panel="Timing",
        ),
    ] = None
    keep: Annotated[
        Literal["best", "all", "none"],
        typer.Option(
            help="Models that stay: those that no other beats in cache and quality (best), all, or none.",
            rich_help_panel="Output",
        ),
    ] = "best"
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            help="Directory for tables, picture and models. Default: beside MODEL, with the suffix -sweep.",
            show_default=False,
            rich_help_panel="Output",
        ),
    ] = None
    picture: Annotated[
        bool,
        typer.Option(" /--no-picture", help="Draw nothing, for which matplotlib is needed.", rich_help_panel="Output"),
    ] = True
    revision: Revision = None
    trust_remote_code: TrustRemoteCode = False
    as_json: Json = False
    quiet: Quiet = False

    def uptraining(self) -> Uptraining | None:
        """How each target is uptrained. Raises InputError for options that say it in part."""
        parts = {"--uptrain": self.uptrain, "--uptrain-data": self.uptrain_data}
        given = [name for name, value in parts.items() if value]
        sizes = {
            "--uptrain-sequence-length": self.uptrain_sequence_length,
            "--uptrain-global-batch-tokens": self.uptrain_global_batch_tokens,
        }
        given += [name for name, value in sizes.items() if value is not None]
        if not given:
            return None
        for name, value in parts.items():
            if not value:
                raise InputError(f"{given[0]} needs {name}", hint=f"say both {given[0]} and {name}")
        assert self.uptrain is not None
        return pipeline.Uptraining(
            tuple(self.uptrain_data or ()),
            parse_count(self.uptrain),
            self.uptrain_sequence_length,
            self.uptrain_global_batch_tokens,
        )

    def shapes(self) -> BenchmarkSettings | None:
        """What is timed. Raises InputError for what is no batch and context, and for more than a grid of both."""
        if self.benchmark is None:
            return None
        found = [re.fullmatch(r"\s*(\d{1,6})x(\d{1,9})\s*", each) for each in self.benchmark.split(",")]
        shapes = [(int(each[1]), int(each[2])) for each in found if each]
        if len(shapes) < len(found):
            raise InputError(
                f"--benchmark is {self.benchmark!r}, expected a batch x context", hint="write for example 1x1024,8x4096"
            )
        batches, contexts = (tuple(dict.fromkeys(each)) for each in zip(*shapes, strict=True))
        settings = measure.BenchmarkSettings(batches, contexts)
        if len(settings.shapes) > len(shapes):
            raise InputError(
                f"--benchmark is {self.benchmark!r}, and every batch is timed at every context",
                hint=f"write {','.join(f'{batch}x{context}' for batch, context in settings.shapes)}",
            )
        return settings


@accepts(_EVALUATION, _CALIBRATION, Request)
def sweep(
    model: Model, data: Data, settings: Given[EvaluationSettings], text: Given[Calibration], request: Request
) -> None:
    """Convert a checkpoint to several targets, evaluate each against it, and compare: a table and a picture.

    The same command again goes on with a sweep that was ended.

    Example: kvconvert sweep model_dir --targets gqa:8,gqa:4,mqa,cla2,mla:256+64 --data held_out.jsonl
    """
    terminal = Terminal(as_json=request.as_json, quiet=request.quiet)
    uptraining = request.uptraining()
    found = pipeline.sweep(
        model,
        [each for each in request.targets.split(",") if each.strip()],
        data,
        request.output or _default_output(model),
        merge=request.method,
        calibration=text.build(data=request.calibration or configs.CALIBRATION_TEXT),
        evaluation=settings.build(),
        uptraining=uptraining,
        speed=request.shapes(),
        keep=request.keep,
        picture=request.picture,
        revision=request.revision,
        progress=terminal.progress,
        remark=terminal.remark,
    )
    terminal.result(found.to_json(), lambda console: _show(found, console))


def _default_output(model: str) -> Path:
    """Beside a local checkpoint, in the current directory for a hub id: `model_dir-sweep`."""
    local = Path(model).expanduser()
    if local.is_dir():
        return local.absolute().with_name(f"{local.absolute().name}-sweep")
    return Path(f"{model.rpartition('/')[2]}-sweep")


def _show(found: Sweep, console: Console) -> None:
    for line in found.report().splitlines():
        console.print(line)
    for row in found.rows:
        if row.output is not None:
            console.print(f"{row.target}: {row.output}")
    for path in found.files:
        console.print(f"wrote {path}")
