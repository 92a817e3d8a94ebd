"""Perplexity of a model on held-out text, alone or against its original."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ..convert.errors import CheckpointError, DataError
from .finiteness import non_finite_logits

__all__ = ["Comparison", "Evaluation", "Windows", "cut_windows", "evaluate"]


@dataclass(frozen=True)
class Windows:
    """Token ids cut for scoring. Of each window, the tokens from `scored_from[i]` on are scored.

    input_ids: (num_windows, window) int64. `method` says in words how the text was cut.
    """

    input_ids: Tensor
    scored_from: tuple[int, ...]
    method: str

    @property
    def num_scored_tokens(self) -> int:
        return sum(self.input_ids.shape[1] - begin for begin in self.scored_from)


@dataclass(frozen=True)
class Comparison:
    """A model against its original on the same tokens, in nats per token, with standard errors over windows."""

    original_nats_per_token: float
    original_perplexity: float
    excess_nats_per_token: float
    excess_standard_error: float
    kl_nats_per_token: float
    kl_standard_error: float
    top1_agreement: float

    @property
    def perplexity_increase(self) -> float:
        """Relative: 0.05 is five percent above the original."""
        return math.expm1(self.excess_nats_per_token)


@dataclass(frozen=True)
class Evaluation:
    """Nats per token ± standard error over windows, and its exponential. `method` belongs to the number."""

    nats_per_token: float
    standard_error: float
    perplexity: float
    num_tokens: int
    num_windows: int
    method: str
    against: Comparison | None = None


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


@torch.no_grad()  # not inference mode, whose tensors FSDP cannot use again in training
def evaluate(
    model: Any,
    windows: Windows,
    *,
    original: Any | None = None,
    batch_size: int = 8,
    names: tuple[str, str] = ("the model", "the original"),
    progress: Callable[[int], object] = lambda num_windows: None,
) -> Evaluation:
    """Score the windows with `model` and, if given, compare with `original` token by token.

    The two have the same vocabulary, but for rows of padding. They are causal language models of transformers, in eval
    mode, each on its own device. KL is KL(original ‖ model) in nats, from float32 log-probabilities. Raises
    CheckpointError, which has the model's name of `names`, where logits are not finite, and where a token that the text
    has, or that the original expects, is ruled out by a logit of -inf.
    """
    nats: list[Tensor] = []  # one tensor of token losses per window
    original_nats: list[Tensor] = []
    divergence: list[Tensor] = []
    num_agreeing = 0
    for begin in range(0, len(windows.input_ids), batch_size):
        batch = windows.input_ids[begin : begin + batch_size]
        logits = _logits(model, batch)
        reference = _logits(original, batch) if original is not None else None
        for row in range(len(batch)):
            first = windows.scored_from[begin + row]
            targets = batch[row, first:]
            log_probs = logits[row, first - 1 : -1].float().log_softmax(-1).cpu()  # (T, vocab_size)
            nats.append(F.nll_loss(log_probs, targets, reduction="none"))
            _require_finite(nats[-1], names[0], model, window=begin + row)
            if reference is not None:
                expected = reference[row, first - 1 : -1].float().log_softmax(-1).cpu()
                original_nats.append(F.nll_loss(expected, targets, reduction="none"))
                _require_finite(original_nats[-1], names[1], original, window=begin + row)
                divergence.append(_divergence(log_probs, expected))
                _require_finite(divergence[-1], names[0], model, window=begin + row)
                num_agreeing += int((log_probs.argmax(-1) == expected.argmax(-1)).sum())
        progress(len(batch))
    mean, error = _mean_and_error(nats)
    comparison = None
    if original is not None:
        original_mean, _ = _mean_and_error(original_nats)
        excess, excess_error = _mean_and_error([a - b for a, b in zip(nats, original_nats, strict=True)])
        kl, kl_error = _mean_and_error(divergence)
        comparison = Comparison(
            original_nats_per_token=original_mean,
            original_perplexity=math.exp(original_mean),
            excess_nats_per_token=excess,
            excess_standard_error=excess_error,
            kl_nats_per_token=kl,
            kl_standard_error=kl_error,
            top1_agreement=num_agreeing / windows.num_scored_tokens,
        )
    return Evaluation(
        nats_per_token=mean,
        standard_error=error,
        perplexity=math.exp(mean) if mean < 700 else math.inf,
        num_tokens=windows.num_scored_tokens,
        num_windows=len(windows.input_ids),
        method=windows.method,
        against=comparison,
    )


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


def _mean_and_error(per_window: list[Tensor]) -> tuple[float, float]:
    """Mean over all tokens, and the standard error of the windows' means (nan for a single window)."""
    mean = torch.cat(per_window).double().mean().item()
    means = torch.stack([tokens.double().mean() for tokens in per_window])
    error = means.std().item() / math.sqrt(len(means)) if len(means) > 1 else math.nan
    return mean, error
