"""The workflows of docs/ci.md and the Dockerfile: what they call is there, and the Slurm script does what it says."""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from doc_blocks import blocks_of
from kvconvert.cli.main import app
from typer.main import get_command

ROOT = Path(__file__).parent.parent
WORKFLOWS = [*sorted((ROOT / "docs/workflows").iterdir()), ROOT / "docs/ci.md"]
COMMANDS: dict[str, Any] = get_command(app).commands  # type: ignore[attr-defined]
SLURM = ROOT / "docs/workflows/uptrain.sbatch"
CALL = re.compile(r"(?<![\w/.-])kvconvert\)?\"? (?=[a-z])([^\n|;&>)`]+)")


def calls(text: str) -> list[list[str]]:
    """The commands of kvconvert in a script, with their arguments; comments and what is installed are none."""
    lines = "\n".join(line for line in text.replace("\\\n", " ").splitlines() if not line.lstrip().startswith("#"))
    return [shlex.split(found) for found in CALL.findall(lines)]


def blocks(page: Path) -> str:
    """The lines of a page that are to be typed."""
    return "\n".join(block.text for block in blocks_of(page) if block.language == "bash")


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
def test_every_command_and_option_of_a_workflow_is_there(path: Path) -> None:
    found = calls(path.read_text() if path.suffix != ".md" else blocks(path))
    assert found
    for command, *arguments in found:
        COMMANDS[command].make_context(command, arguments)  # raises for what the command does not take


def test_an_option_that_is_not_there_is_found() -> None:
    """The control."""
    ((command, *arguments),) = calls(
        '  kvconvert evaluate "$MODEL" \\\n    --data a.jsonl --max-perplexity 3 || exit 1\n'
    )
    assert arguments == ["$MODEL", "--data", "a.jsonl", "--max-perplexity", "3"]
    with pytest.raises(Exception, match="No such option: --max-perplexity"):
        COMMANDS[command].make_context(command, arguments)


def test_the_workflow_of_github_is_one(tmp_path: Path) -> None:
    """It parses, its scripts are bash, and what it asks of a step is an output of that step."""
    text = (ROOT / "docs/workflows/convert.yml").read_text()
    workflow = yaml.safe_load(text)
    assert workflow[True] == {"workflow_dispatch": {"inputs": workflow[True]["workflow_dispatch"]["inputs"]}}  # `on`
    steps = workflow["jobs"]["convert"]["steps"]
    for step in steps:
        assert ("uses" in step) != ("run" in step)
        if "run" in step:
            subprocess.run(["bash", "-n", "-c", step["run"]], check=True)
    written = {step["id"] for step in steps if "id" in step}
    assert set(re.findall(r"steps\.(\w+)\.", text)) == written == {"uptrain", "evaluate"}
    assert set(re.findall(r"steps\.evaluate\.outputs\.(\w+)", text)) == {"gates"}  # which kvconvert writes
    for name in re.findall(r"\$(?:\{\{ env\.)?([A-Z]{3,})\b", text):
        known = {
            *workflow["env"],
            "GITHUB_OUTPUT",
            "GITHUB_WORKFLOW",
            "GITHUB_REPOSITORY",
            "GITHUB_REF_NAME",
            "ATTEMPT",
        }
        assert any(name == each or each.startswith(f"{name}_") for each in known), name


def test_the_dockerfile_installs_extras_that_there_are() -> None:
    import tomllib

    text = (ROOT / "Dockerfile").read_text()
    (extras,) = re.findall(r"^ARG EXTRAS=(.*)$", text, re.MULTILINE)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert set(extras.split(",")) <= project["optional-dependencies"].keys()
    ignored = (ROOT / ".dockerignore").read_text().splitlines()
    built_from = {
        "pyproject.toml",
        "README.md",
        "LICENSE",
        "cli",
        "configs",
        "convert",
        "measure",
        "pipeline",
        "uptrain",
    }
    assert not built_from & set(ignored)
    assert all((ROOT / name).exists() for name in built_from)


@pytest.fixture
def slurm(tmp_path: Path) -> dict[str, str]:
    """An environment in which torchrun, kvconvert and scontrol are stand-ins that note what they are called with."""
    programs = {
        "torchrun": f"""#!{sys.executable}
import json, os, signal, sys
def end(number, frame):
    with open("recovered.uptraining/run_status.json", "w") as file:
        json.dump({{"state": "preempted", "exit_code": int(os.environ["EXITS_WITH"])}}, file)
    sys.exit(1)  # as torchrun does
signal.signal(signal.SIGUSR1, end)
open("arguments", "w").write(" ".join(sys.argv[1:]))
os.makedirs("recovered.uptraining", exist_ok=True)
print("begun", flush=True)
if os.environ["EXITS_WITH"] == "0":
    sys.exit(0)
if os.environ["EXITS_WITH"] == "at once":
    sys.exit(2)
signal.pause()
""",
        "kvconvert": "#!/bin/sh\n",
        "scontrol": '#!/bin/sh\necho "$@" > requeued\n',
    }
    for name, program in programs.items():
        (tmp_path / "bin").mkdir(exist_ok=True)
        (tmp_path / "bin" / name).write_text(program)
        (tmp_path / "bin" / name).chmod(0o755)
    return {**os.environ, "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}", "SLURM_JOB_ID": "7"}


@pytest.mark.parametrize(("exits_with", "code", "requeued"), [("75", 75, True), ("4", 4, False), ("0", 0, False)])
def test_a_slurm_job_is_requeued_on_75_only(
    exits_with: str, code: int, requeued: bool, slurm: dict[str, str], tmp_path: Path
) -> None:
    """Slurm sends SIGUSR1 to the script, and to nothing else."""
    environment = {**slurm, "EXITS_WITH": exits_with, "SLURM_GPUS_ON_NODE": "4"}
    process = subprocess.Popen(["bash", str(SLURM)], cwd=tmp_path, env=environment, stdout=subprocess.PIPE, text=True)
    with process:
        assert process.stdout is not None
        assert process.stdout.readline() == "begun\n"
        if exits_with != "0":
            process.send_signal(signal.SIGUSR1)
        assert process.wait(60) == code
    arguments = (tmp_path / "arguments").read_text().split()
    assert arguments[:2] == ["--nproc_per_node", "4"]
    assert arguments[2:4] == [str(tmp_path / "bin/kvconvert"), "uptrain"]
    assert (tmp_path / "requeued").exists() is requeued
    assert not requeued or (tmp_path / "requeued").read_text() == "requeue 7\n"


def test_a_slurm_job_that_fails_is_not_requeued_for_an_old_status(slurm: dict[str, str], tmp_path: Path) -> None:
    """The status of the job before says 75, and this one ended before it wrote one: it would go on for ever."""
    (tmp_path / "recovered.uptraining").mkdir()
    status = tmp_path / "recovered.uptraining/run_status.json"
    status.write_text(json.dumps({"exit_code": 75}))
    os.utime(status, (0, 0))
    done = subprocess.run(["bash", str(SLURM)], cwd=tmp_path, env={**slurm, "EXITS_WITH": "at once"}, check=False)
    assert done.returncode == 2
    assert not (tmp_path / "requeued").exists()
