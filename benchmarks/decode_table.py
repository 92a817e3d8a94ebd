"""Decoding speed against cache: one random MHA Llama, converted to every target, each timed in turn with it.

    python benchmarks/decode_table.py rows.json [--targets gqa:8,mqa+cla2,mla:128+32 …] [--batch 1,8] [--context 1024]
    python benchmarks/render_decode_table.py rows.json

The cache dominates: the weights are as many as those of a small model, the keys and values of each token those of a far
larger one. Every target is converted by `kvconvert` and timed by `kvconvert benchmark --against` the MHA model, in
processes of their own. rows.json is written anew after each, and a second call goes on where the first was ended.
Pairs of batch and context whose MHA cache is above --max-cache are left out, and named.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any

PROGRAM = Path(sys.executable).with_name("kvconvert")
TARGETS = "gqa:8,gqa:4,mqa,cla2,mqa+cla2,mla:256+64,mla:128+32"
DTYPE_BYTES = {"float32": 4, "bfloat16": 2}
TIMED = ("tokens", "warm_up", "repeats")


def command_of(target: str) -> list[str]:
    """The conversion that a target stands for: gqa:N, mqa, claN, mqa+claN, gqa:N+claN or mla:R+D."""
    if match := re.fullmatch(r"mla:(\d+)\+(\d+)", target):
        return ["mha2mla", "--kv-lora-rank", match[1], "--qk-rope-head-dim", match[2], "--no-calibration"]
    match = re.fullmatch(r"(?:gqa:(\d+)|(mqa))?(?:(?:(?<=.)\+|^)cla(\d+))?", target)
    if match is None or not target:
        raise SystemExit(f"no such target: {target}; there are gqa:N, mqa, claN, mqa+claN, gqa:N+claN and mla:R+D")
    groups, share = "1" if match[2] else match[1], match[3]
    to_groups = ["--groups", groups] if groups else []
    return ["mha2cla", "--share", share, *to_groups] if share else ["mha2gqa", *to_groups]


def build(directory: Path, options: argparse.Namespace) -> None:
    """The MHA model, float32."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    config = AutoConfig.for_model(
        "llama",
        hidden_size=options.hidden_size,
        intermediate_size=options.intermediate_size,
        num_hidden_layers=options.layers,
        num_attention_heads=options.heads,
        num_key_value_heads=options.heads,
        head_dim=options.head_dim,
        vocab_size=options.vocab_size,
        max_position_embeddings=2 * max(options.context),  # and what is decoded after it
        tie_word_embeddings=False,
    )
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(directory)


def run(words: list[object]) -> str:
    done = subprocess.run([str(PROGRAM), *map(str, words)], stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"kvconvert {words[0]} ended with {done.returncode}")
    return done.stdout


def timed(folder: Path, target: str, context: int, batches: list[int], dtype: str, options: argparse.Namespace) -> Any:
    words: list[object] = ["benchmark", folder / target, "--against", folder / "mha", "--json", "--quiet"]
    words += ["--batch", ",".join(map(str, batches)), "--context", context, "--dtype", dtype]
    for name in TIMED:
        words += [f"--{name.replace('_', '-')}", getattr(options, name)]
    words += [] if options.prefill else ["--no-prefill"]
    words += ["--compile"] if options.compile else []
    return json.loads(run(words))


Work = tuple[dict[str, Any], list[int]]


def left_to_do(rows: list[dict[str, Any]], options: argparse.Namespace) -> Iterator[Work]:
    """What is the same for the rows of one call, and the batches for which there is no row yet."""
    shape = f"{options.layers} layers of {options.heads} heads of {options.head_dim}, hidden size {options.hidden_size}"
    numbers = 2 * options.layers * options.heads * options.head_dim  # of a token in the cache of the MHA model
    for dtype, context in product(options.dtype, options.context):
        fitting = []
        for batch in options.batch:
            size = batch * context * numbers * DTYPE_BYTES[dtype]
            if size <= options.max_cache:
                fitting.append(batch)
            else:
                print(f"left out: batch {batch}, context {context}, {dtype}: {size / 1e9:.3g} GB of cache")
        for target in options.targets:
            key = {"shape": shape, "variant": target, "dtype": dtype, "compiled": options.compile, "context": context}
            there = {row["batch"] for row in rows if row.items() >= key.items()}
            if missing := [batch for batch in fitting if batch not in there]:
                yield key, missing


def main() -> None:
    options = parse()
    rows: list[dict[str, Any]] = json.loads(options.out.read_text())["rows"] if options.out.exists() else []
    work = list(left_to_do(rows, options))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if work:
            build(folder / "mha", options)
        for target in dict.fromkeys(key["variant"] for key, _ in work):
            run([*command_of(target), folder / "mha", "--output", folder / target, "--quiet"])
        for key, batches in work:
            found = timed(folder, key["variant"], key["context"], batches, key["dtype"], options)
            common = {name: found[name] for name in ("machine", "versions", "method")}
            rows += [key | point | common for point in found["points"]]
            options.out.write_text(json.dumps({"rows": rows}, indent=1) + "\n")
            print(f"{key['dtype']} {key['variant']} context {key['context']} batches {batches}", flush=True)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)

    def numbers(text: str) -> list[int]:
        return [int(part) for part in text.split(",")]

    parser.add_argument("out", type=Path)
    parser.add_argument("--targets", type=lambda text: text.split(","), default=TARGETS.split(","))
    parser.add_argument("--batch", type=numbers, default=[1, 8, 64])
    parser.add_argument("--context", type=numbers, default=[1024, 4096, 16384, 32768])
    parser.add_argument("--dtype", type=lambda text: text.split(","), default=list(DTYPE_BYTES))
    parser.add_argument("--max-cache", type=float, default=4e9, help="bytes of MHA; a step holds it twice")
    parser.add_argument("--tokens", type=int, default=16)
    parser.add_argument("--warm-up", type=int, default=3)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--prefill", action="store_true", help="time prefill too, which takes far longer")
    parser.add_argument("--compile", action="store_true")
    for name, default in (("layers", 4), ("heads", 16), ("head-dim", 64), ("hidden-size", 512)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--intermediate-size", type=int, default=512)
    parser.add_argument("--vocab-size", type=int, default=1024)
    options = parser.parse_args()
    if unknown := set(options.dtype) - set(DTYPE_BYTES):
        parser.error(f"no such precision: {', '.join(sorted(unknown))}; there are {', '.join(DTYPE_BYTES)}")
    for target in options.targets:
        command_of(target)
    return options


if __name__ == "__main__":
    main()
