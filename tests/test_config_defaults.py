"""What a config.json leaves to its class means what the source's class has, in the result too, whatever its class."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from functools import cache
from typing import Any

import pytest
import transformers
from accelerate import init_empty_weights
from kvconvert.convert import ARCHITECTURES, ROUTES, Checkpoint, Cla, Gqa, Mla
from kvconvert.convert.checkpoint.config_classes import class_config, full_config
from kvconvert.convert.checkpoint.tensors import TensorInfo
from kvconvert.convert.errors import CheckpointError
from kvconvert.convert.methods.method import Method
from kvconvert.convert.runtime import RUNTIME_CLASSES
from kvconvert.convert.translations.cross_layer import CROSS_LAYER, LATENT_SOURCES
from kvconvert.convert.translations.qwen import _CLASS, QWEN_TO_QWEN2

# depth is that of a small model, everything else the class's default
SHALLOW: dict[str, dict[str, Any]] = {
    "bart": {"encoder_layers": 1, "decoder_layers": 2},
    "whisper": {"encoder_layers": 1, "decoder_layers": 2},
    "gpt_neo": {"num_layers": 2, "attention_types": [[["global", "local"], 1]]},
    "gpt_bigcode": {"n_layer": 2, "multi_query": False},
    "dbrx": {"n_layers": 2, "attn_config": {"kv_n_heads": 16, "rope_theta": 10000.0}},
    "falcon": {"num_hidden_layers": 2, "multi_query": False},
    "hunyuan_v1_dense": {"num_hidden_layers": 2, "head_dim": 128},  # without it the class cannot be built
    "nemotron": {"num_hidden_layers": 2, "num_key_value_heads": 48},  # nor without these
    "t5": {"num_layers": 2},
    "mt5": {"num_layers": 2},
}
SOME_HEADS = {"falcon": 1, "t5": 4, "mt5": 3, "whisper": 3}
ROWS = sorted((set(ARCHITECTURES) | set(ROUTES)) - set(RUNTIME_CLASSES) - {"qwen"})


@cache
def saved(model_type: str) -> tuple[dict[str, Any], dict[str, TensorInfo]]:
    """A config.json with every key that its class has, and the headers of the weights."""
    config = class_config({"model_type": model_type, **SHALLOW.get(model_type, {"num_hidden_layers": 2})})
    mapping = (
        transformers.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING,
        transformers.MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING,
        transformers.MODEL_FOR_CAUSAL_LM_MAPPING,
    )
    model_class: Any = next(found[type(config)] for found in mapping if type(config) in found)
    with init_empty_weights():
        model = model_class(copy.deepcopy(config))
    raw = full_config(config.to_dict() | {"model_type": model_type}) | {"architectures": [model_class.__name__]}
    headers = {
        name: TensorInfo(name, "BF16", tuple(tensor.shape), "model.safetensors", 0, 2 * tensor.numel())
        for name, tensor in model.state_dict().items()
    }
    return raw, headers


def checkpoint(model_type: str, without: tuple[str, ...] = ()) -> Checkpoint:
    raw, headers = saved(model_type)
    config = {name: copy.deepcopy(value) for name, value in raw.items() if name not in without}
    return Checkpoint("model", None, config, headers, 0)


def redundant(model_type: str) -> list[str]:
    """The keys without which the class reads the same config."""
    raw, _ = saved(model_type)
    found = []
    for name in raw:
        shorter = {key: value for key, value in raw.items() if key != name}
        try:
            same = full_config(shorter) == full_config(raw)
        except Exception:  # what no class can be built without
            same = False
        if same and name not in ("model_type", "architectures"):
            found.append(name)
    return found


def methods(model_type: str) -> list[Method]:
    """Every kind of result that a row can have."""
    found: list[Method] = [Gqa(2 if model_type == "diffllama" else 1)]
    if model_type in ROUTES:
        found.append(Gqa(SOME_HEADS.get(model_type, 4)))
    if model_type in CROSS_LAYER:
        found.append(Cla(share=2))
    if model_type in LATENT_SOURCES and model_type != "mistral":  # whose default window no latent has
        found += [Mla(64, 64), Mla(64, 64, "exact", "gain", rope_pairs=tuple((pair, 0) for pair in range(32)))]
    return found


def results(source: Checkpoint, chosen: list[Method]) -> Iterator[Any]:
    """What becomes of a checkpoint by these methods: the config as its class reads it, and all else of the plan."""
    for method in chosen:
        with method.source(source) as view:
            method.check(view)
            plan = method.resolve(view).plan(view)
        yield method, full_config(plan.config), plan.source, plan.result, plan.steps, plan.route


@pytest.mark.parametrize("model_type", ROWS)
def test_a_key_that_the_class_implies_may_be_left_out(model_type: str) -> None:
    every = methods(model_type)
    quick = [method for method in every if not isinstance(method, Mla)]  # a latent's config is made of that of Cla
    keys = redundant(model_type)
    assert len(keys) > 5
    expected = list(results(checkpoint(model_type), every))
    assert list(results(checkpoint(model_type, tuple(keys)), every)) == expected
    for name in keys:
        assert list(results(checkpoint(model_type, (name,)), quick)) == expected[: len(quick)], name


def test_a_config_that_says_nothing_but_its_class() -> None:
    config = class_config({"model_type": "gpt2"})
    with init_empty_weights():
        model = transformers.GPT2LMHeadModel(config)
    headers = {
        name: TensorInfo(name, "F32", tuple(tensor.shape), "model.safetensors", 0, 4 * tensor.numel())
        for name, tensor in model.state_dict().items()
    }
    with Gqa(1).source(Checkpoint("model", None, {"model_type": "gpt2"}, headers, 0)) as view:
        plan = Gqa(1).plan(view)
    expected = {"n_layer": 12, "n_head": 12, "n_embd": 768, "n_positions": 1024, "eos_token_id": 50256}
    assert {name: plan.config[name] for name in expected} == expected
    assert plan.source.num_key_value_heads == 12


def test_the_first_llama_config_becomes_a_latent_of_its_own_length() -> None:
    raw, headers = saved("llama")
    config = {name: raw[name] for name in ("architectures", "hidden_size", "num_attention_heads", "num_hidden_layers")}
    config |= {"model_type": "llama", "max_sequence_length": 2048}  # a name that no class reads
    source = Checkpoint("model", None, config, headers, 0)
    for method in methods("llama")[1:]:
        with method.source(source) as view:
            plan = method.resolve(view).plan(view)
        assert plan.config["max_position_embeddings"] == 2048


def test_the_class_beside_the_first_qwen_has_its_own_defaults() -> None:
    raw = {**_CLASS, "model_type": "qwen", "seq_length": 2048}
    expected = QWEN_TO_QWEN2.make_config(Checkpoint("model", None, raw, {}, 0))
    assert expected["intermediate_size"] == 11008  # Qwen counts both halves
    for name in _CLASS:
        shorter = {key: value for key, value in raw.items() if key != name}
        assert QWEN_TO_QWEN2.make_config(Checkpoint("model", None, shorter, {}, 0)) == expected, name


def test_a_config_that_its_class_cannot_hold_is_named() -> None:
    broken = Checkpoint("model", None, {"model_type": "llama", "num_hidden_layers": "two"}, {}, 0)
    with pytest.raises(CheckpointError, match=r"^model: config\.json has num_hidden_layers = 'two', which the"):
        broken.config_int("num_hidden_layers")


def test_a_number_of_heads_under_two_names_changes_under_both() -> None:
    raw, headers = saved("gpt_bigcode")
    assert raw["num_key_value_heads"] == 12
    with Gqa(1).source(Checkpoint("model", None, raw, headers, 0)) as view:
        config = Gqa(1).plan(view).config
    assert config["multi_query"] is True
    assert config["num_key_value_heads"] == 1


def test_reading_a_config_does_not_write_into_it() -> None:
    raw = {"model_type": "llama", "rope_scaling": {"type": "linear", "factor": 2.0}}
    before = copy.deepcopy(raw)
    assert full_config(raw)["rope_parameters"]["rope_type"] == "linear"
    assert raw == before
