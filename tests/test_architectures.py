"""Every architecture, on its real class: what pooling must preserve, and what it must save."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import (
    OVERRIDES,
    VOCAB_SIZE,
    CheckpointFactory,
    assert_gradients_everywhere,
    assert_same_function,
    key_value_heads,
)
from kvconvert.convert.architectures.source import Source
from kvconvert.convert.architectures.table import ARCHITECTURES, find_architecture
from kvconvert.convert.checkpoint.loading import load_model
from kvconvert.convert.checkpoint.opening import open_checkpoint
from kvconvert.convert.describe.inspection import inspect_checkpoint
from kvconvert.convert.errors import UnsupportedError
from kvconvert.convert.execute import execute
from kvconvert.convert.methods.gqa import Gqa

SEQ2SEQ = ("grouped_bart", "grouped_t5", "grouped_whisper")  # tests/test_seq2seq.py
VARIANTS = [
    (model_type, OVERRIDES.get(model_type, {}))
    for model_type, architecture in ARCHITECTURES.items()
    if model_type not in ("falcon", "gpt_bigcode", *SEQ2SEQ)  # tests/test_translations.py
] + [
    ("cohere", {"logit_scale": 1.0, "use_qk_norm": True}),
    ("phi", {"qk_layernorm": True}),
    ("stablelm", {"qk_layernorm": True}),
    ("olmoe", {"clip_qkv": 1.5}),
    ("grouped_decoder", {"qk_norm": True, "clip_qkv": 4.0}),
]
IDS = [model_type + "".join(f"-{flag}" for flag in flags if "q" in flag) for model_type, flags in VARIANTS]


def convert(source: Path, num_key_value_heads: int, output: Path) -> Path:
    with open_checkpoint(source) as checkpoint:
        plan = Gqa(num_key_value_heads).plan(Source.of(checkpoint))
        execute(plan, checkpoint, output, max_shard_bytes=60_000)
    return output


def logits(model: torch.nn.Module, input_ids: torch.Tensor) -> torch.Tensor:
    with torch.inference_mode():
        output: torch.Tensor = model(input_ids=input_ids, use_cache=False).logits
    return output


@pytest.fixture
def input_ids() -> torch.Tensor:
    return torch.randint(3, VOCAB_SIZE, (2, 12), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize(("model_type", "overrides"), VARIANTS, ids=IDS)
def test_pooling_equal_heads_changes_nothing(
    model_type: str,
    overrides: dict[str, Any],
    groups: int,
    make_checkpoint: CheckpointFactory,
    tmp_path: Path,
) -> None:
    if model_type == "diffllama" and groups == 1:
        groups = 2
    source = make_checkpoint(model_type, seed=groups, tie_groups=groups, max_shard_size="60KB", **overrides)
    original = load_model(source, dtype=torch.float32, device="cpu")
    converted = load_model(convert(source, groups, tmp_path / "out"), dtype=torch.float32, device="cpu")
    assert type(converted) is type(original)
    assert_same_function(original, converted, groups)


def test_pooling_different_heads_changes_the_logits(
    make_checkpoint: CheckpointFactory, tmp_path: Path, input_ids: torch.Tensor
) -> None:
    """The control of the test above: its assertion rejects a source whose heads differ."""
    source = make_checkpoint()
    expected = logits(load_model(source, dtype=torch.float32, device="cpu"), input_ids)
    found = logits(load_model(convert(source, 2, tmp_path / "out"), dtype=torch.float32, device="cpu"), input_ids)
    assert (found - expected).abs().max() > 0.1 * expected.abs().max()


@pytest.mark.parametrize(("model_type", "overrides"), VARIANTS, ids=IDS)
def test_each_head_is_the_float64_mean_of_its_group(
    model_type: str, overrides: dict[str, Any], make_checkpoint: CheckpointFactory, tmp_path: Path
) -> None:
    source = make_checkpoint(model_type, seed=3, dtype=torch.bfloat16, **overrides)
    original = load_model(source, dtype="auto", device="cpu")
    converted = load_model(convert(source, 2, tmp_path / "out"), dtype="auto", device="cpu")
    before, after = key_value_heads(original), key_value_heads(converted)
    assert before.keys() == after.keys()
    assert len(before) >= 2
    for name, runs in before.items():
        for run, pooled in zip(runs, after[name], strict=True):
            assert (len(run), len(pooled)) == (8, 2)
            for group in range(2):
                total = torch.stack([tensor.double() for tensor in run[4 * group : 4 * group + 4]]).sum(0)
                assert torch.equal(pooled[group], (total / 4).to(torch.bfloat16)), (name, group)
    kept = dict(converted.named_parameters())
    for name, parameter in original.named_parameters():
        if name in kept and kept[name].shape == parameter.shape and ".k_layernorm.norms." not in name:
            assert torch.equal(kept[name], parameter), name


@pytest.mark.parametrize(("model_type", "overrides"), VARIANTS, ids=IDS)
def test_gradients_reach_every_parameter(
    model_type: str, overrides: dict[str, Any], make_checkpoint: CheckpointFactory, tmp_path: Path
) -> None:
    source = make_checkpoint(model_type, **overrides)
    model = load_model(convert(source, 2, tmp_path / "out"), dtype=torch.float32, device="cpu")
    assert_gradients_everywhere(model)


@pytest.mark.parametrize(
    ("model_type", "overrides", "reason"),
    [
        ("llama", {}, None),
        ("qwen3", {}, "keys are normalised after the projection"),
        ("nanochat", {}, "keys are normalised after the projection"),
        ("stablelm", {}, None),
        ("stablelm", {"qk_layernorm": True}, "keys are normalised after the projection"),
        ("olmo", {"clip_qkv": 8.0}, "queries, keys and values are clipped"),
        ("dbrx", OVERRIDES["dbrx"], "queries, keys and values are clipped"),
    ],
)
def test_inspection_says_where_pooling_is_approximate(
    model_type: str, overrides: dict[str, Any], reason: str | None, make_checkpoint: CheckpointFactory
) -> None:
    with open_checkpoint(make_checkpoint(model_type, **overrides)) as checkpoint:
        found = inspect_checkpoint(checkpoint).approximation
    assert (found is None) == (reason is None)
    assert (found or "").startswith(reason or "")


def test_differential_attention_needs_an_even_number_of_heads(make_checkpoint: CheckpointFactory) -> None:
    with open_checkpoint(make_checkpoint("diffllama")) as checkpoint:
        with pytest.raises(UnsupportedError, match="diffllama needs an even number of K/V heads, not 1"):
            Gqa(1).plan(Source.of(checkpoint))
        gqa, mqa, *_ = inspect_checkpoint(checkpoint).targets
    assert gqa.groups == (2, 4)
    assert not mqa.possible


def test_an_unknown_architecture_lists_the_known_ones(make_checkpoint: CheckpointFactory) -> None:
    with open_checkpoint(make_checkpoint("rwkv")) as checkpoint:
        with pytest.raises(UnsupportedError, match="model_type 'rwkv' is not supported") as raised:
            find_architecture(checkpoint)
    assert raised.value.hint == "docs/architectures.md lists what is supported"


def test_quantised_checkpoints_are_refused(make_checkpoint: CheckpointFactory) -> None:
    source = make_checkpoint()
    config = json.loads((source / "config.json").read_text()) | {"quantization_config": {"quant_method": "gptq"}}
    (source / "config.json").write_text(json.dumps(config))
    with open_checkpoint(source) as checkpoint:
        with pytest.raises(UnsupportedError, match="the checkpoint is quantised"):
            Gqa(2).plan(Source.of(checkpoint))
