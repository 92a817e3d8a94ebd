"""The `kvconvert` command: its sub-commands, and the one place where errors are printed."""

from __future__ import annotations

import io
import signal
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import Annotated, Any, NoReturn

import typer
from typer.core import TyperGroup

from ..convert.checkpoint.hub import without_secrets
from ..convert.errors import InputError, KvConvertError, first_line, is_out_of_memory
from .benchmark import benchmark
from .console import say, stdout_errors
from .demo import demo
from .evaluate import evaluate
from .inspect import inspect
from .mha2cla import mha2cla
from .mha2gqa import mha2gqa, mha2mqa
from .mha2mla import mha2mla
from .options import Command
from .push import push
from .refresh import refresh
from .run import run, schema
from .sweep import sweep
from .uptrain import uptrain
from .verify import verify

__all__ = ["app"]

_INTERRUPTED = 130
_ENDING = (signal.SIGTERM, signal.SIGHUP) if hasattr(signal, "SIGHUP") else (signal.SIGTERM,)


class _Commands(TyperGroup):
    """Turns errors into one line on stderr, an optional hint, and the documented exit code."""

    def make_context(self, *arguments: Any, **options: Any) -> Any:
        for stream in (sys.stdout, sys.stderr):  # an arrow in a message is no reason to fail
            if isinstance(stream, io.TextIOWrapper):
                stream.reconfigure(errors="backslashreplace")
        with _errors_for_people(debug=False, flags=list), stdout_errors():  # of --help and --version
            return super().make_context(*arguments, **options)

    def invoke(self, ctx: Any) -> Any:
        with _errors_for_people(debug=bool(ctx.params.get("debug")), flags=lambda names: self._flags(ctx, names)):
            return super().invoke(ctx)

    def _flags(self, ctx: Any, settings: Sequence[str]) -> list[str]:
        """The options that fill these settings of the library, of those that the command has."""
        command = self.commands.get(ctx.invoked_subcommand)
        parameters = command.params if command else []
        spelled = {parameter.name: [*parameter.opts, *parameter.secondary_opts] for parameter in parameters}
        options = [max(spelled[setting], key=len) for setting in settings if spelled.get(setting)]
        return [option for option in options if option.startswith("--")]


app = typer.Typer(
    cls=_Commands,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help="Convert a multi-head-attention checkpoint into one with a smaller K/V cache, then uptrain it.",
)
_COMMANDS = (
    *(inspect, mha2gqa, mha2mqa, mha2cla, mha2mla, uptrain, evaluate, benchmark, sweep),
    *(run, schema, verify, push, refresh, demo),
)
for command in _COMMANDS:
    app.command(cls=Command)(command)


def _print_version(value: bool) -> None:
    if value:
        from importlib.metadata import version

        typer.echo(f"kvconvert {version('kvconvert')}")
        raise typer.Exit


@app.callback()
def kvconvert(
    show_version: Annotated[
        bool, typer.Option("--version", is_eager=True, callback=_print_version, help="Print the version and exit.")
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    pass


@contextmanager
def _errors_for_people(*, debug: bool, flags: Callable[[Sequence[str]], list[str]]) -> Iterator[None]:
    ours = {number: signal.getsignal(number) for number in _ENDING if signal.getsignal(number) == signal.SIG_DFL}
    for number in ours:  # what nohup ignores stays ignored
        signal.signal(number, _end)
    try:
        yield
    except KvConvertError as error:
        _fail(str(error), _hint(error.hint, flags(error.settings)), error.exit_code, debug)
    except KeyboardInterrupt as error:
        _fail("; ".join(["interrupted", *getattr(error, "__notes__", [])]), None, _INTERRUPTED, debug)
    except _EndedError as error:
        name = signal.Signals(error.number).name
        _fail("; ".join([f"ended by {name}", *getattr(error, "__notes__", [])]), None, 128 + error.number, debug)
    except (typer.Exit, typer.Abort, SystemExit):
        raise
    except BaseException as error:
        # a panic in a library of Rust is none of Python's exceptions
        if _is_usage_error(error) or not (isinstance(error, Exception) or type(error).__name__ == "PanicException"):
            raise
        if is_out_of_memory(error):
            during = " ".join(["", *getattr(error, "__notes__", [])])
            hint = "take a machine, or a device, with more memory"
            _fail(f"out of memory{during} ({first_line(error)})", hint, InputError.exit_code, debug)
        hint = "this is a bug: run again with `kvconvert --debug …` and report the traceback"
        _fail(f"unexpected {type(error).__name__}: {error}", None if debug else hint, 1, debug)
    finally:
        for number, handler in ours.items():
            signal.signal(number, handler)


def _hint(hint: str | None, flags: Sequence[str]) -> str | None:
    """The hint, and how to type what it says."""
    if hint is None or not flags:
        return hint
    return f"{hint} ({', '.join(flags)})"


class _EndedError(SystemExit):
    """Unwinds the program after a signal, so that what is half made is removed."""

    def __init__(self, number: int) -> None:
        super().__init__(128 + number)
        self.number = number


def _end(number: int, frame: FrameType | None) -> NoReturn:
    raise _EndedError(number)


def _is_usage_error(error: BaseException) -> bool:
    """Whether typer itself knows how to show it: a wrong option, a missing argument."""
    return hasattr(error, "exit_code") and hasattr(error, "show")


def _fail(message: str, hint: str | None, exit_code: int, debug: bool) -> NoReturn:
    if debug and sys.stderr is not None:
        sys.stderr.write(without_secrets(traceback.format_exc()))
    say(f"error: {without_secrets(' '.join(message.split()))}")
    if hint:
        say(f"hint: {' '.join(hint.split())}")
    raise typer.Exit(exit_code)
