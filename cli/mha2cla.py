"""kvconvert mha2cla: layers that share keys and values."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, Annotated

import typer

from ..convert.algebra.attention_shape import AttentionShape
from ..convert.algebra.heads import HeadGrouping
from ..convert.algebra.layer_grouping import LayerGrouping
from ..convert.architectures.attention import read_attention
from ..convert.architectures.table import find_architecture
from ..convert.checkpoint.opening import open_checkpoint
from ..convert.checkpoint.tensors import Checkpoint
from ..convert.errors import InputError
from ..convert.execute import check_source
from ..convert.methods.cla import Cla
from ..convert.methods.layer_choice import Damages, best_layers, measure_damages, permitted_pairs
from ..convert.translations.routes import as_cross_layer
from .conversion import (
    OF_TEXT,
    ConversionRequest,
    Grouping,
    calibration_text,
    check_device,
    checked_output,
    convert,
    memory_errors,
)
from .options import accepts, parse_size

if TYPE_CHECKING:
    from ..convert.calibration.text import CalibrationText

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
        architecture = find_architecture(checkpoint)
        shape = read_attention(checkpoint, architecture)
        HeadGrouping.contiguous(shape.num_key_value_heads, request.groups or shape.num_key_value_heads)
        heads = {1: "mqa-", None: "", shape.num_key_value_heads: ""}.get(request.groups, f"gqa{request.groups}-")
        suffix = f"{heads}cla{request.share or ''}"
        text = None
        if request.pairs is Pairs.auto:
            parse_size(request.max_shard_size)
            checked_output(checkpoint, request, suffix)
            budget = request.kv_layers or len(_uniform(shape, request).groups)
            pairs = _pairs(shape, budget, request)
            text = _text(checkpoint, request)
            layers = best_layers(shape.num_hidden_layers, budget, _damages(checkpoint, request, text, pairs))
        else:
            layers = _given(request.kv_source_layers) if request.kv_source_layers else _uniform(shape, request)
        convert(
            checkpoint,
            Cla(layers, request.groups, request.method.value),
            request,
            suffix,
            grouping=request.grouping.value,
            text=text,
        )


def _given(kv_source_layers: str) -> LayerGrouping:
    try:
        return LayerGrouping(tuple(int(source) for source in kv_source_layers.split(",")))
    except ValueError as error:
        raise InputError(f"--kv-source-layers {kv_source_layers}: {error}") from error


def _uniform(shape: AttentionShape, request: Request) -> LayerGrouping:
    ends = {"keep_first": request.keep_first, "keep_last": request.keep_last}
    return LayerGrouping.uniform(shape.num_hidden_layers, request.share or 2, **ends)


def _pairs(shape: AttentionShape, budget: int, request: Request) -> list[tuple[int, int]]:
    """The pairs to try: in groups of at most one layer more than if all were as large.

    Raises InputError or UnsupportedError for a number of layers with keys and values that no groups have.
    """
    ends = request.keep_first + request.keep_last
    between = shape.num_hidden_layers - ends
    if not ends < budget < shape.num_hidden_layers:
        raise InputError(
            f"{shape.num_hidden_layers} layers cannot share so that {budget} keep keys and values",
            hint=f"possible here: {ends + 1} to {shape.num_hidden_layers - 1}" if between > 1 else None,
        )
    reach = -(-between // (budget - ends))
    pairs = permitted_pairs(shape, reach, keep_first=request.keep_first, keep_last=request.keep_last)
    best_layers(shape.num_hidden_layers, budget, dict.fromkeys(pairs, 0.0))  # whether there are such groups
    return pairs


def _text(checkpoint: Checkpoint, request: Request) -> CalibrationText:
    check_device(request)
    check_source(checkpoint)
    return calibration_text(checkpoint, find_architecture(checkpoint), request)


def _damages(checkpoint: Checkpoint, request: Request, text: CalibrationText, pairs: list[tuple[int, int]]) -> Damages:
    architecture, device = find_architecture(checkpoint), check_device(request)
    num_layers = read_attention(checkpoint, architecture).num_hidden_layers
    with request.terminal.progress("choosing layers", num_layers) as advance, memory_errors(device):
        return measure_damages(
            checkpoint,
            architecture,
            text,
            pairs,
            device=device,
            precision=request.precision.chosen,
            progress=advance,
        )
