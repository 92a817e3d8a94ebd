"""What classes of transformers and of kvconvert hold, told from data and without importing them, which takes seconds.

known_classes.json has for each `model_type`, and each version of transformers that was looked at, the entries of its
config with their defaults and the tensors of its class. Everything here can only agree: where a config has an entry or
a value that the data does not cover, or the tensors are not exactly those of the class, the answer is None, and the
class itself has to be asked. scripts/generate_known_classes.py writes the data, and tests hold it to be what the
installed classes say.
"""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable, Container, Iterable, Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any, Protocol

__all__ = [
    "DATA_NAME",
    "ROPE_KEYS",
    "RULES",
    "Header",
    "facts",
    "holds",
    "is_known",
    "known_class",
    "known_config",
    "known_generation",
    "size",
]

DATA_NAME = "known_classes.json"

_LARGEST = 2**31
_MOST_LAYERS = 10_000
_KINDS_OF_LAYERS = ("full_attention", "sliding_attention")
_DTYPES = ("float64", "float32", "float16", "bfloat16")
_FRACTIONS = ("dropout", "pdrop", "initializer_range")
_MAY_BE_ZERO = ("_token_id", "max_window_layers", "num_nextn_predict_layers")
ROPE_KEYS = {
    "default": frozenset(),
    "linear": frozenset({"factor"}),
    "dynamic": frozenset({"factor"}),
    "llama3": frozenset({"factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"}),
}
# entries of many a config.json that the classes in question keep and do not read
_KEPT = {
    "_name_or_path": str,
    "is_llama_config": bool,
    "moe_layer_freq": int,
    "pretraining_tp": int,
    "rope_interleaved": bool,
    "scoring_func": str,
    "topk_method": str,
    "transformers.js_config": dict,
    "use_mrope": bool,
}

_GENERATION: Mapping[str, tuple[type, ...]] = {
    **dict.fromkeys(("bos_token_id", "pad_token_id", "top_k", "max_length", "max_new_tokens"), (int,)),
    **dict.fromkeys(("temperature", "top_p", "repetition_penalty"), (float,)),
    **dict.fromkeys(("_from_model_config", "do_sample", "use_cache"), (bool,)),
    **dict.fromkeys(("output_attentions", "output_hidden_states"), (bool,)),
    "eos_token_id": (int, list),
    "transformers_version": (str,),
}

Values = Mapping[str, Any]


class Header(Protocol):
    """What is known of a tensor before it is read or written."""

    @property
    def name(self) -> str:
        """Its name in the state dict."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Its size in every dimension."""


class _UnknownError(Exception):
    """Something that the data does not cover."""


def _unless_stated(name: str, value: Callable[[Values], Any]) -> Callable[[Values], Any]:
    return lambda values: value(values) if values.get(name) is None else values[name]


def _beyond_max_window(values: Values) -> list[str]:
    window, first = values["sliding_window"], values["max_window_layers"]
    return [_KINDS_OF_LAYERS[window is not None and layer >= first] for layer in range(values["num_hidden_layers"])]


RULES: Mapping[str, tuple[str, Callable[[Values], Any]]] = {
    "as many as query heads": (
        "num_key_value_heads",
        _unless_stated("num_key_value_heads", lambda values: values["num_attention_heads"]),
    ),
    "hidden_size by heads": (
        "head_dim",
        _unless_stated("head_dim", lambda values: values["hidden_size"] // values["num_attention_heads"]),
    ),
    "only if used": (
        "sliding_window",
        lambda values: values["sliding_window"] if values.get("use_sliding_window") else None,
    ),
    "sliding from max_window_layers on": ("layer_types", _unless_stated("layer_types", _beyond_max_window)),
    "sliding, every second full": (
        "layer_types",
        _unless_stated(
            "layer_types", lambda values: [_KINDS_OF_LAYERS[(i + 1) % 2] for i in range(values["num_hidden_layers"])]
        ),
    ),
    "sliding, every fourth full": (
        "layer_types",
        _unless_stated(
            "layer_types",
            lambda values: [_KINDS_OF_LAYERS[(i + 1) % 4 != 0] for i in range(values["num_hidden_layers"])],
        ),
    ),
    "all full": (
        "layer_types",
        _unless_stated("layer_types", lambda values: [_KINDS_OF_LAYERS[0]] * values["num_hidden_layers"]),
    ),
    "none": ("attention_bias", _unless_stated("attention_bias", lambda values: [])),
    "each its own": (
        "kv_source_layers",
        _unless_stated("kv_source_layers", lambda values: list(range(values["num_hidden_layers"]))),
    ),
    "both parts": ("qk_head_dim", lambda values: values["qk_nope_head_dim"] + values["qk_rope_head_dim"]),
    "the rotary part": ("head_dim", lambda values: values["qk_rope_head_dim"]),
}
"""What a class computes of other entries, by the name that the data has for it: which entry, and how."""


def is_known(model_type: object) -> bool:
    """Return whether the data has this `model_type` for the installed version of transformers."""
    return _entry(model_type) is not None


def known_config(config: Values) -> dict[str, Any] | None:
    """Return what `config_classes.full_config` returns, or None where the data does not cover the config."""
    entry = _entry(config.get("model_type"))
    return None if entry is None else values_of(config, entry)


def values_of(config: Values, entry: Values) -> dict[str, Any] | None:
    """Return the values that the class of a config has by an entry of the data, None where that does not cover them."""
    try:
        return copy.deepcopy(_full(config, entry))
    except _UnknownError:
        return None


def known_class(config: Values, tensors: Iterable[Header], *, ignored: Callable[[str], object]) -> str | None:
    """Return the name of the class of a config, or None unless it holds exactly these tensors, by name and shape.

    A tensor that another one is tied to may be absent. One whose name is `ignored` may be there beside those of the
    class. None also stands for a config that the data does not cover, and for one saved with another class.
    """
    entry = _entry(config.get("model_type"))
    if entry is None:
        return None
    try:
        values, tensors = _full(config, entry), list(tensors)
        _require(values["num_hidden_layers"] <= len(tensors), "num_hidden_layers")
        expected = dict(_tensors(values, entry))
    except _UnknownError:
        return None
    optional = set(entry["tied"]) if values["tie_word_embeddings"] else set()
    for tensor in tensors:
        shape = expected.pop(tensor.name, None)
        if shape != tuple(tensor.shape) and not (shape is None and ignored(tensor.name)):
            return None
    return None if expected.keys() - optional else str(entry["class"])


def known_frequencies(config: Values) -> tuple[float, ...] | None:
    """Return how fast the pairs of dims of a head rotate, in radians per token, to about six digits; None if unknown.

    The class computes them in float32, so that what is computed with them has to take them from there.
    """
    entry, values = _entry(config.get("model_type")), known_config(config)
    if entry is None or values is None or entry["rope"] is None:
        return None
    rope = values["rope_parameters"]
    return rope_frequencies(values, rope) if rope["rope_type"] in entry["rope"]["nominal"] else None


def rope_frequencies(values: Values, rope: Values) -> tuple[float, ...]:
    """Return the frequencies of settings of the kinds default and llama3, in radians per token, highest first."""
    head_dim = values.get("head_dim") or values["hidden_size"] // values["num_attention_heads"]
    dims = int(head_dim * rope.get("partial_rotary_factor", 1.0))
    natural = [float(rope["rope_theta"]) ** (-first / dims) for first in range(0, dims, 2)]
    if rope["rope_type"] == "default":
        return tuple(natural)
    low, high, factor = rope["low_freq_factor"], rope["high_freq_factor"], rope["factor"]
    turns = [rope["original_max_position_embeddings"] * frequency / (2 * math.pi) for frequency in natural]
    kept = [min(max((number - low) / (high - low), 0.0), 1.0) for number in turns]
    return tuple(part * (share + (1 - share) / factor) for part, share in zip(natural, kept, strict=True))


def known_generation(config: object) -> bool:
    """Return whether the content of a generation_config.json is one that every version takes."""
    return isinstance(config, dict) and all(
        name in _GENERATION and type(value) in _GENERATION[name] and _is_plain(name, value)
        for name, value in config.items()
    )


def _is_plain(name: str, value: object) -> bool:
    if isinstance(value, list):
        return all(type(item) is int and item >= 0 for item in value)
    if isinstance(value, bool | str):
        return True
    return isinstance(value, int | float) and (0 < value < _LARGEST or (value == 0 and name.endswith("_token_id")))


@cache
def _data() -> Any:
    return json.loads(Path(__file__).with_name(DATA_NAME).read_text(encoding="utf-8"))


@cache
def installed() -> str:
    """Return the version of transformers, without importing it."""
    from importlib.metadata import version  # 40 ms, which a command that reads no checkpoint does without

    return version("transformers")


@cache
def _entry(model_type: object) -> Any:
    """What the data says of a `model_type`, None where it says nothing of the installed version of transformers."""
    entries = _data()["classes"].get(model_type, ()) if isinstance(model_type, str) else ()
    return next((entry for entry in entries if installed() in entry["versions"]), None)


def _full(config: Values, entry: Values) -> dict[str, Any]:
    """The values that the class of a config has. Raises _UnknownError where the data does not cover the config."""
    stated = {key: value for key, value in config.items() if key not in ("model_type", "auto_map")}
    values: dict[str, Any] = {"model_type": config["model_type"]}
    fields = entry["fields"]
    for name, (types, *default) in fields.items():
        if name in stated:
            value = stated.pop(name)
            is_default = bool(default) and type(value) is type(default[0]) and value == default[0]
            _require(is_default or _is_of(name, value, types), name)
            values[name] = value
        elif default:
            values[name] = default[0]
    if entry["rope"] is not None:
        values["rope_parameters"] = _rope(stated, values, entry["rope"])
    values |= _others(stated, entry)
    _require(values["num_hidden_layers"] <= _MOST_LAYERS, "num_hidden_layers")
    for rule in entry["rules"]:
        name, value = RULES[rule]
        values[name] = value(values)
    _check(values)
    return values


def _require(condition: object, what: str) -> None:
    if not condition:
        raise _UnknownError(what)


def _is_of(name: str, value: Any, types: Iterable[str]) -> bool:
    """Whether a value is one that every class with an entry of these types takes; some take more."""
    if value is None:
        return "None" in types
    if type(value) is bool:
        return "bool" in types
    if name.endswith(_FRACTIONS):
        return type(value).__name__ in types and type(value) in (int, float) and 0 <= value <= 1
    if type(value) is int:
        least = 0 if name.endswith(_MAY_BE_ZERO) else 1
        return "int" in types and least <= value < _LARGEST
    if type(value) is float:
        return "float" in types and 0 <= value < _LARGEST
    if type(value) is str:
        return "str" in types and name in ("hidden_act", "hidden_activation") and value in _data()["activations"]
    if type(value) is list:
        return _is_list_of(name, value, types)
    return name == "rope_parameters" and type(value) is dict


def _is_list_of(name: str, values: list[Any], types: Iterable[str]) -> bool:
    if name == "layer_types":
        return "list[str]" in types and all(type(kind) is str and kind in _KINDS_OF_LAYERS for kind in values)
    if name == "attention_bias":
        projections = ("q_proj", "k_proj", "v_proj", "o_proj")
        return "list[str]" in types and all(type(item) is str and item in projections for item in values)
    is_ints = all(type(value) is int and 0 <= value < _LARGEST for value in values)
    return name in ("eos_token_id", "kv_source_layers") and "list[int]" in types and is_ints and bool(values)


def _rope(stated: dict[str, Any], values: Values, of_class: Values) -> dict[str, Any]:
    """The rotary settings in their newer form, made of the older entries where these are there, which are taken out."""
    older = stated.pop("rope_scaling", None)
    _require(older is None or type(older) is dict, "rope_scaling")
    rope: dict[str, Any] = dict(older or values["rope_parameters"] or {})
    _require(all(type(value) in (int, float, str) for value in rope.values()), "rope")
    rope.setdefault("rope_theta", stated.pop("rope_theta", of_class["rope_theta"]))
    stated.pop("rope_theta", None)
    if "partial_rotary_factor" in of_class:
        default = of_class["partial_rotary_factor"]
        if of_class["reads_partial_rotary_factor"]:
            default = stated.pop("partial_rotary_factor", default)
        rope.setdefault("partial_rotary_factor", default)
    part = rope.get("partial_rotary_factor", 1.0)
    _require(type(part) is float and 0 < part <= 1, "partial_rotary_factor")
    kind: str = rope.setdefault("rope_type", rope.get("type", "default"))
    _require(kind in of_class["types"] and rope.get("type", kind) == kind, "rope")
    settings = rope.keys() - {"rope_type", "type", "rope_theta", "partial_rotary_factor"}
    _require(settings == ROPE_KEYS[kind], "rope")
    _require(all(type(rope[key]) in (int, float) and 0 < rope[key] < 1e12 for key in (*settings, "rope_theta")), "rope")
    _require(rope.get("low_freq_factor", 1) < rope.get("high_freq_factor", 2), "rope")
    return rope


def _others(stated: Mapping[str, Any], entry: Values) -> dict[str, Any]:
    """The values that the class has of entries that are not its own. Raises _UnknownError for one that it may read."""
    values: dict[str, Any] = {}
    for name, value in stated.items():
        if name == "architectures":
            _require(value is None or value == [entry["class"]], name)
            values[name] = value
        elif name in ("dtype", "torch_dtype"):
            _require(type(value) is str and value in _DTYPES, name)
            values["dtype"] = stated.get("dtype", value)
        elif name == "transformers_version":
            _require(type(value) is str, name)
            values[name] = installed()
        elif name in _data()["dropped"]:
            _require(value is None or type(value) in (bool, int, float, str), name)
        else:
            _require(type(value) is _KEPT.get(name), name)
            values[name] = value
    return values


def _check(values: Values) -> None:
    """Raise _UnknownError unless the sizes go together as in every class they do; some allow more."""
    heads, shared_heads, layers = (
        values[name] for name in ("num_attention_heads", "num_key_value_heads", "num_hidden_layers")
    )
    _require(values["hidden_size"] % heads == 0, "hidden_size")
    _require(type(shared_heads) is int and heads % shared_heads == 0, "num_key_value_heads")
    head_dim = values.get("head_dim", values["hidden_size"] // heads)
    _require(type(head_dim) is int and head_dim % 2 == 0, "head_dim")
    _require((values.get("pad_token_id") or 0) < values["vocab_size"], "pad_token_id")
    kinds: list[str] = [""] * layers if values.get("layer_types") is None else values["layer_types"]
    _require(len(kinds) == layers, "layer_types")
    _require(layers <= values.get("first_k_dense_replace", layers), "first_k_dense_replace")  # no experts
    sources: list[int] = values.get("kv_source_layers", list(range(layers)))
    _require(len(sources) == layers, "kv_source_layers")
    for layer, source in enumerate(sources):
        is_own = source <= layer and sources[source] == source
        _require(is_own and kinds[source] == kinds[layer], "kv_source_layers")


def _tensors(values: Values, entry: Values) -> Iterator[tuple[str, tuple[int, ...]]]:
    """The tensors of a class, by name, with their shapes."""
    of_layers = [facts(values, layer) for layer in range(values["num_hidden_layers"])]
    for template, (shape, *conditions) in entry["tensors"].items():
        for layer, found in enumerate(of_layers if "{layer}" in template else of_layers[:1]):
            if all(holds(condition, found) for condition in conditions):
                yield template.format(layer=layer), tuple(size(part, values) for part in shape)


def size(expression: str, values: Values) -> int:
    """Return what a sum of products of a config's sizes comes to, such as "2*intermediate_size"."""
    known = {"head_dim": values["hidden_size"] // values["num_attention_heads"], **values}
    total = 0
    for term in expression.split("+"):
        factors = [int(name) if name.isdecimal() else known[name] for name in term.split("*")]
        _require(all(type(factor) is int for factor in factors), expression)
        total += math.prod(factors)
    return total


def holds(condition: str, found: Container[str]) -> bool:
    """Return whether a fact is among those that were found, or "not …" is not."""
    fact = condition.removeprefix("not ")
    return (fact in found) == (fact == condition)


def facts(values: Values, layer: int) -> set[str]:
    """Return what decides which tensors a layer has: entries that are true, and what others come to."""
    found = {name for name, value in values.items() if value is True}
    if isinstance(values.get("attention_bias"), list):
        found |= {f"attention_bias {projection}" for projection in values["attention_bias"]}
    if values.get("q_lora_rank") is not None:
        found.add("q_lora_rank")
    if values.get("kv_source_layers", {layer: layer})[layer] == layer:
        found.add("own keys")
    return found
