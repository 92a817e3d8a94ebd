"""What a model predicts of windows of text, token by token, alone or beside its original."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ..convert.errors import CheckpointError
from .finiteness import non_finite_logits
from .windows import Windows

__all__ = ["Scores", "score"]


@dataclass
class Scores:
    """Of each window the scored tokens, (T,) each: losses in nats, and what is known beside an original.

    `first_positions` are the positions of the first of them in their windows. `divergence` is KL(original ‖ model), and
    `agrees` says where both find the same token most likely. Without an original the last three are empty.
    """

    first_positions: list[int] = field(default_factory=list)
    nats: list[Tensor] = field(default_factory=list)
    original_nats: list[Tensor] = field(default_factory=list)
    divergence: list[Tensor] = field(default_factory=list)
    agrees: list[Tensor] = field(default_factory=list)

    @classmethod
    def joined(cls, several: Iterable[Scores]) -> Scores:
        """The windows of several texts."""
        scores = cls()
        for each in several:
            scores.first_positions += each.first_positions
            scores.nats += each.nats
            scores.original_nats += each.original_nats
            scores.divergence += each.divergence
            scores.agrees += each.agrees
        return scores


@torch.no_grad()  # not inference mode, whose tensors FSDP cannot use again in training
def score(
    model: Any,
    windows: Windows,
    *,
    original: Any | None = None,
    batch_size: int = 8,
    names: tuple[str, str] = ("the model", "the original"),
    progress: Callable[[int], object] = lambda num_windows: None,
) -> Scores:
    """Score the windows with `model` and, if given, compare with `original` token by token.

    The two have the same vocabulary, but for rows of padding. They are causal language models of transformers, in eval
    mode, each on its own device. KL is in nats, from float32 log-probabilities. Raises CheckpointError, which has the
    model's name of `names`, where logits are not finite, and where a token that the text has, or that the original
    expects, is ruled out by a logit of -inf.
    """
    scores = Scores()
    for begin in range(0, len(windows.input_ids), batch_size):
        batch = windows.input_ids[begin : begin + batch_size]
        logits = _logits(model, batch)
        reference = _logits(original, batch) if original is not None else None
        for row in range(len(batch)):
            first = windows.scored_from[begin + row]
            targets = batch[row, first:]
            log_probs = logits[row, first - 1 : -1].float().log_softmax(-1).cpu()  # (T, vocab_size)
            scores.first_positions.append(first)
            scores.nats.append(F.nll_loss(log_probs, targets, reduction="none"))
            _require_finite(scores.nats[-1], names[0], model, window=begin + row)
            if reference is not None:
                expected = reference[row, first - 1 : -1].float().log_softmax(-1).cpu()
                scores.original_nats.append(F.nll_loss(expected, targets, reduction="none"))
                _require_finite(scores.original_nats[-1], names[1], original, window=begin + row)
                scores.divergence.append(_divergence(log_probs, expected))
                _require_finite(scores.divergence[-1], names[0], model, window=begin + row)
                scores.agrees.append(log_probs.argmax(-1) == expected.argmax(-1))
        progress(len(batch))
    return scores


def _divergence(log_probs: Tensor, expected: Tensor) -> Tensor:
    """KL of each token, (T,), from log-probabilities, (T, vocab_size); a token that is not expected adds nothing.

    Where one vocabulary has more rows of padding, the original's are left out and its other tokens sum to 1 again; the
    model's are tokens that the original does not expect.
    """
    shared = slice(min(log_probs.shape[-1], expected.shape[-1]))
    if expected.shape[-1] > log_probs.shape[-1]:
        expected = expected[:, shared].log_softmax(-1)
    terms = expected.exp() * (expected - log_probs[:, shared])
    return terms.where(expected > -math.inf, 0.0).sum(-1)


def _require_finite(nats: Tensor, name: str, model: Any, *, window: int) -> None:
    """Raise CheckpointError where losses or divergences of a window's tokens, (T,), are not finite."""
    if nats.isfinite().all():
        return
    where = f"in window {window + 1}"
    if nats.isnan().any():  # of the logits of a token, one that is not finite and above -inf makes all of them nan
        raise non_finite_logits(name, model, where)
    raise CheckpointError(
        f"{name}: rules out a token of the text, or one that the original expects, by a logit of -inf {where}",
        hint="its loss is infinite, so that it has no perplexity to compare",
    )


def _logits(model: Any, input_ids: Tensor) -> Tensor:
    logits: Tensor = model(input_ids=input_ids.to(model.device), use_cache=False).logits
    return logits
