#!/usr/bin/env python3
"""Ends runs that replace an output, at every line of the swap and at random moments, and looks what is there then.

    .venv/bin/python scripts/soak.py --quick                        # every line of the swap; seconds
    .venv/bin/python scripts/soak.py --runs 200 --folder /tmp/soak  # also the command, at random moments; an hour

After each run the output has to be the old one or the new one, whole, by the digests of its manifest. After a signal
that can be caught nothing else may be there, and after a kill the next run has to clear up. Exits with 1 and says what
was broken, if anything was.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from itertools import product
from pathlib import Path
from types import FrameType
from typing import Any

from kvconvert.convert.checkpoint import files, staging
from kvconvert.convert.checkpoint.manifest import unlike_manifest, write_manifest

SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
TRACED = {staging.__file__, files.__file__}
NO_SUCH_LINE = 2
COMMAND = (str(Path(sys.executable).with_name("kvconvert")), "mha2mqa")


def make(output: Path, content: str) -> None:
    """Write an output with one file, in place of what is there."""
    with staging.staged_directory(output, force=True) as new:
        (new / "model").write_text(content)
        write_manifest(new, {})


def replace(output: Path) -> None:
    """What a command does: clear up, and replace the output."""
    staging.clear_leftovers(output, lambda remark: None)
    make(output, "new")


def ended_at(line: int, number: int, output: Path, *, exchanges: bool) -> int:
    """Replace an output in a process of its own, which gets a signal at a line of the code; returns its wait status."""
    child = os.fork()
    if child:
        return os.waitpid(child, 0)[1]
    code = 3
    try:
        code = 0 if end_at(line, number, output, exchanges=exchanges) else NO_SUCH_LINE
    except SystemExit:
        code = 1
    finally:
        sys.settrace(None)
        os._exit(code)


def end_at(line: int, number: int, output: Path, *, exchanges: bool) -> bool:
    """Replace an output, and send this process a signal at a line of the code; False where it does not come so far."""
    count = 0

    def trace(frame: FrameType, event: str, argument: Any) -> Any:
        nonlocal count
        if frame.f_code.co_filename not in TRACED:
            return None
        if event == "line":
            count += 1
            if count == line:
                os.kill(os.getpid(), number)
        return trace

    def end(number: int, frame: FrameType | None) -> None:
        raise SystemExit(1)

    for each in SIGNALS[1:]:
        signal.signal(each, end)
    if not exchanges:
        staging._renameat2 = lambda one, other, flags: False
    sys.settrace(trace)
    replace(output)
    return count >= line


def wrong(output: Path, was_there: bool, status: int) -> Iterator[str]:
    """Say what is not as promised after a run that ended with this wait status."""
    killed = os.WIFSIGNALED(status)
    if not killed and os.WEXITSTATUS(status) == 3:
        yield "ended with an error"
    if killed:
        clear_up(output)
    beside = sorted(path.name for path in output.parent.iterdir() if path != output)
    if beside:
        yield f"{'the next run cleared all but' if killed else 'a signal that can be caught left'} {beside}"
    if output.exists():
        yield from unlike_manifest(output, digests=True)
    elif was_there:
        yield "the output is gone"


def clear_up(output: Path) -> None:
    """What the next run does before all else."""
    for path in output.parent.iterdir():
        if path != output and not any(path.iterdir()):
            os.utime(path, (0, 0))  # an empty one is cleared when it is a minute old
    staging.clear_leftovers(output, lambda remark: None)


def swap_at_every_line(folder: Path, signals: Sequence[signal.Signals]) -> tuple[int, list[str]]:
    """End the swap at each of its lines, with each signal; returns how many runs there were, and what was broken."""
    broken, runs = [], 0
    for number, exchanges, was_there in product(signals, (True, False), (True, False)):
        line = 0
        while True:
            line += 1
            place = Path(tempfile.mkdtemp(dir=folder))
            output = place / "out"
            if was_there:
                make(output, "old")
            status = ended_at(line, number, output, exchanges=exchanges)
            if os.WIFEXITED(status) and os.WEXITSTATUS(status) == NO_SUCH_LINE:
                shutil.rmtree(place)
                break
            runs += 1
            case = f"{signal.Signals(number).name} at line {line}, exchange {exchanges}, replaces {was_there}"
            broken += [f"{case}: {what}" for what in wrong(output, was_there, status)]
            shutil.rmtree(place)
    return runs, broken


def command_at_random(folder: Path, runs: int, source: Path, draw: random.Random) -> tuple[int, list[str]]:
    """End `kvconvert mha2mqa --force` at random moments of the time that it takes."""
    broken: list[str] = []
    output = folder / "out"
    arguments = [*COMMAND, str(source), "--output", str(output), "--force", "--quiet"]
    started = time.monotonic()
    subprocess.run(arguments, check=True, stdout=subprocess.DEVNULL)
    takes = time.monotonic() - started
    for index in range(runs):
        number = SIGNALS[index % len(SIGNALS)]
        with subprocess.Popen(arguments, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as process:
            time.sleep(draw.uniform(0, 1.05 * takes))
            process.send_signal(number)
            errors = process.communicate()[1]
        case = f"{number.name}, run {index}"
        if "Traceback" in errors or process.returncode == 1:
            broken.append(f"{case}: {errors}")
        if number == signal.SIGKILL:
            staging.clear_leftovers(output, lambda remark: None)
        beside = [path.name for path in folder.iterdir() if path not in (output, source)]
        if beside:
            broken.append(f"{case}: left {beside}")
        problems = unlike_manifest(output, digests=True)
        if problems:
            broken.append(f"{case}: {problems}")
    return runs, broken


def processes_at_once(folder: Path, rounds: int) -> tuple[int, list[str]]:
    """Let four processes replace one output at once."""
    broken: list[str] = []
    for _ in range(rounds):
        place = Path(tempfile.mkdtemp(dir=folder))
        output = place / "out"
        children = []
        for index in range(4):
            child = os.fork()
            if not child:
                try:
                    make(output, f"{index}")
                except BaseException:
                    os._exit(1)
                os._exit(0)
            children.append(child)
        done = [os.waitpid(child, 0)[1] for child in children]
        if all(done):
            broken.append("none of four processes wrote the output")
        broken += wrong(output, True, 0)
        shutil.rmtree(place)
    return rounds, broken


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="two signals, and no command")
    parser.add_argument("--runs", type=int, default=200, help="how often the command is ended")
    parser.add_argument("--folder", type=Path, help="where to work; default: a new temporary folder")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        parts: dict[str, Callable[[Path], tuple[int, list[str]]]] = {
            "swap at every line": lambda folder: swap_at_every_line(folder, SIGNALS[:2] if options.quick else SIGNALS),
            "four processes at once": lambda folder: processes_at_once(folder, 50),
        }
        if not options.quick:
            source = Path(__file__).parent.parent / "configs" / "demo" / "model"
            draw = random.Random(options.seed)
            parts["command at random"] = lambda folder: command_at_random(folder, options.runs, source, draw)
        result: dict[str, dict[str, Any]] = {}
        for part, run in parts.items():
            folder = Path(name) / part.replace(" ", "-")
            folder.mkdir()
            runs, broken = run(folder)
            result[part] = {"runs": runs, "broken": broken}
    print(json.dumps(result, indent=1))
    sys.exit(any(part["broken"] for part in result.values()))


if __name__ == "__main__":
    main()
