"""Texts that a run trains on, each with the share of the samples that comes from it."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

from ...convert.errors import InputError
from ...convert.text.sources import TextSource

__all__ = ["SourceSize", "WeightedSource", "parse_source", "shares_of"]

# what a source may say for itself, and the field of TextSource that holds it
_OWN = {"split": "split", "field": "text_field", "config": "config", "revision": "revision"}
_WEIGHT = re.compile(r"(.*):([+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?)", re.DOTALL)
_SUFFIX = re.compile(r"(.*)\[(\w+=[^\[\]=,]*(?:,\w+=[^\[\]=,]*)*)\]", re.DOTALL)
_EXAMPLE = "write for example a.jsonl:0.7 or org/name[split=train,field=text]:0.3"


@dataclass(frozen=True)
class WeightedSource:
    """A text, and how much of the samples comes from it, relative to the other sources."""

    text: TextSource
    weight: float = 1.0


@dataclass(frozen=True)
class SourceSize:
    """A source of text in numbers: its part of the samples, and about how many tokens it holds, None if not known."""

    share: float
    num_tokens: int | None


def parse_source(typed: str, defaults: TextSource) -> WeightedSource:
    """Read a source as it is typed: `place`, `place:weight`, `place[split=train,field=text,config=en]:weight`.

    Between brackets stand split, field, config and revision, each of which counts more than that of `defaults`. What
    is the name of a file or a directory as a whole is a place, whatever it ends in: `dump:2024` may be one.
    Raises InputError for anything else between them, for no place, and for a weight that is not positive.
    """
    match = None if replace(defaults, location=typed.strip()).path.exists() else _WEIGHT.fullmatch(typed.strip())
    place, weight = (match[1], float(match[2])) if match else (typed.strip(), 1.0)
    own: dict[str, str] = {}
    suffix = None if replace(defaults, location=place).path.exists() else _SUFFIX.fullmatch(place)
    if suffix:
        place = suffix[1]
        for part in suffix[2].split(","):
            name, _, value = part.partition("=")
            if name not in _OWN or not value:
                raise InputError(f"{typed!r}: {part} says nothing of a text", hint=f"known are {', '.join(_OWN)}")
            own[_OWN[name]] = value
    if not place:
        raise InputError(f"{typed!r} names no text", hint=_EXAMPLE)
    if not 0 < weight < math.inf:
        raise InputError(f"{typed!r} has the weight {weight:g}; write a positive number, for example a.jsonl:0.7")
    return WeightedSource(replace(defaults, location=place, **own), weight)


def shares_of(sources: Sequence[WeightedSource]) -> tuple[float, ...]:
    """Scale the weights of sources to the sum 1."""
    total = math.fsum(source.weight for source in sources)
    return tuple(source.weight / total for source in sources)
