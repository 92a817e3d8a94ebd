"""What uptraining minimises: cross-entropy, or the divergence from the original model."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = ["IGNORED_LABEL", "cross_entropy_sum", "forward_kl_sum"]

IGNORED_LABEL = -100
_CHUNK_TOKENS = 1024


def cross_entropy_sum(logits: Tensor, labels: Tensor) -> Tensor:
    """Sum over predicted tokens of −log p(label), in float32.

    logits: (B, T, vocab_size), any float dtype; labels: (B, T) int64, not shifted, IGNORED_LABEL where not predicted.
    """
    predicted, targets = logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
    return F.cross_entropy(predicted.float(), targets, ignore_index=IGNORED_LABEL, reduction="sum")


def forward_kl_sum(student_logits: Tensor, teacher_logits: Tensor, labels: Tensor) -> Tensor:
    """Sum over predicted tokens of KL(teacher ‖ student) at temperature 1, in nats, float32.

    Shapes as in cross_entropy_sum; labels only say which positions count. No gradient flows into the teacher.
    """
    keep = labels[:, 1:].flatten() != IGNORED_LABEL
    student = student_logits[:, :-1].flatten(0, 1)[keep]
    teacher = teacher_logits[:, :-1].flatten(0, 1)[keep]
    total: Tensor = _ForwardKl.apply(student, teacher)
    return total


class _ForwardKl(torch.autograd.Function):
    """Σ KL(teacher ‖ student), by chunks, with the gradient softmax(student) − softmax(teacher) taken in the forward.

    Looping over chunks alone saves nothing, since autograd keeps every chunk's float32 softmax; this keeps one tensor
    in the student's own dtype.
    """

    @staticmethod
    def forward(ctx: Any, student: Tensor, teacher: Tensor) -> Tensor:
        gradient = torch.empty_like(student)
        total = torch.zeros((), dtype=torch.float32, device=student.device)
        for begin in range(0, len(student), _CHUNK_TOKENS):
            chunk = slice(begin, begin + _CHUNK_TOKENS)
            log_p = student[chunk].float().log_softmax(-1)
            log_q = teacher[chunk].float().log_softmax(-1)
            q = log_q.exp()
            total += (q * (log_q - log_p)).sum()
            gradient[chunk] = log_p.exp_().sub_(q)
        ctx.save_for_backward(gradient)
        return total

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * grad_outputs[0].to(gradient.dtype), None
