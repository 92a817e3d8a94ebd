"""Perplexity of a model on held-out text, alone or against its original."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .scoring import Scores, score
from .windows import Windows

if TYPE_CHECKING:
    from .samples import Sample
    from .tasks import TaskScore

__all__ = ["Comparison", "Evaluation", "PositionLoss", "Recovery", "evaluate", "recovery", "summarise"]

_FIRST_POSITIONS = 64  # in the first group of positions; each group after it reaches twice as far


@dataclass(frozen=True)
class Comparison:
    """A model against its original on the same tokens, in nats per token, with standard errors over windows.

    Those of differences are of the windows' differences, which are far smaller than those of the two losses.
    """

    original_nats_per_token: float
    original_perplexity: float
    original_bits_per_byte: float | None
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
class PositionLoss:
    """The tokens that stand at `first_position` to `last_position` in their windows: so many tokens come before them.

    The excess over the original is nats per token ± its standard error over windows, None without an original.
    """

    first_position: int
    last_position: int
    num_tokens: int
    nats_per_token: float
    excess_nats_per_token: float | None = None
    excess_standard_error: float | None = None


@dataclass(frozen=True)
class Recovery:
    """How much of what a conversion lost came back: 1 - excess / excess before uptraining.

    ± the jackknife's standard error over windows; nan where nothing was lost, so that nothing can come back.
    """

    recovered: float
    standard_error: float
    before_nats_per_token: float
    before_excess_nats_per_token: float


@dataclass(frozen=True)
class Evaluation:
    """Nats per token ± standard error over windows, and its exponential. `method` belongs to the number.

    Bits per byte are of the text's UTF-8, and compare models with other tokenizers; None where the text of tokens is
    not known. `by_source` has each text alone, where there are several, `positions` the loss by how many tokens stand
    before. `window_nats` and `text_sha256` are for pairing with another evaluation of the same text.
    """

    nats_per_token: float
    standard_error: float
    perplexity: float
    bits_per_byte: float | None
    num_tokens: int
    num_windows: int
    method: str
    against: Comparison | None = None
    recovery: Recovery | None = None
    positions: tuple[PositionLoss, ...] = ()
    by_source: Mapping[str, Evaluation] = field(default_factory=dict)
    samples: tuple[Sample, ...] = ()
    tasks: tuple[TaskScore, ...] = ()
    text_sha256: str = ""
    window_nats: tuple[float, ...] = ()


def evaluate(
    model: Any,
    windows: Windows,
    *,
    original: Any | None = None,
    batch_size: int = 8,
    names: tuple[str, str] = ("the model", "the original"),
    progress: Callable[[int], object] = lambda num_windows: None,
) -> Evaluation:
    """Score the windows with a model and, if given, beside its original; arguments and errors are those of `score`."""
    scores = score(model, windows, original=original, batch_size=batch_size, names=names, progress=progress)
    return summarise(scores, windows)


def summarise(scores: Scores, windows: Windows) -> Evaluation:
    """What the scores of these windows come to."""
    mean, error = _mean_and_error(scores.nats)
    return Evaluation(
        nats_per_token=mean,
        standard_error=error,
        perplexity=math.exp(mean) if mean < 700 else math.inf,
        bits_per_byte=_bits_per_byte(scores.nats, windows.num_bytes),
        num_tokens=sum(map(len, scores.nats)),
        num_windows=len(scores.nats),
        method=windows.method,
        against=_compare(scores, windows.num_bytes) if scores.original_nats else None,
        positions=_by_position(scores),
        text_sha256=windows.sha256,
        window_nats=tuple(tokens.double().mean().item() for tokens in scores.nats),
    )


def recovery(scores: Scores, before: Scores) -> Recovery:
    """How much came back since `before`, which scores the same windows; `scores` are beside the original."""
    now = torch.stack([tokens.double().sum() for tokens in _differences(scores.nats, scores.original_nats)])
    then = torch.stack([tokens.double().sum() for tokens in _differences(before.nats, scores.original_nats)])
    num_tokens, num_windows = sum(map(len, before.nats)), len(then)
    lost = then.sum().item() / num_tokens
    recovered, error = math.nan, math.nan
    if lost > 0:
        recovered = 1 - (now.sum() / then.sum()).item()
        if num_windows > 1:
            without = 1 - (now.sum() - now) / (then.sum() - then)  # each window left out once
            spread = (without - without.mean()).square().sum() * (num_windows - 1) / num_windows
            error = math.sqrt(spread.item())
    return Recovery(recovered, error, _mean_and_error(before.nats)[0], lost)


def _compare(scores: Scores, num_bytes: int | None) -> Comparison:
    original, _ = _mean_and_error(scores.original_nats)
    excess, excess_error = _mean_and_error(_differences(scores.nats, scores.original_nats))
    kl, kl_error = _mean_and_error(scores.divergence)
    return Comparison(
        original_nats_per_token=original,
        original_perplexity=math.exp(original) if original < 700 else math.inf,
        original_bits_per_byte=_bits_per_byte(scores.original_nats, num_bytes),
        excess_nats_per_token=excess,
        excess_standard_error=excess_error,
        kl_nats_per_token=kl,
        kl_standard_error=kl_error,
        top1_agreement=torch.cat(scores.agrees).double().mean().item(),
    )


def _by_position(scores: Scores) -> tuple[PositionLoss, ...]:
    """The loss at positions 0 to 63, 64 to 127, 128 to 255 and so on, without groups in which nothing is scored."""
    end = max(first + len(tokens) for first, tokens in zip(scores.first_positions, scores.nats, strict=True))
    found: list[PositionLoss] = []
    begin, after = 0, _FIRST_POSITIONS
    while begin < end:
        nats = _between(scores, scores.nats, begin, after)
        if nats:
            excess: tuple[float | None, float | None] = (None, None)
            if scores.original_nats:
                excess = _mean_and_error(_differences(nats, _between(scores, scores.original_nats, begin, after)))
            last = min(after, end) - 1
            found.append(PositionLoss(begin, last, sum(map(len, nats)), _mean_and_error(nats)[0], *excess))
        begin, after = after, 2 * after
    return tuple(found)


def _between(scores: Scores, values: Sequence[Tensor], begin: int, after: int) -> list[Tensor]:
    """Of each window's values those at positions from `begin` on and before `after`, where there are any."""
    cut = [
        tokens[max(begin - first, 0) : max(after - first, 0)]
        for first, tokens in zip(scores.first_positions, values, strict=True)
    ]
    return [tokens for tokens in cut if len(tokens)]


def _differences(some: Sequence[Tensor], others: Sequence[Tensor]) -> list[Tensor]:
    return [one - other for one, other in zip(some, others, strict=True)]


def _bits_per_byte(nats: Sequence[Tensor], num_bytes: int | None) -> float | None:
    if not num_bytes:
        return None
    return torch.cat(list(nats)).double().sum().item() / math.log(2) / num_bytes


def _mean_and_error(per_window: Sequence[Tensor]) -> tuple[float, float]:
    """Mean over all tokens, and the standard error of the windows' means (nan for a single window)."""
    mean = torch.cat(list(per_window)).double().mean().item()
    means = torch.stack([tokens.double().mean() for tokens in per_window])
    error = means.std().item() / math.sqrt(len(means)) if len(means) > 1 else math.nan
    return mean, error
