"""Texts that a run trains on, each with the share of the samples that comes from it."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from ...convert.errors import InputError
from ...convert.text.sources import TextSource, parse_text

__all__ = ["SourceSize", "WeightedSource", "parse_source", "shares_of"]

_WEIGHT = re.compile(r"(.*):([+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?)", re.DOTALL)


@dataclass(frozen=True)
class WeightedSource:
    """A text, and how much of the samples comes from it, relative to the other sources."""

    text: TextSource
    weight: float = 1.0

    @property
    def description(self) -> dict[str, Any]:
        """All that decides what is read: how unreadable rows are met does not."""
        text = asdict(self.text)
        del text["skip_bad_lines"]
        return {"text": text, "weight": self.weight}


@dataclass(frozen=True)
class SourceSize:
    """A source of text in numbers: its part of the samples, and about how many tokens it holds, None if not known."""

    share: float
    num_tokens: int | None


def parse_source(typed: str, defaults: TextSource) -> WeightedSource:
    """Read a source as it is typed: a text as `parse_text` reads it, and its weight: `a.jsonl`, `org/name[split=en]:2`.

    A place that exists, as a directory `dump:2024`, has no weight in its name. Raises InputError for what is no text,
    and for a weight that is not positive.
    """
    exists = os.path.lexists(TextSource(typed.strip()).path)
    match = None if exists else _WEIGHT.fullmatch(typed.strip())
    place, weight = (match[1], float(match[2])) if match else (typed, 1.0)
    if not place:
        raise InputError(f"{typed!r} names no text", hint="write for example a.jsonl:0.7")
    text = parse_text(place, defaults)
    if not 0 < weight < math.inf:
        raise InputError(f"{typed!r} has the weight {weight:g}; write a positive number, for example a.jsonl:0.7")
    return WeightedSource(text, weight)


def shares_of(sources: Sequence[WeightedSource]) -> tuple[float, ...]:
    """Scale the weights of sources to the sum 1."""
    total = math.fsum(source.weight for source in sources)
    return tuple(source.weight / total for source in sources)
