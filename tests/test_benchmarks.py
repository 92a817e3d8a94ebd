from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.slow
def test_what_runs_on_a_gpu_runs_here_in_small(tmp_path: Path) -> None:
    """All parts but the tests, which this suite runs itself; compiled runs need minutes on a CPU, and fail loudly."""
    environment = {**os.environ, "PYTHON": sys.executable, "KVCONVERT_INSTALLED": "1", "TORCHDYNAMO_DISABLE": "1"}
    outcome = subprocess.run(
        [ROOT / "benchmarks/gpu.sh", tmp_path, "--cpu", "--tiny", "--parts", "uptraining,decoding,conversion"],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )
    assert outcome.returncode == 0, outcome.stdout + outcome.stderr
    found = {path.stem: json.loads(path.read_text()) for path in tmp_path.glob("*.json")}
    assert all(result["finished"] for result in found.values())
    rows = {name: result["rows"] for name, result in found.items()}
    assert [(row["shape"], row["run"]) for row in rows["uptraining"]] == [
        (shape, run) for shape in ("1B", "135M") for run in ("CE", "KL, compiled")
    ]
    assert len(rows["decoding"]) == 2 * 4 * 2
    cache = {row["variant"]: row for row in rows["decoding"] if row["batch"] == 2}
    # 2 layers of 8 heads of 8, and for MLA a latent of 16 and a rotary key of 8: numbers per token
    assert {name: row["result"]["cache_bytes"] / row["original"]["cache_bytes"] for name, row in cache.items()} == {
        "GQA-8": 1 / 4,
        "MQA": 1 / 8,
        "CLA2": 1 / 2,
        "MLA": (16 + 8) / (2 * 8 * 8),
    }
    assert [row["groups"] for row in rows["conversion"]] == [4, 1]


def test_a_part_that_is_cut_off_still_tells(tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHON": sys.executable, "KVCONVERT_INSTALLED": "1"}
    command = [str(ROOT / "benchmarks/gpu.sh"), str(tmp_path), "--cpu", "--parts", "decoding", "--seconds", "1"]
    outcome = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert "decoding: cut off after" in outcome.stdout
    assert json.loads((tmp_path / "decoding.json").read_text())["finished"] is False


@pytest.mark.slow
def test_every_step_of_a_calibrated_conversion_is_measured() -> None:
    """For a tiny shape: a step that the library calls by another name would be missing from the table."""
    command = [sys.executable, str(ROOT / "benchmarks/measure_calibrated.py"), "--tiny", "--tokens", "2048"]
    command += ["--only", "mha2mla --kv-lora-rank 512 --qk-rope-head-dim 64"]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    rows = [line.split("|")[1].strip() for line in printed.splitlines() if line.startswith("|")]
    shared = {"reading weights", "moments of inputs *", "pass of the original *", "moments of outputs *", "refit"}
    shared |= {"pass of the result *", "writing", "a layer"}
    assert {name for name in rows if rows.count(name) == 1} >= shared
    assert {"latents", "norm of the latent"} <= set(rows)
