"""An estimate of the memory that one process of a run needs."""

from __future__ import annotations

from ..recipe import Objective, Trained
from ..settings import Sharding
from .size import ModelSize

__all__ = ["memory_bytes", "weight_bytes"]


_CHUNK_TOKENS = 1024  # of which objectives hold float32 probabilities at a time


def weight_bytes(
    student: ModelSize, teacher: ModelSize | None, *, trained: Trained, shares: bool = False, bf16: bool = True
) -> int:
    """The weights of both models as a run loads them: the student in float32, the teacher in the dtype it is stored in.

    `shares`: what is frozen is the teacher's own, if that is of the same size, and counts once; it is as it is stored
    under `bf16`, else float32, as the whole teacher then is.
    """
    frozen = _frozen_bytes(student, trained, as_stored=shares and bf16)
    if teacher is None:
        return 4 * student.num_trained(trained) + frozen
    if shares and _has_size_of(student, teacher):
        frozen = 0
    whole_teacher = 4 * teacher.num_parameters if shares and not bf16 else teacher.num_bytes
    return 4 * student.num_trained(trained) + frozen + whole_teacher


def _frozen_bytes(student: ModelSize, trained: Trained, *, as_stored: bool) -> int:
    num_frozen = student.num_parameters - student.num_trained(trained)
    return student.num_bytes * num_frozen // student.num_parameters if as_stored else 4 * num_frozen


def _has_size_of(student: ModelSize, teacher: ModelSize) -> bool:
    """Whether weights outside attention can be equal; their number may differ, as classes differ in biases."""
    return all(
        getattr(student, name) == getattr(teacher, name) for name in ("hidden_size", "num_hidden_layers", "vocab_size")
    )


def memory_bytes(
    student: ModelSize,
    teacher: ModelSize | None,
    *,
    trained: Trained,
    objective: Objective = Objective.prediction,
    shares: bool = False,
    micro_batch: int,
    sequence_length: int,
    num_processes: int = 1,
    sharding: Sharding = "none",
    bf16: bool = True,
    activation_checkpointing: bool = False,
) -> int:
    """An estimate of the memory that one process needs on its GPU at most.

    - States: the weights of `weight_bytes`; of trained parameters gradient and two AdamW moments in float32, 12 bytes.
      "fsdp" divides all by the processes, "zero3" all but the teacher, "zero2" gradients and moments.
    - Logits: the student's with their gradient and the teacher's, in the autocast dtype, and in float32 those of one
      chunk of 1024 tokens. Attention regression has none.
    - Activations: what is kept for the backward, see `_activation_bytes`; less of it by attention regression.
    - Autocast's copies of the student's float32 weights, trained or not: gradients pass through both.

    Fragmentation, communication buffers and the CUDA context (about 1 GB) come on top.
    """
    num_trained = student.num_trained(trained)
    weights = weight_bytes(student, teacher, trained=trained, shares=shares, bf16=bf16)
    optimizer = 12 * num_trained
    if sharding in ("fsdp", "zero3"):
        own = weights if sharding == "fsdp" else weight_bytes(student, None, trained=trained, shares=shares, bf16=bf16)
        weights += -(-own // num_processes) - own
    if sharding != "none":
        optimizer = -(-optimizer // num_processes)
    value_bytes = 2 if bf16 else 4
    tokens = micro_batch * sequence_length
    logits = (2 + (teacher is not None)) * tokens * student.vocab_size * value_bytes
    logits += min(tokens, _CHUNK_TOKENS) * student.vocab_size * 4
    in_float32 = not shares or student.num_bytes == 4 * student.num_parameters
    num_float32 = student.num_parameters if in_float32 else num_trained
    if objective is Objective.attention_regression:  # which runs attention alone
        logits, num_float32 = 0, min(num_float32, student.num_attention_parameters)
    activations = tokens * _activation_bytes(student, value_bytes, checkpointing=activation_checkpointing)
    # the copies stay until the backward, unless layers are run again then
    copies = 2 * num_float32 if bf16 and not activation_checkpointing else 0
    return weights + optimizer + logits + activations + copies


def _activation_bytes(size: ModelSize, value_bytes: int, *, checkpointing: bool) -> int:
    """Per token. Every matrix keeps its input and what follows keeps its output; each layer's two norms keep their
    float32 input and its normalised copy, 16 bytes per channel. With checkpointing, that of one layer, and each
    layer's float32 input. Scores are not kept: sdpa recomputes them.

    Of what autograd saves this is 0.8 to 1.4 in most dense decoders, and in bf16 about half with a latent or experts
    and in Falcon, whose classes copy more, and a third in GPTBigCode.
    """
    layers = size.num_hidden_layers
    whole = value_bytes * size.linear_features + 16 * size.hidden_size * layers
    return whole // layers + 4 * size.hidden_size * layers if checkpointing else whole
