"""What GitHub Actions is told of a command: the summary of the step, its outputs, annotations."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import CheckpointFactory, Command
from kvconvert.cli.github import annotate, evaluation_summary, publish_evaluation, write_outputs, write_summary

AGAINST = {
    "original_perplexity": 20.0,
    "excess_nats_per_token": 0.25,
    "kl_nats_per_token": 0.125,
    "top1_agreement": 0.75,
}
GATE = {"name": "max_kl", "task": None, "value": 0.125, "threshold": 0.05, "passed": False}
EVALUATION: dict[str, Any] = {
    "model": "model_dir-gqa8",
    "data": ["held_out.jsonl"],
    "perplexity": 25.5,
    "against": AGAINST,
    "recovery": None,
    "gates": [GATE],
}


@pytest.fixture
def runner(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], str]:
    """A runner's files, which the function reads: "summary" or "output"."""
    monkeypatch.setenv("GITHUB_ACTIONS", "true")
    for name, variable in (("summary", "GITHUB_STEP_SUMMARY"), ("output", "GITHUB_OUTPUT")):
        (tmp_path / name).write_text("before\n")
        monkeypatch.setenv(variable, str(tmp_path / name))
    return lambda name: (tmp_path / name).read_text()


def outputs(text: str) -> dict[str, str]:
    """What a runner reads of GITHUB_OUTPUT: a name, <<, a delimiter; lines, until the delimiter is alone on one."""
    found: dict[str, str] = {}
    lines = iter(text.splitlines()[1:])
    for line in lines:
        name, _, end = line.partition("<<")
        found[name] = "\n".join(iter(lambda: next(lines), end))
    return found


def test_an_evaluation_is_a_table_outputs_and_annotations(
    runner: Callable[[str], str], capsys: pytest.CaptureFixture[str]
) -> None:
    publish_evaluation(EVALUATION, [("max_kl", "the KL is 0.1250, more than 0.0500")], output=Path("results"))
    assert runner("summary") == (
        "before\n### model\\_dir-gqa8\n\nOn held\\_out.jsonl.\n\n"
        "| figure | value |\n|---|---|\n| perplexity | 25.5 |\n| perplexity of the original | 20 |\n"
        "| loss above the original, nats per token | 0.2500 |\n| KL to the original, nats per token | 0.1250 |\n"
        "| tokens on which both agree | 75.0% |\n\n"
        "| gate | value | limit | verdict |\n|---|---|---|---|\n| max\\_kl | 0.1250 | at most 0.0500 | **failed** |\n\n"
    )
    assert outputs(runner("output")) == {
        "perplexity": "25.5",
        "original_perplexity": "20.0",
        "excess": "0.25",
        "kl": "0.125",
        "top1": "0.75",
        "gates": "failed",
        "output": "results",
    }
    error = "::error title=quality gate max_kl::the KL is 0.1250, more than 0.0500\n"
    assert capsys.readouterr() == ("", error)


def test_nothing_is_written_elsewhere(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for variable in ("GITHUB_ACTIONS", "GITHUB_STEP_SUMMARY", "GITHUB_OUTPUT"):
        monkeypatch.delenv(variable, raising=False)
    publish_evaluation(EVALUATION, [("max_kl", "too much")])
    assert capsys.readouterr() == ("", "")
    assert list(tmp_path.iterdir()) == []


def test_of_several_processes_only_the_first_writes(
    runner: Callable[[str], str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "1")
    publish_evaluation(EVALUATION, [("max_kl", "too much")])
    assert (runner("summary"), runner("output")) == ("before\n", "before\n")
    assert capsys.readouterr().err == ""


def test_an_annotation_is_escaped(runner: Callable[[str], str], capsys: pytest.CaptureFixture[str]) -> None:
    annotate("50% more: a, b\r\n::error::forged", title="a: b, 5%\nc", level="warning")
    assert capsys.readouterr().err == ("::warning title=a%3A b%2C 5%25%0Ac::50%25 more: a, b%0D%0A::error::forged\n")


def test_no_value_pretends_to_be_another_output(runner: Callable[[str], str]) -> None:
    write_outputs({"output": "a\nEOF\nkl=0\nkl<<x", "kl": 3.0, "none": None})
    assert outputs(runner("output")) == {"output": "a\nEOF\nkl=0\nkl<<x", "kl": "3.0"}


def test_names_are_no_markup() -> None:
    text = evaluation_summary(EVALUATION | {"model": "a|b<script>`x`\n# c", "data": "d*e*"})
    assert text.startswith("### a\\|b&lt;script&gt;\\`x\\`\\\\x0a\\# c\n\nOn d\\*e\\*.\n")


def test_what_is_no_number_is_no_figure(runner: Callable[[str], str]) -> None:
    publish_evaluation({"model": "a", "data": "b", "perplexity": math.inf, "gates": []}, [])
    assert outputs(runner("output")) == {}
    assert "figure" not in runner("summary")


def test_a_summary_stays_below_what_the_runner_takes(runner: Callable[[str], str]) -> None:
    write_summary("ü" * 10**6)
    text = runner("summary")
    assert 2**20 - 2**11 < len(text.encode()) < 2**20
    assert text.endswith("ü\n\n… the rest is left out\n")


def test_a_file_that_cannot_be_written_loses_nothing(
    runner: Callable[[str], str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setenv("GITHUB_OUTPUT", str(tmp_path))
    write_outputs({"kl": 3.0})
    assert capsys.readouterr().err == f"{tmp_path} could not be written (Is a directory)\n"


def test_evaluate_tells_github_and_json_stays_one_object(
    runner: Callable[[str], str],
    make_checkpoint: CheckpointFactory,
    invoke: Command,
    prose_file: Path,
) -> None:
    model, other = make_checkpoint(with_tokenizer=True), make_checkpoint(name="other", seed=1, with_tokenizer=True)
    arguments = ("evaluate", other, "--data", prose_file, "--window", 16, "--max-windows", 2, "--against", model)
    outcome = invoke(*arguments, "--max-kl", 1e-9, "--json", "--quiet", "--output", "results")
    assert outcome.returncode == 3
    printed = json.loads(outcome.stdout)
    annotation, error = outcome.stderr.splitlines()
    assert annotation.startswith("::error title=quality gate max_kl::the KL to the original is ")
    assert error.startswith("error: the KL to the original is ")
    assert outputs(runner("output")) == {
        "perplexity": str(printed["perplexity"]),
        "original_perplexity": str(printed["against"]["original_perplexity"]),
        "excess": str(printed["against"]["excess_nats_per_token"]),
        "kl": str(printed["against"]["kl_nats_per_token"]),
        "top1": str(printed["against"]["top1_agreement"]),
        "gates": "failed",
        "output": "results",
    }
    assert f"| perplexity | {printed['perplexity']:.4g} |" in runner("summary")
