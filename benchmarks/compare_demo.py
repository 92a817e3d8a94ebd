"""Compare merges on the demo checkpoint, before and after uptraining: the table and the picture of the README.

    python benchmarks/compare_demo.py OUTPUT [--all] [--steps N] [--max-windows N] [--calibration-tokens N]

The mean of the heads and `svd`, for 2 and for 1 K/V head, calibrated on the uptraining text; gqa2-svd, with --all every
model, is uptrained with forward KL to the original for 5 % of its pretraining tokens. Writes `results.json` and
`recovery.png` to OUTPUT, a new directory, and prints a Markdown table. Takes 20 minutes of one core.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from kvconvert.configs import DEMO
from kvconvert.convert import Calibration, Gqa, convert, inspect
from kvconvert.convert.text.sources import TextSource
from kvconvert.measure.held_out import evaluate_checkpoint, load_windows
from kvconvert.measure.perplexity import evaluate
from kvconvert.measure.pictures import Curve, Point, draw_recovery
from kvconvert.uptrain import Monitoring, TextSettings, UptrainSettings, uptrain

_MODEL = DEMO / "model"
_UPTRAIN_TEXT = DEMO / "uptrain.jsonl"
_HELD_OUT_TEXT = DEMO / "heldout.jsonl"
_FRACTION = 0.05  # of pretraining: the α of the GQA paper
_SEQUENCE_LENGTH = 256  # as in pretraining
_BATCH_SIZE = 16
_EVAL_STEPS = 32


@dataclass(frozen=True)
class Variant:
    """A conversion of the demo checkpoint, and whether it is uptrained."""

    name: str
    label: str
    num_key_value_heads: int
    method: Literal["mean", "svd"]
    uptrained: bool


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path)
    parser.add_argument("--all", action="store_true")
    parser.add_argument("--steps", type=int)
    parser.add_argument("--max-windows", type=int)
    parser.add_argument("--calibration-tokens", type=int, default=131072)
    asked = parser.parse_args()
    asked.output.mkdir(parents=True)
    variants = (
        Variant("gqa2-mean", "GQA, 2 K/V heads, mean", 2, "mean", uptrained=asked.all),
        Variant("gqa2-svd", "GQA, 2 K/V heads, svd", 2, "svd", uptrained=True),
        Variant("mqa-mean", "MQA, 1 K/V head, mean", 1, "mean", uptrained=asked.all),
        Variant("mqa-svd", "MQA, 1 K/V head, svd", 1, "svd", uptrained=asked.all),
    )
    pretraining = json.loads((_MODEL / "pretraining.json").read_text())["pretraining_tokens"]
    steps = asked.steps or math.ceil(_FRACTION * pretraining / (_SEQUENCE_LENGTH * _BATCH_SIZE))
    begun = time.monotonic()
    inspection = inspect(_MODEL)
    windows = load_windows(
        _MODEL, TextSource(str(_HELD_OUT_TEXT)), window=_SEQUENCE_LENGTH, max_windows=asked.max_windows
    )
    rows, curves = [], []
    for variant in variants:
        model = asked.output / variant.name
        calibration = Calibration(_UPTRAIN_TEXT, asked.calibration_tokens, _SEQUENCE_LENGTH)
        method = Gqa(variant.num_key_value_heads, merge=variant.method)
        converted = convert(_MODEL, method, model, calibration=calibration if variant.method == "svd" else None)
        row = asdict(variant) | {"cache_bytes_per_token": converted.plan.cache_bytes_per_token[1], "after": None}
        row["before"] = score(model, windows)
        if variant.uptrained:
            row["recovery"] = recover(model, windows, steps)
            curves.append(Curve(variant.label, *zip(*row["recovery"], strict=True)))
            row["after"] = score(model.with_name(f"{model.name}-uptrained"), windows)
        print(f"{variant.label}: done after {time.monotonic() - begun:.0f} s", file=sys.stderr)
        rows.append(row)
    perplexity = rows[0]["before"]["against"]["original_perplexity"]
    draw_recovery(
        asked.output / "recovery.png",
        original=Point(f"original, {inspection.num_key_value_heads} K/V heads", inspection.cache_bytes_per_token, 0.0),
        original_perplexity=perplexity,
        curves=curves,
        points=[point_of(row) for row in rows],
    )
    results = {"original_perplexity": perplexity, "num_held_out_tokens": windows.num_scored_tokens, "steps": steps}
    results |= {"method": windows.method, "converted": rows, "seconds": round(time.monotonic() - begun, 1)}
    (asked.output / "results.json").write_text(json.dumps(results, indent=2) + "\n")
    print_table(rows, perplexity, inspection.num_key_value_heads, inspection.cache_bytes_per_token)


def score(model: Path, windows: Any) -> dict[str, Any]:
    """The model on held-out text beside the original."""
    return asdict(evaluate_checkpoint(model, windows, against=_MODEL, batch_size=_BATCH_SIZE))


def recover(model: Path, windows: Any, steps: int) -> list[tuple[int, float]]:
    """Uptrain a converted checkpoint; returns (tokens, held-out perplexity) along the way."""
    found: list[tuple[int, float]] = []

    def show(record: dict[str, Any]) -> None:
        if "eval_nats_per_token" in record:
            found.append((record["tokens"], math.exp(record["eval_nats_per_token"])))

    uptrain(
        model,
        data=_UPTRAIN_TEXT,
        teacher=_MODEL,
        steps=steps,
        settings=UptrainSettings(sequence_length=_SEQUENCE_LENGTH, global_batch_tokens=_BATCH_SIZE * _SEQUENCE_LENGTH),
        text=TextSettings(validation_fraction=0.0),
        monitoring=Monitoring(eval_steps=_EVAL_STEPS),
        show=show,
        score=lambda trained: evaluate(trained, windows, batch_size=_BATCH_SIZE).nats_per_token,
    )
    return found


def point_of(row: dict[str, Any]) -> Point:
    """What the picture shows of a model."""
    before, after = row["before"]["against"], row["after"]["against"] if row["after"] else None
    return Point(
        row["label"],
        row["cache_bytes_per_token"],
        before["excess_nats_per_token"],
        after["excess_nats_per_token"] if after else None,
        (after or before)["excess_standard_error"],
    )


def print_table(rows: list[dict[str, Any]], perplexity: float, heads: int, cache: int) -> None:
    print("| model | K/V heads | B/token | perplexity | after | KL | after |\n|---|---|---|---|---|---|---|")
    print(f"| original | {heads} | {cache} | {perplexity:.1f} | | 0 | |")
    for row in rows:
        before, after = row["before"], row["after"]
        cells = [row["name"], row["num_key_value_heads"], row["cache_bytes_per_token"], f"{before['perplexity']:.1f}"]
        cells += [f"{after['perplexity']:.1f}" if after else "", f"{before['against']['kl_nats_per_token']:.3f}"]
        cells += [f"{after['against']['kl_nats_per_token']:.3f}" if after else ""]
        print(f"| {' | '.join(map(str, cells))} |")


if __name__ == "__main__":
    main()
