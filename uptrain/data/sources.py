"""Texts that a run trains on, each with the share of the samples that comes from it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ...convert.text.sources import TextSource, estimate_tokens

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["SourceSize", "WeightedSource", "measure_sources", "shares_of"]


@dataclass(frozen=True)
class WeightedSource:
    """Text, and how much of the samples comes from it, relative to the other sources."""

    text: TextSource
    weight: float = 1.0


def measure_sources(
    sources: Sequence[WeightedSource], tokenizer: PreTrainedTokenizerBase | None
) -> tuple[SourceSize, ...]:
    """The part of the samples that comes from each source, and about how many tokens it holds.

    Without a tokenizer no text is read and none of these are known. Raises DataError for what is no text.
    """
    return tuple(
        SourceSize(share, None if tokenizer is None else estimate_tokens(source.text, tokenizer))
        for share, source in zip(shares_of(sources), sources, strict=True)
    )


def shares_of(sources: Sequence[WeightedSource]) -> tuple[float, ...]:
    """The weights, with sum 1."""
    total = math.fsum(source.weight for source in sources)
    return tuple(source.weight / total for source in sources)


@dataclass(frozen=True)
class SourceSize:
    """A source of text in numbers: its part of the samples, and about how many tokens it holds, None if not known."""

    share: float
    num_tokens: int | None
