"""Data that ships with kvconvert. `DEMO` holds the demo checkpoint, its uptraining text and its held-out text."""

from pathlib import Path

DEMO = Path(__file__).parent / "demo"
