"""The model card of a result, and remote code, which a card may tell people to allow."""

from __future__ import annotations

import hashlib
import json
import math
import re
from pathlib import Path
from typing import Any, BinaryIO

import pytest
import torch
import yaml
from conftest import LATENT, CheckpointFactory, Command, RunHere
from huggingface_hub import ModelCard
from kvconvert.configs import CALIBRATION_TEXT
from kvconvert.convert import Gqa, convert
from kvconvert.convert.checkpoint.loading import load_model
from kvconvert.convert.describe import card as card_module
from kvconvert.convert.describe.card import add_recipe, write_card
from kvconvert.convert.errors import CheckpointError, InputError
from kvconvert.measure import add_results, verify

PROVENANCE = {
    "kvconvert_version": "0.1.0",
    "source": "org/model",
    "target": "gqa",
    "method": "mean",
    "num_key_value_heads": {"source": 8, "result": 2},
    "cache_bytes_per_token": {"source": 4096, "result": 1024},
}
TRAINING: dict[str, Any] = {
    "tokens": 1000,
    "objective": "forward KL",
    "sequence_length": 128,
    "data": [{"text": {"location": "b.jsonl"}}, {"text": {"location": "org/text"}}],
}
FINISHED = PROVENANCE | {"uptraining": {"tokens": 1000, "objective": "forward KL"}}
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
    assert "vllm serve" not in card
    assert "- vLLM does not serve it: its Transformers backend leaves ALiBi out" in card


@pytest.mark.parametrize(
    ("config", "command"),
    [
        ({"model_type": "llama"}, "vllm serve MODEL"),
        ({"model_type": "phi"}, "python -m sglang.launch_server --model-path MODEL --model-impl transformers"),
        ({"model_type": "cross_layer_decoder"}, "vllm serve MODEL --trust-remote-code"),
        (
            LATENT | {"model_type": "deepseek_v3", "attention_bias": True},
            "VLLM_MLA_DISABLE=1 vllm serve MODEL --model-impl transformers",
        ),
    ],
)
def test_a_card_says_what_to_type_for_each_engine(config: dict[str, Any], command: str, tmp_path: Path) -> None:
    """With the options without which the engine would compute something else, or nothing."""
    (tmp_path / "config.json").write_text(json.dumps(config))
    write_card(tmp_path, tmp_path, PROVENANCE)
    assert f"\n{command}\n```\n" in (tmp_path / "README.md").read_text()


def test_the_text_that_ships_with_kvconvert_is_called_so(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    own = {"data": "text.jsonl.gz", "num_tokens": 8, "data_files": [_digest(CALIBRATION_TEXT)]}
    for calibration, name in ((own, "the text that ships with kvconvert"), (own | {"data_files": []}, "text.jsonl.gz")):
        write_card(tmp_path, tmp_path, PROVENANCE | {"calibration": calibration})
        assert f"Its heads were fitted to 8 tokens of {name}." in (tmp_path / "README.md").read_text()


def _digest(path: Path) -> dict[str, Any]:
    content = path.read_bytes()
    digest = hashlib.sha256(content).hexdigest()
    return {"name": path.name, "algorithm": "sha256", "digest": digest, "size": len(content)}


def test_the_python_of_a_card_opens_the_result(
    make_checkpoint: CheckpointFactory, run_here: RunHere, tmp_path: Path
) -> None:
    source, output = make_checkpoint(with_tokenizer=True), tmp_path / "out"
    run_here("mha2gqa", "--groups", 2, source, "--output", output)
    (block,) = re.findall(r"^```python\n(.*?)^```", (output / "README.md").read_text(), re.DOTALL | re.MULTILINE)
    scope: dict[str, Any] = {}
    exec(block.replace("MODEL", str(output)), scope)
    assert scope["model"].config.num_key_value_heads == 2
    assert scope["tokenizer"]("best")["input_ids"]


@pytest.mark.parametrize(
    ("facts", "limit"),
    [
        ({}, "It has not been uptrained"),
        ({"calibration": {"data": "a.jsonl", "num_tokens": 512}}, "Its heads were fitted to 512 tokens of a.jsonl."),
        ({"calibration": {"data": None, "num_tokens": 0}}, "It was merged by the weights alone"),
        ({"uptraining": TRAINING}, "What came back by uptraining came back on b.jsonl, org/text."),
        ({"uptraining": TRAINING}, "sequences of 128 tokens. Nothing was trained on the rest of its 4096."),
        ({"nonfinite_values": {"model.norm.weight": 1}}, "1 of its tensors have values that are not finite."),
    ],
)
def test_a_card_says_what_it_is_not_good_for(facts: dict[str, Any], limit: str, tmp_path: Path) -> None:
    """What the manifest has, and nothing without it."""
    for directory, provenance in ((tmp_path / "with", PROVENANCE | facts), (tmp_path / "without", FINISHED)):
        directory.mkdir()
        (directory / "config.json").write_text('{"model_type": "llama", "max_position_embeddings": 4096}')
        write_card(directory, directory, provenance)
    assert limit in (tmp_path / "with/README.md").read_text()
    assert "What it is not good for" not in (tmp_path / "without/README.md").read_text()


def test_of_an_encoder_decoder_a_card_says_that_the_encoder_is_as_before(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(
        '{"model_type": "grouped_t5", "architectures": ["GroupedT5ForConditionalGeneration"]}'
    )
    write_card(tmp_path, tmp_path, PROVENANCE)
    card = (tmp_path / "README.md").read_text()
    assert "- Only the decoder's attention was converted; the encoder takes" in card
    assert 'AutoModelForSeq2SeqLM.from_pretrained("MODEL", trust_remote_code=True, dtype="auto")' in card


def test_the_hub_learns_what_a_trained_result_is_of(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    write_card(tmp_path, tmp_path, PROVENANCE)
    assert "base_model_relation" not in (tmp_path / "README.md").read_text()
    write_card(tmp_path, tmp_path, PROVENANCE | {"source": "gpt2", "source_revision": "0" * 40, "uptraining": TRAINING})
    data = ModelCard.load(tmp_path / "README.md").data.to_dict()
    assert (data["base_model"], data["base_model_relation"]) == ("gpt2", "finetune")


COMPARISON = {
    "original_perplexity": 20.0,
    "excess_nats_per_token": 0.25,
    "kl_nats_per_token": 0.125,
    "top1_agreement": 0.75,
}
EVALUATION: dict[str, Any] = {
    "data": ["/somewhere/held_out.jsonl"],
    "perplexity": 25.5,
    "bits_per_byte": None,
    "method": "windows of 512",
    "dtype": "float32",
    "against": COMPARISON,
}


def written(result: Path) -> tuple[str, list[dict[str, Any]]]:
    """A card, and the results in its metadata as YAML has them."""
    text = (result / "README.md").read_text()
    assert verify(result, run=False).ok
    (index,) = yaml.safe_load(text.split("---")[1])["model-index"]
    return text, index["results"]


@pytest.fixture
def result(make_checkpoint: CheckpointFactory, tmp_path: Path) -> Path:
    source = make_checkpoint()
    (source / "README.md").write_text("---\nlicense: mit\nlanguage: [en, de]\n---\n")
    return convert(source, Gqa(2), tmp_path / "out").output


def test_results_go_into_the_card_and_its_metadata(result: Path) -> None:
    add_results(result, EVALUATION)
    text, (found,) = written(result)
    assert found["task"] == {"type": "text-generation", "name": "Text Generation"}
    assert found["dataset"] == {"type": "held_out.jsonl", "name": "held_out.jsonl"}
    assert {metric["type"]: metric["value"] for metric in found["metrics"]} == {
        "perplexity": 25.5,
        "excess_nats_per_token": 0.25,
        "kl_nats_per_token": 0.125,
        "top1_agreement": 0.75,
    }
    assert "| perplexity | 25.5 |" in text
    assert "| perplexity of the original | 20 |" in text
    assert "| loss above the original, nats per token | 0.2500 |" in text
    assert "By `kvconvert evaluate`, in float32: windows of 512." in text
    assert text.index("## Results") < text.index("## What it is not good for") < text.index("## Serving")
    card = ModelCard.load(result / "README.md").data
    assert (card.license, card.language, card.tags) == ("mit", ["en", "de"], ["kvconvert", "gqa"])


def test_later_results_replace_earlier_ones_and_nothing_else(result: Path) -> None:
    before = (result / "README.md").read_text().split("---")[2]
    add_results(result, EVALUATION)
    once = (result / "README.md").read_bytes()
    add_results(result, EVALUATION | {"perplexity": 99.0})
    add_results(result, EVALUATION)
    assert (result / "README.md").read_bytes() == once
    text, _ = written(result)
    begin, end = text.index("## Results"), text.index("## What it is not good for")
    assert (text[:begin] + text[end:]).split("---", 2)[2] == before


def test_each_text_and_each_task_has_its_own_result(result: Path) -> None:
    score = {
        "task": "arc_easy",
        "metric": "acc_norm",
        "metrics": {"acc_norm": 0.5, "acc": 0.4},
        "original_metrics": {"acc_norm": 0.75},
        "num_fewshot": 2,
        "dataset": "allenai/ai2_arc",
        "dataset_config": "ARC-Easy",
    }
    by_source = {"org/text[split=test]": EVALUATION, "b.jsonl": {"perplexity": 3.0, "against": None}}
    add_results(result, EVALUATION | {"data": list(by_source), "by_source": by_source, "tasks": [score]})
    text, found = written(result)
    assert [each["dataset"] for each in found] == [
        {"name": "org/text", "type": "org/text", "split": "test"},
        {"name": "b.jsonl", "type": "b.jsonl"},
        {"name": "arc_easy", "type": "allenai/ai2_arc", "config": "ARC-Easy"},
    ]
    assert found[1]["metrics"] == [{"type": "perplexity", "value": 3.0, "name": "perplexity"}]
    assert found[2]["metrics"] == [{"type": "acc_norm", "value": 0.5, "name": "acc_norm, 2-shot"}]
    assert "| arc_easy | acc_norm | 0.5000 | 0.7500 |" in text


def test_a_figure_that_is_no_number_is_left_out(result: Path) -> None:
    against = COMPARISON | {"kl_nats_per_token": math.nan, "excess_nats_per_token": math.inf}
    add_results(result, EVALUATION | {"against": against})
    _, (found,) = written(result)
    assert [metric["type"] for metric in found["metrics"]] == ["perplexity", "top1_agreement"]


def test_results_need_a_card_and_an_evaluation(result: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="this is no evaluation, with data and perplexity, as evaluate --json prints"):
        add_results(result, {"perplexity": 3.0})
    with pytest.raises(CheckpointError, match=r"README\.md: there is no model card to add to"):
        add_results(tmp_path, EVALUATION)


def test_a_recipe_goes_beside_the_weights_and_into_the_card(result: Path) -> None:
    recipe = "model: org/model\n## not a heading\nnotes: |\n  ```\n  a block of its own\n  ```\n"
    add_recipe(result, recipe)
    add_results(result, EVALUATION)
    add_recipe(result, recipe)
    text, _ = written(result)
    assert (result / "recipe.yaml").read_text() == recipe
    assert text.count(f"`kvconvert run recipe.yaml` makes it again.\n\n````yaml\n{recipe}````\n\n## ") == 1
    assert [line for line in text.splitlines() if line.startswith("## ")] == [
        "## Recipe",
        "## not a heading",
        "## Results",
        "## What it is not good for",
        "## Serving",
    ]


def test_a_recipe_is_not_carried_to_what_is_made_of_a_result(result: Path, tmp_path: Path) -> None:
    add_recipe(result, "model: org/model\n")
    again = convert(result, Gqa(1), tmp_path / "again")
    assert not (again.output / "recipe.yaml").exists()
    assert again.left_behind is not None
    assert again.left_behind["recipe.yaml"] == "of a training run"


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
