"""Measure the memory of a conversion on a checkpoint much larger than it: 3.8 GB in shards of 1 GB, written here.

    python benchmarks/measure_memory.py

Needs 8 GB of free disk. Peak memory is the largest resident set of the conversion's process, libraries included.
"""

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM


def build(directory: str) -> None:
    """A Llama as wide as the 7B one, with 8 layers."""
    config = LlamaConfig(
        hidden_size=4096, intermediate_size=11008, num_hidden_layers=8, num_attention_heads=32, vocab_size=32000
    )
    with torch.device("meta"):
        model = LlamaForCausalLM(config).bfloat16()
    model.to_empty(device="cpu")
    for parameter in model.parameters():
        parameter.data.fill_(0.01)
    model.save_pretrained(directory, max_shard_size="1GB")


def main() -> None:
    if len(sys.argv) == 3 and sys.argv[1] == "--build":
        build(sys.argv[2])
        return
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "model"
        # in a process of its own: a child's peak memory begins with that of the process that it was forked from
        subprocess.run([sys.executable, __file__, "--build", str(source)], check=True)
        num_bytes = sum(path.stat().st_size for path in source.glob("*.safetensors"))
        program = Path(sys.executable).with_name("kvconvert")
        start = time.perf_counter()
        process = subprocess.Popen([str(program), "mha2gqa", str(source), "--groups", "8", "--quiet"])
        _, status, usage = os.wait4(process.pid, 0)
        seconds = time.perf_counter() - start
    if status:
        sys.exit("the conversion failed")
    print(f"{num_bytes / 1e9:.2f} GB converted in {seconds:.1f} s, peak RSS {usage.ru_maxrss * 1024 / 1e6:.0f} MB")


if __name__ == "__main__":
    main()
