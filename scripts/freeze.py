"""Freeze what every command writes and prints, so that a change of structure can be shown to change nothing else.

    .venv/bin/python scripts/freeze.py record            write scripts/frozen.json
    .venv/bin/python scripts/freeze.py check             run everything again; exit 1 with what differs
    .venv/bin/python scripts/freeze.py check --only llama --only mla

Tiny checkpoints of every row of the architecture table, and the demo's, go through every command and method on one
thread, in this process. Recorded are the exit code, stdout, stderr and SHA-256 of every file of the output. Times and
temporary paths are replaced by placeholders first. Texts lie in build/freeze/ after a run, to be compared by eye.

Random numbers and products of matrices differ in their last bits between processors and versions of torch, so that a
record holds on machines of one kind. On another, record the commit before the change first, in a checkout of its own.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import re
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path
from typing import Any

os.environ |= {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "COLUMNS": "120"}
ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "tests"))

FROZEN = ROOT / "scripts" / "frozen.json"
TEXTS = ROOT / "build" / "freeze"

# what differs from run to run, and what stands in its place
_CHANGING = (
    (re.compile(r"\d+(\.\d+)? s, \d+ tokens/s"), "T s, N tokens/s"),
    (re.compile(r'"(seconds|train_seconds|tokens_per_second|eta_seconds|mfu|process_id)": [-\d.e+null]+'), r'"\1": T'),
    (re.compile(r", [\d.]+ ?[kMB]? tokens/s"), ", N tokens/s"),
    (re.compile(r"^.*: \d+ %\n", re.MULTILINE), ""),  # of progress, as often as there was time for
    (re.compile(r", \d+ min left"), ", N min left"),
    (re.compile(r"\[\d+(\.\d+)?s\]"), "[T]"),
)
_NOT_HASHED = {"run_status.json", "run_files.json"}  # of a process id, times, and digests of them


@dataclass(frozen=True)
class Row:
    """A tiny checkpoint: how to make it, and what it is called."""

    name: str
    make: Callable[[Path], object]


@dataclass(frozen=True)
class Case:
    """One command line. `{model}`, `{text}`, `{out}` and the like stand for places."""

    name: str
    arguments: tuple[str, ...]


@dataclass
class Record:
    exit_code: int
    stdout: str
    stderr: str
    files: dict[str, str] = field(default_factory=dict)

    def as_json(self) -> dict[str, Any]:
        return {
            "exit_code": self.exit_code,
            "stdout": _digest(self.stdout.encode()),
            "stderr": _digest(self.stderr.encode()),
            "files": self.files,
        }


def rows() -> list[Row]:
    """Every row that the tests of architectures, translations, encoder-decoders, CLA and MLA have."""
    import test_architectures
    import test_cla
    import test_mla
    import test_seq2seq
    import test_translations

    found = [
        (f"native-{name}", model_type, overrides)
        for name, (model_type, overrides) in zip(test_architectures.IDS, test_architectures.VARIANTS, strict=True)
    ]
    found += [(f"translated-{row.name}", row.model_type, row.overrides) for row in test_translations.ROWS]
    found += [(f"cla-{name}", *source) for name, source in test_cla.SOURCES.items()]
    found += [(f"mla-{name}", *source) for name, source in test_mla.SOURCES.items()]
    decoders = [Row(name, _decoder(model_type, overrides)) for name, model_type, overrides in found]
    encoders = [
        Row(f"seq2seq-{name}", _encoder_decoder(model_type, overrides))
        for name, (model_type, overrides, _) in zip(test_seq2seq.IDS, test_seq2seq.ROWS, strict=True)
    ]
    return decoders + encoders


def _decoder(model_type: str, overrides: dict[str, Any]) -> Callable[[Path], object]:
    def make(directory: Path) -> None:
        from conftest import build_model, build_tokenizer

        build_model(model_type, seed=3, **overrides).save_pretrained(directory, max_shard_size="60KB")
        build_tokenizer().save_pretrained(directory)

    return make


def _encoder_decoder(model_type: str, overrides: dict[str, Any]) -> Callable[[Path], object]:
    def make(directory: Path) -> None:
        import test_seq2seq

        test_seq2seq.make(directory, model_type, overrides, seed=3)

    return make


_TEXT = ("--calibration", "{text}", "--calibration-tokens", "512", "--precision", "fp32", "--device", "cpu")
_OUT = ("-o", "{out}")
_GQA = ("mha2gqa", "{model}", "--groups", "2")
_CLA = ("mha2cla", "{model}", "--share", "2")
_MLA = ("mha2mla", "{model}", "--kv-lora-rank", "24", "--qk-rope-head-dim", "4")

OF_EVERY_ROW = (
    Case("inspect", ("inspect", "{model}", "--context", "4096")),
    Case("inspect-json", ("inspect", "{model}", "--json")),
    Case("gqa-plan", (*_GQA, "--dry-run", "--json")),
    Case("gqa-mean", (*_GQA, *_OUT)),
    Case("gqa-first", (*_GQA, "--method", "first", "--json", *_OUT)),
    Case("gqa-random", (*_GQA, "--method", "random", "--seed", "5", *_OUT)),
    Case("mqa-mean", ("mha2mqa", "{model}", "--max-shard-size", "50KB", *_OUT)),
    Case("gqa-svd", (*_GQA, "--method", "svd", *_TEXT, *_OUT)),
    Case("mqa-svd", ("mha2mqa", "{model}", "--method", "svd", "--no-refit", *_TEXT, *_OUT)),
    Case("cla-plan", (*_CLA, "--dry-run", "--json")),
    Case("cla-mean", (*_CLA, *_OUT)),
    Case("cla-first-gqa", (*_CLA, "--method", "first", "--groups", "2", *_OUT)),
    Case("cla-svd", (*_CLA, "--method", "svd", "--groups", "2", *_TEXT, *_OUT)),
    Case("mla", (*_MLA, *_TEXT, *_OUT)),
    Case("mla-exact", (*_MLA, "--latent-norm", "exact", "--no-calibration", *_OUT)),
)

_DEMO_TEXT = ("--calibration-tokens", "2048", "--precision", "fp32", "--device", "cpu")
_STEPS = ("--data", "{text}", "--sequence-length", "32", "--global-batch-tokens", "128", "--steps", "4")
_TRAIN = (*_STEPS, "--precision", "fp32", "--validation-fraction", "0.1", "--eval-steps", "2", "--log-steps", "1")
_AGAINST = ("evaluate", "{gqa}", "--data", "{text}", "--against", "{model}", "--window", "64")
_TAUGHT = ("uptrain", "{gqa}", *_TRAIN, "--teacher", "{model}")
_SWEPT = (*_TAUGHT, "--steps", "20", "--eval-data", "{held}")

OF_ONE_MODEL = (
    Case("svd-contiguous", (*_GQA, "--method", "svd", "--grouping", "contiguous", *_TEXT, *_OUT)),
    Case("svd-no-calibration", (*_GQA, "--method", "svd", "--no-calibration", *_OUT)),
    Case("svd-save", (*_GQA, "--method", "svd", *_TEXT, "--save-statistics", "{kept}", *_OUT)),
    Case("svd-statistics", (*_GQA, "--method", "svd", "--statistics", "{kept}", *_OUT)),
    Case("svd-dry-run", (*_GQA, "--method", "svd", *_TEXT, "--dry-run", "--json")),
    Case("same-heads", ("mha2gqa", "{model}", "--groups", "8", "--allow-same", *_OUT)),
    Case("same-heads-refused", ("mha2gqa", "{model}", "--groups", "8", *_OUT)),
    Case("no-divisor", ("mha2gqa", "{model}", "--groups", "3", *_OUT)),
    Case("option-of-svd", (*_GQA, "--no-refit", *_OUT)),
    Case("two-sources", (*_GQA, "--method", "svd", "--no-calibration", "--calibration", "{text}", *_OUT)),
    Case("default-output", ("mha2gqa", "{model}", "--groups", "4")),
    Case("missing-model", ("mha2gqa", "{model}-that-is-not-there", "--groups", "2")),
    Case("cla-sources", ("mha2cla", "{model}", "--kv-source-layers", "0,0", *_OUT)),
    Case("cla-wrong-sources", ("mha2cla", "{model}", "--kv-source-layers", "1,1", *_OUT)),
    Case("cla-none", ("mha2cla", "{model}", *_OUT)),
    Case("cla-auto", (*_CLA[:2], "--pairs", "auto", "--kv-layers", "1", *_TEXT, *_OUT)),
    Case("cla-auto-svd", (*_CLA, "--pairs", "auto", "--method", "svd", *_TEXT, *_OUT)),
    Case("cla-keep-too-many", (*_CLA, "--keep-first", "1", "--keep-last", "1", *_OUT)),
    Case("evaluate", _AGAINST),
    Case("evaluate-json", ("evaluate", "{model}", "--data", "{text}", "--window", "64", "--json")),
    Case("evaluate-gate", (*_AGAINST, "--max-ppl-increase", "1%")),
    Case("uptrain-pretraining", ("uptrain", "{gqa}", *_TRAIN, *_OUT)),
    Case("uptrain-distill", (*_TAUGHT, "--layerwise-fraction", "0.5", *_OUT)),
    Case("uptrain-light", (*_TAUGHT, "--recipe", "light", *_OUT)),
    Case("uptrain-layerwise", (*_TAUGHT, "--recipe", "layerwise", "--train-only", "kv", *_OUT)),
    Case("uptrain-sweep", (*_SWEPT, "--lr-sweep", "2", *_OUT)),
    Case("uptrain-plan", (*_TAUGHT, "--gpu", "NVIDIA H100 80GB HBM3", "--dry-run")),
    Case("uptrain-plan-json", (*_TAUGHT, "--dry-run", "--json")),
    Case("uptrain-unknown-tokens", ("uptrain", "{gqa}", "--data", "{text}")),
    Case("uptrain-no-text", ("uptrain", "{gqa}", "--data", "{text}-missing.jsonl", "--steps", "2")),
    Case("refresh", ("refresh", "{cla}")),
    Case("refresh-nothing", ("refresh", "{model}")),
    Case("demo-plan", ("demo", "--dry-run", "--all")),
    Case("demo", (*("demo", "-o", "{out}", "--steps", "2"), *("--max-windows", "4", "--json"))),
    Case("version", ("--version",)),
)  # fmt: skip

OF_ONE_LATENT_MODEL = (
    Case("mla-gain", (*_MLA, "--rope-selection", "gain", *_TEXT, *_OUT)),
    Case("mla-half-split", (*_MLA, "--rope-layout", "half-split", "--no-refit", *_TEXT, *_OUT)),
    Case("mla-padded", (*_MLA, "--v-head-dim", "16", *_TEXT, *_OUT)),
    Case("mla-dry-run", (*_MLA, *_TEXT, "--dry-run", "--json")),
    Case("mla-odd", ("mha2mla", "{model}", "--kv-lora-rank", "24", "--qk-rope-head-dim", "3", *_OUT)),
    Case("mla-refused-option", (*_MLA, "--no-calibration", "--no-refit", *_OUT)),
)
OF_ROWS = {"native-llama": OF_ONE_MODEL, "mla-llama": OF_ONE_LATENT_MODEL}


def run_row(row: Row, cases: tuple[Case, ...] | None = None) -> dict[str, Record]:
    """The cases of a row, all unless given."""
    cases = OF_EVERY_ROW + OF_ROWS.get(row.name, ()) if cases is None else cases
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder).resolve()
        places = _prepare(row, place)
        found = {}
        for case in cases:
            places["out"] = place / "out" / case.name
            found[f"{row.name}/{case.name}"] = _run(case, places, place)
            shutil.rmtree(place / "out", ignore_errors=True)
    return found


def run_help(_: object = None) -> dict[str, Record]:
    """The help of every command."""
    commands = ("inspect", "mha2gqa", "mha2mqa", "mha2cla", "mha2mla", "uptrain", "evaluate", "refresh", "demo")
    cases = [Case(f"help-{name}", (name, "--help")) for name in commands] + [Case("help", ("--help",))]
    with tempfile.TemporaryDirectory() as folder:
        return {f"help/{case.name}": _run(case, {}, Path(folder)) for case in cases}


def _prepare(row: Row, place: Path) -> dict[str, Path]:
    """The checkpoint, a text, and for cases that need one a converted checkpoint."""
    import torch
    from conftest import PROSE

    torch.set_num_threads(1)
    torch.manual_seed(0)  # for what the builders leave as it was initialised
    places = {name: place / name for name in ("model", "gqa", "cla")}
    places |= {"text": place / "text.jsonl", "held": place / "held.jsonl", "kept": place / "kept.safetensors"}
    row.make(places["model"])
    for name, numbers in (("text", range(40)), ("held", range(40, 80))):
        lines = [json.dumps({"text": f"Chapter {number}. {PROSE}"}) for number in numbers]
        places[name].write_text("\n".join(lines) + "\n")
    if row.name == "native-llama":
        for case in (Case("gqa", (*_GQA, "-o", "{gqa}")), Case("cla", (*_CLA, "-o", "{cla}"))):
            assert _run(case, places, place).exit_code == 0
    return places


def _run(case: Case, places: dict[str, Path], place: Path) -> Record:
    from kvconvert.cli.main import app
    from typer.testing import CliRunner

    arguments = [argument.format(**places) for argument in case.arguments]
    before = set(place.iterdir())
    work = place / "cwd"
    work.mkdir(exist_ok=True)
    previous = Path.cwd()
    os.chdir(work)
    try:
        outcome = CliRunner().invoke(app, arguments)
    finally:
        os.chdir(previous)
    record = Record(
        outcome.exit_code,
        _stable(outcome.stdout, place),
        _stable(outcome.stderr, place),
    )
    if outcome.exception is not None and not isinstance(outcome.exception, SystemExit):
        record.stderr += f"\nraised {outcome.exception!r}"
    written = [path for path in place.iterdir() if path not in before and path.name != "cwd"]
    for path in sorted(written):
        for file, content in _files(path):
            record.files[str(file.relative_to(place))] = _digest(_stable_bytes(content, place))
        if path.name.startswith("model-"):  # a default output: the next case shall find none
            shutil.rmtree(path)
    return record


def _files(path: Path) -> Iterator[tuple[Path, bytes]]:
    files = sorted(path.rglob("*")) if path.is_dir() else [path]
    yield from (
        (file, file.read_bytes())
        for file in files
        if file.is_file() and file.name not in _NOT_HASHED and "tfevents" not in file.name and file.suffix != ".png"
    )


def _stable_bytes(content: bytes, place: Path) -> bytes:
    try:
        return _stable(content.decode(), place).encode()
    except UnicodeDecodeError:
        return content.replace(str(place).encode(), b"PLACE")


def _stable(text: str, place: Path) -> str:
    """The text without what differs from run to run."""
    text = text.replace(str(place), "PLACE").replace(str(ROOT), "ROOT")
    for pattern, replacement in _CHANGING:
        text = pattern.sub(replacement, text)
    return "\n".join(line.rstrip() for line in text.splitlines())


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]


def machine() -> dict[str, str]:
    """What decides the last bits of a product of matrices."""
    import torch

    return {
        "torch": torch.__version__,
        "capability": torch.backends.cpu.get_cpu_capability(),
        "processor": platform.machine(),
    }


def run_all(only: list[str], jobs: int) -> dict[str, Record]:
    """All cases whose name holds one of `only`, over so many processes."""
    chosen = [row for row in rows() if not only or any(word in f"{row.name}/" for word in only)]
    # the one with the most cases first
    chosen.sort(key=lambda row: row.name != "native-llama")
    names = [row.name for row in chosen]
    found: dict[str, Record] = {}
    if not only or "help" in only:
        found |= run_help()
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool:
        for name, part in zip(names, pool.map(_run_named, names), strict=True):
            print(f"{name}: {len(part)} cases", file=sys.stderr)
            found |= part
    return dict(sorted(found.items()))


def _run_named(name: str) -> dict[str, Record]:
    return run_row(next(row for row in rows() if row.name == name))


def differences(frozen: dict[str, Any], found: dict[str, Record]) -> list[str]:
    """In words, what differs from the frozen records."""
    lines = []
    for name, record in found.items():
        now, then = record.as_json(), frozen.get(name)
        if then is None:
            lines.append(f"{name}: not frozen")
            continue
        parts = ("exit_code", "stdout", "stderr")
        lines += [f"{name}: {part} was {then[part]}, is {now[part]}" for part in parts if now[part] != then[part]]
        for file in sorted({*now["files"], *then["files"]}):
            was, is_now = then["files"].get(file, "absent"), now["files"].get(file, "absent")
            if was != is_now:
                lines.append(f"{name}: {file} was {was}, is {is_now}")
    return lines


def _keep_texts(found: dict[str, Record], folder: Path) -> None:
    for name, record in found.items():
        path = folder / f"{name}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        files = "\n".join(f"{digest} {file}" for file, digest in record.files.items())
        path.write_text(f"exit {record.exit_code}\n{record.stdout}\n--- stderr\n{record.stderr}\n--- files\n{files}\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=("record", "check"))
    parser.add_argument("--only", action="append", default=[], help="rows whose name holds this")
    parser.add_argument("--jobs", type=int, default=2)
    arguments = parser.parse_args()
    if arguments.action == "check" and json.loads(FROZEN.read_text())["machine"] != machine():
        sys.exit(f"recorded on {json.loads(FROZEN.read_text())['machine']}, this is {machine()}: record here first")
    found = run_all(arguments.only, arguments.jobs)
    _keep_texts(found, TEXTS / arguments.action)
    num_files = sum(len(record.files) for record in found.values())
    print(f"{len(found)} cases, {num_files} files")
    if arguments.action == "record":
        frozen = json.loads(FROZEN.read_text())["cases"] if arguments.only and FROZEN.exists() else {}
        frozen |= {name: record.as_json() for name, record in found.items()}
        FROZEN.write_text(json.dumps({"machine": machine(), "cases": frozen}, indent=0, sort_keys=True) + "\n")
        return
    recorded = json.loads(FROZEN.read_text())
    lines = differences(recorded["cases"], found)
    if not arguments.only:
        lines += [f"{name}: is gone" for name in recorded["cases"] if name not in found]
    print("\n".join(lines) or "nothing differs")
    sys.exit(bool(lines))


if __name__ == "__main__":
    main()
