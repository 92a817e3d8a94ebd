"""Held-out text as windows of tokens."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..convert.errors import DataError

__all__ = ["Windows", "cut_windows", "join_windows"]


@dataclass(frozen=True)
class Windows:
    """Token ids cut for scoring. Of each window, the tokens from `scored_from[i]` on are scored.

    input_ids: (num_windows, window) int64. `method` says in words how the text was cut. `num_bytes` is the length in
    UTF-8 of what the scored tokens stand for, where that is known.
    """

    input_ids: Tensor
    scored_from: tuple[int, ...]
    method: str
    num_bytes: int | None = None

    @property
    def num_scored_tokens(self) -> int:
        return sum(self.input_ids.shape[1] - begin for begin in self.scored_from)

    @property
    def sha256(self) -> str:
        """A digest of the tokens and of which of them are scored: two evaluations with the same one can be paired."""
        digest = hashlib.sha256(repr((tuple(self.input_ids.shape), self.scored_from)).encode())
        digest.update(self.input_ids.cpu().contiguous().numpy().tobytes())
        return digest.hexdigest()


def join_windows(several: Sequence[Windows]) -> Windows:
    """The windows of several texts, all of one length, as those of one text."""
    if len(several) == 1:
        return several[0]
    sizes = [windows.num_bytes for windows in several]
    return Windows(
        torch.cat([windows.input_ids for windows in several]),
        tuple(first for windows in several for first in windows.scored_from),
        "; ".join(dict.fromkeys(windows.method for windows in several)),
        None if None in sizes else sum(size or 0 for size in sizes),
    )


def cut_windows(
    token_ids: Tensor,
    *,
    window: int,
    stride: int | None = None,
    bos_token_id: int | None = None,
    max_windows: int | None = None,
    documents: str = "documents joined by EOS",
) -> Windows:
    """Cut one stream of tokens, (num_tokens,), into windows of `window` tokens every `stride` (default: window).

    With `bos_token_id` each window starts with that token, which takes the place of one text token. Every text token
    is scored at most once: of overlapping windows only the tokens that the window before did not reach, and never
    the first token of a window without BOS in front. A last, shorter window is left out. `documents` says how the
    stream was made, for the method.
    Raises DataError if the text is shorter than one window.
    """
    text_window = window - (bos_token_id is not None)
    stride = text_window if stride is None else stride
    if not 1 <= stride <= text_window or text_window < 2:
        raise DataError(
            f"stride {stride} does not fit a window of {window} tokens", hint=f"use --stride {text_window} or less"
        )
    starts = range(0, len(token_ids) - text_window + 1, stride)
    if not starts:
        raise DataError(
            f"the text has {len(token_ids)} tokens, fewer than one window of {window}",
            hint="use more text or a smaller --window",
        )
    starts = starts[:max_windows]
    input_ids = torch.stack([token_ids[start : start + text_window] for start in starts])
    offset = 0
    if bos_token_id is not None:
        offset = 1
        input_ids = torch.cat([torch.full((len(starts), 1), bos_token_id), input_ids], dim=1)
    scored_from = tuple(1 if index == 0 else max(1, offset + text_window - stride) for index in range(len(starts)))
    kind = "non-overlapping" if stride == text_window else f"overlapping (stride {stride})"
    bos = "BOS before each window" if offset else "no BOS, first token of each window not scored"
    method = f"{documents}, {kind} windows of {window} tokens, {bos}, last partial window left out"
    return Windows(input_ids, scored_from, method)
