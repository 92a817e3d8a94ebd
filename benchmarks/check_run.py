"""Check that a run of a recipe that is killed in each of its stages ends with the bytes of one that is not.

    python benchmarks/check_run.py RECIPE FOLDER [--whole DIR] [--seed N] [--longest SECONDS] [--set KEY=VALUE …]

Runs the recipe into FOLDER/whole, unless DIR holds such a run, and then into FOLDER/ended, which gets SIGKILL once in
each stage, at a random moment of its first SECONDS, and is begun again. Compares the checkpoints, but for files that
say when and how fast they were made, and the evaluation. Prints what was killed when, and exits with 1 on a difference.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
import subprocess
import sys
import time
from pathlib import Path

_STAGES = ("convert", "uptrain", "evaluate")
_OF_TIME = ("metrics.jsonl", "run_status.json", "run_files.json")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--whole", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--longest", type=float, default=30)
    parser.add_argument("--set", action="append", default=[])
    asked = parser.parse_args()
    asked.folder.mkdir(parents=True, exist_ok=True)
    overrides = [word for each in asked.set for word in ("--set", each)]
    whole, ended = asked.whole or asked.folder / "whole", asked.folder / "ended"
    program = str(Path(sys.executable).with_name("kvconvert"))
    command = [program, "run", str(asked.recipe), *overrides, "--quiet", "--output"]
    if asked.whole is None:
        subprocess.run([*command, str(whole)], check=True)
    chance = random.Random(asked.seed)
    for stage in _STAGES:
        after = chance.uniform(0, asked.longest)
        process = subprocess.Popen([*command, str(ended)])
        wait_for(ended / "run_status.json", stage, process)
        time.sleep(after)
        if process.poll() is not None:
            raise SystemExit(f"{stage} was over before {after:.1f} s: give a smaller --longest")
        process.kill()
        process.wait()
        print(f"killed {after:.1f} s into {stage}", flush=True)
    subprocess.run([*command, str(ended)], check=True)
    one, other = digests(whole), digests(ended)
    different = sorted(name for name in {*one, *other} if one.get(name) != other.get(name))
    print(f"{len(one)} files compared, {len(different)} differ" + "".join(f"\n  {name}" for name in different))
    raise SystemExit(1 if different or not one else 0)


def wait_for(status: Path, stage: str, process: subprocess.Popen[bytes]) -> None:
    """Wait until the run is in a stage."""
    while process.poll() is None:
        if status.exists() and json.loads(status.read_text()).get("stage") == stage:
            return
        time.sleep(0.05)
    raise SystemExit(f"the run was over before {stage}")


def digests(run: Path) -> dict[str, str]:
    """The SHA-256 of what a run promises the bytes of."""
    paths = [path for name in ("converted", "uptrained") for path in (run / name).rglob("*") if path.is_file()]
    paths = [*(path for path in paths if path.name not in _OF_TIME), run / "evaluation.json"]
    return {str(path.relative_to(run)): hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}


if __name__ == "__main__":
    main()
