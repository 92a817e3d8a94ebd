#!/usr/bin/env python3
"""Ends runs that write, at every line and at random moments, takes their disk away, and looks what is there then.

    .venv/bin/python scripts/soak.py --quick                        # a minute
    .venv/bin/python scripts/soak.py --runs 200 --folder soak  # every line, and commands at random moments; hours

After each run the output has to be the old one or the new one, whole, by the digests of its manifest. After a signal
that can be caught nothing else may be there, and after a kill the next run has to clear up. A disk that is full at any
block leaves what was there, and an uptraining run goes on when there is space again. Exits with 1 and says what was
broken, if anything was, and what could not be tried here.
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
from functools import partial
from itertools import count, product
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple
from unittest.mock import patch

os.environ |= {"TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}

from kvconvert.convert.checkpoint import files, staging
from kvconvert.convert.checkpoint.manifest import unlike_manifest, write_manifest
from kvconvert.convert.errors import OutputError
from safetensors import SafetensorError, safe_open

sys.path.append(str(Path(__file__).parent))
from soak_places import MOUNTS, NOT_ALLOWED, PROCESS_IDS, forked, in_namespace, mount_disk, unmount

SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
TRACED = {staging.__file__, files.__file__}
NO_SUCH_LINE = 2
DISK_FULL = 4
PLENTY = 2**28
BLOCK = 4096
QUICK_GROWTH = 4
KVCONVERT = str(Path(sys.executable).with_name("kvconvert"))
ROOT = Path(__file__).parent.parent

Broken = tuple[int, list[str]]
"""How many runs there were, and what was broken."""


class Case(NamedTuple):
    """What is ended: `act` writes `output`, after which `wrong` looks at it, `prepared` by what was there before.

    `wrong` gets the status that the process ended with, and yields what is not as promised.
    """

    name: str
    prepare: Callable[[], object]
    act: Callable[[], object]
    wrong: Callable[[int], Iterator[str]]
    traced: set[str]


def make(output: Path, content: str) -> None:
    """Write an output with one file, in place of what is there."""
    with staging.staged_directory(output, force=True) as new:
        (new / "model").write_text(content)
        write_manifest(new, {})


def replace(output: Path, *, exchanges: bool) -> None:
    """What a command does: clear up, and replace the output."""
    if not exchanges:
        staging._renameat2 = lambda one, other, flags: False
    staging.clear_leftovers(output, lambda remark: None)
    make(output, "new")


def end_at(line: int, number: int, act: Callable[[], object], traced: set[str]) -> int:
    """Do something, and send this process a signal at a line of the code; NO_SUCH_LINE if it has fewer."""
    lines = 0

    def trace(frame: FrameType, event: str, argument: Any) -> Any:
        nonlocal lines
        if frame.f_code.co_filename not in traced:
            return None
        if event == "line":
            lines += 1
            if lines == line:
                os.kill(os.getpid(), number)
        return trace

    def end(number: int, frame: FrameType | None) -> None:
        raise SystemExit(1)

    for each in SIGNALS[1:]:
        signal.signal(each, end)
    sys.settrace(trace)
    try:
        act()
    except SystemExit:
        return 1
    return 0 if lines >= line else NO_SUCH_LINE


def wrong_with(output: Path, was_there: bool, status: int) -> Iterator[str]:
    """Say what is not as promised after a run that ended with this wait status."""
    yield from left_beside([output], status, output)
    if output.exists():
        yield from unlike_manifest(output, digests=True)
    elif was_there:
        yield "the output is gone"


def left_beside(places: Sequence[Path], status: int, output: Path) -> Iterator[str]:
    """Clear up as the next run does, where this one was killed, and say what is there besides `places`."""
    killed = os.WIFSIGNALED(status)
    if not killed and os.WEXITSTATUS(status) not in (0, 1):
        yield "ended with an error"
    if killed:
        for path in output.parent.iterdir():
            if path.is_dir() and not any(path.iterdir()):
                os.utime(path, (0, 0))  # an empty one is cleared when it is a minute old
        for place in places:
            staging.clear_leftovers(place, lambda remark: None)
    beside = sorted(path.name for path in output.parent.iterdir() if path not in places)
    if beside:
        yield f"{'the next run cleared all but' if killed else 'a signal that can be caught left'} {beside}"


def at_every_line(cases: Sequence[Case], signals: Sequence[signal.Signals], step: int = 1) -> Broken:
    """End each case at every line, or every `step`th from a first one that is another for each signal."""
    broken, runs = [], 0
    for case, (index, number) in product(cases, enumerate(signals)):
        for line in count(1 + index * step // len(signals), step):
            case.prepare()
            status = os.waitpid(forked(partial(end_at, line, number, case.act, case.traced)), 0)[1]
            if os.WIFEXITED(status) and os.WEXITSTATUS(status) == NO_SUCH_LINE:
                break
            runs += 1
            said = f"{case.name}, {signal.Signals(number).name} at line {line}"
            broken += [f"{said}: {what}" for what in case.wrong(status)]
    return runs, broken


def empty(folder: Path) -> None:
    """Have a folder without anything in it."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()


def swaps(folder: Path) -> Iterator[Case]:
    """Outputs that are written and replaced, with and without an exchange of two names."""
    output = folder / "place" / "out"

    def prepare(was_there: bool) -> None:
        empty(output.parent)
        if was_there:
            make(output, "old")

    for exchanges, was_there in product((True, False), (True, False)):
        yield Case(
            f"exchange {exchanges}, replaces {was_there}",
            partial(prepare, was_there),
            partial(replace, output, exchanges=exchanges),
            partial(wrong_with, output, was_there),
            TRACED,
        )


def statistics(folder: Path) -> Iterator[Case]:
    """A file of statistics."""
    import soak_runs

    file = folder / "place" / "statistics"
    empty(file.parent)
    soak_runs.save_statistics(file)
    whole = file.read_bytes()

    def act() -> None:
        staging.clear_leftovers(file, lambda remark: None)
        soak_runs.save_statistics(file)

    def wrong(status: int) -> Iterator[str]:
        yield from left_beside([file], status, file)
        if file.exists() and file.read_bytes() != whole:
            yield "the file is not whole"

    yield Case("statistics", partial(empty, file.parent), act, wrong, TRACED | soak_runs.OF_STATISTICS)


def publishing(folder: Path, *, all_files: bool) -> Iterator[Case]:
    """An uptraining run that is trained, while its result is published and its work directory removed."""
    import soak_runs

    place, kept = folder / "place", folder / "kept"
    place.mkdir()
    output = place / "out"
    publish = soak_runs.trained_run(folder, output)
    shutil.copytree(place, kept)

    def prepare() -> None:
        shutil.rmtree(place)
        shutil.copytree(kept, place)

    def wrong(status: int) -> Iterator[str]:
        work = output.with_name("out.uptraining")
        yield from left_beside([output, work], status, output)
        if output.exists():
            yield from unlike_manifest(output, digests=True)
        elif not (work / "settings.json").exists():
            yield "there is neither the output nor what a run could go on from"

    traced = soak_runs.OF_PUBLISHING | (TRACED if all_files else set())
    yield Case("publishing", prepare, publish, wrong, traced)


def processes_at_once(folder: Path, rounds: int) -> Broken:
    """Let four processes replace one output at once."""
    broken: list[str] = []
    output = folder / "place" / "out"
    for number in range(rounds):
        empty(output.parent)
        write = partial(made, output, exchanges=number % 2 == 0)
        children = [forked(partial(write, f"{number}-{index}")) for index in range(4)]
        broken += wrong_after_all(output, [os.waitpid(child, 0)[1] for child in children])
    return rounds, broken


def equal_process_ids(folder: Path, rounds: int) -> Broken:
    """Let two to four processes replace one output at once, which all have the process id 1, and clear up before."""
    broken: list[str] = []
    output = folder / "place" / "out"

    def cleared_and_made(number: int) -> int:
        if os.getpid() != 1:
            raise RuntimeError(f"the process has the id {os.getpid()}")
        staging.clear_leftovers(output, lambda remark: None)
        return made(output, f"{number}", exchanges=number % 2 == 0, slowly=True)

    for number in range(rounds):
        empty(output.parent)
        make(output, "old")
        children = [in_namespace(PROCESS_IDS, partial(cleared_and_made, index)) for index in range(2 + number % 3)]
        done = [os.waitpid(child, 0)[1] for child in children]
        if any(os.WEXITSTATUS(status) == NOT_ALLOWED for status in done):
            raise NotHereError("no namespace of process ids may be made here")
        broken += wrong_after_all(output, done)
    return rounds, broken


def made(output: Path, content: str, *, exchanges: bool, slowly: bool = False) -> int:
    """Replace an output; 1 where another process was in the way."""
    if not exchanges:
        staging._renameat2 = lambda one, other, flags: False
    try:
        with staging.staged_directory(output, force=True) as new:
            time.sleep(random.uniform(0, 0.02) if slowly else 0)
            (new / "model").write_text(content)
            write_manifest(new, {})
    except OutputError:
        return 1
    return 0


def wrong_after_all(output: Path, done: Sequence[int]) -> Iterator[str]:
    """Say what is not as promised after several processes."""
    if all(done):
        yield "none of the processes wrote the output"
    if any(os.WIFSIGNALED(status) or os.WEXITSTATUS(status) not in (0, 1) for status in done):
        yield f"a process ended with an error: {done}"
    yield from wrong_with(output, True, 0)


def full_disks(folder: Path, act: Callable[[Path], object], *, goes_on: bool, quick: bool) -> Broken:
    """Run something on a disk of one block more each time (or four times as many), until it holds all.

    `act` gets the folder that the disk is mounted on. What it wrote has to be gone, or to be what a run goes on from.
    """
    place, found = folder / "disk", folder / "found.json"
    place.mkdir()

    def run_all() -> int:
        if not mount_disk(place, PLENTY):
            return NOT_ALLOWED
        broken: list[str] = []
        for number in count():
            size = BLOCK * (QUICK_GROWTH**number if quick else number + 1)
            unmount(place)
            mount_disk(place, size)
            with patch.object(shutil, "disk_usage", lambda path: Free(PLENTY)):  # it fills up while it is written
                code = run_on(act, place)
            broken += [f"{size} bytes: {what}" for what in wrong_on_a_disk(code, act, place, goes_on=goes_on)]
            if code == 0 or size > PLENTY:
                break
        found.write_text(json.dumps((number + 1, broken)))
        return 0

    status = os.waitpid(in_namespace(MOUNTS, run_all), 0)[1]
    if os.WEXITSTATUS(status) == NOT_ALLOWED:
        raise NotHereError("no file system may be mounted here")
    runs, broken = json.loads(found.read_text()) if found.exists() else (0, [f"ended with {status}"])
    return runs, broken


def run_on(act: Callable[[Path], object], place: Path) -> int:
    """The code that a process ends with which does something on a disk: DISK_FULL for what people are told then."""

    def run() -> int:
        try:
            act(place)
        except OutputError as error:
            return DISK_FULL if "the disk is full" in str(error) else 1
        return 0

    return os.waitstatus_to_exitcode(os.waitpid(forked(run), 0)[1])


def wrong_on_a_disk(code: int, act: Callable[[Path], object], place: Path, *, goes_on: bool) -> Iterator[str]:
    """Say what is not as promised after a run that ended with this code, on a disk that then has more space."""
    if code not in (0, DISK_FULL):
        yield f"ended with {code}"
    names = {path.name for path in place.iterdir()}
    yield from unlike_statistics(place / "kept")  # which are whole before the rest is written
    if code == DISK_FULL and names - {"kept", *(["out.uptraining"] if goes_on else [])}:
        yield f"left {sorted(names)}"
    mount_disk(place, PLENTY, again=True)
    if code and goes_on and (again := run_on(act, place)):
        yield f"with space again it ended with {again}"
    if (place / "out").exists():
        yield from unlike_manifest(place / "out", digests=True)
    elif goes_on or code == 0:
        yield "there is no output"


def command_at_random(arguments: Sequence[str], output: Path, runs: int, draw: random.Random) -> Broken:
    """End a command at random moments of the time that it takes; what it keeps to go on from may stay."""
    broken: list[str] = []
    work = output.with_name(f"{output.name}.uptraining")
    folder = output.parent
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
            for place in (output, work, folder / "statistics"):
                staging.clear_leftovers(place, lambda remark: None)
        locks = [folder / f".{work.name}.lock"] if number == signal.SIGKILL else []  # the next run takes it over
        allowed = {output, work, folder / "statistics", *locks}
        beside = [path.name for path in folder.iterdir() if path not in allowed]
        if beside:
            broken.append(f"{case}: left {beside}")
        problems = unlike_manifest(output, digests=True)
        if problems:
            broken.append(f"{case}: {problems}")
        broken += [f"{case}: {what}" for what in unlike_statistics(folder / "statistics")]
        (folder / "statistics").unlink(missing_ok=True)
    return runs, broken


def unlike_statistics(path: Path) -> Iterator[str]:
    """Say what is wrong with a file of statistics, if there is one."""
    if path.exists():
        try:
            with safe_open(path, "pt") as file:
                for name in file.keys():  # noqa: SIM118, as it is no mapping
                    file.get_tensor(name)
        except SafetensorError as error:
            yield f"statistics: {error}"


class Free(NamedTuple):
    """What shutil.disk_usage says of a disk."""

    free: int


class NotHereError(Exception):
    """Why something cannot be tried on this machine."""


Parts = dict[str, Callable[[Path], Broken]]


def parts_without_torch(options: argparse.Namespace) -> Parts:
    """What is tried with outputs of one file, by its name, each in a folder of its own."""
    quick, signals = options.quick, SIGNALS[:2] if options.quick else SIGNALS
    return {
        "swap at every line": lambda folder: at_every_line(list(swaps(folder)), signals, 2 if quick else 1),
        "four processes at once": lambda folder: processes_at_once(folder, 50),
        "processes of one id": lambda folder: equal_process_ids(folder, 9 if quick else 90),
    }


def parts_with_torch(options: argparse.Namespace) -> Parts:
    """What is tried with conversions and uptraining."""
    import soak_runs

    quick, signals, draw = options.quick, SIGNALS[:2] if options.quick else SIGNALS, random.Random(options.seed)
    parts: Parts = {
        "statistics at every line": lambda folder: at_every_line(list(statistics(folder)), signals, 4 if quick else 1),
        "publishing at every line": lambda folder: at_every_line(
            list(publishing(folder, all_files=not quick)), signals, 16 if quick else 1
        ),
        "full disk, conversion": lambda folder: full_disks(
            folder, soak_runs.conversion(folder), goes_on=False, quick=quick
        ),
        "full disk, uptrain": lambda folder: full_disks(
            folder, soak_runs.uptraining(folder), goes_on=True, quick=quick
        ),
    }
    model, text = str(ROOT / "configs" / "demo" / "model"), str(ROOT / "configs" / "demo" / "uptrain.jsonl")
    few = max(1, options.runs // 4)  # these take several times as long
    commands = (
        ("mha2mqa", ["mha2mqa", model], options.runs),
        ("mha2mqa with statistics", soak_runs.statistics_command(model, text), few),
        ("uptrain", soak_runs.uptrain_command(text), few),
    )
    for name, arguments, runs in () if quick else commands:
        parts[f"{name} at random"] = partial(at_random, arguments, runs, draw)
    return parts


def at_random(arguments: Sequence[str], runs: int, draw: random.Random, folder: Path) -> Broken:
    """End a command at random moments, whose places lie in `folder`."""
    (folder / "place").mkdir()
    import soak_runs

    placed = soak_runs.placed(arguments, folder)
    output = folder / "place" / "out"
    return command_at_random([KVCONVERT, *placed, "--output", str(output), "--force", "--quiet"], output, runs, draw)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="two signals, fewer lines and sizes, and no command")
    parser.add_argument("--runs", type=int, default=200, help="how often the command is ended")
    parser.add_argument(
        "--folder", type=Path, help="where to work; default: a new folder in memory, or a temporary one"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", help="the parts whose names hold this")
    options = parser.parse_args()
    memory = Path("/dev/shm")
    place = options.folder or (memory if os.access(memory, os.W_OK) else None)
    result: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory(dir=place) as name:
        parts = (item for parts in (parts_without_torch, parts_with_torch) for item in parts(options).items())
        for part, run in parts:
            if options.only and options.only not in part:
                continue
            folder = Path(name) / part.replace(" ", "-").replace(",", "")
            folder.mkdir()
            started = time.monotonic()
            try:
                runs, broken = run(folder)
                result[part] = {"runs": runs, "broken": broken}
            except NotHereError as error:
                result[part] = {"runs": 0, "broken": [], "skipped": str(error)}
            result[part]["seconds"] = round(time.monotonic() - started, 1)
            print(f"{part}: {result[part]}"[:2000], file=sys.stderr, flush=True)
    print(json.dumps(result, indent=1))
    sys.exit(any(part["broken"] for part in result.values()))


if __name__ == "__main__":
    main()
