"""Recipes as files: YAML that is read with its line numbers, and written so that it can be run again."""

from __future__ import annotations

import difflib
import io
import json
import os
import re
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args

from pydantic import BaseModel, ValidationError

from ..convert.checkpoint.input_files import open_regular
from ..convert.errors import InputError
from ..convert.printable import printable
from ..convert.text.sources import TextSource
from .recipe_schema import Recipe

__all__ = ["RecipeFile", "read_recipe", "recipe_text", "split_text"]

_MAX_BYTES = 2**20
_MAX_VALUES = 20_000  # an alias is written once and read often
_Keys = tuple[str | int, ...]

# keys that name a place: a file, or what may be on the hub too: a text, with its part and its weight, or a model
_PLACES: Mapping[str, str] = {
    "model": "name",
    "output": "file",
    "convert.calibration": "text",
    "convert.statistics": "file",
    "convert.save_statistics": "file",
    "uptrain.data": "text",
    "uptrain.eval_data": "text",
    "uptrain.teacher": "name",
    "evaluate.data": "text",
    "evaluate.task_directory": "file",
    "gates.baseline": "file",
}
_READ = {"convert.calibration", "convert.statistics", "uptrain.data", "uptrain.eval_data", "evaluate.data"}
_READ |= {"evaluate.task_directory", "gates.baseline"}
_SUFFIX = re.compile(r"(.+?)((?:\[[^\[\]]*\])?(?::[+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?)?)", re.DOTALL)
_FILE = re.compile(r"\.(jsonl?|ndjson|parquet|arrow|txt|md|csv|tsv|ya?ml|safetensors|gz|zst|bz2|xz)$", re.IGNORECASE)

_EXPECTED = {
    "string_type": "text",
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "bool_type": "true or false",
    "list_type": "a list",
    "tuple_type": "a list",
    "model_type": "keys and values",
    "model_attributes_type": "keys and values",
    "path_type": "a path",
    "none_required": "nothing",
    "object_type": "keys and values",
}


@dataclass(frozen=True)
class RecipeFile:
    """A recipe with where each of its values stands, so that what is wrong can be shown there.

    `path` is where it was read, None for one that is made of overrides alone.
    """

    recipe: Recipe
    path: Path
    lines: Mapping[_Keys, int] = field(default_factory=dict)
    overrides: Mapping[_Keys, str] = field(default_factory=dict)

    def where(self, *keys: str | int) -> str:
        """The place of a value, or of the nearest that holds it: `recipe.yaml:12`, or the override as it was typed."""
        return _where(self.path, self.lines, self.overrides, keys)

    def wrong(self, error: InputError, *keys: str) -> InputError:
        """An error about a section, with the place of the key that it is about, if it names one."""
        return InputError(f"{self.where(*keys)}: {'.'.join(keys)}: {error}", hint=error.hint)


def read_recipe(
    path: str | Path, overrides: Sequence[str] = (), *, values: Mapping[str, tuple[str, Any]] | None = None
) -> RecipeFile:
    """Read and check a recipe; `overrides` are as `uptrain.tokens=1B`, of which null takes a key away.

    `values` are overrides that are read already: by the key, as "uptrain.tokens", how it was typed, and the value.

    Places in the file are relative to the file, those in overrides to the current directory. Raises InputError, which
    names file, line and key, for what is no YAML, for unknown keys, values of another type, and files that are missing.
    """
    file = Path(path)
    content, lines = _read_yaml(file)
    content = _moved(content, file.parent, Path())
    typed: dict[_Keys, str] = {}
    for override in overrides:
        keys, value = _parse_override(override)
        _put(content, keys, value, override)
        typed[keys] = f"--set {override}"
    for name, (spelled, value) in (values or {}).items():
        keys = tuple(name.split("."))
        _put(content, keys, value, spelled)
        typed[keys] = spelled
    try:
        recipe = Recipe.model_validate_json(json.dumps(content, default=str))
    except ValidationError as error:
        raise _in_words(error, content, lambda keys: _where(file, lines, typed, keys)) from None
    found = RecipeFile(recipe, file, lines, typed)
    for keys, place in _places(content):
        _check_exists(found, keys, place)
    return found


def recipe_text(recipe: Recipe, directory: Path, heading: str = "") -> str:
    """A recipe in YAML, all that it says and all defaults, as a file in a directory: places are relative to that."""
    from ruamel.yaml import YAML

    content = json.loads(recipe.model_dump_json(exclude_none=True))
    content = _moved(content, Path(), directory)
    text = io.StringIO()
    writer = YAML(typ="safe", pure=True)
    writer.default_flow_style = False
    writer.sort_base_mapping_type_on_output = False  # type: ignore[assignment]
    writer.width = 4096
    writer.dump(content, text)
    return "".join(f"# {line}\n" for line in heading.splitlines()) + text.getvalue()


def _read_yaml(file: Path) -> tuple[dict[str, Any], dict[_Keys, int]]:
    """The content of a file in plain lists, dicts and scalars, and the line of each of its values, from 1."""
    from ruamel.yaml import YAML
    from ruamel.yaml.error import MarkedYAMLError, YAMLError

    try:
        with open_regular(file) as stream:
            data = stream.read(_MAX_BYTES + 1)
        text = data.decode()
    except OSError as error:
        raise InputError(f"{file}: cannot be read ({error.strerror})", hint="name a recipe, a YAML file") from error
    except UnicodeDecodeError as error:
        raise InputError(f"{file}: is not UTF-8 (byte {error.start})") from error
    if len(data) > _MAX_BYTES:
        raise InputError(f"{file}: has more than {_MAX_BYTES} bytes, which no recipe has")
    try:
        with warnings.catch_warnings(action="ignore"):  # of an anchor that is used again
            found = YAML(typ="rt").load(text)
    except MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = f":{mark.line + 1}" if mark is not None else ""
        problem = " ".join(str(error.problem or error.context or "").split("\n")[0].split())
        raise InputError(f"{file}{line}: no YAML: {printable(problem)}") from None
    except (YAMLError, ValueError, RecursionError) as error:
        raise InputError(f"{file}: no YAML: {printable(str(error).splitlines()[0])}") from None
    if not isinstance(found, dict):
        raise InputError(f"{file}: holds no keys and values, which a recipe is made of")
    lines: dict[_Keys, int] = {}
    budget = [_MAX_VALUES]
    content = _plain(found, (), lines, budget, file)
    return content, lines


def _plain(value: Any, keys: _Keys, lines: dict[_Keys, int], budget: list[int], file: Path) -> Any:
    budget[0] -= 1
    if budget[0] < 0 or len(keys) > 16:
        raise InputError(f"{file}: has more than {_MAX_VALUES} values, or too many levels, which no recipe has")
    marks: Any = getattr(value, "lc", None)  # ruamel's lines and columns
    if isinstance(value, dict):
        for key in value:
            lines[(*keys, str(key))] = marks.key(key)[0] + 1
        return {str(key): _plain(each, (*keys, str(key)), lines, budget, file) for key, each in value.items()}
    if isinstance(value, list):
        for index in range(len(value)):
            lines[(*keys, index)] = marks.item(index)[0] + 1
        return [_plain(each, (*keys, index), lines, budget, file) for index, each in enumerate(value)]
    if isinstance(value, bool) or value is None:
        return value
    return next((kind(value) for kind in (int, float, str) if isinstance(value, kind)), str(value))


def _parse_override(typed: str) -> tuple[_Keys, Any]:
    from ruamel.yaml import YAML
    from ruamel.yaml.error import YAMLError

    name, equals, text = typed.partition("=")
    if not equals or not re.fullmatch(r"\w+(\.\w+)*", name.strip()):
        raise InputError(f"--set {typed}: is no key=value", hint="write for example --set uptrain.tokens=1B")
    try:
        return tuple(name.strip().split(".")), YAML(typ="safe", pure=True).load(text)
    except (YAMLError, ValueError):
        raise InputError(f"--set {typed}: {text!r} is no YAML", hint="put quotes around text") from None


def _put(content: dict[str, Any], keys: _Keys, value: Any, typed: str) -> None:
    for key in keys[:-1]:
        below = content.setdefault(str(key), {})
        if not isinstance(below, dict):
            raise InputError(f"--set {typed}: {key} holds no keys")
        content = below
    if value is None:
        content.pop(str(keys[-1]), None)
    else:
        content[str(keys[-1])] = value


def _moved(content: dict[str, Any], source: Path, target: Path) -> dict[str, Any]:
    """The content, whose relative places are from one directory, with places from another."""
    if source.absolute() == target.absolute():
        return content
    moved = dict(content)
    for name, kind in _PLACES.items():
        *sections, key = name.split(".")
        holder = moved
        for section in sections:
            if not isinstance(holder.get(section), dict):
                break
            holder[section] = dict(holder[section])
            holder = holder[section]
        else:
            if isinstance(holder.get(key), str):
                holder[key] = _move(holder[key], kind, source, target)
            elif isinstance(holder.get(key), list):
                texts: list[Any] = holder[key]
                holder[key] = [_move(each, kind, source, target) if isinstance(each, str) else each for each in texts]
    return moved


def _move(place: str, kind: str, source: Path, target: Path) -> str:
    path, suffix = (place, "") if kind == "file" or os.path.lexists(source / place) else split_text(place)
    if path.startswith("~") or Path(path).is_absolute() or place == "self":
        return place
    there = os.path.relpath(source / path, target)
    return there + suffix if kind == "file" or os.path.lexists(source / path) or _is_path(path) else place


def split_text(text: str) -> tuple[str, str]:
    """The place of a text, and what it says of its part and its weight."""
    match = _SUFFIX.fullmatch(text)
    return (match[1], match[2]) if match else (text, "")


def _is_path(name: str) -> bool:
    """Whether a name can be that of a place on this machine only, and of nothing on the hub."""
    return name.startswith((".", "~", "/")) or _FILE.search(name) is not None


def _places(content: Mapping[str, Any]) -> Iterator[tuple[_Keys, str]]:
    for name in _PLACES:
        keys = tuple(name.split("."))
        value: Any = content
        for key in keys:
            value = value.get(key) if isinstance(value, dict) else None
        if isinstance(value, str):
            yield keys, value
        for index, each in enumerate(value if isinstance(value, list) else ()):
            yield (*keys, index), each


def _check_exists(found: RecipeFile, keys: _Keys, place: str) -> None:
    name = ".".join(str(key) for key in keys if isinstance(key, str))
    path = split_text(place)[0] if _PLACES[name] == "text" else place
    is_local = name in ("evaluate.task_directory", "gates.baseline", "convert.statistics") or _is_path(path)
    exists = os.path.lexists(TextSource(place).path) or os.path.lexists(TextSource(path).path)
    if name in (*_READ, "model", "uptrain.teacher") and is_local and not exists:
        raise InputError(
            f"{found.where(*keys)}: {name}: {path} does not exist",
            hint="a place in a recipe is relative to the recipe's file, one of --set to the current directory",
        )


def _where(path: Path, lines: Mapping[_Keys, int], overrides: Mapping[_Keys, str], keys: _Keys) -> str:
    for length in range(len(keys), 0, -1):
        if keys[:length] in overrides:
            return overrides[keys[:length]]
        if keys[:length] in lines:
            return f"{path}:{lines[keys[:length]]}"
    return str(path)


def _in_words(error: ValidationError, content: Mapping[str, Any], where: Callable[[_Keys], str]) -> InputError:
    """The first thing that is wrong, as a line for people: where, which key, what is expected."""
    first = min(error.errors(), key=lambda each: each["type"] != "extra_forbidden")  # a typing error makes others
    keys, kind, given = _known(first["loc"], content), first["type"], first["input"]
    name = ".".join(map(str, keys))
    if kind == "extra_forbidden":
        targets = _keys_of_targets() if keys[:-1] == ("convert",) else {}
        others = [target for target, names in targets.items() if keys[-1] in names]
        if others:
            return InputError(f"{where(keys)}: {name} belongs to target: {' or '.join(others)}", hint="leave it out")
        close = difflib.get_close_matches(str(keys[-1]), sorted(_allowed(keys[:-1], content)), n=1, cutoff=0.5)
        section = f"section {name.rpartition('.')[0]}" if "." in name else "a recipe"
        hint = f"did you mean {close[0]}?" if close else f"known are {', '.join(sorted(_allowed(keys[:-1], content)))}"
        return InputError(f"{where(keys)}: {name} is no key of {section}", hint=hint)
    if kind == "missing":
        missing = [str(part) for part in first["loc"] if not _is_tag(part, content)]
        return InputError(f"{where(keys)}: {'.'.join(missing)} is missing", hint=f"add {missing[-1]}")
    if kind in ("union_tag_not_found", "union_tag_invalid"):
        said = f"is {given['target']!r}" if isinstance(given, dict) and "target" in given else "is missing"
        return InputError(f"{where((*keys, 'target'))}: convert.target {said}, expected gqa, mqa, cla or mla")
    same = [each for each in error.errors() if _known(each["loc"], content) == keys]
    expected = " or ".join(dict.fromkeys(_expected(each) for each in same))
    unquoted = None
    if isinstance(given, str) and any(each["type"] in ("int_type", "float_type", "bool_type") for each in same):
        unquoted = f"write {given} without quotes" if _is_number(given) or given in ("true", "false") else None
    if kind == "value_error":
        return InputError(f"{where(keys)}: {name}: {first['ctx']['error']}")
    return InputError(f"{where(keys)}: {name} is {_shown(given)}, expected {expected}", hint=unquoted)


def _known(location: Sequence[str | int], content: Any) -> _Keys:
    """The part of a location of pydantic's that is in the content: tags and kinds of a union are not."""
    keys: list[str | int] = []
    for part in location:
        is_index = isinstance(content, list) and isinstance(part, int) and part < len(content)
        if is_index or (isinstance(content, dict) and part in content):
            keys.append(part)
            content = content[part]
    return tuple(keys)


def _is_tag(part: str | int, content: Mapping[str, Any]) -> bool:
    convert = content.get("convert")
    return isinstance(convert, dict) and part == convert.get("target")


def _allowed(keys: _Keys, content: Mapping[str, Any]) -> set[str]:
    """The keys that a section has."""
    model: Any = Recipe
    for key in keys:
        choices = _sections(model.model_fields[str(key)].annotation)
        said = content.get(str(key), {})
        tagged = [each for each in choices if "target" in each.model_fields]
        right = [each for each in tagged if said.get("target") in str(each.model_fields["target"].annotation)]
        model = (right or choices)[0]
    return set(model.model_fields)


def _sections(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [each for part in get_args(annotation) for each in _sections(part)]


def _expected(error: Any) -> str:
    kind, context = error["type"], error.get("ctx", {})
    if kind in ("literal_error", "enum"):
        return str(context["expected"])
    if kind == "greater_than_equal":
        return f"{context['ge']:g} or more"
    if kind == "string_pattern_mismatch":
        return "org/name"
    if kind == "too_short":
        return "at least one"
    return _EXPECTED.get(kind, str(error["msg"]))


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _shown(value: object) -> str:
    if isinstance(value, dict | list):
        return "keys and values" if isinstance(value, dict) else "a list"
    if isinstance(value, bool) or value is None:
        return {True: "true", False: "false", None: "empty"}[value]
    return printable(repr(value)[:80])


def _keys_of_targets() -> dict[str, set[str]]:
    """The keys that the section convert has for each target."""
    sections = _sections(Recipe.model_fields["convert"].annotation)
    return {get_args(each.model_fields["target"].annotation)[0]: set(each.model_fields) for each in sections}
