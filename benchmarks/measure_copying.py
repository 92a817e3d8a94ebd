"""Measure a conversion by the mean against copying the same files, and against loading and saving the model.

    python benchmarks/measure_copying.py FOLDER [--shape llama|mixtral|layer-70b] [--layers N] [--repeats 3] [--peer]

Writes into FOLDER a checkpoint of random bfloat16 weights, in shards of up to 5 GB, and removes it again. `copy` is
`cp --reflink=never`, `convert` is `kvconvert mha2gqa`, with the digests of its manifest and without (SHA-256 is
replaced for the measurement), and `peer` is what others do: load the model in bfloat16 with transformers, pool its
heads, save it. All are made in turn, repeat by repeat, warm (after the files were read once) and, as root, cold (the
page cache is dropped). Times are wall seconds, of the least of the repeats, and of conversions beyond `python -c
"import torch"`. With `synced`, `sync` follows the copy, as kvconvert syncs what it writes. Memory is the peak of
RssAnon, sampled every 20 ms: pages of mapped files do not count. Prints a Markdown table.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

SHAPES: dict[str, dict[str, Any]] = {
    "llama": {"hidden_size": 4096, "intermediate_size": 11008, "num_attention_heads": 32, "vocab_size": 32000},
    "mixtral": {"hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32, "vocab_size": 32000},
    "layer-70b": {"hidden_size": 8192, "intermediate_size": 28672, "num_attention_heads": 64, "vocab_size": 32000},
}
LAYERS = {"llama": 32, "mixtral": 4, "layer-70b": 1}
BLOCK = 2**26

CONVERT = """
import sys
if sys.argv[4] == "--no-hash":
    import kvconvert.convert.checkpoint.manifest as manifest
    import kvconvert.convert.checkpoint.weights_file as weights_file
    class Nothing:
        def update(self, data): pass
        def hexdigest(self): return "0" * 64
    weights_file.sha256 = Nothing
    digest_file = manifest.digest_file
    import kvconvert.convert.checkpoint.source_files as source_files
    source_files.digest_file = lambda directory, name, see: manifest.FileDigest(name, 0, "0" * 64)
from kvconvert.cli.main import app
app(["mha2gqa", "--groups", sys.argv[3], sys.argv[1], "--output", sys.argv[2], "--quiet"])
"""
PEER = """
import sys
import torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.bfloat16)
groups, config = int(sys.argv[3]), model.config
head_dim = config.hidden_size // config.num_attention_heads
for layer in model.model.layers:
    for projection in (layer.self_attn.k_proj, layer.self_attn.v_proj):
        heads = projection.weight.data.view(groups, -1, head_dim, config.hidden_size)
        projection.weight.data = heads.float().mean(1).to(torch.bfloat16).reshape(-1, config.hidden_size)
config.num_key_value_heads = groups
model.save_pretrained(sys.argv[2], max_shard_size="5GB")
"""


def write_checkpoint(folder: Path, shape: str, num_layers: int) -> Path:
    """Write a checkpoint of random weights, each a part of one block of random numbers."""
    import torch
    from kvconvert.convert.checkpoint.tensors import tensor_bytes
    from kvconvert.convert.checkpoint.weights_file import WeightsFile
    from kvconvert.convert.checkpoint.writer import TensorSpec, plan_shards, write_index

    sizes = SHAPES[shape]
    hidden, inner, words = (sizes[name] for name in ("hidden_size", "intermediate_size", "vocab_size"))
    layer: dict[str, tuple[int, ...]] = {f"self_attn.{name}_proj": (hidden, hidden) for name in "kqvo"}
    layer |= {"input_layernorm": (hidden,), "post_attention_layernorm": (hidden,)}
    config: dict[str, Any] = {**sizes, "num_hidden_layers": num_layers, "max_position_embeddings": 4096}
    if shape == "mixtral":
        layer |= {"block_sparse_moe.gate": (8, hidden)}
        for expert in range(8):
            parts = {"w1": (inner, hidden), "w2": (hidden, inner), "w3": (inner, hidden)}
            layer |= {f"block_sparse_moe.experts.{expert}.{name}": size for name, size in parts.items()}
        config |= {"model_type": "mixtral", "architectures": ["MixtralForCausalLM"], "num_key_value_heads": 32}
    else:
        layer |= {"mlp.gate_proj": (inner, hidden), "mlp.up_proj": (inner, hidden), "mlp.down_proj": (hidden, inner)}
        config |= {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "dtype": "bfloat16"}
    names: dict[str, tuple[int, ...]] = {
        "lm_head": (words, hidden),
        "model.embed_tokens": (words, hidden),
        "model.norm": (hidden,),
    }
    names |= {f"model.layers.{index}.{name}": size for index in range(num_layers) for name, size in layer.items()}
    specs = [TensorSpec(f"{name}.weight", "BF16", size) for name, size in names.items()]

    block = tensor_bytes(torch.randn(BLOCK, generator=torch.Generator().manual_seed(0)).mul_(0.02).bfloat16())
    model = folder / "model"
    model.mkdir()
    (model / "config.json").write_text(json.dumps(config))
    shards = plan_shards(specs, max_shard_bytes=5_000_000_000)
    for shard in shards:
        with WeightsFile(model / shard.name) as file:
            for spec in shard.write_tensors(file):
                for begin in range(0, spec.num_bytes, len(block)):
                    file.write(block[: min(len(block), spec.num_bytes - begin)])
    write_index(model, shards)
    return model


def measured(command: list[str]) -> tuple[float, float, int]:
    """Wall seconds, processor seconds, and the peak of private memory in bytes, of a process that has to succeed."""
    began = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    peak = 0
    while True:
        done, status, usage = os.wait4(process.pid, os.WNOHANG)
        if done:
            break
        try:
            lines = Path(f"/proc/{process.pid}/status").read_text().splitlines()
            peak = max(peak, *(1024 * int(line.split()[1]) for line in lines if line.startswith("RssAnon")), 0)
        except OSError:
            pass
        time.sleep(0.02)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, command)
    return time.perf_counter() - began, usage.ru_utime + usage.ru_stime, peak


def prepare(model: Path, *, cold: bool) -> None:
    """Put the files into the page cache, or drop it; what is still to be written is written first."""
    os.sync()
    if cold:
        Path("/proc/sys/vm/drop_caches").write_text("3")
        return
    for path in model.iterdir():
        with path.open("rb", buffering=0) as file:
            while file.read(2**24):
                pass


def commands(model: Path, output: Path, groups: int, *, peer: bool) -> Iterator[tuple[str, list[str]]]:
    copy = ["cp", "-r", "--reflink=never", str(model), str(output)]
    yield "copy", copy
    yield "copy, synced", ["sh", "-c", f"{' '.join(copy)} && sync -f {output}"]
    for name, hashing in (("convert", "--hash"), ("convert, no digests", "--no-hash")):
        yield name, [sys.executable, "-c", CONVERT, str(model), str(output), str(groups), hashing]
    if peer:
        yield "peer", [sys.executable, "-c", PEER, str(model), str(output), str(groups)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--shape", choices=SHAPES, default="llama")
    parser.add_argument("--layers", type=int)
    parser.add_argument("--groups", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--peer", action="store_true", help="also load and save the model, which takes its memory")
    options = parser.parse_args()

    layers = options.layers or LAYERS[options.shape]
    model = write_checkpoint(options.folder, options.shape, layers)
    output = options.folder / "output"
    num_bytes = sum(path.stat().st_size for path in model.iterdir())
    bare = min(measured([sys.executable, "-c", "import torch"])[0] for _ in range(3))
    print(f"{options.shape}, {layers} layers, {num_bytes / 1e9:.2f} GB; `import torch` takes {bare:.1f} s\n")
    print(
        "| | page cache | wall, s | of copy, synced | processor, s | private memory, MiB |\n|---|---|---|---|---|---|"
    )
    try:
        for cold in (False, True) if os.geteuid() == 0 else (False,):
            rows: dict[str, list[tuple[float, float, int]]] = {}
            for _ in range(options.repeats):
                for name, command in commands(model, output, options.groups, peer=options.peer):
                    prepare(model, cold=cold)
                    seconds, processor, peak = measured(command)
                    less = bare if command[0] == sys.executable else 0.0
                    rows.setdefault(name, []).append((seconds - less, processor, peak))
                    shutil.rmtree(output)
            of = min(rows["copy, synced"])[0]
            for name, found in rows.items():
                seconds, processor, peak = min(found)
                cells = (f"{seconds:.1f}", f"{seconds / of:.2f}", f"{processor:.1f}", f"{peak / 2**20:.0f}")
                print(f"| {name} | {'cold' if cold else 'warm'} | {' | '.join(cells)} |", flush=True)
    finally:
        shutil.rmtree(output, ignore_errors=True)
        shutil.rmtree(model)


if __name__ == "__main__":
    main()
