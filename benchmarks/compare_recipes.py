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
from pathlib import Path
from typing import Any

import torch
from kvconvert.convert import open_checkpoint
from kvconvert.convert.checkpoint.loading import load_model
from kvconvert.convert.text.sources import TextSource
from kvconvert.measure.held_out import evaluate_checkpoint, load_windows
from kvconvert.measure.perplexity import evaluate
from kvconvert.uptrain import run
from kvconvert.uptrain.data.sources import WeightedSource
from kvconvert.uptrain.estimate.flops import flops_per_token
from kvconvert.uptrain.estimate.size import measure_size
from kvconvert.uptrain.job import UptrainJob
from kvconvert.uptrain.observation import Observation
from kvconvert.uptrain.recipe import LossWeights, Recipe
from kvconvert.uptrain.settings import RunSettings

_CROSS_ENTROPY = LossWeights(kl=0.0, cross_entropy=1.0)
_RECIPES: dict[str, dict[str, Any]] = {
    "pretraining": {"recipe": Recipe.pretraining, "weights": _CROSS_ENTROPY},
    "distill": {"recipe": Recipe.distill, "weights": LossWeights()},
    "distill, layer-wise 10 %": {"recipe": Recipe.distill, "weights": LossWeights(), "layerwise_fraction": 0.1},
    "distill, layer-wise 25 %": {"recipe": Recipe.distill, "weights": LossWeights(), "layerwise_fraction": 0.25},
    "distill, body at 0.2": {"recipe": Recipe.distill, "weights": LossWeights(), "body_lr_multiplier": 0.2},
    "light": {"recipe": Recipe.light, "weights": LossWeights()},
    "light, layer-wise 25 %": {"recipe": Recipe.light, "weights": LossWeights(), "layerwise_fraction": 0.25},
    "layerwise": {"recipe": Recipe.layerwise, "weights": LossWeights()},
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
                row = {"model": Path(model).name, "recipe": name, "lr": rate}
                print(json.dumps(row | _uptrained(arguments, model, name, rate, windows, base)), flush=True)


def _uptrained(
    arguments: argparse.Namespace, model: str, name: str, rate: float, windows: Any, base: float
) -> dict[str, Any]:
    steps = arguments.steps
    if name == "pretraining, equal compute":
        steps, name = math.ceil(steps * 4 / 3), "pretraining"
    settings = RunSettings(
        steps=steps,
        sequence_length=arguments.sequence_length,
        sequences_per_step=arguments.sequences_per_step,
        learning_rate=rate,
        precision=arguments.precision,
        **_RECIPES[name],
    )
    curve: list[tuple[int, float]] = []

    def show(record: dict[str, Any]) -> None:
        if "eval_nats_per_token" in record:
            curve.append((record["tokens"], round(record["eval_nats_per_token"] - base, 5)))

    watch = Observation(
        eval_steps=arguments.eval_steps,
        score=lambda trained: evaluate(trained, windows).nats_per_token,
        show=show,
        save_steps=10**9,
    )
    with tempfile.TemporaryDirectory() as folder, open_checkpoint(model) as checkpoint:
        teacher = arguments.original if settings.recipe.needs_teacher else None
        output = Path(folder) / "out"
        job = UptrainJob(checkpoint, settings, (WeightedSource(TextSource(arguments.data)),), output, teacher)
        result = run.uptrain(job, watch)
        whole = load_windows(output, TextSource(arguments.held_out), window=arguments.sequence_length)
        against = evaluate_checkpoint(output, whole, against=arguments.original).against
    assert against is not None
    return {
        "tokens": result.tokens,
        "compute": round(_flops(arguments, model, settings) / _cross_entropy_flops(arguments, model), 3),
        "seconds": round(result.seconds, 1),
        "excess": round(against.excess_nats_per_token, 4),
        "standard_error": round(against.excess_standard_error, 4),
        "kl": round(against.kl_nats_per_token, 4),
        "curve": curve,
    }


def _flops(arguments: argparse.Namespace, model: str, settings: RunSettings) -> float:
    with open_checkpoint(model) as checkpoint, open_checkpoint(arguments.original) as original:
        student = measure_size(checkpoint)
        teacher = measure_size(original) if settings.recipe.needs_teacher else None
        return sum(
            stage.steps
            * settings.tokens_per_step
            * flops_per_token(student, teacher, stage.objective, stage.trained, settings.sequence_length)
            for stage in settings.stages
        )


def _cross_entropy_flops(arguments: argparse.Namespace, model: str) -> float:
    settings = RunSettings(
        steps=arguments.steps,
        sequence_length=arguments.sequence_length,
        sequences_per_step=arguments.sequences_per_step,
        learning_rate=1.0,
    )
    return _flops(arguments, model, settings)


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("original")
    parser.add_argument("held_out")
    parser.add_argument("converted", nargs="+")
    parser.add_argument("--data", required=True)
    names = [*_RECIPES, "pretraining, equal compute"]
    parser.add_argument("--recipe", action="append", choices=names, help="repeatable; all but the last unless given")
    parser.add_argument("--lr", type=float, action="append")
    parser.add_argument("--steps", type=int, default=128)
    parser.add_argument("--sequence-length", type=int, default=256)
    parser.add_argument("--sequences-per-step", type=int, default=16)
    parser.add_argument("--eval-steps", type=int, default=32)
    parser.add_argument("--curve-windows", type=int, default=64)
    parser.add_argument("--precision", default="bf16")
    arguments = parser.parse_args()
    arguments.lr = arguments.lr or [1e-3]
    return arguments


if __name__ == "__main__":
    main()
