"""Recipes as files: what they may say, what is said of what is wrong, and the ones that ship."""

from __future__ import annotations

import json
import re
import struct
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Command, RunHere, build_tokenizer
from kvconvert.cli.main import app
from kvconvert.configs import RECIPES
from kvconvert.convert.errors import InputError
from kvconvert.pipeline import Recipe, json_schema, read_recipe
from kvconvert.pipeline.pins import known_pins, pinned
from kvconvert.pipeline.recipe_file import recipe_text
from kvconvert.pipeline.recipe_schema import CONVERSIONS, RecipeOptions
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM
from typer.main import get_command

BASE = """\
model: ./model
convert:
  target: gqa
  groups: 2
  method: svd
uptrain:
  data: ["./text.jsonl:0.7", "org/name[split=train]:0.3"]
  tokens: 1B
  lr: 1e-5
evaluate:
  data: ./text.jsonl
gates:
  max_ppl_increase: 5%
"""
# what a recipe says in sections of its own, or what a run decides
NO_KEYS = {
    "convert": {"model", "output", "work_dir", "revision", "trust_remote_code", "dry_run", "force", "as_json", "quiet"},
    "uptrain": {"model", "config", "output", "revision", "trust_remote_code", "dry_run", "force", "as_json", "quiet"},
    "evaluate": {
        *("model", "against", "no_against", "before", "output", "revision", "trust_remote_code", "as_json", "quiet"),
        *("max_ppl_increase", "min_recovery", "max_kl", "baseline"),  # the section gates
    },
    "benchmark": {"model", "against", "no_against", "picture", "revision", "trust_remote_code", "as_json", "quiet"},
}


@pytest.fixture
def recipe(tmp_path: Path) -> Callable[[str], Path]:
    """Write a recipe beside the model and the text that it names."""
    (tmp_path / "model").mkdir()
    (tmp_path / "text.jsonl").touch()

    def write(text: str) -> Path:
        path = tmp_path / "recipe.yaml"
        path.write_text(text)
        return path

    return write


def options_of(command: str) -> set[str]:
    """The options of a command as a recipe spells them."""
    parameters = get_command(app).commands[command].params  # type: ignore[attr-defined]
    names = {max(each.opts + each.secondary_opts, key=len).removeprefix("--"): each.name for each in parameters}
    section = "convert" if command.startswith("mha2") else command
    return {flag.replace("-", "_") for flag, name in names.items() if name not in {*NO_KEYS[section], "help"}}


def keys_of(section: str, target: str | None = None) -> set[str]:
    definitions = json_schema()["$defs"]
    name = section.capitalize() if target is None else f"Convert{target.capitalize()}"
    return set(definitions[name]["properties"]) - {"target"}


@pytest.mark.parametrize("target", CONVERSIONS)
def test_a_conversion_has_every_option_of_its_command(target: str) -> None:
    assert keys_of("convert", target) == options_of(f"mha2{target}")


@pytest.mark.parametrize("section", ["uptrain", "evaluate", "benchmark"])
def test_a_section_has_every_option_of_its_command(section: str) -> None:
    assert keys_of(section) == options_of(section)


def test_values_are_read_as_on_a_command_line(recipe: Callable[[str], Path]) -> None:
    found = read_recipe(recipe(BASE)).recipe
    assert found.uptrain.tokens == 10**9
    assert found.uptrain.lr == 1e-5  # which YAML 1.1 takes for text
    assert found.gates is not None
    assert found.gates.max_ppl_increase == 0.05
    options = RecipeOptions(CONVERSIONS["gqa"].method, found.convert)
    assert options.values["num_key_value_heads"] == 2
    assert options.values["refit"] is True
    assert options.typed() == ["method", "groups"]


@pytest.mark.parametrize(
    ("old", "new", "message", "hint"),
    [
        ("groups: 2", "group: 2", ":4: convert.group is no key of section convert", "did you mean groups?"),
        ("lr: 1e-5", 'lr: "1e-5"', ":9: uptrain.lr is '1e-5', expected a number", "write 1e-5 without quotes"),
        ("groups: 2", "groups: two", ":4: convert.groups is 'two', expected a whole number", None),
        ("groups: 2", "groups: 0", ":4: convert.groups is 0, expected 1 or more", None),
        ("groups: 2", "groups: yes", ":4: convert.groups is 'yes', expected a whole number", None),
        ("groups: 2", "groups: true", ":4: convert.groups is true, expected a whole number", None),
        ("  groups: 2\n", "", ":2: convert.groups is missing", "add groups"),
        (
            "method: svd",
            "method: svds",
            ":5: convert.method is 'svds', expected 'mean', 'first', 'random' or",
            None,
        ),
        ("target: gqa", "target: mha", ":3: convert.target is 'mha', expected gqa, mqa, cla or mla", None),
        ("tokens: 1B", "tokens: 1Q", ":8: uptrain.tokens: '1Q' is not a count; write for example 300M", None),
        ("increase: 5%", "increase: 5", ":13: gates.max_ppl_increase: '5' is not a percentage", None),
        ("tokens: 1B", "micro_batch: few", ":8: uptrain.micro_batch is 'few', expected a whole number or 'auto'", None),
        ("./text.jsonl\n", "./no.jsonl\n", ":11: evaluate.data: ", "relative to the recipe's file"),
        ("model: ./model", "model: ./nowhere", ":1: model: ", "relative to the recipe's file"),
        ("model: ./model", "model: [a]", ":1: model is a list, expected text", None),
        ("model: ./model", "model: ./model\nmodel: x", ':2: no YAML: found duplicate key "model"', None),
        ("model: ./model", "model: {", "no YAML: ", None),
        (BASE, "- 1", ": holds no keys and values", None),
        (BASE, "a: &a [x, x]\nb: &b [*a, *a]\n" * 9, "no YAML: found duplicate", None),
    ],
)
def test_what_is_wrong_is_a_line_with_its_place(
    old: str, new: str, message: str, hint: str | None, recipe: Callable[[str], Path]
) -> None:
    assert old in BASE
    path = recipe(BASE.replace(old, new))
    with pytest.raises(InputError) as caught:
        read_recipe(path)
    assert str(caught.value).startswith(str(path))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert hint is None or hint in str(caught.value.hint)


def test_aliases_do_not_grow_without_end(recipe: Callable[[str], Path]) -> None:
    bomb = "a0: &a0 [x, x, x, x, x, x, x, x]\n"
    bomb += "".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 8)}]\n" for n in range(1, 12))
    with pytest.raises(InputError, match="has more than 20000 values, or too many levels"):
        read_recipe(recipe(bomb))


def test_overrides_count_more_and_are_named(recipe: Callable[[str], Path]) -> None:
    path = recipe(BASE)
    changed = read_recipe(path, ["uptrain.tokens=2M", "gates=null", "benchmark.context=[8, 16]"]).recipe
    assert changed.uptrain.tokens == 2_000_000
    assert changed.gates is None
    assert changed.benchmark.context == (8, 16)
    for override, message in {
        "uptrain.token=1": "--set uptrain.token=1: uptrain.token is no key of section uptrain",
        "uptrain.steps=x": "--set uptrain.steps=x: uptrain.steps is 'x', expected a whole number",
        "uptrain": "--set uptrain: is no key=value",
        "model.x=1": "--set model.x=1: model holds no keys",
    }.items():
        with pytest.raises(InputError) as caught:
            read_recipe(path, [override])
        assert str(caught.value) == message


def test_places_are_relative_to_the_file_and_those_of_overrides_to_here(
    recipe: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = recipe(BASE)
    (tmp_path / "here").mkdir()
    (tmp_path / "here" / "own.jsonl").touch()
    monkeypatch.chdir(tmp_path / "here")
    found = read_recipe("../recipe.yaml", ["evaluate.data=own.jsonl"]).recipe
    assert found.model == "../model"
    assert found.uptrain.data == ["../text.jsonl:0.7", "org/name[split=train]:0.3"]
    assert found.evaluate.data == ["own.jsonl"]
    assert path.exists()


def test_a_recipe_is_written_so_that_it_says_the_same(recipe: Callable[[str], Path], tmp_path: Path) -> None:
    first = read_recipe(recipe(BASE), ["uptrain.max_time=5h", "gates.max_ppl_increase=500%"]).recipe
    (tmp_path / "run").mkdir()
    copy = tmp_path / "run" / "recipe.yaml"
    copy.write_text(recipe_text(first, copy.parent, "a heading"))
    assert copy.read_text().startswith("# a heading\nmodel: ../model\n")
    assert read_recipe(copy).recipe.model_dump(mode="json") == first.model_dump(mode="json")


def test_the_schema_describes_keys_as_the_help_does(invoke: Command) -> None:
    printed = json.loads(invoke("schema").stdout)
    assert printed == json_schema()
    assert printed["$defs"]["ConvertGqa"]["properties"]["groups"]["description"] == "K/V heads of the result."
    assert printed["$defs"]["Uptrain"]["additionalProperties"] is False
    undescribed = [
        f"{name}.{key}"
        for name, definition in {**printed["$defs"], "Recipe": printed}.items()
        for key, value in definition.get("properties", {}).items()
        if "description" not in value
    ]
    assert undescribed == []


# Headers of checkpoints as the recipes name them, whose weights are holes in a file
MODELS: dict[str, dict[str, Any]] = {
    "meta-llama/Llama-2-7b-hf": {
        "model_type": "llama",
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_attention_heads": 32,
        "num_hidden_layers": 32,
        "vocab_size": 32000,
        "max_position_embeddings": 4096,
        "tie_word_embeddings": False,
    },
    "EleutherAI/pythia-1.4b": {
        "model_type": "gpt_neox",
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_attention_heads": 16,
        "num_hidden_layers": 24,
        "vocab_size": 50304,
        "max_position_embeddings": 2048,
        "tie_word_embeddings": False,
        "rotary_pct": 0.25,
        "use_parallel_residual": True,
    },
    "Qwen/Qwen1.5-0.5B": {
        "model_type": "qwen2",
        "hidden_size": 1024,
        "intermediate_size": 2816,
        "num_attention_heads": 16,
        "num_key_value_heads": 16,
        "num_hidden_layers": 24,
        "vocab_size": 151936,
        "max_position_embeddings": 32768,
        "tie_word_embeddings": True,
    },
    "mistralai/Mistral-7B-v0.1": {
        "model_type": "mistral",
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "num_hidden_layers": 32,
        "vocab_size": 32000,
        "max_position_embeddings": 32768,
        "sliding_window": 4096,
        "tie_word_embeddings": False,
    },
    "google/t5-v1_1-large": {
        "model_type": "t5",
        "d_model": 1024,
        "d_ff": 2816,
        "num_heads": 16,
        "d_kv": 64,
        "num_layers": 24,
        "num_decoder_layers": 24,
        "vocab_size": 32128,
        "feed_forward_proj": "gated-gelu",
        "tie_word_embeddings": False,
    },
    "HuggingFaceTB/SmolLM2-135M-Instruct": {
        "model_type": "llama",
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "num_hidden_layers": 30,
        "vocab_size": 49152,
        "max_position_embeddings": 8192,
        "tie_word_embeddings": True,
    },
}
# cache in 16 bits: layers · keys and values · heads · head_dim · 2 bytes; a latent: layers · (448 + 64) · 2 bytes
CACHES = {
    "llama-2-7b-gqa8": (32 * 2 * 32 * 128 * 2, 32 * 2 * 8 * 128 * 2),
    "llama-2-7b-mqa-cla2": (32 * 2 * 32 * 128 * 2, 16 * 2 * 1 * 128 * 2),
    "pythia-1.4b-mqa": (24 * 2 * 16 * 128 * 2, 24 * 2 * 1 * 128 * 2),
    "qwen1.5-0.5b-mla": (24 * 2 * 16 * 64 * 2, 24 * 512 * 2),
    "mistral-7b-gqa2": (32 * 2 * 8 * 128 * 2, 32 * 2 * 2 * 128 * 2),
    "t5-large-gqa4": (24 * 2 * 16 * 64 * 2, 24 * 2 * 4 * 64 * 2),
    "smollm2-135m-mqa": (30 * 2 * 3 * 64 * 2, 30 * 2 * 1 * 64 * 2),
    "demo": (4 * 2 * 8 * 32 * 2, 4 * 2 * 2 * 32 * 2),
}


def write_headers(name: str, directory: Path) -> None:
    """A config, a tokenizer, and a file of weights whose header is that of the real class and whose data is a hole."""
    settings = {**MODELS[name]}
    config = AutoConfig.for_model(settings.pop("model_type"), **settings)
    kind = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
    with torch.device("meta"):
        model = kind.from_config(config, dtype=torch.bfloat16)
    tied = set(model.all_tied_weights_keys)
    header: dict[str, Any] = {}
    end = 0
    for tensor, value in model.state_dict().items():
        if tensor in tied:
            continue
        begin, end = end, end + 2 * value.numel()
        header[tensor] = {"dtype": "BF16", "shape": list(value.shape), "data_offsets": [begin, end]}
    encoded = json.dumps(header).encode()
    directory.mkdir(parents=True)
    config.architectures = [type(model).__name__]
    config.dtype = "bfloat16"
    config.save_pretrained(directory)
    with (directory / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(encoded)) + encoded)
        file.truncate(8 + len(encoded) + end)
    build_tokenizer().save_pretrained(directory)


@pytest.mark.parametrize("path", sorted(RECIPES.glob("*.yaml")), ids=lambda path: path.stem)
def test_a_recipe_that_ships_is_planned_on_headers(
    path: Path, tmp_path: Path, run_here: RunHere, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = read_recipe(path).recipe
    (tmp_path / "text.jsonl").write_text('{"text": "A text."}\n')
    changes = []
    if found.model in MODELS:
        write_headers(found.model, tmp_path / "source")
        changes = [f"model={tmp_path / 'source'}"]
        if found.uptrain:
            changes += [f"uptrain.data={tmp_path / 'text.jsonl'}", f"evaluate.data={tmp_path / 'text.jsonl'}"]
        if "pythia" in path.stem:
            changes.append("uptrain.pretraining_tokens=300B")  # which is known by the name of the model
    words = [word for change in changes for word in ("--set", change)]
    plan = run_here("run", path, *words, "--output", tmp_path / "run", "--dry-run")
    stages = {stage["name"]: stage["facts"] for stage in plan["stages"]}
    source, result = CACHES[path.stem]
    assert stages["convert"]["cache_bytes_per_token"] == {"source": source, "result": result}
    if found.uptrain and found.uptrain.tokens:
        assert found.uptrain.tokens <= stages["uptrain"]["tokens"] < 1.01 * found.uptrain.tokens + 2**19
        assert stages["uptrain"]["flops"] > 6 * stages["uptrain"]["tokens"] * 1e8
    assert not (tmp_path / "run").exists()


def test_every_recipe_is_read_by_the_schema_alone() -> None:
    assert {path.stem for path in RECIPES.glob("*.yaml")} == set(CACHES)
    assert all(isinstance(read_recipe(path).recipe, Recipe) for path in RECIPES.glob("*.yaml"))


def test_texts_of_the_hub_are_read_at_one_commit(
    recipe: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They keep it when the run goes on, whatever the hub has by then; files and what is pinned stay as they are."""
    texts = '["org/a:0.7", "org/b[split=train]", "org/c[revision=v1,field=x]:2", "./text.jsonl:0.3"]'
    text = re.sub(r"data: \[.*\]", f"data: {texts}", BASE)
    first = read_recipe(recipe(text)).recipe
    commits = iter("abcdef")
    monkeypatch.setattr(
        "kvconvert.pipeline.pins.pin_revision", lambda source, remark: replace(source, revision=next(commits))
    )
    found = pinned(first, None, {}, print)
    expected = ["org/a[revision=a]:0.7", "org/b[split=train,revision=b]", "org/c[revision=v1,field=x]:2"]
    assert found.uptrain.data == [*expected, first.uptrain.data[3]]
    assert (found.convert, found.evaluate) == (first.convert, first.evaluate)
    kept = tmp_path / "kept.yaml"
    kept.write_text(recipe_text(found, tmp_path))
    assert pinned(first, None, known_pins(kept), print).uptrain.data == found.uptrain.data
    assert pinned(first, None, known_pins(tmp_path / "none.yaml"), print).uptrain.data[0] == "org/a[revision=c]:0.7"
