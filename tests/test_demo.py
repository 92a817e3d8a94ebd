from __future__ import annotations

import json
from pathlib import Path

import pytest
from conftest import Command, RunHere, weights
from kvconvert.configs import DEMO, RECIPES

SHORT = {
    "convert.calibration_tokens": 4096,
    "uptrain.fraction": "null",
    "uptrain.steps": 4,
    "uptrain.eval_data": "null",
    "evaluate.max_windows": 16,
    "benchmark.context": "[32]",
    "benchmark.repeats": 1,
    "benchmark.tokens": 2,
    "gates.max_ppl_increase": "15%",
}


@pytest.mark.slow
def test_the_demo_runs_from_end_to_end_and_once(kvconvert: Command, invoke: Command, tmp_path: Path) -> None:
    """The demo's own recipe, in small: what it says, what it leaves, and that a second call only shows it again."""
    output = tmp_path / "demo"
    short = [word for key, value in SHORT.items() for word in ("--set", f"{key}={value}")]
    ran = kvconvert("demo", "--output", output, *short, "--json")
    assert ran.returncode == 0, ran.stderr
    evaluation = json.loads((output / "evaluation.json").read_text())
    against = evaluation["against"]
    assert against["original_perplexity"] < evaluation["perplexity"] < 1.1 * against["original_perplexity"]
    facts = {fact["label"]: fact for fact in ran.printed["headline"]}
    assert facts["K/V cache"]["value"] == "1024 bytes per token"
    assert facts["K/V cache"]["note"] == "1/4 of 4096, in 16 bits"
    assert facts["Perplexity"]["value"] == f"{evaluation['perplexity']:.4g}"
    kept = {path.name for path in output.iterdir()}
    assert kept >= {"converted", "uptrained", "evaluation.json", "benchmark.json", "recipe.yaml", "report.html"}
    assert {path.name for path in (output / "pictures").iterdir()} == {
        *("decode.png", "layers.png", "quality.png", "training.png")
    }
    before = weights(output / "uptrained")
    again = invoke("demo", "--output", output, *short)
    assert again.returncode == 0
    done = [line for line in again.stderr.splitlines() if line.endswith("done before")]
    assert done == [f"{stage}: done before" for stage in ("convert", "uptrain", "evaluate", "benchmark")]
    assert f"{evaluation['perplexity']:.4g}" in again.stdout
    assert all((before[name] == tensor).all() for name, tensor in weights(output / "uptrained").items())


@pytest.mark.slow
def test_the_demo_checkpoint_recovers(run_here: RunHere, tmp_path: Path) -> None:
    """From the mean, within 8 steps; the whole demo, `scripts/demo`, takes minutes, and docs/measurements.md has it."""
    model, held_out = DEMO / "model", ("--data", DEMO / "heldout.jsonl", "--against", DEMO / "model")
    few = ("--window", 256, "--max-windows", 24)
    run_here("mha2gqa", "--groups", 2, model, "--output", tmp_path / "mean")
    options = ("--data", DEMO / "uptrain.jsonl", "--teacher", model, "--lr", 1e-3, "--sequence-length", 256)
    steps = ("--steps", 8, "--global-batch-tokens", 4096, "--output", tmp_path / "trained")
    run_here("uptrain", tmp_path / "mean", *options, *steps)
    before, after = (
        run_here("evaluate", tmp_path / name, *held_out, *few)["against"]["kl_nats_per_token"]
        for name in ("mean", "trained")
    )
    assert after < 0.7 * before


def test_the_demo_is_planned_without_a_weight(run_here: RunHere) -> None:
    plan = run_here("demo", "--dry-run")
    assert plan["recipe"] == str(RECIPES / "demo.yaml")
    stages = {stage["name"]: stage["facts"] for stage in plan["stages"]}
    assert stages["convert"]["cache_bytes_per_token"] == {"source": 4096, "result": 1024}
    assert stages["uptrain"]["steps"] == 103  # 2 % of 20 971 520 tokens, at 4096 a step


@pytest.mark.parametrize("force", [[], ["--force"]])
def test_a_directory_that_is_not_a_demos_is_left_alone(force: list[str], invoke: Command, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "file").touch()
    outcome = invoke("demo", "--output", tmp_path / "mine", *force)
    assert outcome.returncode == 2
    assert outcome.stderr.startswith(f"error: {tmp_path / 'mine'} exists and is not a run's\nhint: ")
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["file"]
