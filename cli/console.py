"""What the terminal shows: results on stdout, everything else on stderr."""

from __future__ import annotations

import json
import os
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from ..convert.errors import OutputError
from ..convert.printable import jsonable, printable

__all__ = ["Terminal", "human_bytes", "human_count", "say", "show_left_behind", "stdout_errors"]

_NOBODY_READS = 141  # as of a program that SIGPIPE ends
_SECONDS_BETWEEN_LINES = 30.0  # where there is no terminal: a log of a day has 2880 of them
_NAMES_OF_A_LINE = 6


class Terminal:
    """How one command talks: `as_json` puts one JSON object on stdout, `quiet` drops progress and remarks.

    Where stderr is no terminal, a line says what is being done whenever nothing else was said for half a minute. Of
    several processes that a launcher started, only the first talks.
    """

    def __init__(self, *, as_json: bool = False, quiet: bool = False) -> None:
        self.is_first_process = os.environ.get("RANK", "0") == "0"
        quiet = quiet or not self.is_first_process
        if quiet:
            os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
        self.as_json = as_json
        self.quiet = quiet
        self.results = _Results(highlight=False, soft_wrap=True, markup=False)
        self.remarks = _Remarks(stderr=True, highlight=False, soft_wrap=True, markup=False, quiet=quiet)
        self.doing: object = "at work"
        self.is_live = sys.stderr is not None and sys.stderr.isatty()  # rich believes FORCE_COLOR, too
        if not (quiet or self.is_live):
            _begin_pulse(self)

    def result(self, data: dict[str, Any], show: Callable[[Console], object]) -> None:
        """Print the result once, as JSON or as `show` draws it. Raises as `stdout_errors` does.

        JSON is of ASCII, so that no terminal obeys what is in a name, and a reader finds the name as it is.
        """
        self.doing = "the result is printed"
        if not self.is_first_process:
            return
        with stdout_errors():
            if not self.as_json:
                show(self.results)
            elif sys.stdout is not None:  # else it was closed before the command began
                sys.stdout.write(json.dumps(jsonable(data), indent=2, allow_nan=False) + "\n")

    def remark(self, text: str) -> None:
        if not isinstance(self.doing, _PlainProgress):
            self.doing = text
        self.remarks.print(text)

    @contextmanager
    def progress(self, description: str, total: int) -> Iterator[Callable[[int], None]]:
        """Yields `advance(count)`: a live bar on a terminal, a line every thirty seconds elsewhere."""
        if self.quiet:
            yield lambda count: None
        elif self.is_live:
            columns = (
                TextColumn("{task.description}", markup=False),
                BarColumn(),
                TaskProgressColumn(),
                TimeElapsedColumn(),
                TimeRemainingColumn(),
            )
            with Progress(*columns, console=self.remarks) as bar:
                task = bar.add_task(description, total=total)
                yield lambda count: bar.advance(task, count)
        else:
            plain = self.doing = _PlainProgress(self.remarks, description, total)
            yield plain
            self.doing = f"{description} is done"


class _Results(Console):
    """Prints lines as a terminal may show them, and leaves errors of stdout to `stdout_errors`."""

    def print(self, *objects: Any, **options: Any) -> None:
        super().print(*(printable(each) if isinstance(each, str) else each for each in objects), **options)

    def on_broken_pipe(self) -> None:
        raise  # rich calls it where it has caught the error


class _Remarks(_Results):
    """Drops what cannot be printed: no conversion ends for a remark. `printed_at` is when something was, last."""

    printed_at = 0.0

    def print(self, *objects: Any, **options: Any) -> None:
        self.printed_at = time.monotonic()
        try:
            super().print(*objects, **options)
        except OSError:
            self.quiet = True


def _begin_pulse(terminal: Terminal) -> None:
    """Say what is being done when nothing was said for long, as long as there is the terminal."""
    terminal.remarks.printed_at = time.monotonic()
    threading.Thread(target=_pulse, args=(weakref.ref(terminal),), name="kvconvert-pulse", daemon=True).start()


def _pulse(reference: weakref.ref[Terminal]) -> None:
    pause, doing, since = _SECONDS_BETWEEN_LINES, None, 0.0
    while True:
        time.sleep(pause)
        terminal = reference()
        if terminal is None or terminal.remarks.quiet:
            return
        now = time.monotonic()
        if terminal.doing is not doing:
            doing, since = terminal.doing, terminal.remarks.printed_at
        silent = now - terminal.remarks.printed_at
        if silent >= _SECONDS_BETWEEN_LINES:
            try:
                terminal.remarks.print(f"{doing}: still at work after {now - since:.0f} s")
            except ValueError:  # stderr was closed
                return
            silent = 0.0
        pause = _SECONDS_BETWEEN_LINES - silent
        del terminal


@contextmanager
def stdout_errors() -> Iterator[None]:
    """Write to stdout inside the block, and find out there whether it can be written.

    Raises typer.Exit with 141, as SIGPIPE gives, where nobody reads any more, and OutputError where it is full.
    """
    try:
        yield
        if sys.stdout is not None:
            sys.stdout.flush()
    except BrokenPipeError as error:
        _discard_stdout()
        raise typer.Exit(_NOBODY_READS) from error
    except OSError as error:
        if error.filename is not None:  # of a file
            raise
        _discard_stdout()
        raise OutputError(
            f"what the command prints cannot be written ({error.strerror})",
            hint="all else is done, and complete; print to another place",
        ) from error


def _discard_stdout() -> None:
    """Let what is still held go nowhere, since Python would write it once more when it ends."""
    with suppress(OSError, ValueError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())
        os.close(nowhere)


def say(line: str) -> None:
    """Print a line on stderr, if there is one that takes it."""
    if sys.stderr is not None:
        with suppress(OSError):
            print(printable(line), file=sys.stderr, flush=True)


class _PlainProgress:
    def __init__(self, console: Console, description: str, total: int) -> None:
        self._console = console
        self._description = description
        self._total = total
        self._done = 0
        self._shown_at = time.monotonic()

    def __call__(self, count: int) -> None:
        self._done += count
        now = time.monotonic()
        if now - self._shown_at >= _SECONDS_BETWEEN_LINES or self._done >= self._total:
            self._shown_at = now
            self._console.print(str(self))

    def __str__(self) -> str:
        return f"{self._description}: {self._done * 100 // max(self._total, 1)} %"


def human_bytes(count: int) -> str:
    """1234567 as "1.23 MB"; powers of 1000."""
    value = float(count)
    for unit in ("bytes", "kB", "MB", "GB"):
        if value < 1000:
            return f"{value:.0f} {unit}" if unit == "bytes" else f"{value:.3g} {unit}"
        value /= 1000
    return f"{value:.3g} TB"


def human_count(count: int) -> str:
    """1234567 as "1.23 M"."""
    value = float(count)
    for unit in ("", " k", " M", " B"):
        if value < 1000:
            return f"{value:.3g}{unit}"
        value /= 1000
    return f"{value:.3g} T"


def show_left_behind(left_behind: Mapping[str, str], console: Console) -> None:
    """Print the names of what did not go with the weights, a line for each reason."""
    for reason in sorted(set(left_behind.values())):
        names = [name for name, why in left_behind.items() if why == reason]
        more = f" and {len(names) - _NAMES_OF_A_LINE} more" if len(names) > _NAMES_OF_A_LINE else ""
        console.print(f"  left behind {', '.join(names[:_NAMES_OF_A_LINE])}{more}: {reason}")
