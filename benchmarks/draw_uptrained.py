"""Draws the table "After uptraining" of the results: excess before and after, by the paper's recipe and by ours.

python benchmarks/draw_uptrained.py docs/measurements.md docs/uptrained.png
"""

from __future__ import annotations

import sys
from fractions import Fraction
from pathlib import Path
from typing import NamedTuple

from kvconvert.convert.errors import InputError
from kvconvert.measure.pictures import require_matplotlib

HEAD = "| result | cache | paper, before | paper, after | ours, before | ours, after |"
ORIGINAL_BYTES = 4096  # per token, of the demo checkpoint
RECIPES = {
    "the GQA paper: mean, then cross-entropy": ("#777777", 0.16),
    "kvconvert: svd, then KL to the original": ("#d55e00", -0.16),
}  # colour, and place above the middle of a row


class Row(NamedTuple):
    """A result, its cache in parts of the original's, and the excess before and after of each recipe, if measured."""

    result: str
    cache: Fraction
    excesses: tuple[tuple[float, float] | None, ...]


def main() -> None:
    page, picture = map(Path, sys.argv[1:3])
    try:
        require_matplotlib()
    except InputError as error:
        raise SystemExit(f"error: {error}") from error
    draw(picture, rows_of(page.read_text()))


def rows_of(page: str) -> list[Row]:
    """The rows of the table, from the top."""
    rows = []
    for line in page.partition(HEAD)[2].partition("\n\n")[0].splitlines()[2:]:
        name, size, *cells = (cell.strip() for cell in line.strip("|").split("|"))
        pairs = tuple((float(cells[i]), float(cells[i + 1])) if cells[i] else None for i in (0, 2))
        rows.append(Row(name, Fraction(int(size), ORIGINAL_BYTES), pairs))
    return rows


def draw(picture: Path, rows: list[Row]) -> None:
    """An arrow leads from a converted model, hollow, to the same after uptraining."""
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(10, 4.2), layout="constrained")
    handles = []
    for index, (label, (colour, above)) in enumerate(RECIPES.items()):
        for place, row in enumerate(reversed(rows)):
            pair = row.excesses[index]
            if pair is None:
                continue
            y, (before, after) = place + above, pair
            arrow = {"arrowstyle": "->", "color": colour, "linewidth": 1.5, "shrinkA": 4, "shrinkB": 4}
            axes.annotate("", (after, y), (before, y), arrowprops=arrow)
            axes.plot(before, y, "o", color=colour, markerfacecolor="white", markersize=8)
            axes.plot(after, y, "o", color=colour, markersize=8)
            axes.annotate(f"{after:.4f}", (after, y), (-8, 0), textcoords="offset points", ha="right", va="center")
        handles += axes.plot([], [], "o", color=colour, label=label)
    handles += axes.plot([], [], "o", color="black", markerfacecolor="white", label="converted, nothing trained")
    handles += axes.plot([], [], "o", color="black", label="uptrained")
    axes.set_xscale("log")
    axes.set_xlim(0.0025, 3)
    axes.xaxis.set_major_formatter(lambda excess, _: f"{excess:g}")
    axes.set_yticks(range(len(rows)), [f"{row.result}\n{row.cache} of the cache" for row in reversed(rows)])
    axes.set_xlabel("loss above the original's (nats per token, log scale); less is better")
    axes.set_title("The demo checkpoint, before and after uptraining for 5 % of its pretraining")
    axes.grid(axis="x", color="#dddddd")
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(handles=handles, loc="outside lower center", ncols=2, frameon=False)
    figure.savefig(picture, dpi=150)


if __name__ == "__main__":
    main()
