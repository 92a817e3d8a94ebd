"""Measure conversions: cache, perplexity before and after on held-out text, seconds, peak memory.

    python benchmarks/measure_conversion.py MODEL TEXT [--window 512] [--max-windows 16] "mha2gqa --groups 1" …

Each conversion is a command of `kvconvert` with its options, without MODEL. It runs in a process of its own, and so
does the evaluation. The cache is counted from the live tensors of transformers' DynamicCache in bfloat16; the plan has
to say the same. Excess is nats per token over the original. Peak memory is the largest resident set of the conversion's
process, libraries included. Prints a Markdown table.
"""

import argparse
import json
import os
import shlex
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from kvconvert.convert.runtime.transformers_interface import CACHE_NAME

NUM_TOKENS = 64


def run(*arguments: object) -> tuple[dict[str, Any], int]:
    """What a command prints as JSON, and the peak resident memory of its process in bytes."""
    command = [str(Path(sys.executable).with_name("kvconvert")), *map(str, arguments), "--json", "--quiet"]
    with tempfile.TemporaryFile() as printed:
        process = subprocess.Popen(command, stdout=printed)
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            raise subprocess.CalledProcessError(process.returncode, command)
        printed.seek(0)
        result: dict[str, Any] = json.load(printed)
    return result, usage.ru_maxrss * 1024


def measured_cache(model: Path) -> int:
    """Bytes per token of the tensors that a cache holds after one pass over some tokens."""
    import torch
    from kvconvert.convert.checkpoint.loading import load_model
    from transformers import DynamicCache

    loaded = load_model(model, dtype=torch.bfloat16, device="cpu")
    cache = DynamicCache(config=loaded.config)
    with torch.inference_mode():
        loaded(torch.arange(NUM_TOKENS)[None], use_cache=True, **{CACHE_NAME: cache})
    layers: list[Any] = cache.layers
    held = [tensor for layer in layers for tensor in (layer.keys, layer.values) if tensor is not None]
    return int(sum(tensor.nbytes for tensor in held)) // NUM_TOKENS


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("text")
    parser.add_argument("--window", type=int, default=512)
    parser.add_argument("--max-windows", type=int, default=16)
    parser.add_argument("conversions", nargs="+")
    options = parser.parse_args()
    windows = ("--window", options.window, "--max-windows", options.max_windows)

    print("| conversion | B/token | perplexity | excess | seconds | peak RSS, MB |\n|---|---|---|---|---|---|")
    for conversion in options.conversions:
        with tempfile.TemporaryDirectory() as folder:
            converted = Path(folder) / "converted"
            start = time.perf_counter()
            plan, peak_bytes = run(*shlex.split(conversion), options.model, "--output", converted)
            seconds = time.perf_counter() - start
            cache, planned = measured_cache(converted), plan["cache_bytes_per_token"]
            if cache != planned["result"]:
                sys.exit(f"{conversion}: the plan says {planned['result']} bytes per token, the cache holds {cache}")
            after, _ = run("evaluate", converted, "--data", options.text, *windows, "--against", options.model)
        against = after["against"]
        cells = (
            f"{planned['source']} → {cache}",
            f"{against['original_perplexity']:.2f} → {after['perplexity']:.4g}",
            f"{against['excess_nats_per_token']:.4f} ± {against['excess_standard_error']:.4f}",
            f"{seconds:.1f}",
            f"{peak_bytes / 1e6:.0f}",
        )
        print(f"| {conversion} | {' | '.join(cells)} |", flush=True)
    print(f"\n{after['num_tokens']} tokens: {after['method']}")


if __name__ == "__main__":
    main()
