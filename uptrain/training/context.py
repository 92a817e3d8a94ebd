"""What all stages of a run share while it goes on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from ...convert.architectures.architecture import Architecture
from ..data.blocks import PackedBlocks
from ..job import UptrainJob
from ..observation import Observation
from ..recipe import Stage
from ..rundir.publish import write_weights
from ..rundir.status import StatusFile
from ..rundir.workdir import best_folder, data_folder
from .best import Best, keep_weights
from .processes import Processes
from .stopping import StopRequests

__all__ = ["RunContext"]


@dataclass
class RunContext:
    """A run that is under way, in one of its processes.

    `score` gives held-out nats per token, None where nothing is held out; `held_out` is the last one that was taken,
    `held_out_before` that before the first step of the run. `steps_before` were done before this process began.
    `best` is the step whose weights are kept, where the job keeps the best.
    """

    job: UptrainJob
    watch: Observation
    processes: Processes
    stop: StopRequests
    status: StatusFile
    architecture: Architecture
    score: Callable[[Any], float] | None = None
    held_out: float | None = None
    held_out_before: float | None = None
    best: Best | None = None
    steps_before: int = 0

    def samples(self, stage: Stage) -> PackedBlocks:
        """The samples that a stage is trained on."""
        per_step = self.job.settings.sequences_per_step
        return PackedBlocks(
            data_folder(self.job), num_samples=stage.steps * per_step, first_sample=stage.first_step * per_step
        )

    def evaluate(self, model: Any) -> float:
        """Score held-out text, in every process: all of them compare trials of learning rates by it."""
        assert self.score is not None
        self.held_out = self.score(model)
        if self.held_out_before is None and self.steps_before == 0:
            self.held_out_before = self.held_out
        return self.held_out

    def keep_if_best(self, step: int, gather: Callable[[], dict[str, Tensor]], model: Any) -> None:
        """Keep a model's weights after a step if its score, the last that was taken, is the best of the run.

        Every process calls it, and `gather` gives the first one the whole weights; of equal scores the earlier stays.
        Scores of different GPUs may differ by rounding, so that the processes agree before they gather.
        """
        assert self.held_out is not None
        is_best = self.best is None or self.held_out < self.best.nats_per_token
        if not self.processes.everywhere(is_best):
            return
        self.best, weights = Best(step, self.held_out), gather()
        if self.processes.is_first:
            keep_weights(best_folder(self.job), self.best, lambda folder: write_weights(model, weights, folder))
        self.processes.wait_long()

    def show(self, record: dict[str, Any]) -> None:
        """Hand a metrics record on, which tells how far the run is."""
        if "loss" in record:
            self.status.reach(record["step"])
        self.watch.show(record)

    def saved(self, stage: Stage, folder: Path, step: int) -> None:
        """Note a checkpoint that was saved after `step` steps of a stage."""
        self.status.reach(stage.first_step + step, folder / f"checkpoint-{step}")
