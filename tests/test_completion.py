"""Completion of the command line, as shells ask for it."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest
from conftest import KVCONVERT

# what bash does when Tab is pressed at the end of $1, without an interactive shell
PRESS_TAB = """
eval "$(kvconvert --show-completion)"
COMP_WORDS=($1) COMP_CWORD=$((${#COMP_WORDS[@]} - 1))
if [[ $1 == *' ' ]]; then COMP_WORDS+=('') COMP_CWORD=$((COMP_CWORD + 1)); fi
_kvconvert_completion kvconvert
printf '%s\\n' "${COMPREPLY[@]}"
"""


def environment(**variables: str) -> dict[str, str]:
    return {**os.environ, "PATH": f"{KVCONVERT.parent}:{os.environ['PATH']}", **variables}


@pytest.mark.parametrize(
    ("typed", "completed"),
    [
        ("kvconvert mha2", ["mha2gqa", "mha2mqa", "mha2cla", "mha2mla"]),
        ("kvconvert mha2gqa --gro", ["--groups", "--grouping"]),  # an option of ours, and one of the library's settings
        ("kvconvert mha2gqa model_dir --method ", ["mean", "first", "random", "svd"]),
        ("kvconvert evaluate --dty", ["--dtype"]),
        ("kvconvert verify ", [""]),  # a path, which bash completes itself
    ],
)
def test_bash_completes(typed: str, completed: list[str]) -> None:
    done = subprocess.run(
        ["bash", "-c", PRESS_TAB, "bash", typed], capture_output=True, text=True, env=environment(), check=True
    )
    assert (done.stdout.splitlines(), done.stderr) == (completed, "")


def test_zsh_is_told_names_and_what_they_are() -> None:
    variables = {"_KVCONVERT_COMPLETE": "complete_zsh", "_TYPER_COMPLETE_ARGS": "kvconvert mha2gqa --group"}
    done = subprocess.run([KVCONVERT], capture_output=True, text=True, env=environment(**variables), check=False)
    assert done.stdout.startswith("""_arguments '*: :(("--groups":"K/V heads of the result.\"""")
    assert '"--grouping":"svd' in done.stdout


@pytest.mark.parametrize(("shell", "file"), [("bash", ".bash_completions/kvconvert.sh"), ("zsh", ".zfunc/_kvconvert")])
def test_completion_is_installed_for_a_shell(shell: str, file: str, tmp_path: Path) -> None:
    """Which typer tells by the process that calls it, unless it is asked not to."""
    program = [str(KVCONVERT), "--install-completion", shell]
    variables = environment(HOME=str(tmp_path), _TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION="1")
    done = subprocess.run(program, capture_output=True, text=True, env=variables, check=True)
    assert f"{shell} completion installed in {tmp_path / file}" in done.stdout
    assert "_KVCONVERT_COMPLETE=complete_" in (tmp_path / file).read_text()
    assert (tmp_path / f".{shell}rc").exists()
