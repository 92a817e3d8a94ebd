"""Run by torchrun in test_launchers: uptrains each model sharded, stopped by a signal to one process, and goes on."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

import pytest
from kvconvert.convert import open_checkpoint
from kvconvert.convert.errors import PreemptedError
from kvconvert.convert.runtime import register
from kvconvert.convert.text import TextSource
from kvconvert.uptrain import jobs, run
from kvconvert.uptrain.data import WeightedSource
from kvconvert.uptrain.recipe import LossWeights, Recipe

SETTINGS = jobs.UptrainSettings(
    steps=4,
    sequence_length=32,
    sequences_per_step=4,
    learning_rate=0.1,
    recipe=Recipe.distill,
    weights=LossWeights(),
    layerwise_fraction=0.5,
    max_grad_norm=1.0,
    warmup_fraction=0.0,
)


def uptrain(
    model: Path, teacher: Path, data: Path, output: Path, execution: jobs.Execution, *, stop_at: int = 0
) -> None:
    """One run by plain gradient descent, since AdamW's first steps magnify rounding; evaluated on the way."""
    run._OPTIMIZER = "sgd"
    done = 0

    def stop(num_steps: int) -> None:
        nonlocal done
        done += num_steps
        if done == stop_at and num_steps and os.environ.get("RANK") == "1":
            os.kill(os.getpid(), signal.SIGUSR1)

    with open_checkpoint(model) as checkpoint:
        sources = (WeightedSource(TextSource(str(data))),)
        job = jobs.UptrainJob(checkpoint, SETTINGS, sources, output, str(teacher), execution)
        run.uptrain(job, run.Observation(eval_steps=1, score=lambda trained: 0.0, progress=stop, log_steps=1))


def main() -> None:
    teacher, data, *models = map(Path, sys.argv[1:])
    register()
    execution = jobs.Execution(micro_batch=1, num_processes=jobs.count_processes(), fsdp=True)
    for model in models:
        output = model.with_name(f"{model.name}-sharded")
        with pytest.raises(PreemptedError, match=r"step 3 of 4 \(received SIGUSR1\)"):
            uptrain(model, teacher, data, output, execution, stop_at=3)
        uptrain(model, teacher, data, output, execution)


if __name__ == "__main__":
    main()
