"""What decides the trajectory of a run, and how it is carried out."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from ..convert.architectures.context import context_of
from ..convert.checkpoint.manifest import read_provenance
from ..convert.checkpoint.tensors import Checkpoint
from ..convert.errors import UnsupportedError
from .recipe import LossWeights, Objective, Recipe, Stage, Trained, stages
from .schedule import Schedule

__all__ = [
    "Execution",
    "RunSettings",
    "default_learning_rate",
    "default_sequence_length",
    "rate_for_start",
]


_MAX_DEFAULT_SEQUENCE_LENGTH = 2048
_KL_OF_WHOLE_RATE = 0.3  # nats per token; with it the demo's starts get about their best rate (docs/measurement-log.md)
_LEAST_PART_OF_RATE = 0.05  # which starts within 0.00075 nats per token get


@dataclass(frozen=True)
class RunSettings:
    """What decides the trajectory of a run; a resumed run must have the same.

    With `keep_best` the result is that of the step with the least held-out loss, else of the last step.
    With `rate_from_start` the last stage takes `rate_for_start` of `learning_rate`, measured before its first step.
    `warmup_fraction` is of a stage's steps; `precision` is "bf16" (autocast over float32 weights), "fp32", or
    "fp64", which is for checks of arithmetic.
    `optimizer` is one of the names that transformers has.
    """

    steps: int
    sequence_length: int
    sequences_per_step: int
    learning_rate: float
    recipe: Recipe = Recipe.pretraining
    weights: LossWeights = field(default_factory=lambda: LossWeights(kl=0.0, cross_entropy=1.0))
    trained: Trained = Trained.all
    layerwise_fraction: float = 0.0
    layerwise_learning_rate: float | None = None
    body_lr_multiplier: float = 1.0
    lr_scheduler: str = "cosine"
    warmup_fraction: float = 0.03
    weight_decay: float = 0.1
    max_grad_norm: float = 1.0
    precision: str = "fp32"
    seed: int = 0
    optimizer: str = "adamw_torch_fused"
    keep_best: bool = False
    rate_from_start: bool = False

    def __post_init__(self) -> None:
        rates = [rate for rate in (self.learning_rate, self.layerwise_learning_rate) if rate is not None]
        checks = (
            ("steps", self.steps >= 1, "at least 1"),
            ("sequences_per_step", self.sequences_per_step >= 1, "at least 1"),
            ("sequence_length", self.sequence_length >= 2, "at least 2"),
            ("learning_rate", 0 < rates[0] < math.inf, "a positive number"),
            ("layerwise_learning_rate", 0 < rates[-1] < math.inf, "a positive number"),
            ("body_lr_multiplier", 0 <= self.body_lr_multiplier < math.inf, "0 or more"),
            ("weight_decay", 0 <= self.weight_decay < math.inf, "0 or more"),
            ("max_grad_norm", 0 <= self.max_grad_norm < math.inf, "0 or more"),
            ("warmup_fraction", 0 <= self.warmup_fraction <= 1, "a number from 0 to 1"),
            ("lr_scheduler", self.lr_scheduler in set(Schedule), f"one of {', '.join(Schedule)}"),
            ("precision", self.precision in ("bf16", "fp32", "fp64"), "'bf16', 'fp32' or 'fp64'"),
            ("seed", 0 <= self.seed < 2**32, "a number from 0 to 2**32 - 1"),
        )
        for name, holds, expected in checks:
            if not holds:
                raise UnsupportedError(f"{name.replace('_', ' ')} is {getattr(self, name)!r}, expected {expected}")
        _ = self.stages

    @property
    def tokens_per_step(self) -> int:
        """The tokens of an optimizer step, over all processes."""
        return self.sequences_per_step * self.sequence_length

    @property
    def stages(self) -> tuple[Stage, ...]:
        """The stages of the run, in order."""
        return stages(
            self.recipe,
            steps=self.steps,
            learning_rate=self.learning_rate,
            layerwise_fraction=self.layerwise_fraction,
            layerwise_learning_rate=self.layerwise_learning_rate or self.learning_rate,
            trained=self.trained,
        )

    @property
    def regresses(self) -> bool:
        """Whether a stage fits attention to the teacher's, layer by layer."""
        return any(stage.objective is Objective.attention_regression for stage in self.stages)

    @property
    def uses_teacher(self) -> bool:
        """Whether any stage compares with a teacher."""
        return any(stage.uses_teacher(self.weights) for stage in self.stages)


@dataclass(frozen=True)
class Execution:
    """How a run is carried out. Another number of processes or micro-batch changes its result by rounding only.

    `micro_batch` counts the sequences that a process takes at once; None stands for as many as fit. `fsdp` shards
    weights, gradients and optimizer over the processes (FSDP2). `report_to` names trackers of transformers.
    """

    micro_batch: int | None = 8
    num_processes: int = 1
    fsdp: bool = False
    compile: bool = False
    activation_checkpointing: bool = False
    report_to: tuple[str, ...] = ()


def default_sequence_length(checkpoint: Checkpoint, teacher: Checkpoint | None = None) -> int:
    """Choose the longest sequence that the model and its teacher take, in tokens, but at most 2048."""
    longest = [context_of(each.full_config) for each in (checkpoint, teacher) if each is not None]
    return min([_MAX_DEFAULT_SEQUENCE_LENGTH, *(length for length in longest if length is not None)])


def default_learning_rate(checkpoint: Checkpoint, recipe: Recipe) -> float:
    """Choose a peak learning rate by the number of parameters: 1e-3 below 100M, 3e-4 below 3B, 1e-4 above.

    It is at or below what models of these sizes were pretrained with (Pythia-70M 1e-3, Llama-2-7B 3e-4), half of it for
    the demo checkpoint (2e-3). For cross-entropy after a merge on calibration text, which leaves little to recover, it
    is a quarter of that: at the whole rate it unlearns more than it recovers at first (docs/measurement-log.md).
    """
    size = checkpoint.num_parameters
    peak = 1e-3 if size < 1e8 else 3e-4 if size < 3e9 else 1e-4
    merged = read_provenance(checkpoint.directory).get("method") == "svd"
    return peak / 4 if merged and recipe is Recipe.pretraining else peak


def rate_for_start(peak: float, kl: float) -> float:
    """Choose the peak learning rate of a stage that starts `kl` nats per token from its teacher, at most `peak`.

    It falls with the root of the divergence, which is about quadratic in the distance of the weights: an optimizer that
    moves every weight by its rate in a step overshoots a shorter way sooner. At 1e-3 the demo with 2 K/V heads, which
    starts at 0.064, is twice as far from its original after 16 steps as before (docs/measurement-log.md). Two digits,
    so that rounding on another machine changes nothing; a start without any divergence gets the least rate, not 0.
    """
    part = math.sqrt(max(kl, 0.0) / _KL_OF_WHOLE_RATE)
    return float(f"{peak * min(max(part, _LEAST_PART_OF_RATE), 1.0):.1e}")
