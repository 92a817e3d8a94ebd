"""JSON that others wrote: its limits, and the values of a config that no class is built with."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from conftest import CheckpointFactory
from kvconvert.convert import inspect
from kvconvert.convert.checkpoint import json_files
from kvconvert.convert.checkpoint.json_files import check_values, parse_json, read_object, shortened
from kvconvert.convert.errors import CheckpointError


def refusal(raw: bytes, **options: bool) -> str:
    with pytest.raises(CheckpointError) as caught:
        parse_json(raw, "x.json", **options)
    return str(caught.value).removeprefix("x.json: not readable as JSON ").strip("()")


@pytest.mark.parametrize(
    ("raw", "problem"),
    [
        (b"[" * 100_000, "nested deeper than 64 levels"),
        (b"[" * 65 + b"]" * 65, "nested deeper than 64 levels"),
        (b'{"a":' * 65 + b"1" + b"}" * 65, "nested deeper than 64 levels"),
        (b"1" * 5000, "Exceeds the limit (4300 digits) for integer string conversion: value has 5000 digits"),
        (b'{"a": "\xff"}', "'utf-8' codec can't decode byte 0xff in position 7: invalid start byte"),
        (b'{"a": ["\\ud800"]}', "half a character, a lone surrogate"),
        (b'{"\\uDFFF": 1}', "half a character, a lone surrogate"),
        (b'{"a": 1, "a": 2}', "the key 'a' is there twice, with different values"),
        (b"", "Expecting value: line 1 column 1 (char 0"),
    ],
)
def test_json_that_no_model_has(raw: bytes, problem: str) -> None:
    assert refusal(raw).startswith(problem)


def test_json_that_models_have() -> None:
    assert parse_json(b"[" * 64 + b"]" * 64, "x")
    assert parse_json(b'{"a": [1], "a": [1]}', "x") == {"a": [1]}
    assert parse_json(b'{"a": "\\ud83d\\ude00"}', "x") == {"a": "\N{GRINNING FACE}"}
    assert parse_json(b'{"time_step_limit": [0.0, Infinity]}', "x") == {"time_step_limit": [0.0, float("inf")]}
    assert refusal(b'{"a": 1, "a": 1}', unique=True) == "the key 'a' is there twice"


def test_the_number_of_values_is_limited(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(json_files, "_MAX_VALUES", 10)
    assert refusal(b"[" + b"1," * 10 + b"1]") == "more than 10 values"
    assert parse_json(b"[" + b"1," * 9 + b"1]", "x") == [1] * 10


def test_the_size_of_a_file_is_limited(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text('{"a": 1}')
    assert read_object(path, max_bytes=8) == {"a": 1}
    with pytest.raises(CheckpointError, match=r"a\.json: not readable as JSON \(more than 7 bytes\)"):
        read_object(path, max_bytes=7)


def test_what_is_no_object(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text("[1, 2]")
    with pytest.raises(CheckpointError, match=r"a\.json: expected a JSON object, found \[1, 2\]"):
        read_object(tmp_path / "a.json")


LONG = 10**400
VALUES: list[tuple[dict[str, Any], str]] = [
    ({"model_type": 3}, "model_type = 3, expected a text"),
    ({"model_type": ["llama"]}, r"model_type = \['llama'\], expected a text"),
    ({"architectures": "LlamaModel"}, "architectures = 'LlamaModel', expected a list of names"),
    ({"architectures": [3]}, r"architectures = \[3\], expected a list of names"),
    ({"num_labels": 10**9}, "num_labels = 1000000000, expected a whole number from 0 to 100000"),
    ({"num_labels": -1}, "num_labels = -1, expected a whole number from 0"),
    ({"id2label": [1]}, r"id2label = \[1\], expected an object with at most"),
    ({"num_hidden_layers": 10**9}, "num_hidden_layers = 1000000000, expected a whole number from 0 to 100000"),
    ({"num_hidden_layers": -2}, "num_hidden_layers = -2, expected"),
    ({"num_hidden_layers": "2"}, "num_hidden_layers = '2', expected"),
    ({"num_attention_heads": 2**40}, "num_attention_heads = 1099511627776, expected no number above 65536"),
    ({"n_routed_experts": 10**6}, "n_routed_experts = 1000000, expected no number above 65536"),
    ({"hidden_size": LONG}, r"hidden_size = 1000000000000000\d*\.\.\.0+, expected a finite number"),
    ({"hidden_size": 2**25}, "hidden_size = 33554432, expected a finite number of at most 16777216"),
    (
        {"rope_parameters": {"partial_rotary_factor": 2**53}},
        "rope_parameters has partial_rotary_factor = 9007199254740992, expected a number from 0 to 1",
    ),
    ({"rms_norm_eps": float("nan")}, "rms_norm_eps = nan, expected a finite number"),
    ({"text_config": {"rope_theta": float("inf")}}, r"x: text_config has rope_theta = inf, expected a finite number"),
]


@pytest.mark.parametrize(("config", "message"), VALUES)
def test_values_that_no_class_is_built_with(config: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        check_values(config, "x")


def test_values_that_configs_have() -> None:
    check_values(
        {
            "model_type": "llama",
            "num_labels": 2,
            "id2label": {"0": float("nan"), "num_hidden_layers": -1},
            "vision_feature_layer": -2,
            "num_key_value_heads": None,
            "time_step_limit": [0.0, float("inf")],
            "model_max_length": 10**30,
        },
        "x",
    )


def test_values_are_short_in_messages() -> None:
    assert len(shortened("a" * 10**6)) < 70
    assert len(shortened([["a" * 10**6] * 100] * 100)) < 1000


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": {}}, "model_type = {}, expected a text"),
        ({"num_hidden_layers": 90_000}, "num_hidden_layers = 90000, and there are 21 tensors"),
        ({"head_dim": LONG}, "head_dim = 10"),
        ({"model_type": "xglm", "max_position_embeddings": 65536}, "= 65536, expected at most 16384, since xglm has"),
        ({"hidden_size": "64"}, "hidden_size = '64', which the class of llama does not take"),
        ({"rope_parameters": 3}, "rope_parameters"),
        ({"configuration_files": [3]}, "configuration_files"),
    ],
)
def test_a_checkpoint_says_which_value_is_wrong(
    changes: dict[str, Any], message: str, make_checkpoint: CheckpointFactory
) -> None:
    source = make_checkpoint()
    config = json.loads((source / "config.json").read_text()) | changes
    (source / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=message):
        inspect(source)


RECORD = {
    **dict.fromkeys(("kvconvert_version", "source", "target", "method"), "x"),
    **{key: {"source": 8, "result": 2} for key in ("num_key_value_heads", "cache_bytes_per_token")},
}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"source": 3}, "source = 3, expected a text"),
        ({"num_key_value_heads": {"source": 8}}, "expected an object with the numbers source and result"),
        ({"latent": [1]}, r"latent = \[1\], expected an object with the numbers kv_lora_rank and qk_rope_head_dim"),
        ({"uptraining": {"tokens": "1"}}, "expected an object with the numbers tokens"),
        ({"cache_bytes_per_token": None}, "has num_key_value_heads, and no cache_bytes_per_token"),
        ({"target": None}, "has num_key_value_heads, and no target"),
    ],
)
def test_a_record_that_kvconvert_did_not_write(
    changes: dict[str, Any], message: str, make_checkpoint: CheckpointFactory
) -> None:
    """What a training run says in its card, hours later, is looked at when the checkpoint is opened."""
    source = make_checkpoint()
    (source / "kvconvert.json").write_text(json.dumps(RECORD))
    inspect(source)
    (source / "kvconvert.json").write_text(json.dumps(RECORD | changes))
    with pytest.raises(CheckpointError, match=rf"kvconvert\.json .*{message}"):
        inspect(source)
