"""Draws what compare_recipes.py printed: excess over tokens, and over compute, for each model; prints it as a table.

    python benchmarks/draw_recipes.py rows.jsonl picture.png

A model whose name ends in -mean is the same model from the mean of its heads, and is drawn in its panels; with the
recipe "pretraining" that is the paper's recipe.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from kvconvert.convert.errors import InputError
from kvconvert.measure.pictures import RecipeRun, draw_recipes, require_matplotlib


def main() -> None:
    source, picture = map(Path, sys.argv[1:3])
    try:
        require_matplotlib()
        rows: list[dict[str, Any]] = [json.loads(line) for line in source.read_text().splitlines()]
        draw_recipes(picture, [run_of(row) for row in rows])
    except InputError as error:
        raise SystemExit(f"error: {error}") from error
    print(table(rows, list(dict.fromkeys(row["model"] for row in rows))))


def run_of(row: dict[str, Any]) -> RecipeRun:
    """A row of compare_recipes.py as a line of the picture."""
    model = row["model"].removesuffix("-mean")
    from_mean = model != row["model"]
    of_the_paper = from_mean and row["recipe"] == "pretraining"
    label = f"{row['recipe']}{' from the mean' if from_mean else ''}, lr {row['lr']:g}"
    if "compute" not in row:
        raise InputError(f"{row['model']}, {label}: the row has no compute, which older versions did not print")
    tokens, excess = zip(*row["curve"], strict=True)
    return RecipeRun(
        model, f"the paper: {label}" if of_the_paper else label, tokens, excess, row["compute"], of_the_paper
    )


def table(rows: list[dict[str, Any]], models: list[str]) -> str:
    """A line for each recipe and rate, a column for each model: excess ± its standard error."""
    lines = [f"| recipe | peak rate | compute | {' | '.join(models)} |", "|---|---|---|" + "---|" * len(models)]
    for key in sorted({(row["recipe"], row["lr"]) for row in rows}):
        found = {row["model"]: row for row in rows if (row["recipe"], row["lr"]) == key}
        compute = sorted({f"{row['compute']:.2f}" for row in found.values()})
        cells = [f"{row['excess']:.4f} ± {row['standard_error']:.4f}" if row else "" for row in map(found.get, models)]
        spent = " to ".join(dict.fromkeys((compute[0], compute[-1])))
        lines.append(f"| {key[0]} | {key[1]:g} | {spent} | {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
