"""Models with another head than a language model's: classifiers, answers to questions, reward and value heads."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from conftest import TOKENS, CheckpointFactory, build_model, build_tokenizer, tie_heads
from kvconvert.convert import Calibration, Cla, Gqa, Mla, convert, inspect
from kvconvert.convert.checkpoint.loading import load_model
from kvconvert.convert.errors import CheckpointError, InputError, UnsupportedError
from safetensors.torch import load_file, save_file
from transformers import AutoConfig

COMMANDS = ["mha2gqa", "mha2mqa", "mha2cla", "mha2mla"]


def build(class_name: str, model_type: str, directory: Path, **overrides: Any) -> Any:
    """A tiny model of a class with another head, whose K/V heads are equal in groups of four."""
    build_model(model_type, **overrides).save_pretrained(directory)
    config = AutoConfig.from_pretrained(directory, num_labels=3)
    torch.manual_seed(0)
    model = getattr(transformers, class_name)(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3)
    tie_heads(model, 2)
    model.save_pretrained(directory)
    build_tokenizer().save_pretrained(directory)
    return model


def outputs(model: Any) -> list[torch.Tensor]:
    with torch.inference_mode():
        found = model(input_ids=TOKENS, use_cache=False)
    return [getattr(found, name) for name in ("logits", "start_logits", "end_logits") if hasattr(found, name)]


@pytest.mark.parametrize(
    ("class_name", "model_type"),
    [
        ("LlamaForSequenceClassification", "llama"),
        ("Qwen2ForTokenClassification", "qwen2"),
        ("LlamaForQuestionAnswering", "llama"),  # its tensors are named transformer.*
        ("MistralForQuestionAnswering", "mistral"),
        ("FalconForSequenceClassification", "falcon"),
    ],
)
def test_a_head_stays_where_the_class_stays(class_name: str, model_type: str, tmp_path: Path) -> None:
    overrides = {"multi_query": False} if model_type == "falcon" else {}
    model = build(class_name, model_type, tmp_path / "model", **overrides)
    inspection = inspect(tmp_path / "model")
    assert inspection.head == class_name
    assert [target.possible for target in inspection.targets] == [True, True, False, False]
    result = convert(tmp_path / "model", Gqa(2), tmp_path / "out")
    assert result.opened_as == class_name
    found = outputs(getattr(transformers, class_name).from_pretrained(tmp_path / "out"))
    expected = outputs(model)
    assert len(found) == len(expected) > 0
    for one, other in zip(found, expected, strict=True):
        assert other.abs().max() > 0.1
        torch.testing.assert_close(one, other, rtol=0, atol=1e-5 * other.abs().max().item())


@pytest.mark.parametrize("class_name", ["LlamaForSequenceClassification", "LlamaForQuestionAnswering"])
def test_heads_are_merged_on_a_text(class_name: str, tmp_path: Path, prose_file: Path) -> None:
    model = build(class_name, "llama", tmp_path / "model")
    text = Calibration(prose_file, num_tokens=256, sequence_length=64)
    convert(tmp_path / "model", Gqa(2, merge="svd"), tmp_path / "out", calibration=text)
    found = outputs(getattr(transformers, class_name).from_pretrained(tmp_path / "out"))
    for one, other in zip(found, outputs(model), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-3 * other.abs().max().item())


@pytest.mark.parametrize("method", [Cla(share=2), Mla(16, 4)], ids=["cla", "mla"])
def test_a_head_that_the_class_of_the_result_lacks(method: Any, tmp_path: Path) -> None:
    build("LlamaForSequenceClassification", "llama", tmp_path / "model")
    calibration = Calibration(weights_only=True) if isinstance(method, Mla) else None
    reason = (
        "it has another head than a language model's (LlamaForSequenceClassification), and cross_layer_decoder, the "
        "class that it would become, has no such head"
    )
    with pytest.raises(UnsupportedError) as raised:
        convert(tmp_path / "model", method, tmp_path / "out", calibration=calibration)
    assert str(raised.value) == f"{tmp_path / 'model'}: {reason}"
    assert [target.reason for target in inspect(tmp_path / "model").targets[2:]] == [reason, reason]


def test_a_class_without_grouped_attention(make_checkpoint: CheckpointFactory, tmp_path: Path) -> None:
    source = make_checkpoint("gpt2")
    rename(source, "GPT2ForSequenceClassification")
    for action in (lambda: inspect(source), lambda: convert(source, Gqa(2), tmp_path / "out")):
        with pytest.raises(UnsupportedError, match=r"than a language model's \(GPT2ForSequenceClassification\)"):
            action()


def rename(source: Path, architecture: str) -> None:
    config = json.loads((source / "config.json").read_text()) | {"architectures": [architecture]}
    (source / "config.json").write_text(json.dumps(config))


def add(source: Path, *names: str) -> None:
    tensors = load_file(source / "model.safetensors")
    save_file(tensors | {name: torch.ones(1, 64) for name in names}, source / "model.safetensors")


def test_a_value_head_stays_beside_a_language_model(make_checkpoint: CheckpointFactory, tmp_path: Path) -> None:
    """As TRL's AutoModelForCausalLMWithValueHead saves it."""
    source = make_checkpoint()
    add(source, "v_head.summary.weight")
    output = convert(source, Gqa(2), tmp_path / "out").output
    assert torch.equal(load_file(output / "model.safetensors")["v_head.summary.weight"], torch.ones(1, 64))
    inspection = inspect(source)
    assert inspection.head == "a value head, v_head.summary.weight"
    assert [target.command for target in inspection.targets if target.possible] == COMMANDS[:2]
    with pytest.raises(UnsupportedError, match=r"\(a value head, v_head\.summary\.weight\)"):
        convert(source, Cla(share=2), tmp_path / "cla")
    # training would lose it
    with pytest.raises(CheckpointError, match=r"1 unexpected keys, first v_head\.summary\.weight"):
        load_model(output, dtype=torch.float32, device="cpu")


@pytest.mark.parametrize("architecture", ["LlamaForRewardModel", "LlamaForCausalLM"])
def test_a_head_that_transformers_does_not_know(
    architecture: str, make_checkpoint: CheckpointFactory, tmp_path: Path
) -> None:
    source = make_checkpoint()
    rename(source, architecture)
    add(source, "value_head.weight")
    unknown = "saved as LlamaForRewardModel, which transformers does not have; " if "Reward" in architecture else ""
    message = (
        f"{source}: {unknown}LlamaForCausalLM does not accept its weights: 1 unexpected keys, first value_head.weight"
    )
    for action in (lambda: inspect(source), lambda: convert(source, Gqa(2), tmp_path / "out")):
        with pytest.raises(InputError) as raised:
            action()
        assert str(raised.value) == message
