"""Draws what compare_recipes.py printed: excess over tokens, and over compute, for each model; prints it as a table.

python benchmarks/draw_recipes.py rows.jsonl picture.png
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure


def main() -> None:
    source, picture = map(Path, sys.argv[1:3])
    rows: list[dict[str, Any]] = [json.loads(line) for line in source.read_text().splitlines()]
    models = list(dict.fromkeys(row["model"] for row in rows))
    names = list(dict.fromkeys(_name(row) for row in rows))
    figure = Figure(figsize=(4 * len(models), 7), layout="constrained")
    axes = figure.subplots(2, len(models), squeeze=False)
    for column, model in enumerate(models):
        for row in (row for row in rows if row["model"] == model):
            tokens = [point[0] for point in row["curve"]]
            thousands = [count / 1000 for count in tokens]
            excess = [point[1] for point in row["curve"]]
            color = f"C{names.index(_name(row)) % 10}"
            style = "-" if names.index(_name(row)) < 10 else "--"
            axes[0][column].plot(thousands, excess, style, color=color, label=_name(row))
            spent = [count / row["tokens"] * row["compute"] for count in tokens]
            axes[1][column].plot(spent, excess, style, color=color)
        axes[0][column].set(title=model, xlabel="tokens (thousands)", ylim=(0, None))
        axes[1][column].set(xlabel="compute (cross-entropy for all tokens = 1)", ylim=(0, None))
    for line in axes:
        line[0].set_ylabel("excess, nats per held-out token")
    handles: dict[str, Any] = {}
    for axis in axes[0]:
        handles |= {label: handle for handle, label in zip(*axis.get_legend_handles_labels(), strict=True)}
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=4)
    figure.savefig(picture, dpi=80)
    print(table(rows, models))


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


def _name(row: dict[str, Any]) -> str:
    return f"{row['recipe']}, {row['lr']:g}"


if __name__ == "__main__":
    main()
