"""Interrupts `kvconvert uptrain` at random moments, runs it again until it is done, and compares with a run left alone.

    python benchmarks/check_interruption.py [--trials 20] [--kills 1] [--jobs 2] [--seed 0]

The demo checkpoint is converted to 2 K/V heads by their mean and uptrained towards the original in both stages, with
checkpoints every few steps. A trial starts the command, waits for a random part of the time that it takes, sends
SIGKILL or SIGTERM in turn, and gives the same command again, which is interrupted too until there were --kills of them.
Then model.safetensors has to be equal byte for byte, and every record of metrics.jsonl but for what a clock says.

SIGTERM has to end in exit code 75, or 0 when the run was finished anyhow; before training began and after it was over,
where nothing has to be saved, 143, 130 and -15 (Python's own, before the command is there) pass too. Prints a row for
each trial and what was left beside the result. The time is the lesser of that of the run left alone and of the control,
which run beside each other as trials do; the control, with another order of the blocks, must not be equal.
Exits with 1 if anything is not as it should be.
"""

from __future__ import annotations

import argparse
import filecmp
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from signal import Signals
from typing import Any

_DEMO = Path(__file__).parents[1] / "configs" / "demo"
_WEIGHTS, _METRICS, _STATUS = "model.safetensors", "metrics.jsonl", "run_status.json"
_FROM_A_CLOCK = frozenset({"seconds", "tokens_per_second", "eta_seconds", "mfu"})
_SAVED, _ENDED_AT_ONCE = 75, frozenset({130, 143, -Signals.SIGTERM})
_SIGNALS = (Signals.SIGKILL, Signals.SIGTERM)
_PATIENCE_SECONDS = 600  # for a step and a checkpoint, and for a whole run


@dataclass(frozen=True)
class Interruption:
    """What became of a process that was sent `sent` after `seconds`; None and its whole time if it ended before.

    `status` is what it wrote into run_status.json, None if it had not come so far.
    """

    sent: Signals | None
    seconds: float
    exit_code: int
    status: dict[str, Any] | None
    finished: bool

    @property
    def is_as_it_should_be(self) -> bool:
        if self.sent is None or self.exit_code == 0:
            return self.exit_code == 0 and self.finished
        if self.sent is Signals.SIGKILL:
            return self.exit_code == -Signals.SIGKILL
        if self.exit_code == _SAVED:
            return self.status is None or self.status["state"] == "preempted"
        return self.exit_code in _ENDED_AT_ONCE and (self.status is None or self.finished)

    @property
    def phase(self) -> str:
        if self.finished:
            return "at the end"
        return "before training" if self.status is None else "in training"

    def __str__(self) -> str:
        name = "not needed" if self.sent is None else self.sent.name
        said = "no status" if self.status is None else f"{self.status['state']}, step {self.status['step']}"
        return f"{name} | {self.seconds:.1f} | {said} | {self.exit_code}"


@dataclass(frozen=True)
class Trial:
    """`last_exit_code` is that of the run that was left to end; `error` the last line that it printed if it failed."""

    interruptions: tuple[Interruption, ...]
    last_exit_code: int
    error: str
    equal: bool
    left_behind: tuple[str, ...]

    @property
    def is_as_it_should_be(self) -> bool:
        return self.equal and self.last_exit_code == 0 and all(one.is_as_it_should_be for one in self.interruptions)


def comparable(metrics: str) -> list[dict[str, Any]]:
    """The records of a metrics.jsonl without what a clock says."""
    records = map(json.loads, metrics.splitlines())
    return [{key: value for key, value in record.items() if key not in _FROM_A_CLOCK} for record in records]


def is_equal(one: Path, other: Path) -> bool:
    """Whether two results have the same weights, byte for byte, and the same records."""
    if not all((folder / name).exists() for folder in (one, other) for name in (_WEIGHTS, _METRICS)):
        return False
    same_weights = filecmp.cmp(one / _WEIGHTS, other / _WEIGHTS, shallow=False)
    records = [comparable((folder / _METRICS).read_text()) for folder in (one, other)]
    return same_weights and bool(records[0]) and records[0] == records[1]


@dataclass(frozen=True)
class Command:
    """`kvconvert uptrain` with everything but its output."""

    arguments: tuple[str, ...]

    def start(self, output: Path, *options: str) -> subprocess.Popen[str]:
        output.parent.mkdir(parents=True, exist_ok=True)
        environment = os.environ | {"OMP_NUM_THREADS": "1"}  # another number of threads would be another order of sums
        return subprocess.Popen(
            [_program(), "uptrain", *self.arguments, "--quiet", "--output", str(output), *options],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            env=environment,
        )

    def finish(self, output: Path, *options: str) -> tuple[int, str]:
        """The exit code of a run that is left alone, and the last line that it printed."""
        process = self.start(output, *options)
        _, printed = process.communicate(timeout=_PATIENCE_SECONDS)
        return process.returncode, (printed.strip().splitlines() or [""])[-1]

    def interrupt(self, output: Path, number: Signals, seconds: float) -> Interruption:
        process = self.start(output)
        began = time.monotonic()
        sent: Signals | None = None
        try:
            process.communicate(timeout=seconds)
        except subprocess.TimeoutExpired:
            seconds, sent = time.monotonic() - began, number
            process.send_signal(number)
            process.communicate(timeout=_PATIENCE_SECONDS)
        else:
            seconds = time.monotonic() - began
        return Interruption(sent, seconds, process.returncode, status_of(output, process.pid), output.exists())


def status_of(output: Path, process_id: int) -> dict[str, Any] | None:
    """What this very process said last."""
    for folder in (output, output.with_name(f"{output.name}.uptraining")):
        if (folder / _STATUS).exists():
            status: dict[str, Any] = json.loads((folder / _STATUS).read_text())
            if status["process_id"] == process_id:
                return status
    return None


def run_trial(command: Command, output: Path, reference: Path, plan: Sequence[tuple[Signals, float]]) -> Trial:
    """Interrupt the command as planned, each time after so many seconds, then let it end; its output is removed."""
    interruptions = []
    for number, seconds in plan:
        interruptions.append(command.interrupt(output, number, seconds))
        if interruptions[-1].sent is None:
            break
    exit_code, error = command.finish(output)
    equal = is_equal(output, reference)
    left = sorted(path.name for path in output.parent.iterdir() if path != output)
    shutil.rmtree(output.parent)
    return Trial(tuple(interruptions), exit_code, error, equal, tuple(left))


def plans(*, trials: int, kills: int, longest: float, seed: int) -> Iterator[list[tuple[Signals, float]]]:
    """For each trial its signals, which take turns, and moments."""
    generator = random.Random(seed)
    for trial in range(trials):
        yield [(_SIGNALS[(trial + kill) % 2], generator.uniform(0, longest)) for kill in range(kills)]


def main() -> None:
    arguments = _parse()
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        command = _command(arguments, work)
        reference, other = work / "alone" / "out", work / "control" / "out"
        with ThreadPoolExecutor(max_workers=arguments.jobs) as executor:
            alone = executor.submit(_time, command, reference)
            control = executor.submit(_time, command, other, "--seed", "1")
            longest = min(alone.result(), control.result())
            print(f"undisturbed: {longest:.1f} s, {len(comparable((reference / _METRICS).read_text()))} records")
            planned = plans(trials=arguments.trials, kills=arguments.kills, longest=longest, seed=arguments.seed)
            running = [
                executor.submit(run_trial, command, work / f"trial-{number}" / "out", reference, plan)
                for number, plan in enumerate(planned, start=1)
            ]
            print("| trial | signal | after s | run_status.json | exit code | then | equal |")
            print("|---|---|---|---|---|---|---|")
            trials = []
            for number, future in enumerate(running, start=1):
                trials.append(future.result())
                _show(number, trials[-1])
        differs = not is_equal(other, reference)
        idle = _nothing_happens_again(command, reference)
    passed = all(trial.is_as_it_should_be for trial in trials) and differs and idle
    _summarise(trials, differs=differs, idle=idle)
    sys.exit(0 if passed else 1)


def _time(command: Command, output: Path, *options: str) -> float:
    """Seconds that a run which nothing disturbs takes."""
    began = time.monotonic()
    exit_code, error = command.finish(output, *options)
    if exit_code:
        sys.exit(f"a run that nothing disturbed ended with {exit_code}: {error}")
    return time.monotonic() - began


def _command(arguments: argparse.Namespace, work: Path) -> Command:
    model, teacher = work / "gqa2", _DEMO / "model"
    subprocess.run(
        [_program(), "mha2gqa", str(teacher), "--groups", "2", "--method", "mean", "--output", str(model), "--quiet"],
        stdout=subprocess.DEVNULL,
        check=True,
    )
    options: dict[str, object] = {
        "--data": _DEMO / "uptrain.jsonl",
        "--teacher": teacher,
        "--layerwise-fraction": 0.25,
        "--steps": arguments.steps,
        "--save-steps": arguments.save_steps,
        "--log-steps": 1,  # a loss over more steps would begin anew where a run goes on
        "--validation-fraction": 0.1,
        "--eval-steps": max(arguments.steps // 4, 1),
        "--global-batch-tokens": 512,
        "--sequence-length": 128,
        "--micro-batch": 2,
    }
    return Command((str(model), *(str(part) for pair in options.items() for part in pair)))


def _nothing_happens_again(command: Command, output: Path) -> bool:
    """Whether the command of a finished run exits with 0 and touches no file."""

    def state() -> dict[str, tuple[int, int]]:
        files = [path for path in output.parent.rglob("*") if path.is_file()]
        return {str(path): (path.stat().st_ino, path.stat().st_mtime_ns) for path in files}

    before = state()
    return command.finish(output)[0] == 0 and state() == before


def _show(number: int, trial: Trial) -> None:
    last = str(trial.last_exit_code) + (f": {trial.error}" if trial.last_exit_code else "")
    for index, interruption in enumerate(trial.interruptions, start=1):
        row = f"| {number} | {interruption} |"
        is_last = index == len(trial.interruptions)
        end = f" {last} | {'yes' if trial.equal else 'NO'} |" if is_last else " | |"
        print(row + end + ("" if interruption.is_as_it_should_be else " not the exit code or status it should be"))
    sys.stdout.flush()


def _summarise(trials: Sequence[Trial], *, differs: bool, idle: bool) -> None:
    interruptions = [one for trial in trials for one in trial.interruptions]
    phases = Counter(f"{one.sent.name} {one.phase}" for one in interruptions if one.sent is not None)
    codes = Counter(one.exit_code for one in interruptions if one.sent is Signals.SIGTERM)
    left = Counter(name for trial in trials for name in trial.left_behind)
    print(f"equal: {sum(trial.equal for trial in trials)} of {len(trials)} trials")
    print(f"as they should be: {sum(trial.is_as_it_should_be for trial in trials)} of {len(trials)} trials")
    print(f"interrupted: {_counts(phases)}")
    print(f"exit codes after SIGTERM: {_counts(codes)}")
    print(f"left beside the result: {_counts(left)}")
    print(f"control, another order of blocks: {'differs' if differs else 'DOES NOT DIFFER'}")
    print(f"the finished command again: {'exit code 0, no file touched' if idle else 'NOT IDLE'}")


def _counts(counter: Counter[Any]) -> str:
    return ", ".join(f"{count} × {key}" for key, count in sorted(counter.items(), key=str)) or "none"


def _program() -> str:
    return str(Path(sys.executable).with_name("kvconvert"))


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=20)
    parser.add_argument("--kills", type=int, default=1, help="interruptions of a trial")
    parser.add_argument("--jobs", type=int, default=2, help="trials at a time, each on one core")
    parser.add_argument("--steps", type=int, default=64)
    parser.add_argument("--save-steps", type=int, default=4)
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    return parser.parse_args()


if __name__ == "__main__":
    main()
