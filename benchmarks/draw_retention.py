"""Draws what each layer kept in a conversion: reads what mha2gqa, mha2mqa, mha2cla or mha2mla printed with --json.

kvconvert mha2mqa model_dir --method svd --calibration text.jsonl --json > conversion.json
python benchmarks/draw_retention.py conversion.json picture.png
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from kvconvert.convert.calibration.fitting import FitOutcome
from kvconvert.convert.errors import InputError
from kvconvert.convert.methods.prepared import LayerReport
from kvconvert.measure.pictures import draw_retention


def main() -> None:
    source, picture = map(Path, sys.argv[1:3])
    try:
        draw_retention(picture, [report_of(layer) for layer in json.loads(source.read_text())["layers"]])
    except InputError as error:
        raise SystemExit(f"error: {error}") from error


def report_of(layer: dict[str, Any]) -> LayerReport:
    """A layer of a conversion's JSON as the report that the conversion returned."""
    return LayerReport(
        layers=tuple(layer["layers"]),
        groups=tuple(map(tuple, layer["groups"])),
        keys_retained=tuple(layer["keys_retained"]),
        values_retained=tuple(layer["values_retained"]),
        fits=tuple(FitOutcome(**fit) for fit in layer["fits"]),
    )


if __name__ == "__main__":
    main()
