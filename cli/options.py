"""Options that several commands share, and how their texts become values."""

from __future__ import annotations

import inspect
import math
import os
import re
from collections.abc import Callable
from dataclasses import MISSING, fields
from decimal import Decimal
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, get_type_hints

import typer

from ..convert.checkpoint.remote_code import allow_remote_code
from ..convert.checkpoint.tensors import Checkpoint
from ..convert.device import default_precision

__all__ = [
    "BatchSize",
    "Data",
    "DataConfig",
    "DryRun",
    "Force",
    "Json",
    "Model",
    "Output",
    "Precision",
    "PrecisionOption",
    "Quiet",
    "Revision",
    "Split",
    "TextField",
    "TrustRemoteCode",
    "accepts",
    "default_output",
    "parse_count",
    "parse_duration",
    "parse_percentage",
    "parse_size",
    "parse_weighted",
]

_SIZE_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
_SIZE_UNITS |= {"KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}
_COUNT_UNITS = {"": 1, "K": 10**3, "M": 10**6, "B": 10**9, "T": 10**12}
_SECONDS = {"d": 86_400, "h": 3_600, "m": 60, "s": 1}


class Precision(StrEnum):
    auto = "auto"
    bf16 = "bf16"
    fp32 = "fp32"

    @property
    def chosen(self) -> str:
        """ "bf16" or "fp32"."""
        return default_precision() if self is Precision.auto else self.value


PrecisionOption = Annotated[
    Precision, typer.Option(help="bf16: autocast over float32 weights; auto: where the machine is fast at it.")
]
Model = Annotated[str, typer.Argument(metavar="MODEL", help="A checkpoint directory, or a hub id such as org/name.")]
Output = Annotated[
    Path | None,
    typer.Option(
        "--output", "-o", help="Where the result goes. Default: beside MODEL, with a suffix.", show_default=False
    ),
]
Revision = Annotated[str | None, typer.Option(help="Branch, tag or commit of a hub id.", show_default=False)]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Print what would be done; write nothing.")]
Force = Annotated[bool, typer.Option("--force", help="Replace an existing output that kvconvert wrote.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout and nothing else.")]
Quiet = Annotated[bool, typer.Option("--quiet", help="No progress and no remarks.")]
TrustRemoteCode = Annotated[
    bool,
    typer.Option("--trust-remote-code", callback=allow_remote_code, help="Run the code that lies beside a checkpoint."),
]
Data = Annotated[
    str, typer.Option("--data", help="Text: a .txt, .jsonl or .parquet file, a directory of them, or a dataset name.")
]
TextField = Annotated[str, typer.Option(help="Column that holds the text of a JSONL, parquet or dataset row.")]
Split = Annotated[str, typer.Option(help="Split of a named dataset.")]
DataConfig = Annotated[str | None, typer.Option(help="Configuration of a named dataset.", show_default=False)]
BatchSize = Annotated[int, typer.Option(min=1, help="Sequences per forward pass.")]


def default_output(checkpoint: Checkpoint, suffix: str) -> Path:
    """Beside a local checkpoint, in the current directory for a hub id: `model_dir-gqa8`."""
    local = Path(checkpoint.name).expanduser()
    if local.is_dir():
        absolute = Path(os.path.abspath(local))
        return absolute.with_name(f"{absolute.name}-{suffix}")
    return Path(f"{checkpoint.name.rpartition('/')[2]}-{suffix}")


def parse_size(text: str) -> int:
    """ "5GB" as bytes; powers of 1000 (GB) or 1024 (GiB). Raises typer.BadParameter."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([A-Za-z]*)", text.strip())
    if not match or match[2].upper() not in _SIZE_UNITS or float(match[1]) <= 0:
        raise typer.BadParameter(f"{text!r} is not a size; write for example 5GB or 500MB")
    return max(1, int(float(match[1]) * _SIZE_UNITS[match[2].upper()]))


def parse_count(text: str) -> int:
    """ "300M", "1B", "2T", "1.5e9" or "299_892_736_000" as a positive whole number. Raises typer.BadParameter."""
    match = re.fullmatch(r"(\d+(?:_\d+)*(?:\.\d+)?(?:[eE]\+?\d{1,2})?)\s*([KMBTkmbt]?)", text.strip())
    # decimal, not float: 0.3B is 300 000 000 and 299_892_736_000_001 keeps its last digit
    count = Decimal(match[1].replace("_", "")) * _COUNT_UNITS[match[2].upper()] if match else Decimal(0)
    if count <= 0 or count != int(count):
        raise typer.BadParameter(f"{text!r} is not a count; write for example 300M, 1B or 1.5e9")
    return int(count)


def parse_duration(text: str) -> int:
    """ "5h45m", "90s", "1d" or "30m" as seconds. Raises typer.BadParameter."""
    match = re.fullmatch(r"(?:(\d+)d)?(?:(\d+)h)?(?:(\d+)m)?(?:(\d+)s)?", text.strip().lower())
    parts = match.groups(default="0") if match else ()
    seconds = sum(int(part) * unit for part, unit in zip(parts, _SECONDS.values(), strict=False))
    if seconds == 0:
        raise typer.BadParameter(f"{text!r} is not a duration; write for example 5h45m, 30m or 90s")
    return seconds


def parse_percentage(text: str) -> float:
    """ "5%" or "0.05" as 0.05. Raises typer.BadParameter."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(%?)", text.strip())
    if not match or (float(match[1]) >= 1 and not match[2]):  # 5 could mean 5 % or 500 %
        raise typer.BadParameter(f"{text!r} is not a percentage; write for example 5% or 0.05")
    return float(match[1]) / (100 if match[2] else 1)


def parse_weighted(text: str) -> tuple[str, float]:
    """ "a.jsonl:0.7" as ("a.jsonl", 0.7), a place without a number after its last colon whole, with weight 1.

    Raises typer.BadParameter.
    """
    match = re.fullmatch(r"(.*):([+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?)", text.strip(), re.DOTALL)
    place, weight = (match[1], float(match[2])) if match else (text.strip(), 1.0)
    if not place:
        raise typer.BadParameter(f"{text!r} names no text; write for example a.jsonl:0.7")
    if not 0 < weight < math.inf:
        raise typer.BadParameter(
            f"{text!r} has the weight {weight:g}; write a positive number, for example a.jsonl:0.7"
        )
    return place, weight


def accepts(options: type) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a command the fields of a dataclass as options, after its own; it takes them as one argument, `request`."""

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        hints = get_type_hints(command, include_extras=True) | get_type_hints(options, include_extras=True)
        own = [parameter for name, parameter in inspect.signature(command).parameters.items() if name != "request"]
        shared = [
            inspect.Parameter(
                field.name,
                inspect.Parameter.KEYWORD_ONLY,
                default=inspect.Parameter.empty if field.default is MISSING else field.default,
            )
            for field in fields(options)
        ]

        def accepting(**arguments: Any) -> None:
            request = options(**{field.name: arguments.pop(field.name) for field in fields(options)})
            command(**arguments, request=request)

        keyword_only = [parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY) for parameter in own]
        parameters = [parameter.replace(annotation=hints[parameter.name]) for parameter in keyword_only + shared]
        accepting.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        accepting.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
        accepting.__name__, accepting.__doc__ = command.__name__, command.__doc__
        return accepting

    return decorate
