"""kvconvert demo: the main job, end to end, on the checkpoint that ships with the package."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.console import Console
from rich.table import Table

from .. import configs
from ..convert import Calibration, Conversion, Gqa, convert, inspect
from ..convert.checkpoint.files import write_text
from ..convert.conversion import no_progress
from ..convert.errors import OutputError, PreemptedError
from ..convert.text.sources import TextSource
from .console import Terminal
from .inspect import show_inspection
from .options import DryRun, Json, Quiet

if TYPE_CHECKING:
    from ..measure.pictures import Point

__all__ = ["demo"]

_MODEL = configs.DEMO / "model"
_UPTRAIN_TEXT = configs.DEMO / "uptrain.jsonl"
_HELD_OUT_TEXT = configs.DEMO / "heldout.jsonl"
_RESULTS_NAME = "results.json"
_PICTURE_NAME = "recovery.png"
_MARKER_NAME = ".kvconvert-demo"

_FRACTION = 0.05  # of pretraining: the α of the GQA paper
_SEQUENCE_LENGTH = 256  # as in pretraining
_BATCH_SIZE = 16
_EVAL_STEPS = 32
_CALIBRATION_TOKENS = 131072


@dataclass(frozen=True)
class _Variant:
    name: str
    label: str
    num_key_value_heads: int
    method: Literal["mean", "svd"]
    uptrained: bool


@dataclass(frozen=True)
class _Size:
    """How much is done: what makes the demo long or short. Without `max_windows` all held-out text is scored."""

    steps: int
    max_windows: int | None
    calibration_tokens: int


def demo(
    output: Annotated[Path, typer.Option("--output", "-o", help="Where results go.")] = Path("kvconvert-demo"),
    uptrain_all: Annotated[bool, typer.Option("--all", help="Uptrain every model.")] = False,
    steps: Annotated[
        int | None,
        typer.Option(min=1, help="Steps of uptraining. Default: 5 % of the pretraining tokens.", show_default=False),
    ] = None,
    max_windows: Annotated[
        int | None,
        typer.Option(min=2, help="Windows of held-out text to score. Default: all of it.", show_default=False),
    ] = None,
    calibration_tokens: Annotated[
        int, typer.Option(min=_SEQUENCE_LENGTH, help="Tokens of text that svd merges are measured on.")
    ] = _CALIBRATION_TOKENS,
    dry_run: DryRun = False,
    force: Annotated[bool, typer.Option("--force", help="Run again, even if the results are there.")] = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Convert, evaluate and uptrain the demo checkpoint: a table, and a picture as PNG. Needs no network.

    Example: kvconvert demo --output kvconvert-demo
    """
    from ..measure.pictures import require_matplotlib

    require_matplotlib()
    terminal = Terminal(as_json=as_json, quiet=quiet)
    size = _Size(steps or _uptraining_steps(), max_windows, calibration_tokens)
    variants = (
        _Variant("gqa2-mean", "GQA, 2 K/V heads, mean", 2, "mean", uptrained=uptrain_all),
        _Variant("gqa2-svd", "GQA, 2 K/V heads, svd", 2, "svd", uptrained=True),
        _Variant("mqa-mean", "MQA, 1 K/V head, mean", 1, "mean", uptrained=uptrain_all),
        _Variant("mqa-svd", "MQA, 1 K/V head, svd", 1, "svd", uptrained=uptrain_all),
    )
    if dry_run:
        plan = _plan(variants, output, size.steps)
        terminal.result(plan, lambda console: _show_plan(plan, console))
        return
    results = None if force else _finished_results(output, variants, size)
    if results is None:
        _claim(output, force=force)
        results = _run(variants, output, size, terminal)
        write_text(output / _RESULTS_NAME, json.dumps(results, indent=2) + "\n")
    else:
        terminal.remark(f"{output} holds finished results; --force runs the demo again")
    terminal.result(results, lambda console: _show(results, output, console))


def _pretraining_tokens() -> int:
    return int(json.loads((_MODEL / "pretraining.json").read_text())["pretraining_tokens"])


def _uptraining_steps() -> int:
    return math.ceil(_FRACTION * _pretraining_tokens() / (_SEQUENCE_LENGTH * _BATCH_SIZE))


def _plan(variants: tuple[_Variant, ...], output: Path, steps: int) -> dict[str, Any]:
    return {
        "model": str(_MODEL),
        "output": str(output),
        "pretraining_tokens": _pretraining_tokens(),
        "uptraining_tokens": steps * _SEQUENCE_LENGTH * _BATCH_SIZE,
        "uptraining_steps": steps,
        "variants": [asdict(variant) for variant in variants],
        "dry_run": True,
    }


def _show_plan(plan: dict[str, Any], console: Console) -> None:
    console.print(f"demo checkpoint {plan['model']}")
    for variant in plan["variants"]:
        training = f"uptrain {plan['uptraining_steps']} steps ({plan['uptraining_tokens']} tokens)"
        stages = ["convert", "evaluate", *([training, "evaluate"] if variant["uptrained"] else [])]
        console.print(f"  {variant['label']:<23} {' → '.join(stages)}")
    console.print(f"  would write to {plan['output']}")


def _settings_of(variants: tuple[_Variant, ...], size: _Size) -> dict[str, Any]:
    """What decides the results: equal settings, equal results."""
    from importlib.metadata import version

    return {
        "kvconvert_version": version("kvconvert"),
        "uptrained": [variant.name for variant in variants if variant.uptrained],
        "max_windows": size.max_windows,
        "calibration_tokens": size.calibration_tokens,
        "uptraining_tokens": size.steps * _SEQUENCE_LENGTH * _BATCH_SIZE,
    }


def _finished_results(output: Path, variants: tuple[_Variant, ...], size: _Size) -> dict[str, Any] | None:
    path = output / _RESULTS_NAME
    if not path.exists() or not (output / _MARKER_NAME).exists():
        return None
    results: dict[str, Any] = json.loads(path.read_text())
    return results if results["settings"] == _settings_of(variants, size) else None


def _claim(output: Path, *, force: bool) -> None:
    """Make the output directory ours; one that holds something else is refused."""
    ours = not output.exists() or (output / _MARKER_NAME).exists()
    if not ours and (not output.is_dir() or any(output.iterdir())):
        raise OutputError(f"{output} exists and is not a demo's", hint="choose another place with --output")
    try:
        output.mkdir(parents=True, exist_ok=True)
        (output / _MARKER_NAME).touch()
        (output / _RESULTS_NAME).unlink(missing_ok=True)
    except OSError as error:
        raise OutputError(f"{output}: cannot be written ({error.strerror})") from error


def _run(variants: tuple[_Variant, ...], output: Path, size: _Size, terminal: Terminal) -> dict[str, Any]:
    start = time.monotonic()
    inspection = inspect(_MODEL)
    if not terminal.as_json:
        show_inspection(inspection, terminal.remarks)
    rows = []
    for variant in variants:
        plan = _convert(variant, output, size, terminal).plan
        terminal.remark(f"converted to {variant.label}: {output / variant.name}")
        rows.append(asdict(variant) | {"cache_bytes_per_token": plan.cache_bytes_per_token[1]})

    from ..measure.held_out import load_windows
    from ..measure.pictures import Curve, Point, draw_recovery

    held_out = TextSource(str(_HELD_OUT_TEXT))
    windows = load_windows(_MODEL, held_out, window=_SEQUENCE_LENGTH, max_windows=size.max_windows)
    curves = []
    for variant, row in zip(variants, rows, strict=True):
        row["before"] = _evaluate(output / variant.name, windows, f"evaluating {variant.label}", terminal)
    for variant, row in zip(variants, rows, strict=True):
        row["after"] = None
        if variant.uptrained:
            recovery = _uptrain(variant, output, windows, size.steps, terminal)
            curves.append(Curve(variant.label, *zip(*recovery, strict=True)))
            row["recovery"] = recovery
            row["after"] = _evaluate(
                output / f"{variant.name}-uptrained", windows, f"evaluating {variant.label}, uptrained", terminal
            )
    original = {
        "label": f"original, {inspection.num_key_value_heads} K/V heads",
        "num_key_value_heads": inspection.num_key_value_heads,
        "cache_bytes_per_token": inspection.cache_bytes_per_token,
        "perplexity": rows[0]["before"]["against"]["original_perplexity"],
    }
    draw_recovery(
        output / _PICTURE_NAME,
        original=Point(original["label"], original["cache_bytes_per_token"], before=0.0),
        original_perplexity=original["perplexity"],
        curves=curves,
        points=[_point_of(row) for row in rows],
    )
    return {
        "settings": _settings_of(variants, size),
        "original": original,
        "converted": rows,
        "method": windows.method,
        "num_held_out_tokens": windows.num_scored_tokens,
        "picture": str(output / _PICTURE_NAME),
        "seconds": round(time.monotonic() - start, 1),
    }


def _point_of(row: dict[str, Any]) -> Point:
    """What the picture shows of a model, by its row of the results."""
    from ..measure.pictures import Point

    before, after = row["before"]["against"], row["after"]["against"] if row["after"] else None
    return Point(
        row["label"],
        row["cache_bytes_per_token"],
        before["excess_nats_per_token"],
        after["excess_nats_per_token"] if after else None,
        (after or before)["excess_standard_error"],
    )


def _convert(variant: _Variant, output: Path, size: _Size, terminal: Terminal) -> Conversion:
    """Convert the demo's checkpoint; progress is that of merging only, since the rest takes no time."""
    calibration = None
    if variant.method == "svd":
        calibration = Calibration(_UPTRAIN_TEXT, size.calibration_tokens, _SEQUENCE_LENGTH)

    def progress(what: str, total: int) -> AbstractContextManager[Callable[[int], object]]:
        return terminal.progress(f"merging {variant.label}", total) if what == "merging" else no_progress(what, total)

    return convert(
        _MODEL,
        Gqa(variant.num_key_value_heads, merge=variant.method),
        output / variant.name,
        calibration=calibration,
        force=True,
        progress=progress,
    )


def _evaluate(model: Path, windows: Any, description: str, terminal: Terminal) -> dict[str, Any]:
    from ..measure.held_out import evaluate_checkpoint

    with terminal.progress(description, len(windows.input_ids)) as advance:
        evaluation = evaluate_checkpoint(model, windows, against=_MODEL, batch_size=_BATCH_SIZE, progress=advance)
    return asdict(evaluation)


def _uptrain(variant: _Variant, output: Path, windows: Any, steps: int, terminal: Terminal) -> list[tuple[int, float]]:
    """Uptrain a converted checkpoint; returns (tokens, held-out perplexity) along the way."""
    from ..measure.perplexity import evaluate
    from ..uptrain import Monitoring, TextSettings, UptrainSettings, uptrain

    recovery = []

    def show(record: dict[str, Any]) -> None:
        if "eval_nats_per_token" in record:
            perplexity = math.exp(record["eval_nats_per_token"])
            recovery.append((record["tokens"], perplexity))
            terminal.remark(f"{variant.label}: held-out perplexity {perplexity:.1f} after {record['tokens']} tokens")

    def progress(what: str, total: int) -> AbstractContextManager[Callable[[int], object]]:
        return terminal.progress(f"{what} {variant.label}", total)

    try:
        uptrain(
            output / variant.name,
            data=_UPTRAIN_TEXT,
            teacher=_MODEL,
            steps=steps,
            output=output / f"{variant.name}-uptrained",
            settings=UptrainSettings(
                sequence_length=_SEQUENCE_LENGTH,
                global_batch_tokens=_BATCH_SIZE * _SEQUENCE_LENGTH,
            ),
            text=TextSettings(validation_fraction=0.0),
            monitoring=Monitoring(eval_steps=_EVAL_STEPS),
            force=True,
            progress=progress,
            show=show,
            score=lambda model: evaluate(model, windows, batch_size=_BATCH_SIZE).nats_per_token,
        )
    except PreemptedError as error:
        raise PreemptedError("the demo was stopped", hint="run it again; it starts from the beginning") from error
    return recovery


def _show(results: dict[str, Any], output: Path, console: Console) -> None:
    table = Table(title="kvconvert demo: two ways to merge heads, then uptraining")
    for heading in ("model", "K/V heads", "B/token", "perplexity", "after", "KL", "after"):
        table.add_column(heading, justify="left" if heading == "model" else "right", no_wrap=True)
    original = results["original"]
    table.add_row(
        "original",
        str(original["num_key_value_heads"]),
        str(original["cache_bytes_per_token"]),
        f"{original['perplexity']:.1f}",
        "",
        "0",
        "",
    )
    for row in results["converted"]:
        before, after = row["before"], row["after"]
        table.add_row(
            row["name"],
            str(row["num_key_value_heads"]),
            str(row["cache_bytes_per_token"]),
            f"{before['perplexity']:.1f}",
            f"{after['perplexity']:.1f}" if after else "",
            f"{before['against']['kl_nats_per_token']:.3f}",
            f"{after['against']['kl_nats_per_token']:.3f}" if after else "",
        )
    console.print(table)
    tokens = results["settings"]["uptraining_tokens"]
    console.print("B/token: K/V cache in 16 bits; KL: to the original, nats per token; after: after uptraining")
    console.print(
        f"{results['num_held_out_tokens']} held-out tokens, {tokens} uptraining tokens, {results['seconds']:.0f} s"
    )
    console.print(f"picture: {output / _PICTURE_NAME}")
