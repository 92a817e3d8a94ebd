"""Runs the targets of fuzz_targets.py under atheris, each in a process of its own. `scripts/fuzz` starts it."""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import re
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
CORPUS = ROOT / "tests/corpus"
TARGETS = ("header", "pickle", "index", "config", "tokenizer", "text", "beside")
_JSON_TARGETS = ("index", "config", "tokenizer")
_SAVED_BYTES = 4096
_SAVED_INPUTS = 40  # of a target
_SECONDS_OF_AN_INPUT = 10
_MIB_OF_AN_INPUT = 1024
_ODD: tuple[Any, ...] = (
    *(None, True, False, "", "x", "llama", "../x", "\ud800", -1, 0, 1, 2, 3, 7, 8, 64, 65536, 10**6, 2**31, 2**53),
    *(2**63, 10**400, 0.5, -0.0, 1e308, float("nan"), float("inf"), [], [1], ["a"], {}, {"a": 1}, [[[]]]),
)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=int, default=60, help="for each target")
    parser.add_argument(
        "--seeds", type=Path, help="a directory of checkpoints and text, whose small files are seeds too"
    )
    parser.add_argument("--keep", type=Path, help="where inputs that reached new code, and what was found, are kept")
    parser.add_argument(
        "--save", action="store_true", help="fuzz nothing, choose from --keep what goes to tests/corpus"
    )
    parser.add_argument("--in-process", help=argparse.SUPPRESS)
    parser.add_argument("--room", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("targets", nargs="*", default=TARGETS)
    arguments = parser.parse_args()
    if arguments.in_process:
        _fuzz(arguments.in_process, arguments.seconds, arguments.keep, arguments.room, arguments.seeds)
        return 0
    with tempfile.TemporaryDirectory(prefix="kvconvert-fuzz-") as scratch:
        keep = arguments.keep or Path(scratch)
        if arguments.save:
            for target in arguments.targets or TARGETS:
                _save(target, keep, Path(scratch))
            return 0
        more = [] if arguments.seeds is None else ["--seeds", str(arguments.seeds.resolve(strict=True))]
        return max(_supervise(target, arguments.seconds, keep, more) for target in arguments.targets or TARGETS)


def _supervise(target: str, seconds: int, keep: Path, more: Sequence[str]) -> int:
    """Fuzz one target, print how many inputs there were, and return 1 if one of them came out wrong."""
    command = [sys.executable, __file__, "--in-process", target, "--seconds", str(seconds), "--keep", str(keep)]
    with tempfile.TemporaryDirectory(prefix="kvconvert-fuzz-", dir=_fast_place()) as room:
        command += ["--room", room, *more]
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False)
    printed = done.stdout.decode(errors="replace")
    counted = re.findall(r"stat::number_of_executed_units:\s*(\d+)", printed) or re.findall(r"^#(\d+)", printed, re.M)
    found = sorted((keep / "found" / target).glob("*.txt"))
    given = "".join(f", {number} seeds given" for number in re.findall(r"^(\d+) seeds from", printed, re.M))
    print(f"{target}: {counted[-1] if counted else 0} inputs{given}, {len(found)} found", flush=True)
    for report in found:
        print(report.read_text(errors="replace").strip().splitlines()[-1], report.with_suffix(""))
    if done.returncode:  # a limit of libFuzzer: time, memory or a signal
        print(printed[-4000:])
    return int(bool(found or done.returncode))


def _save(target: str, keep: Path, room: Path) -> None:
    """Copy to tests/corpus the smallest input of each outcome, of a few hundred bytes, that `keep` has."""
    sys.path[:0] = [str(ROOT / "scripts"), str(ROOT / "tests")]
    import fuzz_targets

    if not any(room.iterdir()):
        fuzz_targets.prepare(room)
    chosen: dict[str, bytes] = {}
    inputs = [path for path in (keep / "corpus" / target).glob("*") if path.stat().st_size <= _SAVED_BYTES]
    for path in sorted(inputs, key=lambda path: path.stat().st_size):
        data = path.read_bytes()
        outcome = re.sub(r"/\S+|\d+|'[^']*'|`[^`]*`", "", fuzz_targets.check(target, data, room))
        if len(chosen) < _SAVED_INPUTS:
            chosen.setdefault(outcome[:100], data)
    (CORPUS / target).mkdir(parents=True, exist_ok=True)
    for data in chosen.values():
        (CORPUS / target / hashlib.sha256(data).hexdigest()[:16]).write_bytes(data)
    print(f"{target}: {len(chosen)} inputs, {sum(map(len, chosen.values()))} bytes")


def _fuzz(target: str, seconds: int, keep: Path, room: Path, seeds: Path | None) -> None:
    """Fuzz one target in this process until its time is over; libFuzzer then ends the process."""
    import atheris

    sys.path += [str(ROOT / "scripts"), str(ROOT / "tests")]
    sys.dont_write_bytecode = True  # it would be written outside of the room
    os.environ |= {"HF_HOME": str(room / "home"), "TMPDIR": str(room)}
    tempfile.tempdir = str(room)
    with atheris.instrument_imports(include=["kvconvert.convert"]):
        import fuzz_targets
    fuzz_targets.prepare(room)
    corpus, found = keep / "corpus" / target, keep / "found" / target
    for directory in (corpus, found):
        directory.mkdir(parents=True, exist_ok=True)
    given = [] if seeds is None else list(fuzz_targets.seeds_below(seeds, target))
    if seeds is not None:
        print(f"{len(given)} seeds from {seeds}", flush=True)
    for seed in (*_seeds(target, room), *given):
        (corpus / hashlib.sha256(seed).hexdigest()[:16]).write_bytes(seed)
    known: set[tuple[str, int]] = set()

    def one_input(data: bytes) -> None:
        try:
            fuzz_targets.check(target, data, room)
        except BaseException as error:  # also a panic of a library
            place = traceback.extract_tb(error.__traceback__)[-1]
            if (place.filename, place.lineno or 0) not in known:
                known.add((place.filename, place.lineno or 0))
                name = found / hashlib.sha256(data).hexdigest()[:16]
                os.write(2, f"found {name}\n".encode())
                _keep(name, data, "".join(traceback.format_exception(error)))

    def mutated(data: bytes, max_size: int, seed: int) -> bytes:
        changed = _with_odd_value(data, random.Random(seed)) if seed % 4 else None
        return (changed or atheris.Mutate(data, max_size))[:max_size]

    allowed = (str(found), str(corpus))
    options = [
        f"-max_total_time={seconds}",
        f"-timeout={_SECONDS_OF_AN_INPUT}",
        f"-rss_limit_mb={_rss_mib() + _MIB_OF_AN_INPUT}",
        f"-malloc_limit_mb={_MIB_OF_AN_INPUT}",
        f"-artifact_prefix={found}/",
        "-max_len=65536",
        "-len_control=0",
        "-print_final_stats=1",
        str(corpus),
        *([str(CORPUS / target)] if (CORPUS / target).is_dir() else []),
    ]
    mutator = {"custom_mutator": mutated} if target in _JSON_TARGETS else {}
    with fuzz_targets.writes_inside(room, allowed=allowed):
        atheris.Setup([sys.argv[0], *options], one_input, **mutator)
        atheris.Fuzz()


def _keep(name: Path, data: bytes, report: str) -> None:
    name.write_bytes(data)
    name.with_suffix(".txt").write_text(report, encoding="utf-8", errors="backslashreplace")


def _fast_place() -> str | None:
    return "/dev/shm" if Path("/dev/shm").is_dir() else None


def _rss_mib() -> int:
    import psutil

    return int(psutil.Process().memory_info().rss // 2**20)


def _with_odd_value(data: bytes, choice: random.Random) -> bytes | None:
    """JSON with one value, somewhere in it, replaced by an odd one; None where it is no JSON."""
    first, separator, rest = data.partition(b"\x00\xff\x00")
    try:
        content = json.loads(first)
        places = list(_places(content))
        container, key = choice.choice(places)
        roll = choice.random()
        if roll < 0.1 and isinstance(container, dict):
            container[choice.choice(["num_labels", "id2label", "text_config", "rope_scaling", "head_dim"])] = container[
                key
            ]
        elif roll < 0.2:
            del container[key]
        elif roll < 0.3:
            container[key] = choice.choice(places)[0]
        else:
            container[key] = choice.choice(_ODD)
        return json.dumps(content).encode() + separator + rest
    except (ValueError, RecursionError, IndexError):
        return None


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Every container in a value with every key in it."""
    for key in list(value) if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ():
        yield value, key
        yield from _places(value[key])


def _seeds(target: str, room: Path) -> Iterator[bytes]:
    """Small real inputs, from what `fuzz_targets.prepare` put into the room."""
    import io

    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    if target == "header":
        yield (room / "llama/model.safetensors").read_bytes()
    elif target == "config":
        yield from (path.read_bytes() for path in sorted(room.glob("*/config.json")))
    elif target == "index":
        yield json.dumps({"metadata": {"total_size": 1}, "weight_map": {"a": "a.safetensors"}}).encode()
    elif target == "pickle":
        for is_zip in (True, False):
            file = io.BytesIO()
            state = {"a.weight": torch.ones(2, 3), "b": torch.arange(4)}
            torch.save(state, file, _use_new_zipfile_serialization=is_zip)
            yield file.getvalue()
    elif target == "tokenizer":
        bpe = models.BPE({"a": 0, "b": 1, "ab": 2, "\u0120": 3, "<s>": 4, "</s>": 5}, [("a", "b")], unk_token="a")
        words = models.WordLevel({"a": 0, "b": 1, "<unk>": 2}, unk_token="<unk>")
        pieces = models.Unigram([("<unk>", 0.0), ("\u2581", -1.0), ("a", -1.0), ("ab", -2.5)], 0)
        for number, model in enumerate((bpe, words, pieces)):
            tokenizer = Tokenizer(model)
            tokenizer.pre_tokenizer = pre_tokenizers.Metaspace() if model is pieces else pre_tokenizers.ByteLevel()
            directory = room / f"seed{number}"
            PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="b").save_pretrained(directory)
            content = json.loads((directory / "tokenizer.json").read_bytes())
            yield json.dumps(content).encode() + b"\x00\xff\x00" + (directory / "tokenizer_config.json").read_bytes()
    elif target == "text":
        yield from (bytes([kind]) + b'{"a": {"text": "b"}}\n{"a.text": ["c"]}\n' for kind in (0, 1, 2, 64, 130))
        yield b'\x01[{"a.text": "b"}, {"a.text": null}]'
    elif target == "beside":
        yield b"---\nlicense: mit\nlanguage: [en, de]\n---\n# A model\n"
        yield b"n_heads: 8\nfrom .a import b\n"
        yield b'[{"path": "1_Pooling", "type": "Pooling"}]'
        yield b'{"weight_map": {"a": "model.safetensors"}, "auto_map": {"A": "b.C"}}'


if __name__ == "__main__":
    sys.exit(main())
