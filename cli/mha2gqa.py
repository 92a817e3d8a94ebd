"""kvconvert mha2gqa and kvconvert mha2mqa: fewer K/V heads."""

from __future__ import annotations

from ..convert.conversion import Calibration
from ..convert.methods.gqa import Gqa
from ..pipeline import option_groups
from ..pipeline.conversion_options import gqa_of, mqa_of
from .conversion import ConversionRequest, run_conversion, text_options
from .options import Given, Model, SettingsOptions, accepts

__all__ = ["mha2gqa", "mha2mqa"]

_GQA = SettingsOptions("gqa", option_groups.GQA, "Heads", short={"num_key_value_heads": "-g"})
_MQA = SettingsOptions("gqa", option_groups.MQA, "Heads")
_TEXT = text_options()


@accepts(_GQA, _TEXT, ConversionRequest)
def mha2gqa(model: Model, gqa: Given[Gqa], text: Given[Calibration], request: ConversionRequest) -> None:
    """Pool K/V heads into fewer groups (GQA). A GQA checkpoint can be reduced further.

    Example: kvconvert mha2gqa --groups 8 model_dir --method svd --calibration text.jsonl
    """
    run_conversion(model, gqa_of(gqa, text), text, request)


@accepts(_MQA, _TEXT, ConversionRequest)
def mha2mqa(model: Model, gqa: Given[Gqa], text: Given[Calibration], request: ConversionRequest) -> None:
    """Pool all K/V heads of a layer into one (MQA).

    Example: kvconvert mha2mqa model_dir --output model_dir-mqa
    """
    run_conversion(model, mqa_of(gqa, text), text, request)
