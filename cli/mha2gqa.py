"""kvconvert mha2gqa and kvconvert mha2mqa: fewer K/V heads."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from ..convert.checkpoint.opening import open_checkpoint
from ..convert.errors import InputError
from ..convert.methods.gqa import Gqa
from ..convert.translations.routes import as_target
from .conversion import OF_TEXT, ConversionRequest, Grouping, convert
from .options import accepts

__all__ = ["mha2gqa", "mha2mqa"]

_OF_SVD = OF_TEXT | {"no_calibration", "no_refit", "statistics", "save_statistics"}


class Method(StrEnum):
    mean = "mean"
    first = "first"
    random = "random"
    svd = "svd"


@dataclass(frozen=True)
class Request(ConversionRequest):
    """What both commands take, beside the number of heads."""

    method: Annotated[
        Method,
        typer.Option(
            help="What a group's heads become: their mean, the first, fresh ones, or the best merge on a text."
        ),
    ] = Method.mean
    seed: Annotated[int, typer.Option(help="Seed of --method random.")] = 0
    no_calibration: Annotated[bool, typer.Option("--no-calibration", help="svd: merge by the weights alone.")] = False
    statistics: Annotated[
        Path | None, typer.Option(help="svd: measurements of an earlier run, in place of text.", show_default=False)
    ] = None
    save_statistics: Annotated[
        Path | None, typer.Option(help="svd: keep the measurements here.", show_default=False)
    ] = None

    def check(self) -> None:
        if self.method is not Method.svd:
            self.refuse(_OF_SVD, "--method svd")
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
    settings = Gqa(num_key_value_heads, method=request.method.value, seed=request.seed, allow_same=request.force)
    headers_only = request.dry_run and request.method is not Method.svd
    source = open_checkpoint(request.model, revision=request.revision, headers_only=headers_only)
    with as_target(source, num_key_value_heads) as checkpoint:
        convert(
            checkpoint,
            settings,
            request,
            suffix,
            grouping=grouping.value,
            no_calibration=request.no_calibration,
            statistics=request.statistics,
            save_statistics=request.save_statistics,
        )
