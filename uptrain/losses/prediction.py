"""Losses on predictions: cross-entropy, and the divergence from a teacher."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor

from ..recipe import LossWeights

__all__ = ["IGNORED_LABEL", "Loss", "PredictionLoss", "prediction_loss_sum"]


IGNORED_LABEL = -100
_CHUNK_TOKENS = 1024


def prediction_loss_sum(
    student_logits: Tensor, labels: Tensor, weights: LossWeights, *, teacher_logits: Tensor | None = None
) -> Tensor:
    """Compute the weighted sum over predicted tokens of KL(teacher ‖ student) and −log p(label), in nats, float32.

    student_logits, teacher_logits: (B, T, vocab_size), any float dtype, the teacher's needed where weights.kl > 0. Rows
    of padding at the end of a vocabulary may differ: the teacher's are left out before its softmax, and the student's
    count as tokens that the teacher never expects.
    labels: (B, T) int64, not shifted, IGNORED_LABEL where not predicted. KL is taken at the weights' temperature T and
    multiplied by T². No gradient flows into the teacher, and backward works once. Beside the two tensors of logits only
    float32 copies of one chunk of 1024 tokens are held: the gradient is written over the student's logits, which the
    caller must not read afterwards. Raises ValueError where KL has a weight and there is no teacher.
    """
    if weights.kl and teacher_logits is None:
        raise ValueError("KL has a weight, and there are no logits of a teacher")
    targets = torch.full_like(labels, IGNORED_LABEL)
    targets[:, :-1] = labels[:, 1:]
    total: Tensor = _PredictionLoss.apply(student_logits.contiguous(), teacher_logits, targets, weights)
    return total


class _PredictionLoss(torch.autograd.Function):
    """The sum by chunks, with its gradient taken in the forward.

    Looping over chunks alone would save nothing, since autograd keeps every chunk's float32 softmax. If what made the
    logits needs them in its own backward, autograd refuses there, loudly: it counts writes.
    """

    @staticmethod
    def forward(ctx: Any, student: Tensor, teacher: Tensor | None, targets: Tensor, weights: LossWeights) -> Tensor:
        rows = student.view(-1, student.shape[-1])
        teacher_rows = None if teacher is None else teacher.reshape(-1, teacher.shape[-1])
        total = torch.zeros((), dtype=torch.float32, device=student.device)
        for begin in range(0, len(rows), _CHUNK_TOKENS):
            chunk = slice(begin, begin + _CHUNK_TOKENS)
            goal = None if teacher_rows is None else teacher_rows[chunk]
            loss, gradient = _chunk_loss(rows[chunk], goal, targets.view(-1)[chunk], weights)
            total += loss
            if ctx.needs_input_grad[0]:
                rows[chunk] = gradient.to(rows.dtype)
        ctx.gradient = student.detach()
        return total

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None, None, None]:
        gradient, ctx.gradient = ctx.gradient, None  # a second backward would scale it twice: it fails instead
        return gradient.mul_(grad_outputs[0]), None, None, None


def _chunk_loss(
    student: Tensor, teacher: Tensor | None, targets: Tensor, weights: LossWeights
) -> tuple[Tensor, Tensor]:
    """Loss and its gradient by the student's logits: student, teacher (N, vocab_size), targets (N,), all float32 out.

    With q, p the teacher's and the student's distributions at temperature T: T² Σ q (log q − log p) has the gradient
    T (p − q) by the logits.
    """
    predicted = targets != IGNORED_LABEL
    logits = student.float()
    loss = torch.zeros_like(targets, dtype=torch.float32)
    gradient = torch.zeros_like(logits) if weights.kl and weights.cross_entropy else None
    if weights.kl and teacher is not None:
        log_p = (logits / weights.temperature).log_softmax(-1)
        shared = slice(min(student.shape[-1], teacher.shape[-1]))
        log_q = (teacher[:, shared].float() / weights.temperature).log_softmax(-1)
        q = log_q.exp()
        loss += weights.kl * weights.temperature**2 * (q * (log_q - log_p[:, shared])).sum(-1)
        from_kl = log_p.exp_()
        from_kl[:, shared].sub_(q)
        from_kl.mul_(weights.kl * weights.temperature)
        gradient = from_kl if gradient is None else gradient.add_(from_kl)
    if weights.cross_entropy:
        log_p = logits.log_softmax(-1)
        place = targets.where(predicted, 0)[:, None]
        loss -= weights.cross_entropy * log_p.gather(-1, place)[:, 0]
        from_labels = log_p.exp_().scatter_add_(-1, place, torch.full_like(place, -1, dtype=torch.float32))
        from_labels.mul_(weights.cross_entropy)
        gradient = from_labels if gradient is None else gradient.add_(from_labels)
    assert gradient is not None
    return loss.where(predicted, 0).sum(), gradient.mul_(predicted[:, None])


class Loss(Protocol):
    """What sums a loss over the tokens of a micro-batch: `feed` holds what the model takes, `labels` is (B, T).

    `are_finite` runs both models on a micro-batch again and tells whether what the loss compares is finite in the
    student and in the teacher, which it is where there is none.
    """

    def __call__(self, model: Any, feed: dict[str, Tensor], labels: Tensor) -> Tensor: ...

    def are_finite(self, model: Any, feed: dict[str, Tensor]) -> tuple[bool, bool]: ...


class PredictionLoss:
    """The loss on predictions: the divergence from `teacher`, cross-entropy, or both.

    Neither an attention mask nor a cache is used: either would let packed documents attend to each other.
    """

    def __init__(self, teacher: Any | None, weights: LossWeights) -> None:
        self._teacher = teacher
        self._weights = weights

    def __call__(self, model: Any, feed: dict[str, Tensor], labels: Tensor) -> Tensor:
        logits = model(**feed, use_cache=False).logits
        if self._teacher is None:
            return prediction_loss_sum(logits, labels, self._weights)
        with torch.no_grad():
            teacher_logits = self._teacher(**feed, use_cache=False).logits
        return prediction_loss_sum(logits, labels, self._weights, teacher_logits=teacher_logits)

    @torch.no_grad()
    def are_finite(self, model: Any, feed: dict[str, Tensor]) -> tuple[bool, bool]:
        """Tell whether the logits of student and teacher are finite on a micro-batch."""
        found = [
            each is None or bool(each(**feed, use_cache=False).logits.isfinite().all())
            for each in (model, self._teacher)
        ]
        return found[0], found[1]
