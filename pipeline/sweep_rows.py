"""The results of a sweep: one row for each target, and tables of them."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

from ..measure.pictures import Point, pareto_front

__all__ = ["Quality", "Speed", "SweepRow", "as_csv", "as_table", "front"]


@dataclass(frozen=True)
class Quality:
    """A model on held-out text beside its original: nats per token, but for the perplexity and the share of top-1."""

    perplexity: float
    excess_nats_per_token: float
    excess_standard_error: float
    kl_nats_per_token: float
    top1_agreement: float


@dataclass(frozen=True)
class Speed:
    """Decoding at one batch and context: milliseconds of a step, in turn with the original, and what that gains.

    `bound` is the ratio of the bytes that a step has to read; no number where memory did not do.
    """

    batch: int
    context: int
    milliseconds: float | None
    original_milliseconds: float | None
    gain: float | None
    bound: float | None


@dataclass(frozen=True)
class SweepRow:
    """A target: what its cache takes, what was lost, and what is left of that after uptraining, if that was asked for.

    `cache_bytes_per_token` are of 16-bit keys and values. `seconds` are those of the conversion, by the clock; None
    where it was ended and went on. `output` is where the model is, uptrained if it was; None where it was not kept.
    """

    target: str
    cache_bytes_per_token: int
    weight_bytes: int
    model_type: str
    seconds: float | None
    before: Quality
    after: Quality | None = None
    output: str | None = None
    speed: tuple[Speed, ...] = ()

    @property
    def final(self) -> Quality:
        """After uptraining, if there was any."""
        return self.after or self.before

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> SweepRow:
        """The row that `asdict` made into an object."""
        after, made = content["after"], ("before", "after", "speed")
        return cls(
            **{each.name: content[each.name] for each in fields(cls) if each.name not in made},
            before=Quality(**content["before"]),
            after=None if after is None else Quality(**after),
            speed=tuple(Speed(**each) for each in content["speed"]),
        )


def front(rows: Iterable[SweepRow]) -> tuple[str, ...]:
    """The targets that no other beats, by cache, the largest first: none takes as little and has a smaller excess."""
    points = [Point(row.target, row.cache_bytes_per_token, row.final.excess_nats_per_token) for row in rows]
    return tuple(point.label for point in reversed(pareto_front(points)))


def as_table(rows: Sequence[SweepRow], original_cache: int, original_perplexity: float) -> str:
    """A table in Markdown, the original first, then by cache; targets on the front are in bold."""
    uptrained = any(row.after for row in rows)
    headings = ["target", "B/token", "of the cache", "perplexity", "excess, nats/token", "KL"]
    headings += ["perplexity after", "excess after", "KL after"] if uptrained else []
    shapes = dict.fromkeys((speed.batch, speed.context) for row in rows for speed in row.speed)
    headings += [f"times faster, batch {batch}, context {context}" for batch, context in shapes]
    lines = [f"| {' | '.join(headings)} |", f"|{'---|' * len(headings)}"]
    first = ["original", str(original_cache), "1", f"{original_perplexity:.4g}", "0", "0"]
    lines.append(f"| {' | '.join(first + [''] * (len(headings) - len(first)))} |")
    best = front(rows)
    for row in sorted(rows, key=lambda row: -row.cache_bytes_per_token):
        name = f"**{row.target}**" if row.target in best else row.target
        cells = [name, str(row.cache_bytes_per_token), _share(row.cache_bytes_per_token, original_cache)]
        cells += _quality_cells(row.before)
        if uptrained:
            cells += _quality_cells(row.after) if row.after else ["", "", ""]
        cells += [_gain_cell(row, shape) for shape in shapes]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def as_csv(rows: Sequence[SweepRow]) -> str:
    """The rows as comma-separated values, a heading for each number."""
    best = front(rows)
    flat = [_flat(row) | {"on_front": row.target in best} for row in rows]
    file = io.StringIO()
    names = list(dict.fromkeys(name for each in flat for name in each))
    writer = csv.DictWriter(file, names, lineterminator="\n")
    writer.writeheader()
    writer.writerows(flat)
    return file.getvalue()


def _flat(row: SweepRow) -> dict[str, Any]:
    content = asdict(row)
    found = {name: value for name, value in content.items() if name not in ("before", "after", "speed")}
    for when in ("before", "after"):
        found |= {f"{when}_{name}": value for name, value in (content[when] or {}).items()}
    for speed in row.speed:
        names = ("milliseconds", "original_milliseconds", "gain", "bound")
        found |= {f"decode_{speed.batch}x{speed.context}_{name}": getattr(speed, name) for name in names}
    return found


def _quality_cells(quality: Quality) -> list[str]:
    excess = f"{quality.excess_nats_per_token:.4f} ± {quality.excess_standard_error:.4f}"
    return [f"{quality.perplexity:.4g}", excess, f"{quality.kl_nats_per_token:.4f}"]


def _gain_cell(row: SweepRow, shape: tuple[int, int]) -> str:
    """How many times faster decoding is than the original's, and the most that it could be by the bytes moved."""
    found = next((each for each in row.speed if (each.batch, each.context) == shape), None)
    if found is None or found.gain is None:
        return ""
    return f"{found.gain:.2f}" + ("" if found.bound is None else f" (bound {found.bound:.2f})")


def _share(cache: int, original: int) -> str:
    """A share of the cache as people say it: 1/8 where it is that, else a decimal."""
    return f"1/{original // cache}" if original % cache == 0 else f"{cache / original:.3f}"
