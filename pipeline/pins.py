"""Fixing what a recipe reads from the hub: its model and its texts at the commits that they are at now."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ..convert.checkpoint.foreign import cached_repository
from ..convert.checkpoint.tensors import Checkpoint
from ..convert.errors import InputError
from ..convert.text.hub import pin_revision
from ..convert.text.sources import TextSource
from .recipe_file import read_recipe, split_text
from .recipe_schema import Recipe

__all__ = ["known_pins", "pinned"]

_TEXTS = {"convert": ("calibration",), "uptrain": ("data", "eval_data"), "evaluate": ("data",)}
_REVISION = re.compile(r",?revision=[^\[\],]*")


def pinned(
    recipe: Recipe, original: Checkpoint | None, known: Mapping[str, str], remark: Callable[[str], object]
) -> Recipe:
    """A recipe whose model and texts, where they are the hub's, have the revision that is read.

    `known` maps texts without a revision to the same as an earlier part of the run has read them. A text whose commit
    the hub does not tell stays as it is, and `remark` says so.
    """
    changes: dict[str, Any] = {}
    repository = cached_repository(original.path) if original is not None and original.path is not None else None
    if repository is not None and repository[1] is not None and not Path(recipe.model).expanduser().is_dir():
        changes["revision"] = repository[1]
    for section, keys in _TEXTS.items():
        part = getattr(recipe, section)
        found = {} if part is None else {key: _pinned(getattr(part, key, None), known, remark) for key in keys}
        found = {key: value for key, value in found.items() if value != getattr(part, key, None)}
        if found:
            changes[section] = part.model_copy(update=found)
    return recipe.model_copy(update=changes) if changes else recipe


def known_pins(recipe: Path) -> dict[str, str]:
    """The texts of a recipe that was run, by what they are without their revision; nothing where it cannot be read."""
    if not recipe.is_file():
        return {}
    try:
        found = read_recipe(recipe).recipe
    except InputError:
        return {}
    texts: list[str] = []
    for section, keys in _TEXTS.items():
        for key in keys:
            value = getattr(getattr(found, section), key, None)
            texts += [value] if isinstance(value, str) else value or []
    return {_without_revision(text): text for text in texts if _REVISION.search(split_text(text)[1])}


def _pinned(value: Any, known: Mapping[str, str], remark: Callable[[str], object]) -> Any:
    if isinstance(value, list):
        return [_pinned(each, known, remark) for each in value]
    if not isinstance(value, str) or value == "self":
        return value
    place, suffix = split_text(value)
    if TextSource(value).path.exists() or TextSource(place).path.exists() or "revision=" in suffix:
        return value
    if value in known:
        return known[value]
    revision = pin_revision(TextSource(place), remark=remark).revision
    if revision is None:
        return value
    brackets, _, weight = suffix.rpartition("]") if suffix.startswith("[") else ("", "", suffix)
    return f"{place}{brackets or '['}{',' if brackets else ''}revision={revision}]{weight}"


def _without_revision(text: str) -> str:
    place, suffix = split_text(text)
    return place + _REVISION.sub("", suffix).replace("[,", "[").replace("[]", "")
