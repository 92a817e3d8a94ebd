"""Where the program begins: what happens before the command itself is there to handle it."""

import subprocess
import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from importlib.metadata import entry_points
from types import ModuleType

import pytest
from kvconvert.cli import entry


class _Interrupting:
    """A finder of modules during whose search Ctrl-C is pressed, once `name` is looked for."""

    def __init__(self, name: str) -> None:
        self._name = name

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name == self._name:
            raise KeyboardInterrupt
        return None


def test_the_console_script_begins_there() -> None:
    (script,) = entry_points(group="console_scripts", name="kvconvert")
    assert script.load() is entry.main


def test_ctrl_c_during_imports_is_told_in_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delitem(sys.modules, "kvconvert.cli.main", raising=False)
    monkeypatch.setattr(sys, "meta_path", [_Interrupting("kvconvert.cli.main"), *sys.meta_path])
    with pytest.raises(SystemExit) as ended:
        entry.main()
    assert ended.value.code == 130
    assert capsys.readouterr().err == "error: interrupted\n"


def test_it_runs_the_command_and_collects_garbage_again() -> None:
    program = (
        "import gc, sys; from kvconvert.cli import entry; sys.argv = ['kvconvert', '--version']\n"
        "try: entry.main()\nfinally: print(gc.isenabled())"
    )
    outcome = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    version, collects = outcome.stdout.splitlines()
    assert version.startswith("kvconvert ")
    assert collects == "True"
