"""Errors for people: what they carry, and how the command line prints them."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import typer
from kvconvert.cli import main
from kvconvert.convert.errors import CheckpointError, DataError, first_line, in_one_line, is_out_of_memory
from typer.main import get_command
from typer.testing import CliRunner

CONVERT = Path(__file__).parents[1] / "convert"


def printed(error: BaseException, monkeypatch: pytest.MonkeyPatch, command: str = "inspect") -> tuple[int, str]:
    """Exit code and stderr of a command of kvconvert's in which this error is raised."""

    def opens(*arguments: object, **options: object) -> None:
        raise error

    monkeypatch.setattr("kvconvert.convert.describe.inspection.open_checkpoint", opens)
    monkeypatch.setattr("kvconvert.convert.conversion.open_checkpoint", opens)
    outcome = CliRunner().invoke(main.app, [command, "model", *(["--groups", "2"] if command == "mha2gqa" else [])])
    return outcome.exit_code, outcome.stderr


def test_a_hint_names_the_options_of_the_command_that_ran(monkeypatch: pytest.MonkeyPatch) -> None:
    error = CheckpointError("wrong", hint="choose another output", settings=("output", "force", "num_key_value_heads"))
    assert error.hint == "choose another output"
    assert printed(error, monkeypatch, "mha2gqa") == (
        2,
        "error: wrong\nhint: choose another output (--output, --force, --groups)\n",
    )
    assert printed(error, monkeypatch) == (2, "error: wrong\nhint: choose another output\n")  # inspect has none of them


def test_an_error_without_a_hint_has_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    assert printed(DataError("wrong\n  here", settings=("output",)), monkeypatch, "mha2gqa")[1] == "error: wrong here\n"


@pytest.mark.parametrize(
    "error",
    [
        MemoryError("too much"),
        torch.OutOfMemoryError("too much"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory"),
    ],
)
def test_out_of_memory_is_no_bug(error: BaseException, monkeypatch: pytest.MonkeyPatch) -> None:
    assert is_out_of_memory(error)
    error.add_note("while model was loaded")
    code, text = printed(error, monkeypatch)
    assert code == 2
    assert text == (
        f"error: out of memory while model was loaded ({error})\nhint: take a machine, or a device, with more memory\n"
    )


def test_another_runtime_error_is_a_bug(monkeypatch: pytest.MonkeyPatch) -> None:
    error = RuntimeError("shapes differ")
    assert not is_out_of_memory(error)
    code, text = printed(error, monkeypatch)
    assert code == 1
    assert text.startswith("error: unexpected RuntimeError: shapes differ\nhint: this is a bug")


def test_exceptions_of_libraries_in_one_line() -> None:
    error = ValueError("one\n  two\nthree")
    assert first_line(error) == "one"
    assert first_line(ValueError()) == "ValueError"
    assert in_one_line(error) == "ValueError: one two three"
    assert in_one_line(error, max_characters=15) == "ValueError: one"
    shapes = ValueError(f"copying {torch.Size([64, 32])} into {torch.Size([])}")
    assert in_one_line(shapes) == "ValueError: copying [64, 32] into []"


def settings_in_convert() -> Iterator[tuple[Path, str]]:
    for path in CONVERT.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.keyword) and node.arg == "settings" and isinstance(node.value, ast.Tuple):
                yield from ((path, ast.literal_eval(name)) for name in node.value.elts)


def test_every_setting_of_an_error_is_an_option_of_some_command() -> None:
    group = get_command(main.app)
    options = {parameter.name for command in group.commands.values() for parameter in command.params}  # type: ignore[attr-defined]
    found = dict.fromkeys(name for _, name in settings_in_convert())
    assert "text_field" in found
    assert set(found) <= options


# rooms whose callers are not the command line; engines.py names options of other programs, inspection.py is data
# describe/engines.py names options of engines, and describe/inspection.py commands, as data
QUIET_ROOMS = (
    *("algebra", "architectures", "calibration", "checkpoint", "methods", "text", "translations"),
    *("describe/card.py", "cache_check.py", "plan.py", "execute.py", "conversion.py"),
)
TYPED = re.compile(r"--[a-z]|\bmha2(gqa|mqa|cla|mla)\b|kvconvert (refresh|inspect)")


def texts_of(tree: ast.Module) -> Iterator[str]:
    """The texts of a module but for its docstrings."""
    statements = [node for node in ast.walk(tree) if isinstance(node, ast.Expr)]
    documentation = {id(node.value) for node in statements}
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in documentation:
            yield node.value


def test_the_library_names_no_option_and_no_command() -> None:
    files = [file for file in CONVERT.rglob("*.py") if str(file.relative_to(CONVERT)).startswith(QUIET_ROOMS)]
    assert len(files) > 30
    found = [(file.name, text) for file in files for text in texts_of(ast.parse(file.read_text()))]
    assert [(name, text) for name, text in found if TYPED.search(text)] == []


@pytest.mark.parametrize("hint", ["use --text-field", "mha2gqa takes it", "`kvconvert refresh` renews it"])
def test_a_text_that_names_an_option_is_found(hint: str) -> None:
    module = ast.parse(f'"""Says --text-field."""\nraise DataError(f"{{path}}: wrong", hint={hint!r})')
    assert [text for text in texts_of(module) if TYPED.search(text)] == [hint]


def test_typer_shows_wrong_usage_itself() -> None:
    outcome = CliRunner().invoke(main.app, ["mha2gqa", "model"])
    assert outcome.exit_code == 2
    assert "Usage:" in outcome.stderr


def test_an_exit_passes_through(monkeypatch: pytest.MonkeyPatch) -> None:
    assert printed(typer.Exit(7), monkeypatch) == (7, "")
