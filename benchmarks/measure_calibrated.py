"""Measure what each step of a calibrated conversion costs for a model as wide as Llama-2-7B: seconds, memory, by layer.

    python benchmarks/measure_calibrated.py [--threads 2] [--tokens 8192] [--layers 2] [--only CONVERSION …]

Writes a checkpoint of a few layers of random bfloat16 weights, and a text of random words, both removed again. Each
conversion runs in a process of its own, through the library. Times of a step are those of a layer, without the steps
inside it. Memory is the private resident memory (RssAnon of /proc/self/status, sampled every 5 ms) beyond that of the
process before the conversion; files that are mapped do not count. Costs of 32 layers are extrapolated: 32 times those
of a layer, and what is done once; those of another number of tokens too, since all that depends on it is proportional
to it. Prints Markdown tables. Weights are random, on which time hardly depends.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import wraps
from pathlib import Path
from typing import Any

from gpu import SHAPES, TINY, save_checkpoint

VOCABULARY = 16_384  # more words than the hidden size, so that the inputs of the first layer span all dims
WHOLE_LAYERS, WHOLE_TOKENS = 32, 131_072  # of Llama-2-7B, and of a calibration by default
ONCE = "what is done once: text, embeddings, checks"
CHOICE = "choice among the latents"  # is counted with all steps inside it, which take a part of the tokens only

STEPS = {  # where the library looks a step's function up, in the order of the table; those with * depend on the tokens
    "convert.methods.merging.read_projections": "reading weights",
    "convert.methods.compression.read_projections": "reading weights",
    "convert.calibration.streams.Stream.moments": "moments of inputs *",
    "convert.methods.merging.Heads": "covariances of heads",
    "convert.methods.merging.best_grouping": "search for groups",
    "convert.methods.merging.merge_layers": "merge",
    "convert.methods.compression.without_constant": "biases without a constant",
    "convert.methods.compression.latent_attentions": "latents",
    "convert.calibration.streams.Stream.advance": "pass of the original *",
    "convert.methods.compression.candidate_error": CHOICE,
    "convert.methods.compression.normalised": "norm of the latent",
    "convert.calibration.streams.Stream.output_moments": "moments of outputs *",
    "convert.calibration.streams.refitted": "refit",
    "convert.calibration.streams.Stream._fit": "gradient steps *",
    "convert.calibration.streams.Stream.refit": "pass of the result *",
    "convert.checkpoint.overlay.Overlay.store": "writing",
    "convert.conversion.execute": "writing",
}


class Meter:
    """Seconds, processor seconds and peak private memory of each step, without the steps inside it."""

    def __init__(self) -> None:
        self.wall: defaultdict[str, float] = defaultdict(float)
        self.processor: defaultdict[str, float] = defaultdict(float)
        self.peak: defaultdict[str, int] = defaultdict(int)
        self._within = [ONCE]
        self._start = private_bytes()
        self._last = time.perf_counter(), time.process_time()
        self._ended = threading.Event()
        self._sampler = threading.Thread(target=self._sample)
        self._sampler.start()

    @contextmanager
    def step(self, name: str) -> Iterator[None]:
        self._count()
        self._within.append(CHOICE if self._within[-1] == CHOICE else name)
        try:
            yield
        finally:
            self._count()
            self._within.pop()

    def end(self) -> None:
        self._count()
        self._ended.set()
        self._sampler.join()

    def wrapped(self, function: Callable[..., Any], name: str) -> Callable[..., Any]:
        @wraps(function, updated=())
        def measured(*arguments: Any, **named: Any) -> Any:
            with self.step(name):
                result = function(*arguments, **named)
            return self._each(result, name) if isinstance(result, Generator) else result

        return measured

    def _each(self, results: Generator[Any], name: str) -> Iterator[Any]:
        """The results of a generator, which does its work when one is asked for."""
        while True:
            with self.step(name):
                try:
                    result = next(results)
                except StopIteration:
                    return
            yield result

    def _count(self) -> None:
        now = time.perf_counter(), time.process_time()
        self.wall[self._within[-1]] += now[0] - self._last[0]
        self.processor[self._within[-1]] += now[1] - self._last[1]
        self._last = now

    def _sample(self) -> None:
        while not self._ended.wait(0.005):
            name = self._within[-1]
            self.peak[name] = max(self.peak[name], private_bytes() - self._start)


def private_bytes() -> int:
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(status["RssAnon"].split()[0]) * 1024


def methods(shape: Any) -> dict[str, Any]:
    from kvconvert.convert import Cla, Gqa, Mla

    latent, rope = shape.hidden_size // 8, shape.head_dim // 2
    return {
        "mha2gqa --method svd --groups 8": Gqa(shape.num_attention_heads // 4, merge="svd"),
        "mha2gqa --method svd --groups 1": Gqa(1, merge="svd"),
        "mha2cla --method svd --share 2": Cla(share=2, merge="svd"),
        "mha2mla --kv-lora-rank 512 --qk-rope-head-dim 64": Mla(kv_lora_rank=latent, qk_rope_head_dim=rope),
    }


def make(options: argparse.Namespace) -> None:
    """The checkpoint and the text: in a process of its own, like what is measured."""
    draw = random.Random(0)
    words = [f"w{number}" for number in range(options.shape.vocab_size - 3)]
    lines = [" ".join(draw.choices(words, k=1100)) for _ in range(options.tokens // 1000 + 1)]
    save_checkpoint(options.shape, options.folder, device="cpu", lines=lines)


def measure(options: argparse.Namespace) -> None:
    import pkgutil

    import torch
    from kvconvert.convert import Calibration, convert

    torch.set_num_threads(options.threads)
    method = methods(options.shape)[options.conversion]
    calibration = Calibration(options.folder / "text.jsonl", num_tokens=options.tokens, precision="fp32", device="cpu")
    for path in STEPS:  # imported before memory and time count
        pkgutil.resolve_name(f"kvconvert.{path}")
    import transformers.models.llama.modeling_llama  # noqa: F401

    meter = Meter()
    for path, name in STEPS.items():
        owner, _, attribute = path.rpartition(".")
        place = pkgutil.resolve_name(f"kvconvert.{owner}")
        setattr(place, attribute, meter.wrapped(getattr(place, attribute), name))
    try:
        result = convert(options.folder / "model", method, options.folder / "result", calibration=calibration)
    finally:
        meter.end()
    kept = [[*report.keys_retained, *report.values_retained] for report in result.reports]
    steps = {name: (meter.wall[name], meter.processor[name], meter.peak[name]) for name in meter.wall}
    print(json.dumps({"steps": steps, "kept": kept}))


def report(conversion: str, found: dict[str, Any], options: argparse.Namespace) -> None:
    layers, steps = options.shape.num_hidden_layers, found["steps"]
    kept = [fraction for layer in found["kept"] for fraction in layer]
    print(f"\n`{conversion}`: of energies kept on average {sum(kept) / len(kept):.9f}\n")
    print("| step, of a layer | seconds | processor seconds | peak private memory, GiB |\n|---|---|---|---|")
    once = steps.pop(ONCE)
    order = [name for name in dict.fromkeys(STEPS.values()) if name in steps]
    rows = [(name, *(seconds / layers for seconds in steps[name][:2]), steps[name][2]) for name in order]
    layer = [sum(row[column] for row in rows) for column in (1, 2)]
    growth = WHOLE_TOKENS / options.tokens
    longer = [sum(row[column] * (growth if "*" in row[0] else 1) for row in rows) for column in (1, 2)]
    rows.append(("a layer", *layer, max(row[3] for row in rows)))
    rows.append((ONCE, *once))
    for name, wall, processor, peak in rows:
        print(f"| {name} | {wall:.1f} | {processor:.1f} | {peak / 2**30:.2f} |")
    for tokens, of_layer in ((options.tokens, layer), (WHOLE_TOKENS, longer)):
        whole = [WHOLE_LAYERS * seconds / 60 for seconds in of_layer]
        what = f"{WHOLE_LAYERS} layers, {tokens} tokens, extrapolated, in minutes"
        print(f"| {what} | {whole[0]:.0f} | {whole[1]:.0f} | |", flush=True)


def main() -> None:
    options = parse()
    if options.run is not None:
        {"make": make, "measure": measure}[options.run](options)
        return
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, __file__, *sys.argv[1:], "--folder", folder, "--run"]
        subprocess.run([*command, "make"], check=True)
        for conversion in options.only or methods(options.shape):
            done = subprocess.run(
                [*command, "measure", "--conversion", conversion], check=True, stdout=subprocess.PIPE, text=True
            )
            report(conversion, json.loads(done.stdout), options)
            subprocess.run(["rm", "-r", f"{folder}/result"], check=True)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--only", action="append", help="a conversion, as the tables call it; default: all")
    parser.add_argument("--tiny", action="store_true", help="a tiny shape: the same paths in seconds")
    parser.add_argument("--run", choices=["make", "measure"], help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--conversion", help=argparse.SUPPRESS)
    options = parser.parse_args()
    shape = (TINY if options.tiny else SHAPES)["7B"]
    options.shape = replace(shape, num_hidden_layers=options.layers, vocab_size=min(VOCABULARY, shape.vocab_size))
    return options


if __name__ == "__main__":
    main()
