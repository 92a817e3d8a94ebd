"""JSON that others wrote: read within limits, its values of the types that are expected, and errors that say which."""

from __future__ import annotations

import json
import math
import re
import reprlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import CheckpointError, first_line
from .input_files import open_regular

__all__ = [
    "DEPTH_KEYS",
    "check_provenance",
    "check_values",
    "has_too_many_values",
    "parse_json",
    "read_json",
    "read_object",
    "shortened",
]

_MAX_BYTES = 2**26  # the index of a model with a hundred thousand tensors has 10 MB
_MAX_VALUES = 2_000_000  # of lists, objects and their elements, which take a hundred times their bytes as objects
_MAX_DEPTH = 64
# what configs call the number of layers that a model, its encoder or its decoder has
DEPTH_KEYS = "num_(hidden_|encoder_|decoder_)?layers|n_layers?|(en|de)coder_layers"
_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")
_OPENING = re.compile(rb"[\[{,:]")

_MAX_NUMBER = 2**53  # what doubles count to, which other programs read JSON into
_MAX_LAYERS = 100_000
_MAX_PARTS = 65_536  # heads, or experts, of a layer, and numbers of a head
_MAX_LABELS = 100_000
_MAX_SIZE = 2**24  # of a vector, or a vocabulary
_SHORTENED = reprlib.Repr()
_SHORTENED.maxstring = _SHORTENED.maxother = 60
_SHORTENED.maxlong = 40
_SHORTENED.maxlist = _SHORTENED.maxdict = 4
_SHORTENED.maxlevel = 3
_MAX_SHOWN = 200


def shortened(value: object) -> str:
    """Return a value as a person reads it in a message, where a long one is cut."""
    text = _SHORTENED.repr(value)
    return text if len(text) <= _MAX_SHOWN else f"{text[:_MAX_SHOWN]}…"


def read_object(path: Path, *, max_bytes: int = _MAX_BYTES) -> dict[str, Any]:
    """Return the JSON object in a regular file.

    Raises CheckpointError, which names the file, for anything else and as `parse_json` does.
    """
    content = read_json(path, max_bytes=max_bytes)
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: expected a JSON object, found {shortened(content)}")
    return content


def read_json(path: Path, *, max_bytes: int = _MAX_BYTES) -> Any:
    """Return the value in a regular file of JSON. Raises CheckpointError as `read_object` does."""
    try:
        with open_regular(path) as file:
            raw = file.read(max_bytes + 1)
    except OSError as error:
        raise CheckpointError(
            f"{path}: not readable as JSON ({error.strerror})", hint="check its permissions"
        ) from error
    if len(raw) > max_bytes:
        raise CheckpointError(f"{path}: not readable as JSON (more than {max_bytes} bytes)")
    return parse_json(raw, str(path))


def parse_json(raw: bytes, where: str, *, unique: bool = False) -> Any:
    """Return the value of JSON in UTF-8.

    Raises CheckpointError, which begins with `where`, for what is no JSON, too large or too deep to be a file of a
    model, or has half a character (a lone surrogate), which no other file can hold. An object that has a key twice is
    read as other programs read it if both values are equal, or refused; with `unique` it always is.
    """
    problem = f"more than {_MAX_VALUES} values" if has_too_many_values(raw) else None
    if problem is None:
        try:
            value = json.loads(raw.decode(), object_pairs_hook=_object_with_unique_keys if unique else _object)
        except RecursionError:
            problem = f"nested deeper than {_MAX_DEPTH} levels"
        except ValueError as error:  # also of bytes that are not UTF-8, and of numbers of thousands of digits
            problem = first_line(error)
        else:
            problem = _problem_of(value, check_strings=_SURROGATE.search(raw) is not None)
    if problem is not None:
        raise CheckpointError(f"{where}: not readable as JSON ({problem})", hint="download it again")
    return value


def has_too_many_values(raw: bytes) -> bool:
    """Return whether JSON would take too much memory as objects, told by what stands before a value."""
    return len(raw) > _MAX_VALUES and sum(1 for _ in _OPENING.finditer(raw)) > _MAX_VALUES


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        seen: dict[str, Any] = {}
        for key, value in pairs:
            if seen.setdefault(key, value) != value:
                raise ValueError(f"the key {shortened(key)} is there twice, with different values")
    return found


def _object_with_unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for number, key in enumerate(keys) if key in keys[:number])
        raise ValueError(f"the key {shortened(twice)} is there twice")
    return found


def _problem_of(value: Any, *, check_strings: bool) -> str | None:
    """Why a value that was read is of no use: too deep for what copies and prints it, or with half a character."""
    level, depth = [value], 0
    while level:
        depth += 1
        if depth > _MAX_DEPTH:
            return f"nested deeper than {_MAX_DEPTH} levels"
        following: list[Any] = []
        for item in level:
            if check_strings and not _is_whole(item):
                return "half a character, a lone surrogate"
            if isinstance(item, dict):
                following += item.values()
                if check_strings:
                    following += item.keys()
            elif isinstance(item, list):
                following += item
        level = following if check_strings else [item for item in following if isinstance(item, dict | list)]
    return None


def _is_whole(item: Any) -> bool:
    if not isinstance(item, str):
        return True
    try:
        item.encode()
    except UnicodeEncodeError:
        return False
    return True


def check_values(config: Mapping[str, Any], where: str) -> None:
    """Raise CheckpointError for a value of a config, or of a section in it, that no class can be built with in reason.

    What is told: types that are not the ones which kvconvert and transformers work with before a class looks at them,
    numbers that are not finite, and counts so large that building what they count would take all time and memory.
    """
    for key, value in config.items():
        rule = next((rule for rule in _RULES if rule.name.fullmatch(key)), _ANY_NUMBER)
        if value is not None and not rule.accepts(value):
            raise CheckpointError(
                f"{where} has {_shortened_key(key)} = {shortened(value)}, expected {rule.expected}",
                hint="compare it with the config.json that was published with the weights",
            )
        if isinstance(value, dict) and not rule.is_table:
            check_values(value, f"{where}: {_shortened_key(key)}")


def _shortened_key(key: str) -> str:
    """A key as it is written, a long one as `shortened` does."""
    return key if len(key) <= _SHORTENED.maxstring else shortened(key)


@dataclass(frozen=True)
class _Rule:
    """What values of the keys of this name are, but for null, which is always taken. A table's own keys are free."""

    name: re.Pattern[str]
    accepts: Callable[[Any], bool]
    expected: str
    is_table: bool = False


def _is_count(value: Any, most: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= most


def _is_small(value: Any, most: int) -> bool:
    """Whether a value is none to count with, or no larger than this."""
    return not isinstance(value, int) or abs(value) <= most


def _is_list_of_texts(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(item, str) for item in value)


def _is_number_of_this_world(value: Any) -> bool:
    return math.isfinite(value) if isinstance(value, float) else _is_small(value, _MAX_NUMBER)


# the first whose name fits a key decides
_RULES = tuple(
    _Rule(re.compile(name), accepts, expected, is_table)
    for name, accepts, expected, is_table in (
        ("model_type|transformers_version", lambda value: isinstance(value, str), "a text", False),
        ("architectures|configuration_files", _is_list_of_texts, "a list of names", False),
        ("(torch_)?dtype", lambda value: isinstance(value, str | dict), "the name of a dtype", False),
        ("auto_map", lambda value: isinstance(value, dict), "an object with the names of classes", False),
        (
            "id2label|label2id",
            lambda value: isinstance(value, dict) and len(value) <= _MAX_LABELS,
            f"an object with at most {_MAX_LABELS} entries",
            True,
        ),
        (
            "num_labels",
            lambda value: _is_count(value, _MAX_LABELS),
            f"a whole number from 0 to {_MAX_LABELS}",
            False,
        ),
        (
            DEPTH_KEYS,
            lambda value: _is_count(value, _MAX_LAYERS),
            f"a whole number from 0 to {_MAX_LAYERS}",
            False,
        ),
        (".*_layers?", lambda value: _is_small(value, _MAX_LAYERS), f"no number above {_MAX_LAYERS}", False),
        (
            ".*(heads?|experts?|groups?|(head|rotary|rope|nope)_dim|rank|d_kv)(_.*)?",
            lambda value: _is_small(value, _MAX_PARTS),
            f"no number above {_MAX_PARTS}",
            False,
        ),
        (
            "partial_rotary_factor|rotary_pct|rope_pct",
            lambda value: isinstance(value, int | float) and 0 <= value <= 1,
            "a number from 0 to 1",
            False,
        ),
        (
            ".*_(size|dim)|n_embd|n_inner|d_model|d_ff",
            lambda value: _is_number_of_this_world(value) and _is_small(value, _MAX_SIZE),
            f"a finite number of at most {_MAX_SIZE}",
            False,
        ),
        (".*max_length", lambda value: True, "a number", False),  # tokenizers write 10**30 for "no limit"
    )
)
_ANY_NUMBER = _Rule(
    re.compile(".*"), _is_number_of_this_world, f"a finite number, a whole one of at most {_MAX_NUMBER}"
)

_PAIR = ("source", "result")
_PROVENANCE_NUMBERS = {
    "num_key_value_heads": _PAIR,
    "num_key_value_layers": _PAIR,
    "cache_bytes_per_token": _PAIR,
    "latent": ("kv_lora_rank", "qk_rope_head_dim"),
    "uptraining": ("tokens",),
}
_PROVENANCE_TEXTS = ("kvconvert_version", "source", "target", "method")


def check_provenance(content: Mapping[str, Any], where: str) -> None:
    """Raise CheckpointError for a value of kvconvert.json, the file at `where`, that kvconvert would not have written.

    What else stands in it is nobody's concern here: the card of a result and a training run read these values.
    """
    for key in _PROVENANCE_TEXTS:
        if not isinstance(content.get(key), str | None):
            raise CheckpointError(f"{where} has {key} = {shortened(content[key])}, expected a text")
    for key, names in _PROVENANCE_NUMBERS.items():
        value = content.get(key)
        numbers = [value.get(name) for name in names] if isinstance(value, dict) else [None]
        if value is not None and not all(isinstance(number, int) for number in numbers):
            said = f"{where} has {key} = {shortened(value)}"
            raise CheckpointError(f"{said}, expected an object with the numbers {' and '.join(names)}")
    described = [key for key in _PROVENANCE_NUMBERS if content.get(key) is not None and key != "uptraining"]
    missing = [key for key in ("cache_bytes_per_token", *_PROVENANCE_TEXTS) if described and content.get(key) is None]
    if missing:
        raise CheckpointError(f"{where} has {described[0]}, and no {missing[0]}")
