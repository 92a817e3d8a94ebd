"""Data that ships with kvconvert.

`CALIBRATION_TEXT` is what a merge is measured on where no text is given; `DEMO` holds the demo checkpoint, its
uptraining text and its held-out text; `PRETRAINING_TOKENS` says on how many tokens public models were pretrained;
`ACCELERATE` has configurations for `accelerate launch`, `RECIPES` recipes for `kvconvert run`.
"""

from pathlib import Path

CALIBRATION_TEXT = Path(__file__).parent / "calibration" / "text.jsonl.gz"
DEMO = Path(__file__).parent / "demo"
PRETRAINING_TOKENS = Path(__file__).parent / "pretraining_tokens.json"
ACCELERATE = Path(__file__).parent / "accelerate"
RECIPES = Path(__file__).parent / "recipes"
