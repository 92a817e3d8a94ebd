"""kvconvert mha2gqa and kvconvert mha2mqa: fewer K/V heads."""

from __future__ import annotations

from dataclasses import replace

from ..convert.conversion import Calibration
from ..convert.errors import InputError
from ..convert.methods.gqa import Gqa
from .conversion import ConversionRequest, refuse, run_conversion, text_options
from .options import Given, Model, SettingsOptions, accepts

__all__ = ["mha2gqa", "mha2mqa"]

_FLAGS = {
    "num_key_value_heads": ("--groups", "-g"),
    "merge": ("--method",),
    "refit": ("--no-refit",),
}
_HELP = {
    "refit": "svd: keep the closed form; fit nothing to the text.",
    "allow_same": "Accept as many heads as the source has; none is pooled then.",
}
_GQA = SettingsOptions(
    "gqa",
    Gqa,
    "Heads",
    flags=_FLAGS,
    help=_HELP,
    bounds={"num_key_value_heads": 1, "head_dim": 2},
    omit=("refit_ridge",),
)
_MQA = replace(_GQA, omit=("refit_ridge", "num_key_value_heads", "grouping"))
_TEXT = text_options()
_SOURCES = ("weights_only", "statistics", "save_statistics")  # which of them go together, run_conversion says


@accepts(_GQA, _TEXT, ConversionRequest)
def mha2gqa(model: Model, gqa: Given[Gqa], text: Given[Calibration], request: ConversionRequest) -> None:
    """Pool K/V heads into fewer groups (GQA). A GQA checkpoint can be reduced further.

    Example: kvconvert mha2gqa --groups 8 model_dir --method svd --calibration text.jsonl
    """
    _check(gqa, text)
    run_conversion(model, gqa.build(), text, request)


@accepts(_MQA, _TEXT, ConversionRequest)
def mha2mqa(model: Model, gqa: Given[Gqa], text: Given[Calibration], request: ConversionRequest) -> None:
    """Pool all K/V heads of a layer into one (MQA).

    Example: kvconvert mha2mqa model_dir --output model_dir-mqa
    """
    _check(gqa, text)
    run_conversion(model, gqa.build(num_key_value_heads=1, grouping="contiguous"), text, request)


def _check(gqa: Given[Gqa], text: Given[Calibration]) -> None:
    """Raise InputError for options that the method would ignore."""
    if gqa.values["merge"] != "svd":
        of_svd = [name for name in ("fit_steps", "grouping", "head_dim", "refit") if name in gqa.values]
        refuse(sorted([*gqa.typed(of_svd), *text.typed()]), "--method svd")
    if gqa.values["head_dim"] is None:
        refuse(gqa.typed(["rope_selection"]), "--head-dim")
    for flag, name in (("--no-calibration", "weights_only"), ("--statistics", "statistics")):
        if text.values[name]:
            of_text = [field for field in text.values if field not in ("data", *_SOURCES)]
            for option in text.typed(of_text):
                raise InputError(f"{option} is about a calibration text, and {flag} rules one out")
    if gqa.values["merge"] != "random":
        refuse(gqa.typed(["seed"]), "--method random")
