"""kvconvert mha2cla: layers that share keys and values."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, Annotated

import typer

from ..convert.architecture import AttentionShape, read_attention
from ..convert.architectures import find_architecture
from ..convert.checkpoint import Checkpoint, open_checkpoint
from ..convert.cla import Cla
from ..convert.errors import InputError
from ..convert.execute import check_source
from ..convert.heads import HeadGrouping
from ..convert.layers import LayerGrouping
from ..convert.translations import as_cross_layer
from .conversion import OF_TEXT, ConversionRequest, Grouping, calibration_text, check_device, convert
from .options import accepts

if TYPE_CHECKING:
    from ..convert.calibration import CalibrationText

__all__ = ["mha2cla"]


class Method(StrEnum):
    mean = "mean"
    first = "first"
    svd = "svd"


class Pairs(StrEnum):
    uniform = "uniform"
    auto = "auto"


@dataclass(frozen=True)
class Request(ConversionRequest):
    method: Annotated[
        Method,
        typer.Option(help="What a group's keys and values become: its layers' mean, the first's, or the best merge."),
    ] = Method.mean
    share: Annotated[
        int | None, typer.Option(min=2, help="Layers that share: 2 for CLA2, 3 for CLA3 …", show_default=False)
    ] = None
    keep_first: Annotated[int, typer.Option(min=0, help="So many first layers keep their own.")] = 0
    keep_last: Annotated[int, typer.Option(min=0, help="So many last layers keep their own.")] = 0
    pairs: Annotated[
        Pairs, typer.Option(help="auto: the groups whose sharing changes the least on a text, for the same cache.")
    ] = Pairs.uniform
    kv_layers: Annotated[
        int | None,
        typer.Option("--kv-layers", min=1, help="auto: so many layers keep keys and values.", show_default=False),
    ] = None
    kv_source_layers: Annotated[
        str | None,
        typer.Option(
            "--kv-source-layers",
            help="For each layer the one whose keys and values it reads, as 0,0,2,2.",
            show_default=False,
        ),
    ] = None
    groups: Annotated[
        int | None,
        typer.Option("--groups", "-g", min=1, help="K/V heads of the result. Default: as many.", show_default=False),
    ] = None
    grouping: Annotated[
        Grouping, typer.Option(help="svd: which heads form a group, those that lose least together or in order.")
    ] = Grouping.similarity

    def check(self) -> None:
        if self.method is not Method.svd:
            self.refuse(frozenset({"no_refit", "grouping"}), "--method svd")
            if self.pairs is not Pairs.auto:
                self.refuse(OF_TEXT, "--method svd")
        if self.pairs is not Pairs.auto:
            self.refuse(frozenset({"kv_layers"}), "--pairs auto")
        if sum(option is not None for option in (self.share, self.kv_layers, self.kv_source_layers)) != 1:
            raise InputError(
                "say which layers share, by one of --share, --kv-source-layers and, with --pairs auto, --kv-layers",
                hint="--share 2 lets every two neighbours share",
            )
        if self.kv_source_layers is not None:
            self.refuse(frozenset({"keep_first", "keep_last", "pairs"}), "--share")


@accepts(Request)
def mha2cla(request: Request) -> None:
    """Let neighbouring layers share keys and values (CLA), alone or with fewer K/V heads.

    Example: kvconvert mha2cla --share 2 --groups 1 model_dir --method svd --calibration text.jsonl
    """
    request.check()
    needs_text = request.method is Method.svd or request.pairs is Pairs.auto
    source = open_checkpoint(request.model, revision=request.revision, headers_only=request.dry_run and not needs_text)
    with as_cross_layer(source) as checkpoint:
        shape = read_attention(checkpoint, find_architecture(checkpoint))
        HeadGrouping.contiguous(shape.num_key_value_heads, request.groups or shape.num_key_value_heads)
        chosen = _uniform_or_given(shape, request)
        text = None
        if request.pairs is Pairs.auto:
            budget = request.kv_layers or len(chosen.groups)
            _check_budget(shape, budget, request)
            text = _text(checkpoint, request)
            chosen = _best(checkpoint, shape, budget, request, text)
        heads = {None: "", shape.num_key_value_heads: "", 1: "mqa-"}.get(request.groups, f"gqa{request.groups}-")
        convert(
            checkpoint,
            Cla(chosen, request.groups, request.method.value),
            request,
            f"{heads}cla{request.share or ''}",
            grouping=request.grouping.value,
            text=text,
        )


def _uniform_or_given(shape: AttentionShape, request: Request) -> LayerGrouping:
    if request.kv_source_layers is not None:
        try:
            return LayerGrouping(tuple(int(source) for source in request.kv_source_layers.split(",")))
        except ValueError as error:
            raise InputError(f"--kv-source-layers {request.kv_source_layers}: {error}") from error
    ends = {"keep_first": request.keep_first, "keep_last": request.keep_last}
    return LayerGrouping.uniform(shape.num_hidden_layers, request.share or 2, **ends)


def _check_budget(shape: AttentionShape, budget: int, request: Request) -> None:
    """Raise InputError for a number of layers with keys and values that no groups have."""
    ends = request.keep_first + request.keep_last
    if not ends < budget < shape.num_hidden_layers:
        raise InputError(
            f"{shape.num_hidden_layers} layers cannot share so that {budget} keep keys and values",
            hint=f"possible here: {ends + 1} to {shape.num_hidden_layers - 1}",
        )


def _text(checkpoint: Checkpoint, request: Request) -> CalibrationText:
    check_device(request)
    check_source(checkpoint)
    return calibration_text(checkpoint, find_architecture(checkpoint), request)


def _best(
    checkpoint: Checkpoint, shape: AttentionShape, budget: int, request: Request, text: CalibrationText
) -> LayerGrouping:
    """The groups with the least damage by a trial on the text, of at most one layer more than if all were as large."""
    from ..convert.layer_choice import best_layers, measure_damages

    ends = request.keep_first + request.keep_last
    with request.terminal.progress("choosing layers", shape.num_hidden_layers) as advance:
        damages = measure_damages(
            checkpoint,
            find_architecture(checkpoint),
            text,
            reach=-(-(shape.num_hidden_layers - ends) // (budget - ends)),
            device=check_device(request),
            precision=request.precision.chosen,
            progress=advance,
        )
    return best_layers(shape, budget, damages, keep_first=request.keep_first, keep_last=request.keep_last)
