"""An estimate of the disk that a run takes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

from ..data.sources import SourceSize
from .memory import weight_bytes
from .shape import RunShape

__all__ = ["disk_bytes", "packed_tokens"]

_CHECKPOINTS = 3  # two are kept while a third is written, or the result, which is no larger


def packed_tokens(tokens: int, sources: Sequence[SourceSize]) -> int:
    """Count the tokens that a run of `tokens` packs: of each source its share, or all that it holds if that is less."""
    needed = [math.ceil(tokens * source.share) for source in sources]
    return sum(
        count if source.num_tokens is None else min(count, source.num_tokens)
        for count, source in zip(needed, sources, strict=True)
    )


def disk_bytes(shape: RunShape, num_packed_tokens: int) -> int:
    """Estimate the bytes that a run takes at most, beside its model, teacher and text.

    They are packed text in 2 bytes per token (4 if the vocabulary has more than 65 536); the teacher where it is copied
    into another class; weights, as they are held, of the stage before the last, and twice where the best are kept;
    three checkpoints, with weights and the two moments of what is trained.
    """
    student, last = shape.models.student, shape.stages[-1]
    blocks = num_packed_tokens * (2 if student.vocab_size <= 2**16 else 4)
    weights = weight_bytes(replace(shape.models, teacher=None), last.trained)
    checkpoint = weights + 8 * student.num_trained(last.trained)
    of_stages = weights if last.first_step > 0 else 0
    of_best = 2 * weights if shape.keeps_best else 0  # one is kept while a better one is written
    return blocks + shape.teacher_copy_bytes + of_stages + of_best + _CHECKPOINTS * checkpoint
