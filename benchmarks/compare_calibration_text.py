"""Held-out loss right after merging K/V heads, by the text that the merge was measured on, with nothing trained.

    python scripts/build_calibration_text.py --held-out held_out --disjoint wikitext-2-valid.txt
    python benchmarks/compare_calibration_text.py MODEL --text demo=configs/demo/uptrain.jsonl \\
        --text shipped=configs/calibration/text.jsonl.gz --text self=self \\
        --text both=self+configs/calibration/text.jsonl.gz --held-out encyclopaedia=wikitext-2-valid.txt \\
        --held-out code=held_out/code.jsonl --held-out fiction=held_out/fiction.jsonl \\
        --held-out dialogue=held_out/dialogue.jsonl

A text is a place as --calibration takes it, self for what the model writes, or several with + between them, each of
which gives an equal part of the tokens. Excess is nats per token over the original on the first windows of each
held-out text; then the mean of the texts and the worst of them.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

import torch
from compare_merges import expanded
from kvconvert.configs import CALIBRATION_TEXT
from kvconvert.convert import Gqa, Source, TextSource, open_checkpoint
from kvconvert.convert.calibration.fitting import Fit
from kvconvert.convert.calibration.streams import Hardware
from kvconvert.convert.calibration.text import CalibrationText, read_calibration_text
from kvconvert.convert.calibration.writing import SelfWriting, write_calibration_text
from kvconvert.convert.checkpoint.loading import load_model
from kvconvert.convert.methods.merging import HeadMerge, merge_heads
from kvconvert.convert.methods.prepared import Preparation
from kvconvert.measure.held_out import load_windows
from kvconvert.measure.perplexity import evaluate
from torch import Tensor


def named(typed: str) -> tuple[str, str]:
    """NAME=PLACE."""
    name, _, place = typed.partition("=")
    return name, place


class Texts:
    """Calibration texts of a model; what it writes itself is written once, to `keep` if that is given."""

    def __init__(self, source: Source, num_tokens: int, sequence_length: int, keep: Path | None) -> None:
        self._source, self._num_tokens, self._length, self._keep = source, num_tokens, sequence_length, keep

    def of(self, places: str) -> CalibrationText:
        parts = places.split("+")
        number = self._num_tokens // len(parts)
        rows = [self._own()[: number // self._length] if part == "self" else self._read(part, number) for part in parts]
        return CalibrationText(torch.cat(rows), places)

    def _read(self, place: str, num_tokens: int) -> Tensor:
        return read_calibration_text(
            self._source.checkpoint, TextSource(place), num_tokens=num_tokens, sequence_length=self._length
        ).token_ids

    def _own(self) -> Tensor:
        if self._keep is not None and self._keep.exists():
            kept: Tensor = torch.load(self._keep)
            return kept
        begin = time.monotonic()
        text = write_calibration_text(
            self._source,
            SelfWriting(TextSource(str(CALIBRATION_TEXT))),
            num_tokens=self._num_tokens,
            sequence_length=self._length,
            hardware=Hardware(),
        )
        print(f"{text.description}, in {time.monotonic() - begin:.0f} s", flush=True)
        self._keep = self._keep or Path(tempfile.mkstemp()[1])
        torch.save(text.token_ids, self._keep)
        return text.token_ids


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--text", action="append", type=named, required=True, help="NAME=PLACE[+PLACE]")
    parser.add_argument("--held-out", action="append", type=named, required=True, help="NAME=PLACE")
    parser.add_argument("--groups", type=int, default=1)
    parser.add_argument("--calibration-tokens", type=int, default=32768)
    parser.add_argument("--window", type=int, default=512)
    parser.add_argument("--max-windows", type=int, default=16)
    parser.add_argument("--fit-steps", type=int, default=0, help="gradient steps behind the closed forms")
    parser.add_argument("--keep", type=Path, help="where the token ids that the model writes are kept between runs")
    arguments = parser.parse_args()

    held_out = {
        name: load_windows(
            arguments.model, TextSource(place), window=arguments.window, max_windows=arguments.max_windows
        )
        for name, place in arguments.held_out
    }
    source = Source.of(open_checkpoint(arguments.model))
    texts = Texts(source, arguments.calibration_tokens, arguments.window, arguments.keep)
    model = load_model(arguments.model, dtype=torch.float32, device="cpu")
    originals = [evaluate(model, windows).nats_per_token for windows in held_out.values()]
    print(f"| calibrated on | {' | '.join(held_out)} | mean | worst | seconds |\n|{'---|' * (len(held_out) + 4)}")
    print(f"| (original, nats) | {' | '.join(f'{nats:.3f}' for nats in originals)} | | | |", flush=True)
    for name, places in arguments.text:
        text = texts.of(places)
        begin = time.monotonic()
        with tempfile.TemporaryDirectory() as scratch:
            config = Gqa(arguments.groups).result_config(source)
            prepared = merge_heads(
                source,
                HeadMerge(arguments.groups, fit=Fit(arguments.fit_steps)),
                Preparation(Path(scratch), text),
                config,
            )
            seconds = time.monotonic() - begin
            for tensor, value in expanded(source, prepared).items():
                model.get_parameter(tensor).data = value.float()
        merged = [evaluate(model, windows).nats_per_token for windows in held_out.values()]
        excess = [after - before for after, before in zip(merged, originals, strict=True)]
        figures = [*excess, sum(excess) / len(excess), max(excess)]
        print(f"| {name} | {' | '.join(f'{figure:.3f}' for figure in figures)} | {seconds:.0f} |", flush=True)


if __name__ == "__main__":
    main()
