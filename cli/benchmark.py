"""kvconvert benchmark."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from .. import measure
from ..convert.errors import InputError
from ..measure.speed import BenchmarkSettings
from ..pipeline import option_groups
from ..pipeline.defaults import against_of
from .console import Terminal, human_bytes
from .options import Given, Json, Model, Quiet, Revision, SettingsOptions, TrustRemoteCode, accepts

if TYPE_CHECKING:
    from ..measure.speed import Benchmark, Durations, Gain, Point, Timing

__all__ = ["benchmark"]

_DEFAULTS = BenchmarkSettings()
_SETTINGS = SettingsOptions(
    "settings",
    option_groups.BENCHMARK,
    "Timing",
    types={"batches": list[str], "contexts": list[str]},
    defaults={name: list(map(str, getattr(_DEFAULTS, name))) for name in ("batches", "contexts")},
)

_ABOVE = "the step does more than it has to, such as copying a cache that grows, and the larger one pays more for it"
_NOISE = "rounds disagree by more than half; leave the machine alone, or take more --repeats and --tokens"

Cell = Callable[["Timing"], str]
Columns = dict[str, Callable[["Point"], str]]


@dataclass(frozen=True)
class Request:
    """What is compared, and what is shown."""

    against: Annotated[
        str | None,
        typer.Option(
            help="The original, timed in turn with MODEL: adds what is gained, and how much could be. Default: the "
            "original that the manifest of MODEL names, where it still is what was converted.",
            show_default=False,
            rich_help_panel="Model",
        ),
    ] = None
    no_against: Annotated[
        bool,
        typer.Option("--no-against", help="Time MODEL alone.", rich_help_panel="Model"),
    ] = False
    picture: Annotated[
        Path | None,
        typer.Option(
            help="Draw decode time against context, with its bound, into this .png or .svg file (kvconvert[plot]).",
            show_default=False,
            rich_help_panel="Output",
        ),
    ] = None
    revision: Revision = None
    trust_remote_code: TrustRemoteCode = False
    as_json: Json = False
    quiet: Quiet = False


@accepts(_SETTINGS, Request)
def benchmark(model: Model, settings: Given[BenchmarkSettings], request: Request) -> None:
    """Time decoding and prefill, and measure the live cache and the memory, alone or in turn with the original.

    Example: kvconvert benchmark model_dir-gqa8 --against model_dir --batch 1,8 --context 1024,8192 --memory 80GB
    """
    terminal = Terminal(as_json=request.as_json, quiet=request.quiet)
    if request.picture is not None:
        from ..measure.pictures import check_picture

        check_picture(request.picture)
    chosen = settings.build(batches=_numbers(settings, "batches"), contexts=_numbers(settings, "contexts"))
    against = against_of(model, request.against, request.no_against, terminal.remark)
    timed = measure.benchmark(
        model, against=against, settings=chosen, revision=request.revision, progress=terminal.progress
    )
    if request.picture is not None:
        from ..measure.pictures import decode_times, draw_decode

        draw_decode(request.picture, decode_times(timed))
        terminal.remark(f"wrote {request.picture}")
    summary = {"model": model, "against": against, "settings": asdict(chosen)} | asdict(timed)
    terminal.result(summary, lambda console: _show(model, against, chosen, timed, console))


def _numbers(settings: Given[BenchmarkSettings], name: str) -> tuple[int, ...]:
    """The numbers of an option that may be repeated and takes a list, such as 1,8,64."""
    parts = [part.strip() for typed in settings.values[name] for part in typed.split(",")]
    for part in parts:
        if not (part.isascii() and part.isdigit()):
            flag = settings.options.flag(name)
            raise InputError(f"{flag}: {part!r} is not a whole number", hint=f"write for example {flag} 1,8,64")
    return tuple(map(int, parts))


def _show(model: str, against: str | None, settings: BenchmarkSettings, timed: Benchmark, console: Console) -> None:
    both = against is not None
    threads = timed.machine["threads"]
    console.print(f"{model} against {against}" if both else model)
    console.print(f"  machine       {timed.machine['device']}" + (f", threads: {threads}" if threads else ""))
    console.print(f"  versions      {', '.join(f'{name} {number}' for name, number in timed.versions.items())}")
    console.print(f"  precision     {timed.dtype}")
    console.print(f"  method        {timed.method}")
    for note in timed.notes:
        console.print(f"  note          {note}")
    console.print("decoding, ms per step, which gives each sequence a token: median (90th percentile)")
    _print_table(_decoding(both), timed.points, console)
    for line in _about_gains(timed) if both else ():
        console.print(f"  {line}")
    if settings.prefill:
        console.print("prefill, ms for the prompts of the batch: median (90th percentile)")
        _print_table(_prefill(both), timed.points, console)
        if both:
            console.print("  no gain is to be expected here: keys and values of a prompt are computed, not read;")
            console.print("  what differs is noise, or that the projections are smaller")
    console.print(f"memory, in {timed.dtype}")
    _print_table(_memory(both, settings), timed.points, console)
    if settings.engine == "vllm":
        console.print("  blocks, tokens and the sequences that fit at once: as vLLM says when it starts")
        return
    console.print("  cache: of the batch, from live tensors after the prompt")
    console.print("  peak: weights, cache and what a turn needs besides, most of it for the prompt")
    if settings.memory_bytes is not None:
        console.print("  sequences: of the context, beside the weights, with nothing left for anything else")


def _about_gains(timed: Benchmark) -> Iterator[str]:
    """How gains are meant, and how sure they are."""
    yield "gain: how many times faster the result is, the median over rounds; in rounds: the least and the greatest"
    yield "(milliseconds are medians of all steps, so that their ratio need not be the gain)"
    yield "bound: the bytes a step has to read, weights and cache, of the original over the result's"
    gains = [point.decode_gain for point in timed.points if point.decode_gain]
    if any((gain.of_bound or 0) > 1 for gain in gains):
        yield f"above the bound: {_ABOVE}"
    if unclear := sum(gain.least < 1 < gain.greatest for gain in gains):
        yield f"in {unclear} of {len(gains)} lines rounds lie on both sides of 1: no difference is shown there"
    if noisy := sum(gain.is_noisy for gain in gains):
        yield f"noise: in {noisy} of {len(gains)} lines {_NOISE}"


def _decoding(both: bool) -> Columns:
    columns = _each(both, "ms", lambda timing: _milliseconds(timing.decode))
    columns |= _each(both, "tokens/s", lambda timing: f"{timing.decode_tokens_per_second:.4g}")
    if both:
        columns |= _gained(lambda point: point.decode_gain)
        columns["bound"] = lambda point: _of_gain(point.decode_gain, lambda gain: _decimal(gain.bound))
        columns["gain/bound"] = lambda point: _of_gain(point.decode_gain, lambda gain: _percent(gain.of_bound))
    return columns


def _prefill(both: bool) -> Columns:
    columns = _each(both, "ms", lambda timing: _milliseconds(timing.prefill))
    columns |= _each(both, "tokens/s", lambda timing: f"{timing.prefill_tokens_per_second:.4g}")
    return columns | (_gained(lambda point: point.prefill_gain) if both else {})


def _memory(both: bool, settings: BenchmarkSettings) -> Columns:
    columns = _each(both, "weights", lambda timing: _bytes(timing.weight_bytes))
    columns |= _each(both, "cache", lambda timing: _bytes(timing.cache_bytes))
    if settings.engine == "vllm":
        said = {"blocks": "num_blocks", "tokens": "num_tokens", "at once": "max_concurrency"}
        for head, name in said.items():
            columns |= _each(both, head, partial(_said, name))
        return columns
    columns |= _each(both, "peak", lambda timing: _bytes(timing.peak_bytes))
    if settings.memory_bytes is not None:
        fit = f"sequences in {human_bytes(settings.memory_bytes)}"
        columns |= _each(both, fit, lambda timing: _number(timing.largest_batch))
    return columns


def _said(name: str, timing: Timing) -> str:
    return _number(getattr(timing.engine_cache, name))


def _each(both: bool, head: str, cell: Cell) -> Columns:
    """A column of the result's, and before it one of the original's where there is one."""

    def result(point: Point) -> str:
        return "out of memory" if point.result is None else cell(point.result)

    def original(point: Point) -> str:
        return "out of memory" if point.original is None else cell(point.original)

    return {f"original {head}": original, f"result {head}": result} if both else {head: result}


def _gained(gain_of: Callable[[Point], Gain | None]) -> Columns:
    return {
        "gain": lambda point: _of_gain(gain_of(point), lambda gain: f"{gain.ratio:.2f}"),
        "in rounds": lambda point: _of_gain(gain_of(point), lambda gain: f"{gain.least:.2f}–{gain.greatest:.2f}"),
    }


def _of_gain(gain: Gain | None, cell: Callable[[Gain], str]) -> str:
    return "–" if gain is None else cell(gain)


def _milliseconds(durations: Durations | None) -> str:
    return "–" if durations is None else f"{1e3 * durations.median:.4g} ({1e3 * durations.p90:.4g})"


def _decimal(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}"


def _percent(value: float | None) -> str:
    return "–" if value is None else f"{value:.0%}"


def _bytes(count: int | None) -> str:
    return "–" if count is None else human_bytes(count)


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:,.0f}" if value == int(value) else f"{value:,.2f}"


def _print_table(columns: Columns, points: Sequence[Point], console: Console) -> None:
    """Rows of cells, each as wide as the widest of its column, to the right."""
    size: Columns = {"batch": lambda point: str(point.batch), "context": lambda point: str(point.context)}
    columns = size | columns
    rows = [list(columns), *([cell(point) for cell in columns.values()] for point in points)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        console.print("  " + "  ".join(f"{cell:>{width}}" for cell, width in zip(row, widths, strict=True)))
