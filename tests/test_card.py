"""The model card of a result, and remote code, which a card may tell people to allow."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from conftest import CheckpointFactory, Command
from huggingface_hub import ModelCard
from kvconvert.convert.describe.card import write_card

PROVENANCE = {
    "kvconvert_version": "0.1.0",
    "source": "org/model",
    "target": "gqa",
    "method": "mean",
    "num_key_value_heads": {"source": 8, "result": 2},
    "cache_bytes_per_token": {"source": 4096, "result": 1024},
}
CODE = """
from pathlib import Path
from transformers import LlamaForCausalLM
Path({marker!r}).touch()
class Mine(LlamaForCausalLM):
    pass
"""


def test_a_card_says_what_the_result_is(make_checkpoint: CheckpointFactory, kvconvert: Command, tmp_path: Path) -> None:
    source, output = make_checkpoint(), tmp_path / "out"
    (source / "README.md").write_text("---\nlicense: mit\nlanguage: en\nbase_model: other\n---\n# The original\n")
    assert kvconvert("mha2gqa", "--groups", 2, source, "--output", output).returncode == 0
    card = ModelCard.load(output / "README.md")
    assert (card.data.license, card.data.language, card.data.library_name) == ("mit", "en", "transformers")
    assert card.data.base_model is None  # a directory is no hub id
    assert card.data.tags == ["kvconvert", "gqa"]
    assert "8 K/V heads in each layer became 2" in card.text
    assert "takes 128 bytes per token in 16 bits, where it took 512." in card.text
    assert "It has not been uptrained" in card.text
    assert "Served by: transformers (run), vLLM (run), SGLang (read)." in card.text
    assert "The original" not in card.text


def test_a_card_names_the_hub_id_and_the_training(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    write_card(tmp_path, tmp_path, PROVENANCE | {"uptraining": {"tokens": 1000, "objective": "forward KL"}})
    card = ModelCard.load(tmp_path / "README.md")
    assert card.data.base_model == "org/model"
    assert "Uptrained on 1000 tokens, objective: forward KL." in card.text
    assert "It has not been uptrained" not in card.text


def test_the_card_of_a_class_of_ours_says_how_to_open_it(tmp_path: Path) -> None:
    config = {"model_type": "grouped_decoder", "alibi_slopes": [0.5]}
    (tmp_path / "config.json").write_text(json.dumps(config))
    write_card(tmp_path, tmp_path, PROVENANCE)
    card = (tmp_path / "README.md").read_text()
    assert "open it with `trust_remote_code=True`" in card
    assert "vLLM" not in card  # which has no ALiBi in its Transformers backend


@pytest.mark.parametrize("text", ["", "no metadata", "---\n: : [\n---\n"])
def test_any_text_may_be_the_card_of_the_source(text: str, tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text(text)
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    write_card(tmp_path, tmp_path, PROVENANCE)
    assert ModelCard.load(tmp_path / "README.md").data.license is None


def test_remote_code_runs_only_if_it_is_trusted(
    make_checkpoint: CheckpointFactory, kvconvert: Command, prose_file: Path, tmp_path: Path
) -> None:
    source, marker = make_checkpoint(with_tokenizer=True), tmp_path / "code-has-run"
    config = json.loads((source / "config.json").read_text())
    config["auto_map"] = {"AutoModelForCausalLM": "modeling_mine.Mine"}
    (source / "config.json").write_text(json.dumps(config))
    (source / "modeling_mine.py").write_text(CODE.format(marker=str(marker)))
    environment = {"HF_MODULES_CACHE": str(tmp_path / "modules")}
    for command in (
        ("inspect", source),
        ("mha2gqa", "--groups", 2, source, "--output", tmp_path / "out"),
        ("evaluate", source, "--data", prose_file, "--window", 16, "--max-windows", 1),
    ):
        assert kvconvert(*command, env=environment).returncode == 0
        assert not marker.exists(), command
    assert kvconvert(*command, "--trust-remote-code", env=environment).returncode == 0
    assert marker.exists()
