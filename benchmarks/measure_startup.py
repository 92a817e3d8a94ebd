"""Measure what commands cost before they work: user and system time of --help, inspect and a conversion of 7 MB.

    python benchmarks/measure_startup.py [--runs 5]

The times are those of the whole process, and of all runs the least, since others on the machine only add to it. Beside
them stands what `import torch` costs in the same runs, in turn. Prints a Markdown table.
"""

import argparse
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from kvconvert import configs

PROGRAM = str(Path(sys.executable).with_name("kvconvert"))
MODEL = str(configs.DEMO / "model")


def cpu_seconds(command: Sequence[str]) -> float:
    """User and system time of a process and what it started. Raises CalledProcessError where it fails."""
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, command)
    return usage.ru_utime + usage.ru_stime


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--runs", type=int, default=5)
    runs = parser.parse_args().runs
    with tempfile.TemporaryDirectory() as folder:
        output = str(Path(folder) / "out")
        conversion = ["mha2gqa", MODEL, "--groups", "2", "--method", "mean", "--output", output, "--force"]
        commands = {
            "`import torch`": [sys.executable, "-c", "import torch"],
            "`kvconvert --help`": [PROGRAM, "--help"],
            "`kvconvert inspect`, the demo's checkpoint": [PROGRAM, "inspect", MODEL],
            "`kvconvert mha2gqa --method mean`, 7 MB": [PROGRAM, *conversion],
        }
        times: dict[str, list[float]] = {name: [] for name in commands}
        for _ in range(runs):
            for name, command in commands.items():
                times[name].append(cpu_seconds(command))
    reference = min(times["`import torch`"])
    print("| | CPU s | of `import torch` |\n|---|---|---|")
    for name, measured in times.items():
        print(f"| {name} | {min(measured):.2f} | {min(measured) / reference:.2f} |")


if __name__ == "__main__":
    main()
