"""Prints as Markdown what decode_table.py, or the part `decoding` of gpu.sh, wrote.

    python benchmarks/render_decode_table.py rows.json

A table for each model, precision, kind of code and batch, a column for each context. The first line is the milliseconds
of a step of MHA, the others are the gain over it / its bound, the ratio of the bytes that a step has to read.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable
from pathlib import Path
from statistics import median
from typing import Any

Row = dict[str, Any]


def rendered(rows: list[Row]) -> Iterable[str]:
    """The lines of all tables."""
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        key = (row["shape"], row["dtype"], row["compiled"], row["batch"])
        groups.setdefault(key, []).append(row)
    for (shape, dtype, compiled, batch), group in groups.items():
        yield f"{shape}, {dtype}, {'compiled' if compiled else 'eager'}, batch {batch}:"
        yield ""
        yield from table(group)
        yield ""


def table(rows: list[Row]) -> Iterable[str]:
    """A line for MHA, then one for each variant, in the order of the rows."""
    contexts = sorted({row["context"] for row in rows})
    yield "| | cache | " + " | ".join(f"{context} tokens" for context in contexts) + " |"
    yield "|---|---|" + "---|" * len(contexts)
    yield "| MHA, ms per step | 1 | " + " | ".join(original(rows, context) for context in contexts) + " |"
    for variant in dict.fromkeys(row["variant"] for row in rows):
        own = [row for row in rows if row["variant"] == variant]
        cells = [next((cell(row) for row in own if row["context"] == context), "") for context in contexts]
        yield f"| {variant} | {cache(own)} | " + " | ".join(cells) + " |"


def original(rows: list[Row], context: int) -> str:
    """The median over the runs beside each variant."""
    steps = [row["original"]["decode"]["median"] for row in rows if row["context"] == context and row.get("original")]
    return f"{1e3 * median(steps):.3g}" if steps else "out of memory"


def cell(row: Row) -> str:
    gain = row.get("decode_gain")
    if gain is not None:
        return f"{gain['ratio']:.2f} / {gain['bound']:.2f}"
    return "MHA does not fit" if row.get("result") else "out of memory"


def cache(rows: list[Row]) -> str:
    """The bytes of the live cache over those of MHA."""
    both = [(row["original"], row["result"]) for row in rows if row.get("original") and row.get("result")]
    return f"1/{both[0][0]['cache_bytes'] / both[0][1]['cache_bytes']:.3g}" if both else ""


def main() -> None:
    for line in rendered(json.loads(Path(sys.argv[1]).read_text())["rows"]):
        print(line)


if __name__ == "__main__":
    main()
