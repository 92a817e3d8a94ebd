"""What benchmarks/gpu.sh runs: four parts, each in a process of its own with a limit of time, each with a JSON file.

tests       tests/test_device.py: a calibrated conversion on the device, the runtime classes in bfloat16 under several
            implementations of attention, a run of uptraining of each recipe, and one that is stopped and goes on.
uptraining  Tokens/s, MFU and peak memory of cross-entropy and of forward KL, as they are and under torch.compile, for
            models of the shapes of a 1B Llama and of SmolLM2-135M (benchmarks/measure_training.py does a run).
decoding    What `kvconvert benchmark` says of GQA-8, MQA, CLA2 and MLA beside MHA, of a 1B and a 7B shape, against
            context and batch: seconds of a step, the gain and its bound, the cache as it really lies in memory.
conversion  Seconds and peak memory of a calibrated merge of two layers of the 7B shape.

All weights are random: speed does not depend on them.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
SHARES = {"tests": 0.25, "uptraining": 0.35, "decoding": 0.25, "conversion": 0.15}  # of the time that is there
TEXT = "the cache of a model holds keys and values for every token that it has read so far in its long context"


@dataclass(frozen=True)
class Shape:
    """A Llama with as many K/V heads as query heads."""

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    vocab_size: int = 32_000

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_attention_heads


SHAPES = {
    "1B": Shape(2048, 8192, 16, 32),
    "7B": Shape(4096, 11008, 32, 32),
    "135M": Shape(576, 1536, 30, 9, vocab_size=49_152),
}
TINY = {name: Shape(64, 96, 2, 8, vocab_size=512) for name in SHAPES}
SETTINGS = {  # of a real run, and of a tiny one
    False: {
        "batches": ((1, 1024), (8, 4096), (32, 2048), (8, 16384)),
        "compiled_batches": ((8, 4096),),
        "steps": 10,
        "train": (16, 4, 2048, 16, 8),  # steps, of which are not counted, sequence length, sequences, micro-batch
        "runs": ("CE", "KL", "CE, compiled", "KL, compiled"),
        "calibration_tokens": 65_536,
        "text_lines": 4000,
    },
    True: {
        "batches": ((1, 16), (2, 32)),
        "compiled_batches": (),
        "steps": 2,
        "train": (3, 1, 32, 2, 2),
        "runs": ("CE", "KL, compiled"),
        "calibration_tokens": 512,
        "text_lines": 40,
    },
}


def config_of(variant: str, shape: Shape) -> Any:
    """The config of a shape with another attention: MHA, GQA-8, MQA, CLA2 or MLA."""
    from transformers import AutoConfig

    common: dict[str, Any] = {
        "hidden_size": shape.hidden_size,
        "intermediate_size": shape.intermediate_size,
        "num_hidden_layers": shape.num_hidden_layers,
        "num_attention_heads": shape.num_attention_heads,
        "vocab_size": shape.vocab_size,
        "max_position_embeddings": 32_768,
        "tie_word_embeddings": False,
    }
    heads = {"MHA": shape.num_attention_heads, "GQA-8": shape.num_attention_heads // 4, "MQA": 1}
    if variant in heads:
        return AutoConfig.for_model("llama", **common, num_key_value_heads=heads[variant], head_dim=shape.head_dim)
    if variant == "CLA2":
        pairs = [layer - layer % 2 for layer in range(shape.num_hidden_layers)]
        sizes = {"num_key_value_heads": shape.num_attention_heads, "head_dim": shape.head_dim}
        return AutoConfig.for_model("cross_layer_decoder", **common, **sizes, kv_source_layers=pairs)
    rope = min(64, shape.head_dim)
    return AutoConfig.for_model(
        "deepseek_v3",
        **common,
        num_key_value_heads=shape.num_attention_heads,
        kv_lora_rank=min(512, shape.hidden_size // 4),
        q_lora_rank=None,
        qk_rope_head_dim=rope,
        qk_nope_head_dim=shape.head_dim,
        v_head_dim=shape.head_dim,
        first_k_dense_replace=shape.num_hidden_layers,
        n_routed_experts=8,
    )


def random_model(config: Any, device: str) -> Any:
    """A model of random bfloat16 weights, made on the device."""
    import torch
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    return model.eval()


def save_checkpoint(shape: Shape, folder: Path, *, device: str, lines: Iterable[str]) -> Path:
    """A checkpoint of the shape, with a tokenizer of the lines' words, and beside it a text of a document a line."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    lines = list(lines)
    words = dict.fromkeys(word for line in lines for word in line.split())
    vocabulary = {word: number for number, word in enumerate(["<unk>", "<s>", "</s>", *words])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    random_model(config_of("MHA", shape), device).cpu().save_pretrained(folder / "model")
    names = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names).save_pretrained(folder / "model")
    (folder / "text.jsonl").write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
    return folder / "model"


def text(options: argparse.Namespace) -> list[str]:
    return [" ".join([TEXT] * 40)] * options.settings["text_lines"]


def tests(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-rs",
        "-p",
        "no:cacheprovider",
        str(ROOT / "tests/test_device.py"),
    ]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    yield {"passed": done.returncode == 0, "output": (done.stdout + done.stderr)[-6000:]}


def uptraining(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    steps, warm_up, length, sequences, micro_batch = options.settings["train"]
    sizes = {"steps": steps, "warm-up": warm_up, "sequence-length": length, "sequences-per-step": sequences}
    for name in ("1B", "135M"):
        with tempfile.TemporaryDirectory() as folder:
            model = save_checkpoint(options.shapes[name], Path(folder), device=options.device, lines=text(options))
            data = Path(folder) / "text.jsonl"
            for run in options.settings["runs"]:
                command = [sys.executable, str(ROOT / "benchmarks/measure_training.py"), str(model), str(data)]
                for option, value in (*sizes.items(), ("micro-batch", micro_batch)):
                    command += [f"--{option}", str(value)]
                (Path(folder) / "run").mkdir(exist_ok=True)
                done = subprocess.run(
                    [*command, "--run", run, "--folder", f"{folder}/run"], capture_output=True, text=True, check=False
                )
                row: dict[str, Any] = {"shape": name, "run": run, "sequence_length": length}
                if done.returncode:
                    yield row | {"failed": done.stderr[-2000:]}
                    continue
                result = json.loads((Path(folder) / "run" / "result.json").read_text())
                subprocess.run(["rm", "-rf", f"{folder}/run"], check=True)
                yield row | {
                    "tokens_per_second": result["tokens_per_step"] * len(result["seconds"]) / sum(result["seconds"]),
                    "model_flops_utilisation": result["utilisation"],
                    "peak_bytes": result["allocated"] or result["resident_peak"],
                }


def decoding(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """What `kvconvert benchmark` times, on models that are made where they run: their files would be 70 GB."""
    import torch
    from kvconvert.measure import BenchmarkSettings
    from kvconvert.measure.benchmarking import benchmark_models

    common: dict[str, Any] = {"tokens": options.settings["steps"], "warm_up": 3, "repeats": 2, "prefill": False}
    for name in ("7B", "1B"):
        original = random_model(config_of("MHA", options.shapes[name]), options.device)
        for variant in ("GQA-8", "MQA", "CLA2", "MLA"):
            model = random_model(config_of(variant, options.shapes[name]), options.device)
            runs = [(False, sizes) for sizes in options.settings["batches"]]
            runs += [(True, sizes) for sizes in options.settings["compiled_batches"]]
            for compiled, (batch, context) in runs:
                settings = BenchmarkSettings(batches=(batch,), contexts=(context,), compile=compiled, **common)
                row: dict[str, Any] = {"shape": name, "variant": variant, "dtype": "bfloat16", "compiled": compiled}
                try:
                    timed = benchmark_models(model, original, settings, names=(variant, "MHA"))
                except torch.OutOfMemoryError:  # neither fits
                    yield row | {"batch": batch, "context": context, "out_of_memory": True}
                else:
                    yield row | asdict(timed.points[0])
            del model
            if options.device == "cuda":
                torch.cuda.empty_cache()
        del original


def conversion(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    import torch
    from kvconvert.cli.main import app
    from typer.testing import CliRunner

    shape = Shape(**asdict(options.shapes["7B"]) | {"num_hidden_layers": 2})
    with tempfile.TemporaryDirectory() as folder:
        model = save_checkpoint(shape, Path(folder), device=options.device, lines=text(options))
        for groups in (8, 1):
            number = min(groups, shape.num_attention_heads // 2)
            command = ["mha2gqa", "--groups", str(number), str(model), "--method", "svd", "--device", options.device]
            command += ["--calibration", f"{folder}/text.jsonl"]
            command += ["--calibration-tokens", str(options.settings["calibration_tokens"])]
            if options.device == "cuda":
                torch.cuda.reset_peak_memory_stats()
            began = time.perf_counter()
            outcome = CliRunner().invoke(app, [*command, "--output", f"{folder}/{groups}", "--json", "--quiet"])
            row: dict[str, Any] = {"layers": 2, "groups": number, "seconds": time.perf_counter() - began}
            if outcome.exit_code:
                yield row | {"failed": outcome.stderr[-2000:] or repr(outcome.exception)}
                continue
            peak = torch.cuda.max_memory_allocated() if options.device == "cuda" else None
            kept = [layer["keys_retained"] for layer in json.loads(outcome.stdout)["layers"]]
            yield row | {"peak_bytes": peak, "keys_retained": kept}


PARTS = {"tests": tests, "uptraining": uptraining, "decoding": decoding, "conversion": conversion}


def machine(device: str) -> dict[str, Any]:
    import torch

    versions = {}
    for name in ("kvconvert", "torch", "transformers", "accelerate", "safetensors"):
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            versions[name] = "missing"
    found = torch.cuda.get_device_name() if device == "cuda" else "CPU"
    return {"device": found, "versions": versions}


def work(options: argparse.Namespace) -> None:
    """One part, in this process; its file is written anew after every row."""
    place = options.out / f"{options.part}.json"
    result: dict[str, Any] = {"part": options.part, **machine(options.device), "finished": False, "rows": []}
    for row in PARTS[options.part](options):
        result["rows"].append(row)
        place.write_text(json.dumps(result, indent=1) + "\n")
        print(options.part, json.dumps(row), flush=True)
    place.write_text(json.dumps(result | {"finished": True}, indent=1) + "\n")


def main() -> None:
    options = _parse()
    if options.part is not None:
        work(options)
        return
    options.out.mkdir(parents=True, exist_ok=True)
    parts = options.parts.split(",")
    share = sum(SHARES[part] for part in parts)
    failed = []
    for part in parts:
        limit = options.seconds * SHARES[part] / share
        began = time.monotonic()
        place = options.out / f"{part}.json"
        place.write_text(json.dumps({"part": part, "finished": False, "rows": []}) + "\n")
        process = subprocess.Popen([sys.executable, __file__, *sys.argv[1:], "--part", part], start_new_session=True)
        try:
            code: int | None = process.wait(limit)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)  # and what it started
            code = None
        what = "cut off" if code is None else f"ended with {code}"
        print(f"{part}: {what} after {time.monotonic() - began:.0f} s of at most {limit:.0f}", flush=True)
        rows = json.loads(place.read_text())["rows"]
        if code or any("failed" in row or row.get("passed") is False for row in rows):
            failed.append(part)
    if failed:
        sys.exit(f"failed: {', '.join(failed)}")


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="benchmarks/gpu.sh", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", nargs="?", type=Path, default=ROOT / "build" / "gpu", help="default: build/gpu")
    parser.add_argument("--cpu", action="store_true", help="without a GPU")
    parser.add_argument("--tiny", action="store_true", help="tiny shapes: the same paths in about a minute")
    parser.add_argument("--parts", default=",".join(PARTS))
    parser.add_argument("--seconds", type=float, default=450, help="for all parts together")
    parser.add_argument("--part", choices=PARTS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if unknown := set(options.parts.split(",")) - set(PARTS):
        parser.error(f"no such part: {', '.join(sorted(unknown))}")
    options.out = options.out.resolve()
    options.device = "cpu" if options.cpu else "cuda"
    options.shapes = TINY if options.tiny else SHAPES
    options.settings = SETTINGS[options.tiny]
    return options


if __name__ == "__main__":
    main()
