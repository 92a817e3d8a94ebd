"""kvconvert mha2cla: layers that share keys and values."""

from __future__ import annotations

from typing import Annotated

import typer

from ..convert.conversion import Calibration
from ..convert.methods.cla import Cla
from ..pipeline import option_groups
from ..pipeline.conversion_options import cla_of
from .conversion import ConversionRequest, run_conversion, text_options
from .options import Given, Model, SettingsOptions, accepts

__all__ = ["mha2cla"]

_CLA = SettingsOptions(
    "cla",
    option_groups.CLA,
    "Layers and heads",
    short={"num_key_value_heads": "-g"},
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
    run_conversion(model, cla_of(cla, text, kv_source_layers), text, request)
