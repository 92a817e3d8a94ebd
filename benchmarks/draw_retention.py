"""Draws what each layer kept in a conversion: reads what mha2gqa, mha2mqa, mha2cla or mha2mla printed with --json.

kvconvert mha2mqa model_dir --method svd --calibration text.jsonl --json > conversion.json
python benchmarks/draw_retention.py conversion.json picture.png
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from kvconvert.convert.errors import InputError
from kvconvert.convert.methods.prepared import LayerReport
from kvconvert.measure.pictures import draw_retention


def main() -> None:
    source, picture = map(Path, sys.argv[1:3])
    try:
        draw_retention(picture, [LayerReport.from_json(layer) for layer in json.loads(source.read_text())["layers"]])
    except InputError as error:
        raise SystemExit(f"error: {error}") from error


if __name__ == "__main__":
    main()
