"""FLOPs of training."""

from __future__ import annotations

from collections.abc import Iterable

from ..recipe import Objective, Stage, Trained
from .shape import RunShape
from .size import ModelSize

__all__ = ["flops_per_token", "stage_flops_per_token", "total_flops"]


def flops_per_token(
    student: ModelSize, teacher: ModelSize | None, objective: Objective, trained: Trained, sequence_length: int
) -> float:
    """Compute the FLOPs of one training step, forward and backward, per token.

    Prediction, all parameters: 3 × forward. Only some of the attention: 2N forward, 2N for the gradients of
    activations, which pass every layer down to the first, 2·(trained matrices), and 3 × the scores. The first layer's
    q, k and v need no gradient of their input; that 2·(these) is counted nevertheless. A teacher adds its forward.

    Attention regression: the teacher's forward without its head, and 3 × the forward of the student's attention alone,
    which again counts gradients of inputs that are not asked for.
    Activation checkpointing, which repeats the student's forward, is not counted, as is usual.
    """
    scores = student.score_flops(sequence_length)
    if objective is Objective.attention_regression:
        if teacher is None:
            raise ValueError("attention is fitted to a teacher's")
        attention = 2 * student.num_attention_matmul_parameters + scores
        return teacher.forward_flops(sequence_length) - 2 * teacher.num_head_parameters + 3 * attention
    num_trained = {
        Trained.all: student.num_matmul_parameters,
        Trained.attention: student.num_attention_matmul_parameters,
        Trained.kv: student.num_key_value_matmul_parameters,
    }[trained]
    flops = 4 * student.num_matmul_parameters + 2 * num_trained + 3 * scores
    return flops + (teacher.forward_flops(sequence_length) if teacher is not None else 0)


def stage_flops_per_token(shape: RunShape, stage: Stage) -> float:
    """Compute the FLOPs of a stage of a run, per token."""
    models = shape.models_in(stage)
    return flops_per_token(models.student, models.teacher, stage.objective, stage.trained, shape.batch.sequence_length)


def total_flops(shape: RunShape, stages: Iterable[Stage]) -> float:
    """Compute the FLOPs of these stages, over all processes."""
    tokens = shape.batch.tokens_per_step
    return sum(stage.steps * tokens * stage_flops_per_token(shape, stage) for stage in stages)
