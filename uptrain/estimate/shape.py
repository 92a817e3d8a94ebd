"""A run in numbers: all that its FLOPs, memory and disk are computed from."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from ..recipe import LossWeights, Stage
from .budget import Batch
from .size import ModelSize

__all__ = ["Models", "RunShape", "Sharding"]

Sharding = Literal["none", "zero2", "zero3", "fsdp"]


@dataclass(frozen=True)
class Models:
    """The models of a run, as a process holds them.

    With `shares`, frozen weights of the student are the teacher's own, if that is of the same size, and count once.
    They are then as they are stored under `bf16`, which is autocast, and otherwise float32, as the whole teacher is.
    """

    student: ModelSize
    teacher: ModelSize | None = None
    shares: bool = False
    bf16: bool = True

    @property
    def have_equal_size(self) -> bool:
        """Whether weights outside attention can be equal; their number may differ, as classes differ in biases."""
        names = ("hidden_size", "num_hidden_layers", "vocab_size")
        return self.teacher is not None and all(
            getattr(self.student, name) == getattr(self.teacher, name) for name in names
        )


@dataclass(frozen=True)
class RunShape:
    """The models, stages and batch of a run, and how they are spread over processes and memory.

    `teacher_copy_bytes` is what a teacher takes on the disk that is copied into another class, 0 for any other. With
    `keeps_best`, weights are kept beside the checkpoints.
    """

    models: Models
    stages: tuple[Stage, ...]
    weights: LossWeights
    batch: Batch
    sharding: Sharding = "none"
    activation_checkpointing: bool = False
    teacher_copy_bytes: int = 0
    keeps_best: bool = False

    def models_in(self, stage: Stage) -> Models:
        """The models that are loaded in a stage: no teacher where nothing is compared with one."""
        return self.models if stage.uses_teacher(self.weights) else replace(self.models, teacher=None)
