"""Uptrains converted checkpoints by each recipe for the same tokens, and prints what is left of the loss on the way.

    python benchmarks/compare_recipes.py ORIGINAL HELD_OUT --data UPTRAIN --steps 128 CONVERTED...

One JSON line for each model, recipe and learning rate. `excess` is nats per held-out token over the original on the
whole text, `curve` the same on its first windows after so many tokens. `compute` is FLOPs by the arithmetic of
kvconvert.uptrain.estimate, as a multiple of what cross-entropy costs for --steps; the recipe "pretraining, equal
compute" is cross-entropy for 4/3 of them, which costs what forward KL does.
"""

from __future__ import annotations

import argparse
import json
import math
import tempfile
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from kvconvert.convert import TextSource
from kvconvert.convert.checkpoint.loading import load_model
from kvconvert.measure import EvaluationSettings
from kvconvert.measure import evaluate as evaluate_checkpoint
from kvconvert.measure.held_out import load_windows
from kvconvert.measure.perplexity import evaluate
from kvconvert.uptrain import (
    Length,
    Monitoring,
    Recipe,
    TextSettings,
    UptrainRequest,
    UptrainSettings,
    carry_out,
    plan_uptraining,
)

_RECIPES: dict[str, dict[str, Any]] = {
    "pretraining": {"recipe": Recipe.pretraining},
    "distill": {"recipe": Recipe.distill},
    "distill, layer-wise 10 %": {"recipe": Recipe.distill, "layerwise_fraction": 0.1},
    "distill, layer-wise 25 %": {"recipe": Recipe.distill, "layerwise_fraction": 0.25},
    "distill, body at 0.2": {"recipe": Recipe.distill, "body_lr_multiplier": 0.2},
    "light": {"recipe": Recipe.light},
    "light, layer-wise 25 %": {"recipe": Recipe.light, "layerwise_fraction": 0.25},
    "layerwise": {"recipe": Recipe.layerwise},
}


def main() -> None:
    arguments = _parse()
    windows = load_windows(
        arguments.original,
        TextSource(arguments.held_out),
        window=arguments.sequence_length,
        max_windows=arguments.curve_windows,
    )
    original = load_model(arguments.original, dtype=torch.float32, device="cpu")
    base = evaluate(original, windows).nats_per_token
    for model in arguments.converted:
        for name in arguments.recipe or _RECIPES:
            for rate in arguments.lr:
                row = {"model": Path(model).name, "recipe": name}
                print(json.dumps(row | _uptrained(arguments, model, name, rate, windows, base)), flush=True)


def _uptrained(
    arguments: argparse.Namespace, model: str, name: str, rate: float | None, windows: Any, base: float
) -> dict[str, Any]:
    steps = arguments.steps
    if name == "pretraining, equal compute":
        steps, name = math.ceil(steps * 4 / 3), "pretraining"
    curve: list[tuple[int, float]] = []

    def show(record: dict[str, Any]) -> None:
        if "eval_nats_per_token" in record:
            curve.append((record["tokens"], round(record["eval_nats_per_token"] - base, 5)))

    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "out"
        request = _request(arguments, model, name, rate, output, steps)
        plan = plan_uptraining(request)
        result = carry_out(plan, show=show, score=lambda trained: evaluate(trained, windows).nats_per_token)
        measured = EvaluationSettings(window=arguments.sequence_length, dtype="float32")
        against = evaluate_checkpoint(output, arguments.held_out, against=arguments.original, settings=measured).against
    assert against is not None
    return {
        "lr": result.settings.learning_rate if result.start is None else result.start.peak_learning_rate,
        "tokens": result.tokens,
        "start": None if result.start is None else asdict(result.start),
        "compute": round(plan.cost.flops / _cross_entropy_flops(arguments, request), 3),
        "seconds": round(result.seconds, 1),
        "excess": round(against.excess_nats_per_token, 4),
        "standard_error": round(against.excess_standard_error, 4),
        "kl": round(against.kl_nats_per_token, 4),
        "curve": curve,
    }


def _request(
    arguments: argparse.Namespace, model: str, name: str, rate: float | None, output: Path, steps: int
) -> UptrainRequest:
    settings = UptrainSettings(
        lr=rate,
        sequence_length=arguments.sequence_length,
        global_batch_tokens=arguments.sequences_per_step * arguments.sequence_length,
        precision=arguments.precision,
        **_RECIPES[name],
    )
    return UptrainRequest(
        model=model,
        data=(arguments.data,),
        output=output,
        teacher=None if settings.recipe is Recipe.pretraining else arguments.original,
        length=Length(steps=steps),
        text=TextSettings(validation_fraction=0.0),
        settings=settings,
        monitoring=Monitoring(eval_steps=arguments.eval_steps, save_steps=10**9),
    )


def _cross_entropy_flops(arguments: argparse.Namespace, request: UptrainRequest) -> float:
    """FLOPs of plain cross-entropy for --steps."""
    plain = replace(
        request,
        output=Path(arguments.original).with_name("not-written"),
        teacher=None,
        length=Length(steps=arguments.steps),
        settings=replace(request.settings, recipe=Recipe.pretraining, layerwise_fraction=0.0, body_lr_multiplier=1.0),
    )
    return plan_uptraining(plain).cost.flops


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("original")
    parser.add_argument("held_out")
    parser.add_argument("converted", nargs="+")
    parser.add_argument("--data", required=True)
    names = [*_RECIPES, "pretraining, equal compute"]
    parser.add_argument("--recipe", action="append", choices=names, help="repeatable; all but the last unless given")
    parser.add_argument("--lr", action="append", help="a number, or default: what a run without --lr takes; repeatable")
    parser.add_argument("--steps", type=int, default=128)
    parser.add_argument("--sequence-length", type=int, default=256)
    parser.add_argument("--sequences-per-step", type=int, default=16)
    parser.add_argument("--eval-steps", type=int, default=32)
    parser.add_argument("--curve-windows", type=int, default=64)
    parser.add_argument("--precision", default="bf16")
    arguments = parser.parse_args()
    arguments.lr = [None if rate == "default" else float(rate) for rate in arguments.lr or ["1e-3"]]
    return arguments


if __name__ == "__main__":
    main()
