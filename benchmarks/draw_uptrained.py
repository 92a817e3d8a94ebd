"""Draws the table "After uptraining" of the results: excess before and after, by the paper's recipe and by ours.

python benchmarks/draw_uptrained.py docs/measurements.md docs/uptrained.png
"""

from __future__ import annotations

import sys
from fractions import Fraction
from pathlib import Path

from kvconvert.convert.errors import InputError
from kvconvert.measure.pictures import UptrainedRow, draw_uptrained

HEAD = "| result | cache | paper, before | paper, after | ours, before | ours, after |"
ORIGINAL_BYTES = 4096  # per token, of the demo checkpoint


def main() -> None:
    page, picture = map(Path, sys.argv[1:3])
    try:
        draw_uptrained(picture, rows_of(page.read_text()))
    except InputError as error:
        raise SystemExit(f"error: {error}") from error


def rows_of(page: str) -> list[UptrainedRow]:
    """The rows of the table, from the top."""
    rows = []
    for line in page.partition(HEAD)[2].partition("\n\n")[0].splitlines()[2:]:
        name, size, *cells = (cell.strip() for cell in line.strip("|").split("|"))
        pairs = tuple((float(cells[i]), float(cells[i + 1])) if cells[i] else None for i in (0, 2))
        rows.append(UptrainedRow(name, str(Fraction(int(size), ORIGINAL_BYTES)), (pairs[0], pairs[1])))
    return rows


if __name__ == "__main__":
    main()
