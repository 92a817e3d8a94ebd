"""An estimate of the memory that one process of a run needs on its GPU."""

from __future__ import annotations

from dataclasses import replace

from ..recipe import Objective, Stage, Trained
from .shape import Models, RunShape
from .size import ModelSize

__all__ = ["memory_bytes", "weight_bytes"]

_CHUNK_TOKENS = 1024  # of which losses hold float32 probabilities at a time


def weight_bytes(models: Models, trained: Trained) -> int:
    """Compute the bytes of both models' weights: float32, and under bf16 the teacher's as they are stored.

    What is frozen is as `Models` says.
    """
    student, teacher = models.student, models.teacher
    num_trained = student.num_trained(trained)
    num_frozen = student.num_parameters - num_trained
    as_stored = models.shares and models.bf16
    frozen = student.num_bytes * num_frozen // student.num_parameters if as_stored else 4 * num_frozen
    if teacher is None:
        return 4 * num_trained + frozen
    if models.shares and models.have_equal_size:
        frozen = 0
    whole_teacher = teacher.num_bytes if models.bf16 else 4 * teacher.num_parameters
    return 4 * num_trained + frozen + whole_teacher


def memory_bytes(shape: RunShape, stage: Stage) -> int:
    """Estimate the bytes that one process needs at most in a stage; every part errs on the high side.

    - States: the weights of `weight_bytes`, and of trained parameters the gradient and two AdamW moments in float32,
      12 bytes. "fsdp" divides all by the processes, "zero3" all but the teacher, "zero2" gradients and moments.
    - Logits: the student's with their gradient and the teacher's, in the autocast dtype, and in float32 those of one
      chunk of 1024 tokens. Attention regression has none.
    - Activations: what is kept for the backward pass, see `_activation_bytes`; attention regression keeps less.
    - Autocast's copies of the student's float32 weights, trained or not: gradients pass through both.

    Fragmentation, communication buffers and the CUDA context (about 1 GB) come on top.
    """
    models, batch, sharding = shape.models_in(stage), shape.batch, shape.sharding
    student, bf16 = models.student, models.bf16
    num_trained = student.num_trained(stage.trained)
    weights = weight_bytes(models, stage.trained)
    optimizer = 12 * num_trained
    if sharding in ("fsdp", "zero3"):
        own = weights if sharding == "fsdp" else weight_bytes(replace(models, teacher=None), stage.trained)
        weights += -(-own // batch.num_processes) - own
    if sharding != "none":
        optimizer = -(-optimizer // batch.num_processes)
    value_bytes = 2 if bf16 else 4
    tokens = batch.micro_batch * batch.sequence_length
    logits = (2 + (models.teacher is not None)) * tokens * student.vocab_size * value_bytes
    logits += min(tokens, _CHUNK_TOKENS) * student.vocab_size * 4
    in_float32 = not models.shares or student.num_bytes == 4 * student.num_parameters
    num_float32 = student.num_parameters if in_float32 else num_trained
    if stage.objective is Objective.attention_regression:  # which runs attention alone
        logits, num_float32 = 0, min(num_float32, student.num_attention_parameters)
    checkpointing = shape.activation_checkpointing
    activations = tokens * _activation_bytes(student, value_bytes, checkpointing=checkpointing)
    # the copies stay until the backward pass, unless layers are run again then
    copies = 2 * num_float32 if bf16 and not checkpointing else 0
    return weights + optimizer + logits + activations + copies


def _activation_bytes(size: ModelSize, value_bytes: int, *, checkpointing: bool) -> int:
    """Bytes per token. Every matrix keeps its input and what follows keeps its output; each layer's two norms keep
    their float32 input and its normalised copy, 16 bytes per channel. With checkpointing, that of one layer, and each
    layer's float32 input. Scores are not kept: sdpa recomputes them.

    Of what autograd saves this is 0.8 to 1.4 in most dense decoders, and in bf16 about half with a latent or experts
    and in Falcon, whose classes copy more, and a third in GPTBigCode.
    """
    layers = size.num_hidden_layers
    whole = value_bytes * size.linear_features + 16 * size.hidden_size * layers
    return whole // layers + 4 * size.hidden_size * layers if checkpointing else whole
