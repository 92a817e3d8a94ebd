"""Run by torchrun in test_launchers: uptrains each model sharded, to the end or until a signal stops it at a step."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from kvconvert.convert import open_checkpoint
from kvconvert.convert.errors import PreemptedError
from kvconvert.convert.runtime import register
from kvconvert.convert.text.sources import TextSource
from kvconvert.uptrain import run
from kvconvert.uptrain.data.sources import WeightedSource
from kvconvert.uptrain.job import UptrainJob
from kvconvert.uptrain.launcher import count_processes
from kvconvert.uptrain.observation import Observation
from kvconvert.uptrain.recipe import LossWeights, Recipe
from kvconvert.uptrain.settings import Execution, RunSettings
from kvconvert.uptrain.training import stage
from kvconvert.uptrain.training.arguments import training_arguments
from kvconvert.uptrain.training.processes import joined_processes
from transformers import TrainingArguments

SETTINGS = RunSettings(
    steps=4,
    sequence_length=32,
    sequences_per_step=4,
    learning_rate=0.1,
    recipe=Recipe.distill,
    weights=LossWeights(),
    layerwise_fraction=0.5,
    max_grad_norm=1.0,
    warmup_fraction=0.0,
    rate_from_start=True,
)


def smooth_training_arguments(*args: Any, **kwargs: Any) -> TrainingArguments:
    """AdamW that does not magnify the rounding of gradients, which are all far below its epsilon."""
    arguments = training_arguments(*args, **kwargs)
    arguments.adam_epsilon = 1.0
    return arguments


def uptrain(model: Path, teacher: Path, data: Path, output: Path, execution: Execution, *, stop_at: int = 0) -> None:
    """One run, evaluated on the way."""
    done = 0

    def stop(num_steps: int) -> None:
        nonlocal done
        done += num_steps
        if done == stop_at and num_steps and os.environ.get("RANK") == "1":
            os.kill(os.getpid(), signal.SIGUSR1)

    with open_checkpoint(model) as checkpoint:
        sources = (WeightedSource(TextSource(str(data))),)
        job = UptrainJob(checkpoint, SETTINGS, sources, output, str(teacher), execution)
        run.uptrain(job, Observation(eval_steps=1, score=lambda trained: 0.0, progress=stop, log_steps=1))


def main() -> None:
    stop_at, (teacher, data, *models) = int(sys.argv[1]), map(Path, sys.argv[2:])
    register()
    vars(stage)["training_arguments"] = smooth_training_arguments
    execution = Execution(micro_batch=1, num_processes=count_processes(), fsdp=True)
    with joined_processes():
        for model in models:
            output = model.with_name(f"{model.name}-sharded")
            if stop_at:
                with pytest.raises(PreemptedError, match=rf"step {stop_at} of 4 \(received SIGUSR1\)"):
                    uptrain(model, teacher, data, output, execution, stop_at=stop_at)
            else:
                uptrain(model, teacher, data, output, execution)
    assert not torch.distributed.is_initialized()  # left open, gloo's threads abort a process that ends, now and then


if __name__ == "__main__":
    main()
