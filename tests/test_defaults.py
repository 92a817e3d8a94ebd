"""What commands mean where it is not typed: a recipe, the checkpoint that one is in, and the original it came from."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from conftest import PROSE, CheckpointFactory, Command
from kvconvert.convert import Gqa, convert
from kvconvert.convert.checkpoint.original import find_original
from kvconvert.convert.errors import InputError

LENGTH = ["--sequence-length", 16, "--global-batch-tokens", 32]


@pytest.fixture
def home(make_checkpoint: CheckpointFactory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory with `model_dir`, what it was converted to, and a text; the current one."""
    make_checkpoint(name="model_dir", with_tokenizer=True)
    convert(tmp_path / "model_dir", Gqa(num_key_value_heads=2), tmp_path / "model_dir-gqa2")
    lines = [json.dumps({"text": f"Chapter {number}. {PROSE}"}) for number in range(20)]
    (tmp_path / "text.jsonl").write_text("\n".join(lines) + "\n")
    return tmp_path


@pytest.fixture
def within(monkeypatch: pytest.MonkeyPatch, invoke: Command) -> Callable[..., Any]:
    """Run a command in a directory."""

    def run(directory: Path, *words: object) -> Any:
        monkeypatch.chdir(directory)
        return invoke(*words)

    return run


def planned(outcome: Any) -> dict[str, Any]:
    assert outcome.returncode == 0, outcome.stderr
    return dict(json.loads(outcome.stdout))


def write_recipe(home: Path, **uptrain: object) -> None:
    content = {"model": "model_dir-gqa2", "uptrain": {"data": "text.jsonl", "sequence_length": 16, **uptrain}}
    (home / "kvconvert.yaml").write_text(json.dumps(content))


def test_uptrain_as_the_client_types_it(home: Path, within: Callable[..., Any]) -> None:
    write_recipe(home, global_batch_tokens=32, tokens="1M", lr_scheduler="linear")
    plan = planned(within(home, "uptrain", "--steps", 3, "--dry-run", "--json"))
    assert plan["budget"]["steps"] == 3  # in place of the recipe's million tokens
    assert plan["settings"]["lr_scheduler"] == "linear"
    assert plan["teacher"] == str(home / "model_dir")
    assert plan["output"] == str(home / "model_dir-gqa2-uptrained")
    typed = planned(within(home, "uptrain", "--lr-scheduler", "cosine", "--dry-run", "--json"))
    assert typed["settings"]["lr_scheduler"] == "cosine"  # the default, and typed
    assert typed["budget"]["steps"] == 1_000_000 // 32


def test_no_teacher_is_a_choice_and_not_what_happens(home: Path, within: Callable[..., Any]) -> None:
    shutil.move(home / "model_dir", home / "elsewhere")
    words = ["uptrain", "model_dir-gqa2", "--data", "text.jsonl", "--steps", 1, *LENGTH, "--dry-run", "--json"]
    outcome = within(home, *words)
    assert outcome.returncode == 2
    assert outcome.stderr.startswith(
        "error: no teacher: model_dir, which model_dir-gqa2 was converted from, is neither"
    )
    assert "--teacher, or learn from the text alone with --no-teacher" in outcome.stderr
    assert planned(within(home, *words, "--no-teacher"))["objective"] == "cross-entropy"
    assert planned(within(home, *words, "--teacher", "elsewhere"))["objective"] == "forward KL"


def test_a_recipe_elsewhere_has_places_of_its_own(home: Path, tmp_path: Path, within: Callable[..., Any]) -> None:
    write_recipe(home, global_batch_tokens=32)
    (tmp_path / "elsewhere").mkdir()
    words = ["uptrain", "--config", "../kvconvert.yaml", "--steps", 1, "--no-teacher", "--dry-run", "--json"]
    plan = planned(within(tmp_path / "elsewhere", *words))
    assert plan["objective"] == "cross-entropy"
    assert Path(plan["output"]) == home / "model_dir-gqa2-uptrained"


def test_a_converted_checkpoint_is_trained_where_one_is(home: Path, within: Callable[..., Any]) -> None:
    words = ["--data", "../text.jsonl", "--steps", 1, *LENGTH, "--dry-run"]
    outcome = within(home / "model_dir-gqa2", "uptrain", *words, "--json")
    plan = planned(outcome)
    assert plan["teacher"] == str(home / "model_dir")
    assert "the original is" in outcome.stderr
    assert planned(within(home / "model_dir-gqa2", "uptrain", *words, "--json", "--no-teacher"))["teacher"] is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--steps", 1], "MODEL is missing"),
        (["model_dir-gqa2", "--steps", 1], "--data is missing"),
        (["model_dir-gqa2", "--data", "text.jsonl", "--teacher", "x", "--no-teacher"], "rule each other out"),
        (["--config", "nowhere.yaml"], "nowhere.yaml: cannot be read"),
    ],
)
def test_what_is_missing_is_asked_for_by_name(
    options: list[object], message: str, home: Path, within: Callable[..., Any]
) -> None:
    outcome = within(home, "uptrain", *options)
    assert outcome.returncode == 2
    assert message in outcome.stderr


def test_a_wrong_option_is_shown_as_it_was_typed(home: Path, within: Callable[..., Any]) -> None:
    write_recipe(home)
    outcome = within(home, "uptrain", "--tokens", "many")
    assert outcome.returncode == 2
    assert "--tokens: uptrain.tokens: 'many' is not a count" in outcome.stderr


def test_evaluate_compares_with_the_original_of_the_manifest(home: Path, within: Callable[..., Any]) -> None:
    words = ["evaluate", "model_dir-gqa2", "--data", "text.jsonl", "--window", 16, "--max-windows", 4, "--json"]
    assert planned(within(home, *words))["against"]["excess_nats_per_token"] != 0
    assert planned(within(home, *words, "--no-against"))["against"] is None
    outcome = within(home, *words, "--no-against", "--against", "model_dir")
    assert outcome.returncode == 2
    assert "rule each other out" in outcome.stderr


def test_an_original_of_the_hub_is_taken_from_its_cache_and_not_fetched(
    make_checkpoint: CheckpointFactory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commit, cache = "a" * 40, tmp_path / "hub"
    snapshot = cache / "models--org--tiny" / "snapshots" / commit
    shutil.copytree(make_checkpoint(name="source", with_tokenizer=True), snapshot)
    convert(snapshot, Gqa(num_key_value_heads=2), tmp_path / "out")
    assert json.loads((tmp_path / "out" / "kvconvert.json").read_text())["source"] == "org/tiny"
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:1")  # nobody answers there
    found = find_original(tmp_path / "out")
    assert found is not None
    assert found.directory.resolve() == snapshot.resolve()
    shutil.rmtree(cache)
    with pytest.raises(InputError, match=r"org/tiny, which .* was converted from, is not in the hub's cache"):
        find_original(tmp_path / "out")


def test_the_original_is_known_by_its_digests(home: Path) -> None:
    found = find_original(home / "model_dir-gqa2")
    assert found is not None
    assert found.directory == home / "model_dir"
    weights = home / "model_dir" / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    with pytest.raises(InputError, match=r"its weights are not those that .*model_dir-gqa2 was converted from"):
        find_original(home / "model_dir-gqa2")
    shutil.rmtree(home / "model_dir")
    with pytest.raises(InputError, match=r"model_dir, which .* was converted from, is neither beside it nor in"):
        find_original(home / "model_dir-gqa2")
    (home / "model_dir-gqa2" / "kvconvert.json").unlink()
    assert find_original(home / "model_dir-gqa2") is None
