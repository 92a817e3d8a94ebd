"""kvconvert mha2cla: layers that share keys and values."""

from __future__ import annotations

from typing import Annotated

import typer

from ..convert.algebra.layer_grouping import LayerGrouping
from ..convert.conversion import Calibration
from ..convert.errors import InputError
from ..convert.methods.cla import Cla
from .conversion import ConversionRequest, refuse, run_conversion, text_options
from .options import Given, Model, SettingsOptions, accepts

__all__ = ["mha2cla"]

_CLA = SettingsOptions(
    "cla",
    Cla,
    "Layers and heads",
    flags={
        "num_key_value_heads": ("--groups", "-g"),
        "num_key_value_layers": ("--kv-layers",),
        "merge": ("--method",),
        "refit": ("--no-refit",),
    },
    help={"refit": "svd: keep the closed form; fit nothing to the text."},
    bounds={"num_key_value_heads": 1, "num_key_value_layers": 1, "share": 2, "keep_first": 0, "keep_last": 0},
    omit=("layers", "refit_ridge"),
)
_TEXT = text_options(omit=("statistics", "save_statistics", "weights_only"))


@accepts(_CLA, _TEXT, ConversionRequest)
def mha2cla(
    model: Model,
    cla: Given[Cla],
    text: Given[Calibration],
    request: ConversionRequest,
    kv_source_layers: Annotated[
        str | None,
        typer.Option(
            "--kv-source-layers",
            help="For each layer the one whose keys and values it reads, as 0,0,2,2.",
            show_default=False,
            rich_help_panel="Layers and heads",
        ),
    ] = None,
) -> None:
    """Let neighbouring layers share keys and values (CLA), alone or with fewer K/V heads.

    Example: kvconvert mha2cla --share 2 --groups 1 model_dir --method svd --calibration text.jsonl
    """
    _check(cla, text, kv_source_layers)
    layers = None if kv_source_layers is None else _layer_grouping(kv_source_layers)
    run_conversion(model, cla.build(layers=layers), text, request)


def _check(cla: Given[Cla], text: Given[Calibration], kv_source_layers: str | None) -> None:
    """Raise InputError for options that contradict each other, or that the method would ignore."""
    values = cla.values
    if values["merge"] != "svd":
        refuse(cla.typed(["fit_steps", "grouping", "refit"]), "--method svd")
        if values["pairs"] != "auto":
            refuse(text.typed(), "--method svd")
    if values["pairs"] != "auto":
        refuse(cla.typed(["num_key_value_layers"]), "--pairs auto")
    chosen = (values["share"], values["num_key_value_layers"], kv_source_layers)
    if sum(option is not None for option in chosen) != 1:
        raise InputError(
            "say which layers share, by one of --share, --kv-source-layers and, with --pairs auto, --kv-layers",
            hint="--share 2 lets every two neighbours share",
        )
    if kv_source_layers is not None:
        for option in cla.typed(["keep_first", "keep_last", "pairs"]):
            raise InputError(
                f"{option} has no part in --kv-source-layers, which says for every layer whose keys it reads",
                hint=f"leave {option} out, or use --share in place of --kv-source-layers",
            )


def _layer_grouping(kv_source_layers: str) -> LayerGrouping:
    try:
        return LayerGrouping(tuple(int(source) for source in kv_source_layers.split(",")))
    except ValueError as error:
        raise InputError(f"--kv-source-layers {kv_source_layers}: {error}") from error
