"""Measure one conversion: seconds, peak memory, and perplexity before and after on held-out text.

    python scripts/measure_conversion.py MODEL TEXT [--groups 1] [--window 512] [--max-windows 16] [options of mha2gqa]

Runs the installed `kvconvert` in processes of its own and prints one line of figures. Peak memory is the largest
resident set of the conversion's process, libraries included.
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any


def run(*arguments: object) -> dict[str, Any]:
    command = [str(Path(sys.executable).with_name("kvconvert")), *map(str, arguments), "--json", "--quiet"]
    result: dict[str, Any] = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("text")
    parser.add_argument("--groups", type=int, default=1)
    parser.add_argument("--window", type=int, default=512)
    parser.add_argument("--max-windows", type=int, default=16)
    options, of_conversion = parser.parse_known_args()

    with tempfile.TemporaryDirectory() as folder:
        converted = Path(folder) / "converted"
        start = time.perf_counter()
        plan = run("mha2gqa", options.model, "--groups", options.groups, "--output", converted, *of_conversion)
        seconds = time.perf_counter() - start
        peak_bytes = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
        windows = ("--window", options.window, "--max-windows", options.max_windows)
        after = run("evaluate", converted, "--data", options.text, *windows, "--against", options.model)

    heads, cache = plan["num_key_value_heads"], plan["cache_bytes_per_token"]
    print(
        f"K/V heads {heads['source']} → {heads['result']}, cache {cache['source']} → {cache['result']} bytes per token"
    )
    megabytes = plan["weight_bytes"]["source"] / 1e6
    print(f"converted {megabytes:.1f} MB in {seconds:.1f} s, peak RSS {peak_bytes / 1e6:.0f} MB")
    print(f"perplexity {after['against']['original_perplexity']:.2f} → {after['perplexity']:.1f}")
    print(f"{after['num_tokens']} tokens: {after['method']}")


if __name__ == "__main__":
    main()
