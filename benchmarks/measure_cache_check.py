"""Measure what the check of a result's cache costs for a model as wide as Llama-2-7B whose layers share in pairs.

    python benchmarks/measure_cache_check.py

Writes a random checkpoint of 4 layers (2.1 GB, removed again), of which the check runs 2. Prints the seconds that it
takes, and the peak resident memory of a process that does nothing else, libraries included.
"""

from __future__ import annotations

import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

SIZES: dict[str, Any] = {
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 4,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "head_dim": 128,
    "vocab_size": 32_000,
    "kv_source_layers": [0, 0, 2, 2],
}


def make(folder: str) -> None:
    import kvconvert.convert  # noqa: F401  # registers the class
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model("cross_layer_decoder", **SIZES)
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)


def check(folder: str) -> None:
    from kvconvert.convert.cache_check import check_cache

    began = time.perf_counter()
    found = check_cache(Path(folder))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6  # of kilobytes
    print(f"layers {found.layers}: {time.perf_counter() - began:.1f} s, {peak:.2f} GB at the peak")


def main() -> None:
    if len(sys.argv) > 1:
        {"make": make, "check": check}[sys.argv[1]](sys.argv[2])
        return
    with tempfile.TemporaryDirectory() as folder:
        for step in ("make", "check"):  # each in a process of its own, whose peak memory begins with this one's
            subprocess.run([sys.executable, __file__, step, folder], check=True)


if __name__ == "__main__":
    main()
