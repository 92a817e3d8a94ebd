from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]


def script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, ROOT / "benchmarks" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


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


@pytest.mark.parametrize(
    ("target", "command"),
    [
        ("gqa:8", "mha2gqa --groups 8"),
        ("mqa", "mha2gqa --groups 1"),
        ("cla2", "mha2cla --share 2"),
        ("mqa+cla2", "mha2cla --share 2 --groups 1"),
        ("gqa:4+cla3", "mha2cla --share 3 --groups 4"),
        ("mla:256+64", "mha2mla --kv-lora-rank 256 --qk-rope-head-dim 64 --no-calibration"),
    ],
)
def test_a_target_of_the_table_is_a_conversion(target: str, command: str) -> None:
    assert " ".join(script("decode_table").command_of(target)) == command


@pytest.mark.parametrize("target", ["", "gqa", "cla", "+cla2", "mqacla2", "mqa+", "mla:3", "mha"])
def test_what_is_no_target_of_the_table_is_refused(target: str) -> None:
    with pytest.raises(SystemExit, match="no such target"):
        script("decode_table").command_of(target)


def row(variant: str, context: int, seconds: float | None, gain: tuple[float, float] | None) -> dict[str, Any]:
    timing = {"decode": {"median": seconds}, "cache_bytes": 80}
    gained = None if gain is None else {"ratio": gain[0], "bound": gain[1]}
    common = {"shape": "tiny", "dtype": "float32", "compiled": False, "batch": 2, "context": context}
    return common | {
        "variant": variant,
        "original": None if seconds is None else timing,
        "result": {"cache_bytes": 10},
        "decode_gain": gained,
    }


def test_the_table_has_the_gain_and_its_bound() -> None:
    rows = [row("mqa", 8, 0.1, (2.0, 3.0)), row("mqa", 16, None, None), row("cla2", 8, 0.3, (1.5, 1.75))]
    assert list(script("render_decode_table").rendered(rows)) == [
        "tiny, float32, eager, batch 2:",
        "",
        "| | cache | 8 tokens | 16 tokens |",
        "|---|---|---|---|",
        "| MHA, ms per step | 1 | 200 | out of memory |",
        "| mqa | 1/8 | 2.00 / 3.00 | MHA does not fit |",
        "| cla2 | 1/8 | 1.50 / 1.75 |  |",
        "",
    ]


@pytest.mark.slow
def test_the_table_is_made_and_goes_on_where_it_ended(tmp_path: Path) -> None:
    out = tmp_path / "rows.json"
    command = [sys.executable, str(ROOT / "benchmarks/decode_table.py"), str(out), "--targets", "mqa+cla2"]
    sizes = {"layers": 2, "heads": 4, "head-dim": 8, "hidden-size": 16, "intermediate-size": 16, "vocab-size": 32}
    settings = {"dtype": "float32", "tokens": 2, "repeats": 1, "max-cache": 16384, "context": 16, "batch": "1,4"}
    command += [word for name, value in (sizes | settings).items() for word in (f"--{name}", str(value))]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert printed.splitlines() == [
        "left out: batch 4, context 16, float32: 3.28e-05 GB of cache",
        "float32 mqa+cla2 context 16 batches [1]",
    ]
    (made,) = json.loads(out.read_text())["rows"]
    assert made["original"]["cache_bytes"] == 8 * made["result"]["cache_bytes"] == 2 * 2 * 4 * 8 * 4 * 16
    again = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert again.splitlines() == ["left out: batch 4, context 16, float32: 3.28e-05 GB of cache"]
