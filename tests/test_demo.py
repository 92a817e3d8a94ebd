from __future__ import annotations

from pathlib import Path

import pytest
from conftest import Command, RunHere
from kvconvert.configs import DEMO

PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"


@pytest.mark.slow
def test_the_demo_runs_from_end_to_end_and_once(kvconvert: Command, invoke: Command, tmp_path: Path) -> None:
    output = tmp_path / "demo"
    short = ("--steps", 8, "--max-windows", 32, "--calibration-tokens", 8192)
    results = kvconvert("demo", "--output", output, *short, "--json").printed
    assert (output / "recovery.png").read_bytes().startswith(PNG_SIGNATURE)
    assert {path.name for path in output.iterdir()} == {
        ".kvconvert-demo",
        "gqa2-mean",
        "gqa2-svd",
        "gqa2-svd-uptrained",
        "mqa-mean",
        "mqa-svd",
        "recovery.png",
        "results.json",
    }
    original = results["original"]
    gqa_mean, gqa, mqa_mean, mqa = results["converted"]
    bytes_per_token = [row["cache_bytes_per_token"] for row in (original, *results["converted"])]
    assert bytes_per_token == [4096, 1024, 1024, 512, 512]
    assert original["perplexity"] < gqa["after"]["perplexity"] < 1.15 * original["perplexity"]
    assert gqa["before"]["perplexity"] < mqa["before"]["perplexity"] < 1.3 * original["perplexity"]
    assert 4 * original["perplexity"] < gqa_mean["before"]["perplexity"] < mqa_mean["before"]["perplexity"]
    assert [row["after"] is None for row in results["converted"]] == [True, False, True, True]
    assert [tokens for tokens, _ in gqa["recovery"]] == [0, 8 * 4096]

    written = (output / "gqa2-svd-uptrained" / "model.safetensors").stat().st_mtime_ns
    second = invoke("demo", "--output", output, *short)
    assert second.returncode == 0
    assert "holds finished results; --force runs the demo again" in second.stderr
    row = next(line for line in second.stdout.splitlines() if "gqa2-svd " in line)
    shown = [cell.strip() for cell in row.strip("│").split("│")]
    figures = [f"{gqa[stage]['perplexity']:.1f}" for stage in ("before", "after")]
    figures += [f"{gqa[stage]['against']['kl_nats_per_token']:.3f}" for stage in ("before", "after")]
    assert shown == ["gqa2-svd", "2", "1024", *figures]
    assert (output / "gqa2-svd-uptrained" / "model.safetensors").stat().st_mtime_ns == written


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


@pytest.mark.parametrize("force", [[], ["--force"]])
def test_a_directory_that_is_not_a_demos_is_left_alone(force: list[str], invoke: Command, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "file").touch()
    outcome = invoke("demo", "--output", tmp_path / "mine", *force)
    assert outcome.returncode == 2
    assert outcome.stderr.startswith(f"error: {tmp_path / 'mine'} exists and is not a demo's\nhint: ")
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["file"]
