"""What the terminal shows of names that others chose, and what happens where nothing takes the output."""

from __future__ import annotations

import io
import json
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import typer
from conftest import KVCONVERT, CheckpointFactory, Command
from kvconvert.cli import console
from kvconvert.cli.console import Terminal, say
from kvconvert.convert.errors import OutputError
from kvconvert.convert.printable import printable
from safetensors.torch import load_file, save_file

HOSTILE = "a\x1b[2J\x07\x9b31m\u202eb\nc"
SHOWN = "a\\x1b[2J\\x07\\x9b31m\\u202eb\\x0ac"


def test_what_a_terminal_obeys_is_shown_as_text() -> None:
    assert printable(HOSTILE) == SHOWN
    assert printable("\u2028\ufeff\ud800\U000e0041") == "\\u2028\\ufeff\\ud800\\U000e0041"
    assert printable("ünï 東京 🙂\t→ ½") == "ünï 東京 🙂\t→ ½"


def test_a_long_line_is_cut_in_its_middle() -> None:
    line = "a" * 1500 + "b" * 100_000 + "c" * 500
    assert printable(line) == "a" * 1500 + " … 100000 characters … " + "c" * 500
    assert printable("a" * 2000) == "a" * 2000


def test_results_and_remarks_are_shown_so(capsys: pytest.CaptureFixture[str]) -> None:
    terminal = Terminal()
    terminal.remark(HOSTILE)
    terminal.result({}, lambda results: results.print(HOSTILE))
    say(HOSTILE)
    assert capsys.readouterr() == (f"{SHOWN}\n", f"{SHOWN}\n{SHOWN}\n")


def test_json_is_of_ascii_and_has_the_name_as_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    Terminal(as_json=True).result({"name": HOSTILE}, lambda results: None)
    printed = capsys.readouterr().out
    assert printed.isascii()
    assert printed.isprintable() is False  # but for line breaks
    assert not set(printed) & {"\x1b", "\x07"}
    assert json.loads(printed) == {"name": HOSTILE}


def test_a_name_of_a_tensor_in_an_error(make_checkpoint: CheckpointFactory, invoke: Command) -> None:
    source = make_checkpoint()
    tensors = load_file(source / "model.safetensors")
    name = "model.layers.0.self_attn.k_proj.weight\x1b]0;x\x07" + "y" * 100_000
    save_file(tensors | {name: tensors["lm_head.weight"].clone()}, source / "model.safetensors", {"format": "pt"})
    outcome = invoke("mha2gqa", source, "--groups", 2)
    assert outcome.returncode == 2
    assert "\x1b" not in outcome.stderr
    assert "k_proj.weight\\x1b]0;x\\x07yyy" in outcome.stderr
    assert max(map(len, outcome.stderr.splitlines())) < 2100


class _Stream(io.StringIO):
    """A stream whose reader has gone, or whose disk is full."""

    def __init__(self, error: OSError) -> None:
        super().__init__()
        self._error = error

    def write(self, text: str) -> int:
        raise self._error


@pytest.mark.parametrize("as_json", [True, False])
def test_a_result_that_cannot_be_printed(as_json: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdout", _Stream(OSError(28, "No space left on device")))
    with pytest.raises(OutputError, match=r"what the command prints cannot be written \(No space left on device\)"):
        Terminal(as_json=as_json).result({"a": 1}, lambda results: results.print("a"))


@pytest.mark.parametrize("as_json", [True, False])
def test_a_result_that_nobody_reads(as_json: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdout", _Stream(BrokenPipeError(32, "Broken pipe")))
    with pytest.raises(typer.Exit) as caught:
        Terminal(as_json=as_json).result({"a": 1}, lambda results: results.print("a"))
    assert caught.value.exit_code == 141


def test_no_command_ends_for_a_remark(monkeypatch: pytest.MonkeyPatch) -> None:
    for error in (OSError(28, "No space left on device"), BrokenPipeError(32, "Broken pipe")):
        monkeypatch.setattr(sys, "stderr", _Stream(error))
        Terminal().remark("a")
        say("a")
    monkeypatch.setattr(sys, "stderr", None)
    say("a")


def test_an_error_of_a_file_is_not_one_of_stdout() -> None:
    with pytest.raises(FileNotFoundError), console.stdout_errors():
        Path("/nowhere/at/all").read_text()


class _Log(io.StringIO):
    """A log that no terminal shows, and that can be waited for."""

    def __init__(self) -> None:
        super().__init__()
        self.grew = threading.Event()

    def write(self, text: str) -> int:
        written = super().write(text)
        self.grew.set()
        return written


def log_in_place_of_stderr(monkeypatch: pytest.MonkeyPatch) -> _Log:
    """In a test's own body: between the phases of a test, pytest puts a stderr of its own."""
    made = _Log()
    monkeypatch.setattr(sys, "stderr", made)
    return made


def test_progress_elsewhere_is_a_line_now_and_then(monkeypatch: pytest.MonkeyPatch) -> None:
    log, now = log_in_place_of_stderr(monkeypatch), [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    with Terminal().progress("merging", 10) as advance:
        for second in range(0, 100, 10):
            now[0] = second
            advance(1)
    assert log.getvalue().splitlines() == ["merging: 40 %", "merging: 70 %", "merging: 100 %"]


@pytest.mark.parametrize("within", [True, False])
def test_a_stage_that_says_nothing_is_told_to_be_at_work(within: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Inside of a progress that does not advance, and after a remark."""
    log = log_in_place_of_stderr(monkeypatch)
    monkeypatch.setattr(console, "_SECONDS_BETWEEN_LINES", 0.05)
    terminal = Terminal()
    if within:
        with terminal.progress("merging", 10):
            terminal.remark("a remark in between")
            log.grew.clear()
            assert log.grew.wait(30)
    else:
        terminal.remark("checking weights")
        log.grew.clear()
        assert log.grew.wait(30)
    what = "merging: 0 %" if within else "checking weights"
    assert re.search(rf"^{what}: still at work after \d+ s$", log.getvalue(), re.MULTILINE)


def test_no_line_comes_where_none_is_wanted_or_after_the_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    def pulses() -> list[threading.Thread]:
        return [thread for thread in threading.enumerate() if thread.name == "kvconvert-pulse"]

    monkeypatch.setattr(console, "_SECONDS_BETWEEN_LINES", 0.05)
    before = set(pulses())
    Terminal(quiet=True)
    assert set(pulses()) == before
    terminal = Terminal()
    (pulse,) = set(pulses()) - before
    del terminal
    pulse.join(30)
    assert not pulse.is_alive()


@pytest.mark.parametrize("variables", [{"FORCE_COLOR": "1"}, {"NO_COLOR": "1"}, {"TTY_COMPATIBLE": "1"}])
def test_a_log_has_no_ansi_whatever_the_environment_says(
    variables: dict[str, str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """CI sets them, and a live bar in a log is a line for each of its frames."""
    log = log_in_place_of_stderr(monkeypatch)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    terminal = Terminal()
    with terminal.progress("merging", 2) as advance:
        advance(2)
    terminal.remark("done")
    terminal.result({}, lambda results: results.print("[bold]12 %[/bold]"))
    assert log.getvalue() == "merging: 100 %\ndone\n"
    assert capsys.readouterr().out == "[bold]12 %[/bold]\n"


def test_a_terminal_has_a_bar_and_no_colour_where_none_is_wanted(kvconvert_on_a_terminal: Callable[..., bytes]) -> None:
    shown = kvconvert_on_a_terminal(NO_COLOR="1")
    assert b"merging" in shown
    assert b"\x1b[?25l" in shown  # a bar hides the cursor
    assert re.search(rb"\x1b\[[\d;]*m", shown) is None
    assert re.search(rb"\x1b\[[\d;]*m", kvconvert_on_a_terminal()) is not None  # the control


@pytest.fixture
def kvconvert_on_a_terminal() -> Callable[..., bytes]:
    """What a terminal gets of a command's progress, in a process of its own."""

    def run(**variables: str) -> bytes:
        program = (
            "from kvconvert.cli.console import Terminal\nwith Terminal().progress('merging', 2) as advance: advance(2)"
        )
        leader, follower = os.openpty()
        environment = {**os.environ, "TERM": "xterm-256color", **variables}
        subprocess.run([sys.executable, "-c", program], stderr=follower, env=environment, check=True)
        os.close(follower)
        shown = os.read(leader, 2**16)
        os.close(leader)
        return shown

    return run


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="a device of Linux")
def test_the_installed_command_says_that_stdout_is_full() -> None:
    def ended(stdout: Any) -> tuple[int, bytes]:
        done = subprocess.run([KVCONVERT, "inspect", "--help"], stdout=stdout, stderr=subprocess.PIPE, check=False)
        return done.returncode, done.stderr

    with Path("/dev/full").open("wb") as full:
        code, text = ended(full)
    assert (code, text.splitlines()[0]) == (
        2,
        b"error: what the command prints cannot be written (No space left on device)",
    )
    read, write = os.pipe()
    os.close(read)
    assert ended(write) == (141, b"")
    os.close(write)
