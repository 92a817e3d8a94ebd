"""Compares uptraining in one process at once with the same steps accumulated, in two processes, and sharded over two.

    python benchmarks/check_invariance.py [--steps 8]

The demo checkpoint, converted to 2 K/V heads by their mean, is uptrained for a few steps of 4 sequences on the CPU by
cross-entropy and by forward KL: 4 sequences at once (the reference), 4 × 1 accumulated, 2 processes × 2 (torchrun,
gloo), and the same with FSDP2. Each in float32 with AdamW, in float32 with plain SGD, and in float64 with AdamW. For
each it prints how far it is from the reference:

- loss: the largest relative difference of a logged loss (logged in float32);
- gradient: ‖g − g'‖ / ‖g‖ of the first step's gradient, before anything can grow;
- update: ‖w − w'‖ / ‖w − w0‖ over all weights after the last step;
- weight: the largest |w − w'|.

AdamW divides a gradient by its own size, so that where it is nearly zero the rounding of a sum in another order decides
the sign of a step of the size of the learning rate. SGD does not, and float64 rounds 1e9 times less: what remains there
is not rounding. SGD runs without clipping, which would hide a wrong scale of the gradient just as AdamW does.

The control accumulates 4 × 1 and lets the Trainer scale the loss a second time, as it would if the class did not forbid
it: it has to fail. The FSDP run's result, written by uptrain, has to open and evaluate as the reference's does. Exits
with 1 if a check fails.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from kvconvert.convert import open_checkpoint
from kvconvert.convert.text.sources import TextSource
from kvconvert.uptrain import run
from kvconvert.uptrain.data.sources import WeightedSource
from kvconvert.uptrain.job import UptrainJob
from kvconvert.uptrain.observation import Observation
from kvconvert.uptrain.recipe import LossWeights, Recipe
from kvconvert.uptrain.settings import Execution, RunSettings
from kvconvert.uptrain.training.trainer import UptrainTrainer
from safetensors.torch import load_file
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_pre_hook

_DEMO = Path(__file__).parents[1] / "configs" / "demo"
_SEQUENCES, _LENGTH = 4, 128


@dataclass(frozen=True)
class Layout:
    """How the sequences of a step are shared out. `limit` is what the issue asks for."""

    name: str
    micro_batch: int
    num_processes: int = 1
    fsdp: bool = False
    scaled_twice: bool = False
    limit: float = 1e-6


@dataclass(frozen=True)
class Arithmetic:
    name: str
    precision: str
    optimizer: str
    learning_rate: float
    max_grad_norm: float


@dataclass(frozen=True)
class Outcome:
    """`gradient` is the first step's, flat; `weights` are those after the last step."""

    losses: list[float]
    gradient: Tensor
    weights: dict[str, Tensor]


@dataclass(frozen=True)
class Distance:
    """The module's docstring says of what."""

    loss: float
    gradient: float
    update: float
    weight: float


REFERENCE = Layout("1 × 4", 4)
CONTROL = Layout("4 × 1, scaled twice", 1, scaled_twice=True)
LAYOUTS = (
    REFERENCE,
    Layout("4 × 1", 1),
    CONTROL,
    Layout("2 processes", 2, num_processes=2),
    Layout("FSDP2, 2 processes", 2, num_processes=2, fsdp=True, limit=1e-4),
)
ADAMW = Arithmetic("float32, AdamW", "fp32", "adamw_torch_fused", 1e-3, 1.0)
SGD = Arithmetic("float32, SGD", "fp32", "sgd", 0.1, 0.0)
DOUBLE = Arithmetic("float64, AdamW", "fp64", "adamw_torch_fused", 1e-3, 1.0)
ARITHMETICS = (ADAMW, SGD, DOUBLE)
OBJECTIVES = {
    "CE": (Recipe.pretraining, LossWeights(kl=0.0, cross_entropy=1.0)),
    "KL": (Recipe.distill, LossWeights()),
}


def distance(outcome: Outcome, reference: Outcome, start: dict[str, Tensor]) -> Distance:
    """How far an outcome is from another of the same start; the norms in float64."""
    pairs = zip(outcome.losses, reference.losses, strict=True)
    moved, apart = (_difference(reference.weights, other, start) for other in (start, outcome.weights))
    return Distance(
        loss=max(abs(one - other) / abs(other) for one, other in pairs),
        gradient=_relative(outcome.gradient, reference.gradient),
        update=_norm(apart) / _norm(moved),
        weight=apart.abs().max().item(),
    )


def _relative(one: Tensor, other: Tensor) -> float:
    """‖one − other‖ / ‖other‖, infinite where the optimizers do not hold the same parameters."""
    return _norm(one - other) / _norm(other) if one.shape == other.shape else math.inf


def _difference(one: dict[str, Tensor], other: dict[str, Tensor], names: dict[str, Tensor]) -> Tensor:
    return torch.cat([(one[name].double() - other[name].double()).flatten() for name in names])


def _norm(tensor: Tensor) -> float:
    return float(torch.linalg.vector_norm(tensor.double()).item())


def train(layout: Layout, arithmetic: Arithmetic, objective: str, *, model: Path, output: Path, steps: int) -> Outcome:
    """Uptrain in this process, or in this and the others that torchrun started."""
    recipe, weights = OBJECTIVES[objective]
    settings = RunSettings(
        steps=steps,
        sequence_length=_LENGTH,
        sequences_per_step=_SEQUENCES,
        learning_rate=arithmetic.learning_rate,
        recipe=recipe,
        weights=weights,
        warmup_fraction=0.0,  # with a warm-up the first step would be a small one
        max_grad_norm=arithmetic.max_grad_norm,
        precision=arithmetic.precision,
        optimizer=arithmetic.optimizer,
    )
    execution = Execution(layout.micro_batch, layout.num_processes, fsdp=layout.fsdp)
    source = WeightedSource(TextSource(str(_DEMO / "uptrain.jsonl")))
    teacher = str(_DEMO / "model") if recipe.needs_teacher else None
    losses: list[float] = []

    def show(record: dict[str, Any]) -> None:
        losses.append(record["loss"])

    states: dict[str, Tensor] = {}

    def keep(trained: dict[str, Tensor]) -> None:
        states.update({name: tensor.clone() for name, tensor in trained.items()})

    # the control: a class that lets the Trainer scale the loss a second time
    control = patch.object(UptrainTrainer, "loss_is_scaled_for_ga", not layout.scaled_twice)
    with open_checkpoint(model) as checkpoint, _first_gradient() as gradient, control:
        job = UptrainJob(checkpoint, settings, (source,), output, teacher, execution)
        run.uptrain(job, Observation(log_steps=1, show=show, trained=keep))
    return Outcome(losses, torch.cat(gradient), states)


@contextmanager
def _first_gradient() -> Iterator[list[Tensor]]:
    """Of every parameter, whole and flat, in the optimizer's order, as the first step has it; 0 where it has none."""
    found: list[Tensor] = []

    def keep(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        if found:
            return
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
                whole = gradient.full_tensor() if hasattr(gradient, "full_tensor") else gradient.clone()
                found.append(whole.detach().flatten())

    handle = register_optimizer_step_pre_hook(keep)
    try:
        yield found
    finally:
        handle.remove()


def work(folder: Path, *, steps: int, num_processes: int, fsdp: bool) -> None:
    """All runs of the layouts of so many processes; the main one saves what came out."""
    for layout in LAYOUTS:
        if (layout.num_processes, layout.fsdp) != (num_processes, fsdp):
            continue
        for arithmetic in ARITHMETICS:
            for objective in OBJECTIVES:
                name = _name(layout, arithmetic, objective)
                outcome = train(layout, arithmetic, objective, model=folder / "gqa2", output=folder / name, steps=steps)
                if os.environ.get("RANK", "0") == "0":
                    torch.save(
                        {field.name: getattr(outcome, field.name) for field in fields(outcome)}, folder / f"{name}.pt"
                    )


def _name(layout: Layout, arithmetic: Arithmetic, objective: str) -> str:
    return f"{objective}, {arithmetic.name}, {layout.name}"


def main() -> None:
    arguments = _parse()
    if arguments.worker is not None:
        work(arguments.worker, steps=arguments.steps, num_processes=arguments.processes, fsdp=arguments.fsdp)
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        _kvconvert("mha2gqa", _DEMO / "model", "--groups", 2, "--method", "mean", "--output", folder / "gqa2")
        for num_processes, fsdp in dict.fromkeys((layout.num_processes, layout.fsdp) for layout in LAYOUTS):
            _run_worker(folder, arguments.steps, num_processes, fsdp)
        passed = _compare(folder) & _evaluate(folder)
    sys.exit(0 if passed else 1)


def _run_worker(folder: Path, steps: int, num_processes: int, fsdp: bool) -> None:
    command = [sys.executable]
    if num_processes > 1:
        command += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(num_processes)]
    command += [__file__, "--worker", str(folder), "--steps", str(steps), "--processes", str(num_processes)]
    # one thread each, so that the order of sums within a process is the same; and no GPU
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command += ["--fsdp"] if fsdp else []
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{' '.join(command)} ended with {done.returncode}:\n{done.stderr[-4000:]}")


def _compare(folder: Path) -> bool:
    """Print the table and the checks; whether all of them passed."""
    start = load_file(folder / "gqa2" / "model.safetensors")
    found: dict[tuple[str, str, str], Distance] = {}
    print("| objective | arithmetic | against 1 × 4 at once | loss | gradient | update | weight |")
    print("|---|---|---|---|---|---|---|")
    for objective in OBJECTIVES:
        for arithmetic in ARITHMETICS:
            reference = _outcome(folder, REFERENCE, arithmetic, objective)
            for layout in LAYOUTS[1:]:
                apart = distance(_outcome(folder, layout, arithmetic, objective), reference, start)
                found[objective, arithmetic.name, layout.name] = apart
                figures = " | ".join(f"{value:.1e}" for value in asdict(apart).values())
                print(f"| {objective} | {arithmetic.name} | {layout.name} | {figures} |")
    return _judge(found)


def _judge(found: dict[tuple[str, str, str], Distance]) -> bool:
    passed = True
    for layout in LAYOUTS[1:]:
        rows = {arithmetic.name: _worst(found, arithmetic, layout) for arithmetic in ARITHMETICS}
        checks = {
            "loss, float32": max(rows[name].loss for name in (ADAMW.name, SGD.name)),
            "gradient, float32": max(rows[name].gradient for name in (ADAMW.name, SGD.name)),
            "update, float32, SGD": rows[SGD.name].update,
            "update, float64, AdamW": rows[DOUBLE.name].update,
        }
        for what, value in checks.items():
            below = value <= layout.limit
            verdict = "at most" if below else "above, as it has to be," if layout is CONTROL else "MORE THAN"
            print(f"{layout.name}: {what}: {value:.1e}, {verdict} {layout.limit:.0e}")
            passed &= below or layout is CONTROL
        if layout is CONTROL and checks["update, float32, SGD"] <= layout.limit:
            print(f"{layout.name}: THE CONTROL DOES NOT FAIL")
            passed = False
    return passed


def _worst(found: dict[tuple[str, str, str], Distance], arithmetic: Arithmetic, layout: Layout) -> Distance:
    """Of the objectives, figure by figure."""
    rows = [asdict(found[objective, arithmetic.name, layout.name]) for objective in OBJECTIVES]
    return Distance(**{name: max(row[name] for row in rows) for name in rows[0]})


def _outcome(folder: Path, layout: Layout, arithmetic: Arithmetic, objective: str) -> Outcome:
    return Outcome(**torch.load(folder / f"{_name(layout, arithmetic, objective)}.pt", weights_only=True))


def _evaluate(folder: Path) -> bool:
    """Whether `kvconvert evaluate` finds the same in the results of FSDP and of the reference."""
    passed = True
    for objective in OBJECTIVES:
        scores = {}
        for layout in (REFERENCE, LAYOUTS[-1]):
            model = folder / _name(layout, ADAMW, objective)
            printed = _kvconvert(
                "evaluate", model, "--data", _DEMO / "heldout.jsonl", "--window", _LENGTH, "--max-windows", 64, "--json"
            )
            scores[layout.name] = json.loads(printed)["nats_per_token"]
        one, other = scores.values()
        same = abs(one - other) <= LAYOUTS[-1].limit * one
        passed &= same
        values = ", ".join(f"{name} {score:.6f} nats/token" for name, score in scores.items())
        print(f"evaluate, {objective}: {values}: {'the same' if same else 'NOT THE SAME'} to {LAYOUTS[-1].limit:.0e}")
    return passed


def _kvconvert(*arguments: object) -> str:
    command = [str(Path(sys.executable).with_name("kvconvert")), *map(str, arguments), "--quiet"]
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--processes", type=int, default=1, help=argparse.SUPPRESS)
    parser.add_argument("--fsdp", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    main()
