"""Write convert/checkpoint/known_classes.json: what the installed classes of transformers and of kvconvert hold.

    python scripts/generate_known_classes.py

What is there of other versions of transformers stays. For a new version, install it and run this again:

    pip install --no-deps --target /tmp/other transformers==5.20.0
    PYTHONPATH=/tmp/other python scripts/generate_known_classes.py

Each class is built on the meta device, from configs whose sizes all differ, with each of its switches on and off. So it
shows of itself which entries its config has and what it computes of them, and which tensors there are, and when. A
class that does more than `known_classes` has words for is left out, which is said, and is asked itself.
"""

from __future__ import annotations

import itertools
import json
import math
import re
import sys
import types
import typing
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
import transformers
from kvconvert.convert.checkpoint import known_classes
from kvconvert.convert.checkpoint.config_classes import class_config, class_values
from kvconvert.convert.checkpoint.known_classes import DATA_NAME, RULES, facts, holds, size
from kvconvert.convert.checkpoint.loading import empty_model
from transformers.activations import ACT2FN

DATA = Path(known_classes.__file__).with_name(DATA_NAME)
MODEL_TYPES = (
    *("arcee", "cohere", "cohere2", "cross_layer_decoder", "deepseek_v3", "ernie4_5", "gemma"),
    *("gemma2", "glm", "glm4", "granite", "helium", "hunyuan_v1_dense", "llama", "mistral"),
    *("nemotron", "olmo", "olmo2", "phi3", "qwen2", "qwen3", "seed_oss", "stablelm", "starcoder2"),
)
# every size differs from every other, and from what others come to
_SIZES: dict[str, Any] = {
    "vocab_size": 211,
    "hidden_size": 48,
    "intermediate_size": 44,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}
_LATENT_SIZES = {
    "q_lora_rank": 7,
    "kv_lora_rank": 5,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 9,
    "v_head_dim": 17,
    "first_k_dense_replace": 99,
}
_EXPRESSIONS = (
    *("vocab_size", "hidden_size", "intermediate_size", "2*intermediate_size", "head_dim", "q_lora_rank"),
    *("num_attention_heads*head_dim", "num_key_value_heads*head_dim", "kv_lora_rank", "kv_lora_rank+qk_rope_head_dim"),
    "num_attention_heads*head_dim+2*num_key_value_heads*head_dim",
    "num_attention_heads*qk_nope_head_dim+num_attention_heads*qk_rope_head_dim",
    "num_attention_heads*qk_nope_head_dim+num_attention_heads*v_head_dim",
    *("num_attention_heads*v_head_dim", "num_attention_heads", "num_key_value_heads", "1"),
)
_NO_SWITCHES = ("use_cache", "tie_word_embeddings", "use_sliding_window", "output_router_logits", "norm_topk_prob")
_ACTIVATIONS = ("gelu", "gelu_new", "gelu_pytorch_tanh", "relu", "relu2", "silu")


class NotSimpleError(Exception):
    """A class that does more than the data has words for."""


def describe(model_type: str) -> dict[str, Any]:
    """What the data has of a class. Raises NotSimpleError."""
    declared = _fields(model_type)
    base = {"model_type": model_type} | {name: value for name, value in _SIZES.items() if name in declared}
    if "kv_lora_rank" in declared:
        base |= _LATENT_SIZES
    elif "head_dim" in declared:
        base["head_dim"] = 10
    elif _reads_head_dim(base):
        base["head_dim"] = 10
        declared["head_dim"] = [["int"]]
    tensors, class_name = _tensors(base, declared)
    entry = {
        "class": class_name,
        "fields": declared,
        "rules": _rules(base, declared),
        "rope": _rope(model_type, declared),
        "tied": _tied(base),
        "tensors": tensors,
    }
    for config in (base, {**base, "rope_theta": 5000.0}, {**base, "partial_rotary_factor": 0.75}):
        if known_classes.values_of(config, entry) not in (None, class_values(config)):
            raise NotSimpleError(f"{model_type}: its config has other values than the data says")
    return entry


def _fields(model_type: str) -> dict[str, list[Any]]:
    """The entries of a config that are the class's own, each with the types that it takes and its default."""
    config_class = type(class_config({"model_type": model_type}))
    every, values = (
        {field.name for field in fields(transformers.PreTrainedConfig)},
        class_values({"model_type": model_type}),
    )
    hints = typing.get_type_hints(config_class, localns={"torch": torch})
    declared = {}
    for field in fields(config_class):
        if field.name in every:
            continue
        taken = sorted(set(_types(hints[field.name])))
        name = config_class.attribute_map.get(field.name, field.name)
        default = field.default
        if default is None and not _depends(model_type, name):
            default = values[name]
            taken = taken if default is None else [each for each in taken if each != "None"]
        declared[name] = [taken, default]
    return declared


def _types(hint: Any) -> Iterator[str]:
    """The names of the types in a union, of those that JSON has."""
    if hint is type(None):
        yield "None"
    elif hint in (int, float, bool, str):
        yield hint.__name__
    elif str(hint) in ("list[int]", "list[str]"):
        yield str(hint)
    elif typing.get_origin(hint) in (typing.Union, types.UnionType):
        for part in typing.get_args(hint):
            yield from _types(part)


def _depends(model_type: str, name: str) -> bool:
    """Whether what a class has in place of a null depends on other entries."""
    small = {"hidden_size": 24, "num_attention_heads": 2, "num_hidden_layers": 2}
    large = {"hidden_size": 70, "num_attention_heads": 5, "num_hidden_layers": 3}
    single = {} if name == "num_key_value_heads" else {"num_key_value_heads": 1}
    found = [class_values({"model_type": model_type, **sizes, **single}).get(name) for sizes in (small, large)]
    return name == "rope_parameters" or found[0] != found[1]


def _reads_head_dim(base: Mapping[str, Any]) -> bool:
    """Whether a class without such an entry takes a head_dim that is there nevertheless, in all its projections."""
    shapes = [_shapes({**base, "head_dim": head_dim}) for head_dim in (8, 10)]
    queries = {shape[0] for name, shape in shapes[1].items() if name.endswith(("q_proj.weight", "qkv_proj.weight"))}
    norms = [name for name, shape in shapes[1].items() if "norm" in name and 8 in shape]
    return shapes[0] != shapes[1] and queries <= {60, 120} and not norms


def _model(config: Mapping[str, Any]) -> Any:
    with torch.device("meta"):
        return transformers.AutoModelForCausalLM.from_config(class_config(config))


def _shapes(config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in _model(config).state_dict().items()}


def _tied(base: Mapping[str, Any]) -> list[str]:
    """The tensors that need not be there where `tie_word_embeddings` is set."""
    return sorted(_model({**base, "tie_word_embeddings": True}).all_tied_weights_keys)


def _rules(base: Mapping[str, Any], declared: Mapping[str, list[Any]]) -> list[str]:
    """The rules by which a class computes entries."""
    model_type = base["model_type"]
    variants: list[dict[str, Any]] = [{}, {"num_hidden_layers": 9}, {"hidden_size": 60, "num_attention_heads": 5}]
    if "use_sliding_window" in declared:
        used = {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 2}
        variants += [used, {**used, "sliding_window": None}, {**used, "use_sliding_window": False}]
    unstated = {key: value for key, value in base.items() if key not in ("num_key_value_heads", "head_dim")}
    numbers: list[dict[str, Any]] = [{"num_key_value_heads": 1}]
    numbers += [{"num_key_value_heads": 1, "head_dim": 14}] if "head_dim" in base else []
    taken, default = declared["num_key_value_heads"]
    numbers += [{}] if default is None else []
    numbers += [{"num_key_value_heads": None}] if "None" in taken else []
    configs = [{**unstated, **variant, **number} for variant in variants for number in numbers]
    found: list[str] = []
    computed = [name for name, _ in RULES.values()]
    for name in dict.fromkeys(computed):
        cases = [(config, class_values(config)) for config in configs]
        if all(name not in values for _, values in cases):
            continue
        if all(_simple(config, declared).get(name, "absent") == values.get(name, "absent") for config, values in cases):
            continue
        for rule, (target, value) in RULES.items():
            if target == name and all(_matches(value, config, declared, values, name) for config, values in cases):
                found.append(rule)
                break
        else:
            raise NotSimpleError(f"{model_type}: {name}")
    order = list(RULES)
    return sorted(found, key=order.index)


def _simple(config: Mapping[str, Any], declared: Mapping[str, list[Any]]) -> dict[str, Any]:
    return {name: default[0] for name, (_, *default) in declared.items() if default} | dict(config)


def _matches(value: Any, config: Any, declared: Any, values: Mapping[str, Any], name: str) -> bool:
    # what the rule reads is what the class has, but for the entry that is asked about
    given = {**values, name: _simple(config, declared).get(name)}
    try:
        return bool(value(given) == values[name])
    except KeyError:
        return False


def _rope(model_type: str, declared: Mapping[str, Any]) -> dict[str, Any] | None:
    """The defaults of a class's rotary settings, and the kinds that it takes."""
    if "rope_parameters" not in declared:
        return None
    default = class_values({"model_type": model_type})["rope_parameters"]
    if not isinstance(default, dict) or default.get("rope_type") != "default":
        raise NotSimpleError(f"{model_type}: rope_parameters is {default}")
    if default.keys() - {"rope_type", "rope_theta", "partial_rotary_factor"}:
        raise NotSimpleError(f"{model_type}: rope_parameters has {sorted(default)}")
    rope: dict[str, Any] = {"rope_theta": default["rope_theta"], "types": ["default"], "nominal": []}
    if "partial_rotary_factor" in default:
        rope["partial_rotary_factor"] = default["partial_rotary_factor"]
        stated = class_values({"model_type": model_type, "partial_rotary_factor": 0.75})
        is_moved = stated["rope_parameters"]["partial_rotary_factor"] == 0.75 and "partial_rotary_factor" not in stated
        rope["reads_partial_rotary_factor"] = is_moved
    for kind in known_classes.ROPE_KEYS:
        values = {"factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8}
        settings = {"rope_type": kind, **{key: values[key] for key in sorted(known_classes.ROPE_KEYS[kind])}}
        config = {"model_type": model_type, "rope_scaling": settings, "num_hidden_layers": 1}
        try:
            _model(config)
        except Exception:  # a class refuses in its own words
            continue
        rope["types"] = sorted({*rope["types"], kind})
        if kind in ("default", "llama3") and _rotates_so(config):
            rope["nominal"] = sorted({*rope["nominal"], kind})
    return rope


def _rotates_so(config: Mapping[str, Any]) -> bool:
    """Whether a class computes the frequencies that `rope_frequencies` does."""
    frequencies = [
        buffer.tolist() for name, buffer in empty_model(config).named_buffers() if name.endswith("rotary_emb.inv_freq")
    ]
    values = class_values(config)
    expected = known_classes.rope_frequencies(values, values["rope_parameters"])
    return (
        len(frequencies) == 1
        and len(frequencies[0]) == len(expected)
        and all(math.isclose(*pair, rel_tol=1e-5) for pair in zip(frequencies[0], expected, strict=True))
    )


def _tensors(base: Mapping[str, Any], declared: Mapping[str, list[Any]]) -> tuple[dict[str, list[Any]], str]:
    """The tensors of a class, each with its shape and what must be so for it to be there; and the name of the class."""
    names = [name for name, (taken, *_) in declared.items() if "bool" in taken and name not in _NO_SWITCHES]
    settings: list[dict[str, Any]] = [
        dict(zip(names, on, strict=True)) for on in itertools.product((False, True), repeat=len(names))
    ]
    if "list[str]" in declared.get("attention_bias", [[]])[0]:
        projections = ("q_proj", "k_proj", "v_proj", "o_proj")
        chosen = [list(itertools.compress(projections, on)) for on in itertools.product((0, 1), repeat=4)]
        settings = [{**each, "attention_bias": biases} for each in settings for biases in chosen]
    if "q_lora_rank" in base:
        settings = [{**each, **extra} for each in settings for extra in ({}, {"q_lora_rank": None})]
    if "kv_source_layers" in declared:
        settings = [{**each, "kv_source_layers": sources} for each in settings for sources in ([0, 1, 2], [0, 0, 2])]
    cases: list[set[str]] = []
    shapes_of: dict[str, tuple[int, ...]] = {}
    present: dict[str, set[int]] = {}
    class_name = type(_model(base)).__name__
    for setting in settings:
        try:
            config = {**base, **setting}
            shapes, values = _shapes(config), class_values(config)
        except Exception as error:  # a class refuses in its own words
            raise NotSimpleError(f"{base['model_type']}: {setting}: {error}") from error
        for layer in range(base["num_hidden_layers"]):
            cases.append(facts(values, layer))
            for name, shape in shapes.items():
                template, number = _template(name)
                if number not in (None, layer):
                    continue
                if shapes_of.setdefault(template, shape) != shape:
                    raise NotSimpleError(f"{name}: {shape} and {shapes_of[template]}")
                present.setdefault(template, set()).add(len(cases) - 1)
    values = class_values(base)
    return {
        template: [
            [_expression(part, values, template) for part in shape],
            *_conditions(present[template], cases, template),
        ]
        for template, shape in shapes_of.items()
    }, class_name


def _template(name: str) -> tuple[str, int | None]:
    found = re.search(r"\.(\d+)\.", name)
    if found is None:
        return name, None
    return f"{name[: found.start(1)]}{{layer}}{name[found.end(1) :]}", int(found[1])


def _expression(part: int, values: Mapping[str, Any], name: str) -> str:
    """The first expression that comes to a size: others do too only where a class has no head_dim of its own."""
    for expression in _EXPRESSIONS:
        if {*re.findall(r"[a-z]\w+", expression)} - {"head_dim"} <= values.keys() and size(expression, values) == part:
            return expression
    raise NotSimpleError(f"{values['model_type']}: {name} has a size of {part}")


def _conditions(present: set[int], cases: list[set[str]], name: str) -> list[str]:
    """The facts that hold in all cases in which a tensor is there, and together in no other."""
    names = sorted(set().union(*cases))
    conditions = [fact for fact in names if all(fact in cases[index] for index in present)]
    conditions += [f"not {fact}" for fact in names if all(fact not in cases[index] for index in present)]
    constant = set.intersection(*cases)
    conditions = [condition for condition in conditions if condition not in constant]
    holding = {index for index, case in enumerate(cases) if all(holds(condition, case) for condition in conditions)}
    if holding != present:
        raise NotSimpleError(f"{name}: there under conditions that are no conjunction")
    return conditions


def merged(data: Mapping[str, list[dict[str, Any]]], model_type: str, entry: dict[str, Any]) -> list[dict[str, Any]]:
    """The entries of a `model_type` with that of the installed version, versions that say the same being one entry."""
    installed = transformers.__version__
    kept = [
        {**old, "versions": [each for each in old["versions"] if each != installed]} for old in data.get(model_type, ())
    ]
    same = [old for old in kept if {**old, "versions": 0} == {**entry, "versions": 0}]
    others = [old for old in kept if old not in same and old["versions"]]
    versions = {installed, *itertools.chain(*(old["versions"] for old in same))}
    return sorted([*others, {"versions": _sorted(versions), **entry}], key=lambda old: _numbers(old["versions"][0]))


def _sorted(versions: Iterable[str]) -> list[str]:
    return sorted(versions, key=_numbers)


def _numbers(version: str) -> list[int]:
    return [int(part) for part in re.findall(r"\d+", version)]


def shared() -> dict[str, Any]:
    """What the data has of all classes: activations, and entries of config.json that configs drop."""
    dropped = transformers.GenerationConfig._get_default_generation_params()
    return {
        "activations": [name for name in _ACTIVATIONS if name in ACT2FN],
        "dropped": sorted(dropped),
    }


def main() -> None:
    data = json.loads(DATA.read_text()) if DATA.exists() else {"classes": {}}
    for name, values in shared().items():
        # what some version does not have is known of none
        data[name] = sorted(set(values) & set(data.get(name, values)))
    DATA.write_text(written(data))  # what entries are compared with
    for model_type in MODEL_TYPES:
        try:
            data["classes"][model_type] = merged(data["classes"], model_type, describe(model_type))
        except NotSimpleError as error:
            print(f"left out of {transformers.__version__}: {error}", file=sys.stderr)
    DATA.write_text(written(data))


def written(data: Mapping[str, Any]) -> str:
    """The data as JSON, each entry of a config and each tensor on a line of its own."""
    lines = [f'"{name}": {json.dumps(value)},' for name, value in data.items() if name != "classes"]
    classes = []
    for model_type, entries in data["classes"].items():
        blocks = []
        for entry in entries:
            rows = []
            for name, value in entry.items():
                inner = (
                    [f"   {json.dumps(key)}: {json.dumps(each)}" for key, each in value.items()]
                    if name in ("fields", "tensors")
                    else []
                )
                rows.append(f'  "{name}": ' + ("{\n" + ",\n".join(inner) + "\n  }" if inner else json.dumps(value)))
            blocks.append(" {\n" + ",\n".join(rows) + "\n }")
        classes.append(f'"{model_type}": [\n' + ",\n".join(blocks) + "\n]")
    return "{\n" + "\n".join(lines) + '\n"classes": {\n' + ",\n".join(classes) + "\n}\n}\n"


if __name__ == "__main__":
    main()
