"""What is told of a class without importing it is what the class says; where it is not covered, the class is asked."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from kvconvert import configs
from kvconvert.convert.checkpoint import known_classes, loading
from kvconvert.convert.checkpoint.config_classes import class_values
from kvconvert.convert.checkpoint.known_classes import known_class, known_config, known_frequencies, known_generation
from kvconvert.convert.checkpoint.loading import check_accepts, check_opens, empty_model
from kvconvert.convert.errors import CheckpointError

sys.path.insert(0, str(Path(__file__).parent.parent / "scripts"))
import generate_known_classes

ROOT = Path(__file__).parent.parent
DEMO = configs.DEMO / "model"
KNOWN = sorted(name for name in known_classes._data()["classes"] if known_classes.is_known(name))
if not KNOWN:  # a version that is newer than the data, whose classes are asked themselves
    pytest.skip(f"the data has nothing of transformers {version('transformers')}", allow_module_level=True)

SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": None,
}
LATENT = {"qk_rope_head_dim": 4, "kv_lora_rank": 6, "q_lora_rank": None, "qk_nope_head_dim": 8, "v_head_dim": 8}
FULL, SLIDING = "full_attention", "sliding_attention"
LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 32}
ROPES: list[Any] = [
    *(None, {}, {"rope_type": "default"}, {"type": "linear", "factor": 2.0}, {"rope_type": "linear"}),
    *({"rope_type": "dynamic", "factor": 4}, {"rope_type": "llama3", **LLAMA3}, {"type": "llama3", "factor": 8.0}),
    *({"rope_type": "yarn", "factor": 4.0}, {"rope_type": "nope"}, {"rope_type": "default", "rope_theta": 5e5}),
    *({"rope_type": "default", "partial_rotary_factor": 0.5}, {"full_attention": {"rope_type": "default"}}),
    *({"rope_type": "linear", "factor": "2"}, {"rope_type": "default", "rope_theta": None}, "default"),
]
ANYTHING: list[Any] = [
    *(
        None,
        True,
        False,
        -1,
        0,
        1,
        2,
        3,
        4,
        8,
        63,
        64,
        10**12,
        0.0,
        1e-6,
        0.5,
        1.0,
        2.0,
        -0.5,
        float("inf"),
        "",
        "silu",
    ),
    *("gelu", "gelu_pytorch_tanh", "nope", "bfloat16", "float8_e4m3fn", [], [0], [0, 1], [0, 0], [1, 0], [FULL], {}),
    *([FULL, FULL], [SLIDING, FULL], ["nope", FULL], ["q_proj"], ["q_proj", "k_proj"], ["o_proj"], ["x"], [2, "3"]),
]
OTHER_KEYS = [
    *("architectures", "dtype", "torch_dtype", "transformers_version", "rope_theta", "rope_scaling", "rope_parameters"),
    *("partial_rotary_factor", "head_dim", "attention_bias", "mlp_bias", "qkv_bias", "layer_types", "sliding_window"),
    *("use_sliding_window", "max_window_layers", "quantization_config", "auto_map", "is_encoder_decoder", "num_labels"),
    *(
        "id2label",
        "output_attentions",
        "cache_implementation",
        "max_length",
        "attn_implementation",
        "hidden_activation",
    ),
    *("per_layer_config", "pretraining_tp", "_name_or_path", "rope_local_base_freq", "problem_type", "x"),
]


@dataclass(frozen=True)
class Header:
    name: str
    shape: tuple[int, ...]


def small(model_type: str) -> dict[str, Any]:
    fields = known_classes._entry(model_type)["fields"]
    config = {name: value for name, value in SIZES.items() if name in fields}
    if "kv_lora_rank" in fields:
        config |= {**LATENT, "first_k_dense_replace": 2}
    elif fields.get("head_dim", [[], None])[1:] != [None] or model_type == "hunyuan_v1_dense":
        config["head_dim"] = 8  # the default is another, or does not follow from the other sizes
    return {"model_type": model_type, **config}


@st.composite
def configs_of_classes(draw: st.DrawFn) -> dict[str, Any]:
    """A small config with some entries that its class or any other has, right, wrong, or left out."""
    model_type = draw(st.sampled_from(KNOWN))
    config = small(model_type)
    fields = known_classes._entry(model_type)["fields"]
    for name in draw(st.lists(st.sampled_from([*fields, *OTHER_KEYS]), max_size=4)):
        values = ROPES if name in ("rope_scaling", "rope_parameters") else ANYTHING
        if name == "architectures":
            values = [None, ["LlamaForCausalLM"], [known_classes._entry(model_type)["class"]], ["LlamaModel"], "x"]
        elif name in fields and fields[name][0] == ["bool"]:
            values = [True, False, *ANYTHING[:6]]
        config[name] = draw(st.sampled_from(values))
    for name in draw(st.lists(st.sampled_from(sorted(config.keys() - {"model_type"})), max_size=2)):
        if name in ("num_key_value_heads", "num_attention_heads", "head_dim", "pad_token_id"):  # others are too large
            config.pop(name, None)
    return config


def said_by_class(config: Mapping[str, Any]) -> Any:
    try:
        return class_values(config)
    except Exception as error:
        return f"refused: {error}"


@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
@given(config=configs_of_classes())
def test_a_config_is_unknown_or_what_its_class_says(config: dict[str, Any]) -> None:
    known = known_config(config)
    assert known is None or known == said_by_class(config)


@pytest.mark.parametrize("model_type", KNOWN)
def test_a_small_config_of_each_class_is_known(model_type: str) -> None:
    """Without this, the data could agree to nothing at all, and no other test would fail."""
    config = small(model_type)
    values = known_config(config)
    assert values == class_values(config)
    headers = [Header(*item) for item in known_classes._tensors(values or {}, known_classes._entry(model_type))]
    name = known_classes._entry(model_type)["class"]
    assert known_class(config, headers, ignored=loading._is_ignored) == name


@pytest.mark.parametrize(
    ("model_type", "entry", "value"),
    [
        *(("phi3", "resid_pdrop", 2), ("starcoder2", "residual_dropout", 2), ("llama", "initializer_range", 1.5)),
        *(("llama", "pad_token_id", 64), ("llama", "hidden_act", "nope"), ("qwen2", "layer_types", [])),
        *(("mistral", "num_hidden_layers", 10**9), ("llama", "rms_norm_eps", float("nan")), ("llama", "x", 1)),
        *(("llama", "quantization_config", {}), ("llama", "architectures", ["LlamaModel"])),
    ],
)
def test_what_a_class_may_refuse_is_unknown(model_type: str, entry: str, value: object) -> None:
    config = small(model_type)
    headers = [Header(*item) for item in known_classes._tensors(class_values(config), known_classes._entry(model_type))]
    assert known_class(config, headers, ignored=loading._is_ignored) is not None
    assert known_class({**config, entry: value}, headers, ignored=loading._is_ignored) is None


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    config=configs_of_classes(),
    change=st.sampled_from(["", "drop", "drop the head", "add", "rename", "reshape"]),
    data=st.data(),
)
def test_tensors_are_accepted_only_where_the_class_accepts_them(
    config: dict[str, Any], change: str, data: st.DataObject
) -> None:
    values = known_config(config)
    if values is None:
        return
    tensors = dict(known_classes._tensors(values, known_classes._entry(config["model_type"])))
    name = data.draw(st.sampled_from(sorted(tensors)))
    if change.startswith("drop"):
        tensors.pop("lm_head.weight" if change == "drop the head" else name, None)
    elif change in ("add", "rename"):
        shape = tensors[name] if change == "add" else tensors.pop(name)
        tensors[data.draw(st.sampled_from(["x", f"{name}.x", f"model.{name}", "model.rotary_emb.inv_freq"]))] = shape
    elif change == "reshape":
        tensors[name] = (*reversed(tensors[name]), 1)
    headers = [Header(*item) for item in tensors.items()]
    found = known_class(config, headers, ignored=loading._is_ignored)
    if not change:
        assert found is not None
    if found is not None:
        model, info = loading._built(config, headers, "it")
        loading._require_accepted("it", model, info, with_value_head=True)
        assert type(model).__name__ == found


@pytest.mark.parametrize("model_type", KNOWN)
def test_the_data_is_what_the_installed_class_says(model_type: str) -> None:
    entry = dict(known_classes._entry(model_type))
    assert version("transformers") in entry.pop("versions")
    assert generate_known_classes.describe(model_type) == entry


@pytest.mark.parametrize("constraints", ["constraints.txt", "constraints-oldest.txt"])
def test_the_data_has_the_tested_versions_of_common_classes(constraints: str) -> None:
    lines = (ROOT / "scripts" / constraints).read_text().splitlines()
    (tested,) = (line.partition("==")[2] for line in lines if line.startswith("transformers=="))
    classes = known_classes._data()["classes"]
    for model_type in ("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "phi3", "olmo2"):
        assert tested in {each for entry in classes[model_type] for each in entry["versions"]}


def test_another_version_of_transformers_is_asked_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    config = json.loads((DEMO / "config.json").read_bytes())
    assert known_config(config) is not None
    known_classes._entry.cache_clear()
    monkeypatch.setattr(known_classes, "installed", lambda: "5.17.0.dev0")
    try:
        assert known_config(config) is None
        assert known_frequencies(config) is None
    finally:
        known_classes._entry.cache_clear()


@pytest.mark.parametrize("model_type", KNOWN)
@pytest.mark.parametrize("scaled", [False, True])
def test_frequencies_are_those_of_the_class(model_type: str, scaled: bool) -> None:
    config = small(model_type) | ({"rope_scaling": {"rope_type": "llama3", **LLAMA3}} if scaled else {})
    known = known_frequencies(config)
    if known is not None:
        (buffer,) = (each for name, each in empty_model(config).named_buffers() if name.endswith("rotary_emb.inv_freq"))
        assert known == pytest.approx(buffer.tolist(), rel=1e-6)


def test_a_refusal_is_that_of_the_class() -> None:
    config = small("llama")
    tensors = [Header(*item) for item in known_classes._tensors(class_values(config), known_classes._entry("llama"))]
    assert check_accepts(config, tensors, "it") == "LlamaForCausalLM"
    with pytest.raises(CheckpointError, match=r"^it: LlamaForCausalLM does not accept its weights: 1 missing keys"):
        check_accepts(config, tensors[:-1], "it")


@pytest.mark.parametrize(
    ("name", "content", "is_known"),
    [
        ("generation_config.json", '{"temperature": 0.6, "eos_token_id": [1, 2], "do_sample": true}', True),
        ("generation_config.json", '{"max_new_tokens": 0}', False),
        ("generation_config.json", "{", False),
        ("adapter_config.json", "{}", False),
    ],
)
def test_a_directory_with_more_than_is_known_is_opened_by_transformers(
    name: str, content: str, is_known: bool, tmp_path: Path
) -> None:
    for file in ("config.json", "model.safetensors"):
        (tmp_path / file).write_bytes((DEMO / file).read_bytes())
    assert loading._known_directory(tmp_path) == "LlamaForCausalLM"
    (tmp_path / name).write_text(content)
    assert (loading._known_directory(tmp_path) is not None) == is_known


@pytest.mark.parametrize(
    ("name", "value"), [("temperature", "hot"), ("top_p", -1.0), ("max_length", True), ("cache_implementation", "x")]
)
def test_generation_settings_that_some_version_refuses_are_unknown(name: str, value: object) -> None:
    assert known_generation({"do_sample": True})
    assert not known_generation({"do_sample": True, name: value})


def imported(*arguments: str) -> set[str]:
    """The modules that a run of kvconvert has imported at its end."""
    code = (
        "import sys, kvconvert.cli.main as main\n"
        "try: main.app(sys.argv[1:])\n"
        "except SystemExit as error: assert error.code == 0, error.code\n"
        "print('MODULES', *sys.modules)"
    )
    run = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=True)
    return set(run.stdout.rpartition("MODULES ")[2].split())


def test_inspecting_a_known_class_imports_neither_torch_nor_transformers() -> None:
    modules = imported("inspect", str(DEMO))
    assert "kvconvert.convert.describe.inspection" in modules
    assert modules.isdisjoint({"torch", "transformers"})


def test_the_mean_of_a_known_class_is_taken_without_transformers(tmp_path: Path) -> None:
    modules = imported("mha2gqa", str(DEMO), "--groups", "2", "--method", "mean", "-o", str(tmp_path / "out"))
    assert "torch" in modules
    assert "transformers" not in modules
    assert check_opens(tmp_path / "out") == "LlamaForCausalLM"
    assert loading._opened(tmp_path / "out", device_map="meta")[0].config.num_key_value_heads == 2
