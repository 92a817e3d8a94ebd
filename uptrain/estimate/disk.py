"""An estimate of the disk that a run takes."""

from __future__ import annotations

import math
from collections.abc import Sequence

from ..data.shards import SHARD_TOKENS
from ..data.sources import SourceSize
from ..recipe import Trained
from .memory import weight_bytes
from .size import ModelSize

__all__ = ["disk_bytes", "packed_tokens"]


_CHECKPOINTS = 3  # two are kept while a third is written, or the result, which is no larger


def packed_tokens(tokens: int, sources: Sequence[SourceSize], *, window_tokens: int | None = None) -> int:
    """Tokens of text that a run of `tokens` has on its disk at most: of each source its share, or all that it holds.

    Of a streamed text, `window_tokens` are kept to fall back to: of each source its share, and what three shards hold.
    """
    needed = [math.ceil(tokens * source.share) for source in sources]
    if window_tokens is None:
        return sum(
            min(count, count if source.num_tokens is None else source.num_tokens)
            for count, source in zip(needed, sources, strict=True)
        )
    windows = [math.ceil(window_tokens * source.share) + 3 * SHARD_TOKENS for source in sources]
    return sum(map(min, needed, windows))


def disk_bytes(
    student: ModelSize,
    *,
    trained: Trained,
    num_packed_tokens: int,
    shares: bool = False,
    bf16: bool = True,
    after_stage: bool = False,
    teacher_copy_bytes: int = 0,
) -> int:
    """Disk that a run takes at most, beside its model, teacher and text.

    Packed text in 2 bytes per token (4 if the vocabulary has more than 65 536); the teacher where it is copied into
    another class; weights, as they are held, of the stage before the last; three checkpoints, with weights and the two
    moments of what is trained.
    """
    blocks = num_packed_tokens * (2 if student.vocab_size <= 2**16 else 4)
    weights = weight_bytes(student, None, trained=trained, shares=shares, bf16=bf16)
    checkpoint = weights + 8 * student.num_trained(trained)
    of_stages = weights if after_stage else 0
    return blocks + teacher_copy_bytes + of_stages + _CHECKPOINTS * checkpoint
