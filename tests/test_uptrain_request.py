"""The front door of uptraining: what is asked for, what becomes of it, and that the command line hands all of it on."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import datasets
import kvconvert.uptrain
import pytest
from conftest import CheckpointFactory, same_weights, weights
from kvconvert import configs
from kvconvert.cli.main import app
from kvconvert.convert.checkpoint.opening import open_checkpoint
from kvconvert.convert.checkpoint.tokenizer import load_tokenizer
from kvconvert.convert.errors import DataError, InputError, UnsupportedError
from kvconvert.convert.text.sources import TextSource
from kvconvert.uptrain import (
    Length,
    Machine,
    Monitoring,
    TextSettings,
    UptrainRequest,
    UptrainSettings,
    WeightedSource,
    inputs,
    plan_uptraining,
    uptrain,
)
from kvconvert.uptrain.data.sources import parse_source
from kvconvert.uptrain.job import UptrainJob
from kvconvert.uptrain.recipe import Recipe, Trained
from kvconvert.uptrain.request import Schedule, Tracker
from kvconvert.uptrain.settings import default_learning_rate
from typer.testing import CliRunner

DEFAULTS = TextSource("")

# Each option as it is typed, where it is no default, and what the library is asked for.
TYPED: dict[str, dict[str, tuple[list[str], Any]]] = {
    "length": {
        "steps": (["--steps", "3"], 3),
        "tokens": (["--tokens", "2k"], 2000),
        "fraction": (["--fraction", "5%"], 0.05),
        "pretraining_tokens": (["--pretraining-tokens", "2T"], 2 * 10**12),
        "yes": (["--yes"], True),
    },
    "text": {
        "text_field": (["--text-field", "content"], "content"),
        "split": (["--split", "dev"], "dev"),
        "data_config": (["--data-config", "en"], "en"),
        "data_revision": (["--data-revision", "v1"], "v1"),
        "line_documents": (["--line-documents"], True),
        "document_separator": (["--document-separator", "---"], "---"),
        "skip_bad_lines": (["--skip-bad-lines"], True),
        "validation_fraction": (["--validation-fraction", "0.2"], 0.2),
        "eval_data": (["--eval-data", "held.jsonl"], "held.jsonl"),
        "eval_split": (["--eval-split", "validation"], "validation"),
    },
    "settings": {
        "recipe": (["--recipe", "light"], Recipe.light),
        "train_only": (["--train-only", "kv"], Trained.kv),
        "kl_weight": (["--kl-weight", "0.5"], 0.5),
        "ce_weight": (["--ce-weight", "0.25"], 0.25),
        "temperature": (["--temperature", "2"], 2.0),
        "layerwise_fraction": (["--layerwise-fraction", "0.1"], 0.1),
        "lr": (["--lr", "2e-4"], 2e-4),
        "lr_sweep": (["--lr-sweep", "3"], 3),
        "layerwise_lr": (["--layerwise-lr", "1e-5"], 1e-5),
        "body_lr_multiplier": (["--body-lr-multiplier", "0.2"], 0.2),
        "lr_scheduler": (["--lr-scheduler", "linear"], Schedule.linear),
        "warmup_fraction": (["--warmup-fraction", "0.1"], 0.1),
        "weight_decay": (["--weight-decay", "0.01"], 0.01),
        "max_grad_norm": (["--max-grad-norm", "2"], 2.0),
        "seed": (["--seed", "7"], 7),
        "sequence_length": (["--sequence-length", "64"], 64),
        "global_batch_tokens": (["--global-batch-tokens", "512k"], 512_000),
        "precision": (["--precision", "bf16"], "bf16"),
        "keep_best": (["--keep-best"], True),
    },
    "machine": {
        "micro_batch": (["--micro-batch", "auto"], "auto"),
        "compile": (["--compile"], True),
        "activation_checkpointing": (["--activation-checkpointing"], True),
        "fsdp": (["--fsdp"], True),
        "gpu": (["--gpu", "H100"], "H100"),
        "report_to": (["--report-to", "wandb", "--report-to", "mlflow"], (Tracker.wandb, Tracker.mlflow)),
    },
    "monitoring": {
        "eval_steps": (["--eval-steps", "5"], 5),
        "save_steps": (["--save-steps", "6"], 6),
        "log_steps": (["--log-steps", "7"], 7),
        "max_time": (["--max-time", "5h45m"], 20_700),
    },
}
OF_REQUEST: dict[str, tuple[list[str], Any]] = {
    "output": (["--output", "out"], Path("out")),
    "teacher": (["--teacher", "original"], "original"),
    "revision": (["--revision", "v2"], "v2"),
    "force": (["--force"], True),
}


def test_every_setting_of_the_library_is_typed_in_the_test_below() -> None:
    for name, kind in (
        ("length", Length),
        ("text", TextSettings),
        ("settings", UptrainSettings),
        ("machine", Machine),
        ("monitoring", Monitoring),
    ):
        assert set(TYPED[name]) == {field.name for field in fields(kind)}
    of_request = {field.name for field in fields(UptrainRequest)}
    assert of_request == {"model", "data", *OF_REQUEST, *TYPED}


class AskedError(Exception):
    """Ends a command once the library was asked."""


def asked(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> UptrainRequest:
    requests: list[UptrainRequest] = []

    def ask(request: UptrainRequest, **options: Any) -> None:
        requests.append(request)
        raise AskedError

    monkeypatch.setattr("kvconvert.uptrain.plan.plan_uptraining", ask)
    outcome = CliRunner().invoke(app, ["uptrain", "model", "--data", "a.jsonl", *arguments])
    assert len(requests) == 1, outcome.output
    return requests[0]


@pytest.mark.parametrize(("group", "name"), [(group, name) for group, typed in TYPED.items() for name in typed])
def test_an_option_reaches_the_library_and_changes_nothing_else(
    group: str, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    typed, expected = TYPED[group][name]
    plain, found = asked(monkeypatch), asked(monkeypatch, *typed)
    assert getattr(getattr(found, group), name) == expected != getattr(getattr(plain, group), name)
    for other, options in TYPED.items():
        for field in options:
            if (other, field) != (group, name):
                assert getattr(getattr(found, other), field) == getattr(getattr(plain, other), field)


@pytest.mark.parametrize("name", OF_REQUEST)
def test_an_option_of_the_request_reaches_the_library(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    typed, expected = OF_REQUEST[name]
    assert getattr(asked(monkeypatch), name) != expected
    assert getattr(asked(monkeypatch, *typed), name) == expected


def test_the_defaults_of_the_command_are_those_of_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    assert asked(monkeypatch) == UptrainRequest(model="model", data=("a.jsonl",))


@pytest.mark.parametrize(
    ("typed", "expected"),
    [
        ("a.jsonl", WeightedSource(TextSource("a.jsonl"))),
        (" a.jsonl:0.7 ", WeightedSource(TextSource("a.jsonl"), 0.7)),
        ("a:b.txt", WeightedSource(TextSource("a:b.txt"))),
        ("data[1]/a.jsonl:2", WeightedSource(TextSource("data[1]/a.jsonl"), 2.0)),
        ("data[1]", WeightedSource(TextSource("data[1]"))),
        ("org/name[split=dev]", WeightedSource(TextSource("org/name", split="dev"))),
        (
            "org/name[split=dev,field=content,config=en,revision=v1]:0.3",
            WeightedSource(TextSource("org/name", "content", "dev", "en", "v1"), 0.3),
        ),
    ],
)
def test_sources_as_they_are_typed(typed: str, expected: WeightedSource) -> None:
    assert parse_source(typed, DEFAULTS) == expected


def test_a_source_says_for_itself_what_counts_more_than_the_defaults() -> None:
    defaults = TextSource("", text_field="content", split="dev", config="de", revision="v1")
    own = parse_source("org/name[split=train]", defaults).text
    assert own == TextSource("org/name", text_field="content", split="train", config="de", revision="v1")


def test_the_name_of_a_directory_is_a_place_whatever_it_ends_in(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    expected = {
        "dump:2024": ("dump:2024", 1.0),
        "dump:2024:0.5": ("dump:2024", 0.5),
        "dump:2024[field=content]:0.5": ("dump:2024", 0.5),
        "crawl[year=2024]": ("crawl[year=2024]", 1.0),
        "crawl[year=2024]:2": ("crawl[year=2024]", 2.0),
    }
    assert parse_source("dump:2024", DEFAULTS) == WeightedSource(TextSource("dump"), 2024)  # the control
    for name in ("dump:2024", "crawl[year=2024]"):
        (tmp_path / name).mkdir()
    found = {typed: parse_source(typed, DEFAULTS) for typed in expected}
    assert {typed: (source.text.location, source.weight) for typed, source in found.items()} == expected
    assert found["dump:2024[field=content]:0.5"].text.text_field == "content"


@pytest.mark.parametrize(
    ("typed", "message"),
    [
        (":0.7", "':0.7' names no text"),
        ("a.jsonl:0", "'a.jsonl:0' has the weight 0; write a positive number, for example a.jsonl:0.7"),
        ("a.jsonl:-1", "'a.jsonl:-1' has the weight -1; write a positive number"),
        ("name[splt=dev]", r"'name\[splt=dev\]': splt=dev says nothing of a text"),
        ("name[split=]", r"'name\[split=\]': split= says nothing of a text"),
    ],
)
def test_sources_that_cannot_be_read(typed: str, message: str) -> None:
    with pytest.raises(InputError, match=f"^{message}"):
        parse_source(typed, DEFAULTS)


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        (UptrainSettings, {"recipe": "gqa"}, "recipe 'gqa' is not known"),
        (UptrainSettings, {"train_only": "mlp"}, "train only 'mlp' is not known"),
        (UptrainSettings, {"precision": "fp8"}, "precision is 'fp8', expected 'auto', 'bf16' or 'fp32'"),
        (UptrainSettings, {"lr_sweep": -1}, "lr sweep is -1, expected 0 or more"),
        (Machine, {"report_to": ("nowhere",)}, "report to 'nowhere' is not known"),
        (Machine, {"micro_batch": 0}, "0 is not a number of sequences, nor auto"),
        (Monitoring, {"save_steps": 0}, "save steps is 0, expected at least 1"),
        (Monitoring, {"max_time": 0}, "max time is 0, expected a positive number of seconds"),
        (UptrainRequest, {"model": "model", "data": ()}, "there is no text to train on"),
    ],
)
def test_settings_that_cannot_be(kind: Callable[..., Any], options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=f"^{message}"):
        kind(**options)


def test_the_old_name_of_a_recipe_is_answered_with_those_that_are_known(monkeypatch: pytest.MonkeyPatch) -> None:
    outcome = CliRunner().invoke(app, ["uptrain", "model", "--data", "a.jsonl", "--recipe", "gqa"])
    assert outcome.exit_code == 2
    words = " ".join(outcome.stderr.replace("│", " ").split())
    assert "'gqa' is not one of 'distill', 'pretraining', 'light', 'layerwise'" in words
    with pytest.raises(UnsupportedError) as caught:
        UptrainSettings(recipe="gqa")  # type: ignore[arg-type]
    assert caught.value.hint == "known are distill, pretraining, light, layerwise"


@pytest.fixture
def model(make_checkpoint: CheckpointFactory) -> Path:
    return make_checkpoint(num_key_value_heads=2, with_tokenizer=True)


SMALL: dict[str, Any] = {"global_batch_tokens": 128, "sequence_length": 32}


def test_one_call_does_what_the_command_does_and_prints_nothing(
    model: Path, make_checkpoint: CheckpointFactory, prose_file: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    teacher = make_checkpoint(name="teacher", seed=1, with_tokenizer=True)
    (model / "optimizer.pt").touch()
    arguments = ["--steps", "3", "--teacher", str(teacher), "--global-batch-tokens", "128", "--sequence-length", "32"]
    typed = ["uptrain", str(model), "--data", str(prose_file), "--output", str(tmp_path / "typed"), *arguments]
    outcome = CliRunner().invoke(app, [*typed, "--json", "--quiet"])
    assert outcome.exit_code == 0, outcome.output
    capfd.readouterr()
    done: list[int] = []
    records: list[dict[str, Any]] = []

    class Shown:
        def __enter__(self) -> Callable[[int], object]:
            return done.append

        def __exit__(self, *exception: object) -> None:
            done.append(-1)

    result = uptrain(
        str(model),
        data=str(prose_file),
        teacher=teacher,
        output=str(tmp_path / "called"),
        steps=3,
        settings=UptrainSettings(**SMALL),
        progress=lambda what, total: Shown() if (what, total) == ("uptraining", 3) else pytest.fail(what),
        show=records.append,
    )
    printed = capfd.readouterr()
    assert printed.out == ""
    assert "step" not in printed.err
    assert (done[-1], sum(done[:-1])) == (-1, 3)
    assert [row["step"] for row in records if "loss" in row] == [3]
    assert (result.output, result.steps, result.tokens, result.objective) == (
        tmp_path / "called",
        3,
        3 * 128,
        "forward KL",
    )
    found, expected = weights(tmp_path / "called"), weights(tmp_path / "typed")
    assert found.keys() == expected.keys()
    assert all(found[name].equal(tensor) for name, tensor in expected.items())
    assert result.left_behind == json.loads(outcome.stdout)["left_behind"] == {"optimizer.pt": "of a training run"}
    settings = json.loads(outcome.stdout)["settings"]
    assert {"recipe": settings["recipe"], "steps": settings["steps"]} == {"recipe": "distill", "steps": 3}


def test_the_door_opens_without_torch_and_leads_everywhere() -> None:
    program = "import sys, kvconvert.uptrain; print(sorted({'torch', 'transformers'} & set(sys.modules)))"
    outcome = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert outcome.stdout == "[]\n"
    for name in kvconvert.uptrain.__all__:
        assert getattr(kvconvert.uptrain, name) is not None
    with pytest.raises(AttributeError, match=r"module 'kvconvert\.uptrain' has no attribute 'nonesuch'"):
        _ = kvconvert.uptrain.nonesuch


def test_a_teacher_that_nothing_is_compared_with_is_refused(
    make_job: Callable[..., UptrainJob],
) -> None:
    job = make_job()
    with pytest.raises(
        InputError, match=r"^the original would not be used: cross-entropy compares with no teacher$"
    ) as caught:
        UptrainJob(job.checkpoint, job.settings, job.sources, job.output, teacher="the original")
    assert caught.value.hint is not None
    assert "leave the teacher out" in caught.value.hint


def request_of(model: Path, prose_file: Path, **text: Any) -> UptrainRequest:
    return UptrainRequest(
        model=model,
        data=(prose_file,),
        output=model.with_name("out"),
        length=Length(steps=1),
        text=TextSettings(**text),
        settings=UptrainSettings(**SMALL),
    )


def test_held_out_text_of_a_dataset_is_its_test_split(
    model: Path, prose_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[str] = []

    def load(location: str, config: str | None, *, split: str, **options: Any) -> list[dict[str, str]]:
        read.append(split)
        if split != "test":
            raise ValueError(f"Unknown split {split!r}.")
        return [{"text": "A sentence that nobody trains on. " * 20}]

    monkeypatch.setattr(datasets, "load_dataset", load)
    monkeypatch.setattr("kvconvert.convert.text.hub._is_cached", lambda name: True)
    assert plan_uptraining(request_of(model, prose_file, eval_data="org/name")).held_out == TextSource(
        "org/name", usual_split="test"
    )
    uptrain(
        model,
        data=prose_file,
        output=model.with_name("out"),
        steps=1,
        settings=UptrainSettings(**SMALL),
        text=TextSettings(eval_data="org/name"),
    )
    assert set(read) == {"test"}
    with pytest.raises(DataError, match=r"^--eval-data: org/name: .*Unknown split 'dev'") as caught:
        uptrain(
            model,
            data=prose_file,
            output=model.with_name("other"),
            steps=1,
            settings=UptrainSettings(**SMALL),
            text=TextSettings(eval_data="org/name", eval_split="dev"),
        )
    assert (caught.value.hint, caught.value.settings) == ("name the split to read", ("eval_split",))
    assert not model.with_name("other.uptraining").exists()


def test_held_out_text_has_the_configuration_and_revision_of_the_text() -> None:
    text = TextSettings(data_config="en", data_revision="v2", split="dev", text_field="body", eval_data="org/name")
    assert text.held_out == TextSource("org/name", "body", None, "en", "v2", usual_split="test")
    text = TextSettings(data_revision="v2", eval_data="org/name[revision=v3,split=a]", eval_split="b")
    assert text.held_out == TextSource("org/name", split="a", revision="v3", usual_split="test")


@pytest.mark.parametrize(
    ("data", "held_out", "options", "message"),
    [
        (["{prose}"], "{prose}", {}, r".*prose\S*: .*prose\S* is trained on, so that a score on it says nothing"),
        (["{prose}"], "{directory}", {}, r".*: .*prose\S* is trained on"),
        (["org/a"], "org/a", {"eval_split": "train"}, "org/a: split 'train' of org/a is trained on"),
        (["org/a[split=test]"], "org/a", {}, "org/a: split 'test' of org/a is trained on"),
        (["{prose}:1", "{directory}:2"], None, {}, r".*prose\S*: .*prose\S* is read twice"),
        (["org/a", "org/a[split=train]"], None, {}, "org/a: split 'train' of org/a is read twice"),
        (["org/a", "org/a[split=dev]"], "org/a", {}, None),
        (["org/a", "org/a[config=en]", "org/a[field=body]"], "org/a", {}, None),
    ],
)
def test_text_that_is_read_twice_is_refused(
    data: list[str],
    held_out: str | None,
    options: dict[str, str],
    message: str | None,
    model: Path,
    prose_file: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("kvconvert.convert.text.hub._is_cached", lambda name: True)
    directory = prose_file.with_name("texts")
    directory.mkdir()
    (directory / "a.jsonl").symlink_to(prose_file)
    texts = [place.format(prose=prose_file, directory=directory) for place in data]
    eval_data = held_out and held_out.format(prose=prose_file, directory=directory)
    request = replace(request_of(model, prose_file, eval_data=eval_data, **options), data=tuple(texts))
    if message is None:
        assert plan_uptraining(request)
        return
    with pytest.raises(InputError, match=f"^{message}"):
        plan_uptraining(request)


def test_sources_of_one_run_have_their_own_splits(
    model: Path, prose_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kvconvert.convert.text.hub._is_cached", lambda name: True)
    request = UptrainRequest(
        model=model,
        data=(f"{prose_file}:0.5", "org/name[split=dev,field=content]:0.5", WeightedSource(TextSource("org/other"), 1)),
        length=Length(steps=1),
        settings=UptrainSettings(**SMALL),
    )
    assert [(source.text.chosen_split, source.text.text_field) for source in plan_uptraining(request).job.sources] == [
        ("train", "text"),
        ("dev", "content"),
        ("train", "text"),
    ]


def test_a_plan_reads_its_tokenizer_once(
    model: Path, make_checkpoint: CheckpointFactory, prose_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Beside the check that student and teacher have the same one, which reads both."""
    loads: list[Path] = []

    def load(place: Path) -> Any:
        loads.append(place)
        return load_tokenizer(place)

    monkeypatch.setattr(inputs, "load_tokenizer", load)
    teacher = make_checkpoint(name="teacher", seed=1, with_tokenizer=True)
    uptrain(model, data=prose_file, teacher=teacher, steps=1, settings=UptrainSettings(**SMALL))
    assert loads == [model]


def test_a_token_that_no_text_needs_is_a_remark(
    model: Path, make_checkpoint: CheckpointFactory, prose_file: Path, tmp_path: Path
) -> None:
    """Tokens that were added without resizing the embedding: text without them trains as it did before."""
    added = make_checkpoint(name="added", num_key_value_heads=2)
    tokenizer = load_tokenizer(model)
    tokenizer.add_tokens(["<|im_start|>", "<|im_end|>"], special_tokens=True)
    tokenizer.save_pretrained(added)
    remarks: list[str] = []
    for name, place in (("plain", model), ("rich", added)):
        settings = UptrainSettings(**SMALL)
        uptrain(place, data=prose_file, output=tmp_path / name, steps=2, settings=settings, remark=remarks.append)
    assert [text for text in remarks if "vocab_size" in text] == [
        f"the tokenizer has tokens beyond the vocab_size 384 of {added}, <|im_start|> (384), <|im_end|> (385): "
        "text that needs one of them is refused"
    ]
    assert same_weights(tmp_path / "plain", tmp_path / "rich")


def test_the_default_rate_of_the_demo_is_half_the_peak_of_its_pretraining() -> None:
    """As docs/measurements.md and the demo say."""
    original = configs.DEMO / "model"
    peak = json.loads((original / "pretraining.json").read_text())["peak_learning_rate"]
    with open_checkpoint(original) as checkpoint:
        assert default_learning_rate(checkpoint, Recipe.distill) == peak / 2
