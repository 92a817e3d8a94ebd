"""The picture of a conversion: how uptraining recovers, and what quality costs in cache."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

__all__ = ["Curve", "Point", "draw_recovery"]

_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7")  # Okabe and Ito: distinguishable with colour blindness


@dataclass(frozen=True)
class Curve:
    """Held-out perplexity after so many uptraining tokens."""

    label: str
    tokens: Sequence[int]
    perplexities: Sequence[float]


@dataclass(frozen=True)
class Point:
    """A model at its cache size; `after` is the perplexity after uptraining, None if it was not uptrained."""

    label: str
    cache_bytes_per_token: int
    before: float
    after: float | None = None


def draw_recovery(path: Path, *, original: Point, curves: Sequence[Curve], points: Sequence[Point]) -> None:
    """Write a PNG: perplexity against uptraining tokens, and perplexity against cache bytes per token."""
    from matplotlib.figure import Figure  # Figure, not pyplot: no window system is asked for

    figure = Figure(figsize=(10, 4.2), layout="constrained")
    recovery, frontier = figure.subplots(1, 2)
    for curve, colour in zip(curves, _COLOURS, strict=False):
        thousands = [tokens / 1000 for tokens in curve.tokens]
        recovery.plot(thousands, curve.perplexities, color=colour, marker="o", markersize=3, label=curve.label)
    recovery.axhline(original.before, color="black", linestyle="--", linewidth=1, label=original.label)
    recovery.set(xlabel="uptraining tokens (thousands)", ylabel="held-out perplexity", title="Recovery")
    frontier.scatter([original.cache_bytes_per_token], [original.before], color="black", zorder=3)
    frontier.annotate(
        original.label,
        (original.cache_bytes_per_token, original.before),
        (0, 8),
        textcoords="offset points",
        ha="right",
    )
    for point, colour in zip(points, _COLOURS, strict=False):
        x = point.cache_bytes_per_token
        frontier.scatter([x], [point.before], facecolors="none", edgecolors=colour, zorder=3)
        frontier.annotate(point.label, (x, point.before), (8, 0), textcoords="offset points", va="center")
        if point.after is not None:
            frontier.annotate("", (x, point.after), (x, point.before), arrowprops={"arrowstyle": "->", "color": colour})
            frontier.scatter([x], [point.after], color=colour, zorder=3)
            frontier.annotate("uptrained", (x, point.after), (8, 0), textcoords="offset points", va="center")
    frontier.set(xlabel="K/V cache, bytes per token", ylabel="held-out perplexity", title="Quality against cache")
    frontier.set_xscale("log", base=2)
    frontier.margins(x=0.25)
    for axes in (recovery, frontier):
        axes.set_yscale("log")
        axes.grid(alpha=0.3, which="both")
    recovery.legend(frameon=False)
    figure.savefig(path, dpi=150)
