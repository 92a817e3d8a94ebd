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
    """Write a PNG: perplexity against uptraining tokens, and perplexity against cache bytes per token.

    A curve has the label of its point.
    """
    from matplotlib.figure import Figure  # Figure, not pyplot: no window system is asked for

    figure = Figure(figsize=(10, 4.2), layout="constrained")
    recovery, frontier = figure.subplots(1, 2)
    colour_of = {point.label: colour for point, colour in zip(points, _COLOURS, strict=False)}
    for curve in curves:
        colour = colour_of[curve.label]
        thousands = [tokens / 1000 for tokens in curve.tokens]
        recovery.plot(thousands, curve.perplexities, color=colour, marker="o", markersize=3, label=curve.label)
    recovery.axhline(original.before, color="black", linestyle="--", linewidth=1, label=original.label)
    recovery.set(xlabel="uptraining tokens (thousands)", ylabel="held-out perplexity", title="Recovery")
    for point in (original, *points):
        x, is_original = point.cache_bytes_per_token, point is original
        colour = "black" if is_original else colour_of[point.label]
        frontier.scatter([x], [point.before], color=colour if is_original else "none", edgecolors=colour, zorder=3)
        beside = {"xytext": (0, -14), "ha": "center"} if is_original else {"xytext": (9, 0), "ha": "left"}
        frontier.annotate(point.label, (x, point.before), textcoords="offset points", va="center", **beside)
        if point.after is not None:
            frontier.annotate("", (x, point.after), (x, point.before), arrowprops={"arrowstyle": "->", "color": colour})
            frontier.scatter([x], [point.after], color=colour, zorder=3)
            frontier.annotate(
                "uptrained", (x, point.after), (-8, 0), textcoords="offset points", ha="right", va="center"
            )
    frontier.set(xlabel="K/V cache, bytes per token", ylabel="held-out perplexity", title="Quality against cache")
    frontier.set_xscale("log", base=2)
    sizes = sorted({point.cache_bytes_per_token for point in (original, *points)})
    frontier.set_xticks(sizes, [str(size) for size in sizes])
    frontier.margins(x=0.35, y=0.15)
    for axes in (recovery, frontier):
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter("{x:g}")
        axes.grid(alpha=0.3, which="both")
    recovery.legend(frameon=False)
    figure.savefig(path, dpi=150)
