"""From the options of a conversion, as they were typed, to its method and its text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..configs import CALIBRATION_TEXT
from ..convert.algebra.layer_grouping import LayerGrouping
from ..convert.conversion import Calibration
from ..convert.errors import InputError
from ..convert.methods.cla import Cla
from ..convert.methods.gqa import Gqa
from ..convert.methods.mla import Mla
from .option_groups import GivenOptions

__all__ = ["calibration_of", "cla_of", "gqa_of", "mla_of", "mqa_of"]

_SOURCES = ("weights_only", "statistics", "save_statistics")  # which of them go together, `calibration_of` says


def gqa_of(gqa: GivenOptions, text: GivenOptions) -> Gqa:
    """The method of fewer K/V heads. Raises InputError for options that it would ignore."""
    _check_gqa(gqa, text)
    return Gqa(**gqa.values)


def mqa_of(gqa: GivenOptions, text: GivenOptions) -> Gqa:
    """The method of one K/V head. Raises InputError for options that it would ignore."""
    _check_gqa(gqa, text)
    return Gqa(num_key_value_heads=1, grouping="contiguous", **gqa.values)


def cla_of(cla: GivenOptions, text: GivenOptions, kv_source_layers: str | None) -> Cla:
    """The method of layers that share keys and values; `kv_source_layers` says for each which it reads, as 0,0,2,2.

    Raises InputError for options that contradict each other, or that it would ignore.
    """
    values, written = cla.values, cla.spell("layers")
    if values["merge"] != "svd":
        _refuse(cla.typed(["fit_steps", "grouping", "refit"]), cla.spell("merge", "svd"))
        if values["pairs"] != "auto":
            _refuse(text.typed(), cla.spell("merge", "svd"))
    if values["pairs"] != "auto":
        _refuse(cla.typed(["num_key_value_layers"]), cla.spell("pairs", "auto"))
    chosen = (values["share"], values["num_key_value_layers"], kv_source_layers)
    if sum(option is not None for option in chosen) != 1:
        raise InputError(
            f"say which layers share, by one of {cla.spell('share')}, {written} and, with "
            f"{cla.spell('pairs', 'auto')}, {cla.spell('num_key_value_layers')}",
            hint=f"{cla.spell('share', 2)} lets every two neighbours share",
        )
    if kv_source_layers is None:
        return Cla(**values)
    for option in cla.typed(["keep_first", "keep_last", "pairs"]):
        raise InputError(
            f"{option} has no part in {written}, which says for every layer whose keys it reads",
            hint=f"leave {option} out, or use {cla.spell('share')} in place of {written}",
        )
    try:
        layers = LayerGrouping(tuple(int(source) for source in kv_source_layers.split(",")))
    except ValueError as error:
        raise InputError(f"{cla.spell('layers', kv_source_layers)}: {error}") from error
    return Cla(layers=layers, **values)


def mla_of(mla: GivenOptions, text: GivenOptions) -> Mla:
    """The method of one latent. Raises InputError for options that it would ignore."""
    if text.values["weights_only"]:
        of_text = [name for name in text.values if name != "weights_only"]
        none = text.spell("weights_only")
        for option in sorted([*mla.typed(["fit_steps", "refit"]), *text.typed(of_text)]):
            raise InputError(
                f"{option} is about a calibration text, and {none} rules one out",
                hint=f"leave out {option} or {none}",
            )
    return Mla(**{**mla.values, "rope_interleave": mla.values["rope_interleave"] == "interleaved"})


def calibration_of(text: GivenOptions, *, dry_run: bool = False) -> tuple[Calibration, bool]:
    """What to measure on, and whether nobody chose it: then it is the text that ships with kvconvert.

    Raises InputError for more than one of a text, statistics, and nothing but the weights.
    """
    values = text.values
    statistics, weights_only = values.get("statistics"), values.get("weights_only", False)
    if (values["data"] is not None) + (statistics is not None) + weights_only > 1:
        raise InputError(
            f"give one of {text.spell('data')}, {text.spell('statistics')} and {text.spell('weights_only')}"
        )
    if values.get("save_statistics") is not None:
        save = text.spell("save_statistics")
        if statistics is not None or weights_only:
            raise InputError(f"{save} needs text to measure on", hint=f"give {text.spell('data')}")
        if dry_run:
            raise InputError(f"--dry-run writes nothing, {save} does", hint="leave out one of them")
    if values["data"] is not None or statistics is not None or weights_only:
        return Calibration(**values), False
    return Calibration(**{**values, "data": str(CALIBRATION_TEXT)}), True


def _check_gqa(gqa: GivenOptions, text: GivenOptions) -> None:
    values: Any = gqa.values
    if values["merge"] != "svd":
        of_svd = [name for name in ("fit_steps", "grouping", "head_dim", "refit") if name in values]
        _refuse(sorted([*gqa.typed(of_svd), *text.typed()]), gqa.spell("merge", "svd"))
    if values["head_dim"] is None:
        _refuse(gqa.typed(["rope_selection"]), gqa.spell("head_dim"))
    for name in ("weights_only", "statistics"):
        if text.values[name]:
            of_text = [field for field in text.values if field not in ("data", *_SOURCES)]
            for option in text.typed(of_text):
                raise InputError(f"{option} is about a calibration text, and {text.spell(name)} rules one out")
    if values["merge"] != "random":
        _refuse(gqa.typed(["seed"]), gqa.spell("merge", "random"))


def _refuse(options: Sequence[str], belongs_to: str) -> None:
    """Raise InputError for the first of these options, which would be ignored without `belongs_to`."""
    for option in options:
        raise InputError(f"{option} belongs to {belongs_to}", hint=f"add {belongs_to}, or leave it out")
