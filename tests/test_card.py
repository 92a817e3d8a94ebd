"""The model card of a result, and remote code, which a card may tell people to allow."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, BinaryIO

import pytest
import torch
from conftest import CheckpointFactory, Command, RunHere
from huggingface_hub import ModelCard
from kvconvert.convert.checkpoint.loading import load_model
from kvconvert.convert.describe import card as card_module
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


def test_a_card_says_what_the_result_is(make_checkpoint: CheckpointFactory, run_here: RunHere, tmp_path: Path) -> None:
    source, output = make_checkpoint(), tmp_path / "out"
    (source / "README.md").write_text("---\nlicense: mit\nlanguage: en\nbase_model: other\n---\n# The original\n")
    run_here("mha2gqa", "--groups", 2, source, "--output", output)
    card = ModelCard.load(output / "README.md")
    assert (card.data.license, card.data.language, card.data.library_name) == ("mit", "en", "transformers")
    assert card.data.base_model is None  # a directory is no hub id
    assert card.data.tags == ["kvconvert", "gqa"]
    assert "8 K/V heads in each layer became 2" in card.text
    assert "takes 128 bytes per token in 16 bits, where it took 512." in card.text
    assert "It has not been uptrained" in card.text
    assert "Served by: transformers (tested), vLLM (tested), SGLang (by its source, untested)." in card.text
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


def card_after(text: str | bytes, directory: Path) -> Any:
    """The card of a result, where `text` was that of the source."""
    (directory / "README.md").write_bytes(text if isinstance(text, bytes) else text.encode())
    (directory / "config.json").write_text('{"model_type": "llama"}')
    write_card(directory, directory, PROVENANCE)
    return ModelCard.load(directory / "README.md")


@pytest.mark.parametrize("text", ["", "no metadata", "---\nlanguage: en\n---\n"])
def test_a_card_without_a_licence_is_no_problem(text: str, tmp_path: Path) -> None:
    card = card_after(text, tmp_path)
    assert card.data.license is None
    assert "could not be read" not in card.text


@pytest.mark.parametrize(
    "metadata",
    [
        "license: mit\nwidget: [",
        "widget: a: b\nlicense: mit\nlanguage:\n- en\n- de\n",
        b"title: [caf\xe9\nlicense: mit",
    ],
)
def test_the_licence_of_a_broken_card_is_kept(metadata: str | bytes, tmp_path: Path) -> None:
    block = metadata if isinstance(metadata, bytes) else metadata.encode()
    card = card_after(b"---\n" + block + b"\n---\n# The original\n", tmp_path)
    assert card.data.license == "mit"
    assert card.data.language == (["en", "de"] if b"language" in block else None)
    assert "model card could not be read as a whole. Its licence was read; compare" in card.text


def test_wrong_results_in_a_card_do_not_cost_its_licence(tmp_path: Path) -> None:
    assert card_after("---\nlicense: mit\nmodel-index: 3\n---\n", tmp_path).data.license == "mit"


@pytest.mark.parametrize("metadata", [": : [", "license: [mit\nlanguage: en"])
def test_a_licence_that_cannot_be_read_is_said_to_be_missing(metadata: str, tmp_path: Path) -> None:
    card = card_after(f"---\n{metadata}\n---\n", tmp_path)
    assert card.data.license is None
    assert "so no licence is declared above. The licence of the original holds: see there." in card.text


def test_a_card_that_cannot_be_opened_is_said_to_be_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path) -> BinaryIO:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(card_module, "open_regular", refuse)
    source, target = tmp_path / "source", tmp_path / "target"
    for directory in (source, target):
        directory.mkdir()
    (source / "README.md").touch()
    (target / "config.json").write_text('{"model_type": "llama"}')
    write_card(source, target, PROVENANCE)
    assert (
        "The original's model card could not be read (Permission denied), so no licence"
        in (target / "README.md").read_text()
    )


def test_a_card_behind_a_link_is_not_read(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").write_text("---\nlicense: mit\n---\n")
    (tmp_path / "source").mkdir()
    (tmp_path / "source/README.md").symlink_to(tmp_path / "elsewhere")
    inherited, problem = card_module._inherited(tmp_path / "source/README.md")
    assert inherited == {}
    assert problem is not None
    assert problem.startswith("The original's model card could not be read (a link that leads out of the checkpoint)")


def test_a_card_shows_names_as_text(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    write_card(tmp_path, tmp_path, PROVENANCE | {"source": "org/a\x1b[2J\nb\u202e"})
    text = (tmp_path / "README.md").read_text()
    assert "# org/a\\x1b[2J\\x0ab\\u202e, with a smaller K/V cache" in text
    assert "\x1b" not in text
    assert "\u202e" not in text


@pytest.mark.parametrize("licence", ["[[mit]]", "{a: b}", "3", '"\\e[2J"'])
def test_a_licence_that_is_no_text_is_not_inherited(licence: str, tmp_path: Path) -> None:
    card = card_after(f"---\nlicense: {licence}\nlanguage: en\n---\n", tmp_path)
    assert (card.data.license, card.data.language) == (None, "en")


def test_remote_code_runs_only_if_it_is_trusted(
    make_checkpoint: CheckpointFactory, invoke: Command, kvconvert: Command, prose_file: Path, tmp_path: Path
) -> None:
    source, marker = make_checkpoint(with_tokenizer=True), tmp_path / "code-has-run"
    config = json.loads((source / "config.json").read_text())
    config["auto_map"] = {"AutoModelForCausalLM": "modeling_mine.Mine"}
    (source / "config.json").write_text(json.dumps(config))
    (source / "modeling_mine.py").write_text(CODE.format(marker=str(marker)))
    for command in (
        ("inspect", source),
        ("mha2gqa", "--groups", 2, source, "--output", tmp_path / "out"),
        ("evaluate", source, "--data", prose_file, "--window", 16, "--max-windows", 1),
    ):
        assert invoke(*command).returncode == 0
        assert not marker.exists(), command
    load_model(source, dtype=torch.float32, device="cpu")  # nor does the library trust it unasked
    assert not marker.exists()
    # in a process of its own: the code that lies beside the checkpoint stays imported
    environment = {"HF_MODULES_CACHE": str(tmp_path / "modules")}
    assert kvconvert(*command, "--trust-remote-code", env=environment).returncode == 0
    assert marker.exists()
