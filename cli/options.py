"""Options that several commands share, and how their texts become values."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Annotated

import typer

from ..convert.checkpoint import Checkpoint
from ..convert.remote_code import allow_remote_code

__all__ = [
    "BatchSize",
    "Data",
    "DataConfig",
    "DryRun",
    "Force",
    "Json",
    "Model",
    "Output",
    "Quiet",
    "Revision",
    "Split",
    "TextField",
    "TrustRemoteCode",
    "default_output",
    "parse_percentage",
    "parse_size",
]

_SIZE_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
_SIZE_UNITS |= {"KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}

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


def parse_percentage(text: str) -> float:
    """ "5%" or "0.05" as 0.05. Raises typer.BadParameter."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(%?)", text.strip())
    if not match or (float(match[1]) >= 1 and not match[2]):  # 5 could mean 5 % or 500 %
        raise typer.BadParameter(f"{text!r} is not a percentage; write for example 5% or 0.05")
    return float(match[1]) / (100 if match[2] else 1)
