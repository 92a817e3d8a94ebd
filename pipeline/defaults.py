"""What is meant where it is not typed: a recipe, the converted checkpoint that one is in, and its original."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..convert.checkpoint.manifest import PROVENANCE_NAME
from ..convert.checkpoint.original import find_original
from ..convert.checkpoint.remote_code import allow_remote_code
from ..convert.checkpoint.tensors import CONFIG_NAME
from ..convert.errors import InputError
from ..uptrain.request import UptrainRequest

__all__ = [
    "CONFIG_FILE",
    "against_of",
    "config_file",
    "converted_here",
    "original_of",
    "teacher_of",
    "uptraining_from_recipe",
]

CONFIG_FILE = "kvconvert.yaml"
"""The recipe that is read where none is named, if it is in the current directory."""

_LENGTHS = ("steps", "tokens", "fraction")


def config_file() -> Path | None:
    """The recipe in the current directory, None where there is none."""
    return Path(CONFIG_FILE) if os.path.lexists(CONFIG_FILE) else None


def converted_here() -> Path | None:
    """The current directory, if it is a checkpoint that kvconvert has made, else None."""
    here = Path.cwd()
    return here if all((here / name).is_file() for name in (PROVENANCE_NAME, CONFIG_NAME)) else None


def uptraining_from_recipe(
    recipe: Path, typed: Mapping[str, tuple[str, Any]], *, model: str | None = None, output: Path | None = None
) -> UptrainRequest:
    """What a recipe asks of the uptraining; `typed` maps keys to how they were typed, and to values that count more.

    Without `model` it is what the recipe's conversion makes, or where it has none its model, and the result goes where
    `run` would have it. A length that is typed takes the place of the recipe's, however that is said. Raises InputError
    for a recipe that is wrong, and for one that says nothing of uptraining.
    """
    from .recipe_file import read_recipe  # pydantic takes a tenth of a second, which other commands do not need
    from .run_stages import RunJob

    lengths = dict.fromkeys(_LENGTHS, ("", None)) if any(name in typed for name in _LENGTHS) else {}
    values = {f"uptrain.{key}": value for key, value in {**lengths, **typed}.items()}
    file = read_recipe(recipe, values=values)
    if file.recipe.uptrain is None:
        raise InputError(f"{recipe}: has no section uptrain", hint="add one, with data, or give --data")
    allow_remote_code(file.recipe.trust_remote_code)
    job = RunJob.of(file, model=model)
    request = job.uptraining_request()
    if file.recipe.convert is None or model is not None:
        request = replace(request, output=None)
    elif not Path(request.model).is_dir():
        raise InputError(
            f"{request.model} is not there yet, which {recipe} converts",
            hint=f"kvconvert run {recipe} --until convert makes it",
        )
    return request if output is None else replace(request, output=output)


def against_of(model: str | Path, named: str | None, alone: bool, remark: Callable[[str], object]) -> str | None:
    """What a model is compared with: the original that is named, that of its manifest, or nothing if it stands alone.

    Raises InputError for one that is named although it stands alone.
    """
    if alone and named is not None:
        raise InputError("--against and --no-against rule each other out", hint="leave out one of them")
    if alone or named is not None:
        return named
    try:
        found = original_of(model, remark)
    except InputError as error:
        remark(f"not compared with the original: {error}")
        return None
    return None if found is None else str(found)


def teacher_of(model: str | Path, remark: Callable[[str], object]) -> Path | None:
    """The original that the manifest of a converted checkpoint names, as its teacher; None where none was converted.

    Raises InputError where it is gone: another objective than its predictions is for a person to choose.
    """
    try:
        return original_of(model, remark)
    except InputError as error:
        raise InputError(
            f"no teacher: {error}", hint="name it with --teacher, or learn from the text alone with --no-teacher"
        ) from error


def original_of(model: str | Path, remark: Callable[[str], object]) -> Path | None:
    """The original that the manifest of a converted checkpoint names; None for one that was not converted.

    `remark` is told which it is. Raises InputError where it is gone, or is not what was converted.
    """
    found = find_original(model)
    if found is None:
        return None
    remark(f"the original is {found.directory}: {Path(model) / PROVENANCE_NAME} says so, and its digests agree")
    return found.directory
