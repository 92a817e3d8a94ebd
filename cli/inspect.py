"""kvconvert inspect."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict
from typing import Annotated, Any

import typer
from rich.console import Console

from .. import convert as library
from ..convert.describe.cache_planning import CachePlan, PlannedModel
from ..convert.describe.engines import engines_line, latent_kernels
from ..convert.describe.inspection import Inspection, Target
from ..convert.errors import InputError
from ..pipeline.values import parse_memory
from .console import Terminal, human_bytes, human_count
from .options import Json, Model, Quiet, Revision

__all__ = ["inspect"]

_MOST_TOKENS = 2**40
_MOST_SEQUENCES = 2**30


def _memory(text: str) -> int:
    try:
        return parse_memory(text)
    except InputError as error:
        raise typer.BadParameter(str(error)) from error


def inspect(
    model: Model,
    context: Annotated[
        int | None,
        typer.Option(
            min=1,
            max=_MOST_TOKENS,
            help="Context length for the cache figure. Default: the model's longest, or 2048 where nothing limits it.",
            show_default=False,
        ),
    ] = None,
    batch: Annotated[
        int | None,
        typer.Option(
            min=1,
            max=_MOST_SEQUENCES,
            help="Plan the memory of so many sequences of that length, now and after each conversion. Default: 1, "
            "with --gpu-memory.",
            show_default=False,
        ),
    ] = None,
    gpu_memory: Annotated[
        int | None,
        typer.Option(
            parser=_memory,
            metavar="SIZE",
            help="Say how many sequences fit into a GPU of this memory, as 80GB or 80GiB, now and after each "
            "conversion: 90 % of it are for weights and caches.",
            show_default=False,
        ),
    ] = None,
    revision: Revision = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Show what a checkpoint is, what its K/V cache costs and what it can become. Reads headers only.

    Example: kvconvert inspect model_dir --context 32768 --batch 64 --gpu-memory 80GB
    """
    terminal = Terminal(as_json=as_json, quiet=quiet)
    if batch is None and gpu_memory is None:
        inspection = library.inspect(model, context_length=context, revision=revision)
        terminal.result(asdict(inspection), lambda console: show_inspection(inspection, console))
        return
    plan = library.plan_cache(
        model, context_length=context, batch=batch or 1, memory_bytes=gpu_memory, revision=revision
    )

    def show(console: Console) -> None:
        show_inspection(plan.inspection, console)
        show_cache_plan(plan, console)

    terminal.result(_as_data(plan), show)


def _as_data(plan: CachePlan) -> dict[str, Any]:
    """What `inspect` gives, and the plan beside it."""
    planned = asdict(plan)
    inspection: dict[str, Any] = planned.pop("inspection")
    return {**inspection, "cache_plan": planned}


_READING_A_TEXT = ("mha2cla", "mha2mla")  # and mha2gqa, of the same models
# docs/measurements.md, "The calibration text"
_WORTH_OF_A_TEXT = (
    "best on text like what the model will see (--calibration). An example: SmolLM2-135M with 1 of 3 K/V heads lost "
    "0.90 nats/token on Wikipedia with the default text, 0.49 with Wikipedia's own (--method svd --fit-steps 0)"
)


def _options(target: Target) -> str:
    """How a conversion that is possible is typed."""
    if target.command == "mha2gqa":
        return f"--groups {' or '.join(map(str, target.groups))}"
    if target.share is not None:
        least, most = target.share
        return f"--share {least} to {most}" if most > least else f"--share {least}"
    if target.latent_below is None:
        return target.reason
    sizes = [
        f"{rank} + {rope_dim}" + (f" with --v-head-dim {v_head_dim}" if v_head_dim else "")
        for rank, rope_dim, v_head_dim in target.kernel_sizes
    ]
    kernels = f"fast kernels for {' or '.join(sizes)}" if sizes else "every size with fast kernels has a larger cache"
    norm = f" --latent-norm {target.latent_norm}" if target.latent_norm else ""
    return f"--kv-lora-rank R --qk-rope-head-dim D{norm}, R + D below {target.latent_below}; {kernels}"


def show_inspection(inspection: Inspection, console: Console) -> None:
    context = f"{human_bytes(inspection.cache_bytes_for_context)} for {inspection.context_length} tokens"
    size = f"{human_count(inspection.num_parameters)}, {inspection.dtype}"
    rows = {
        "architecture": f"{inspection.model_type} ({inspection.attention})"
        + (f", saved with {inspection.head}" if inspection.head else ""),
        "layers": str(inspection.num_hidden_layers)
        + (
            f", of which {inspection.num_key_value_layers} have keys and values"
            if inspection.num_key_value_layers != inspection.num_hidden_layers
            else ""
        ),
        "query heads": str(inspection.num_attention_heads),
        "K/V heads": str(inspection.num_key_value_heads),
        "head_dim": str(inspection.head_dim),
        "parameters": f"{size}, {human_bytes(inspection.size_on_disk_bytes)} on disk",
        "K/V cache": f"{inspection.cache_bytes_per_token} bytes per token, {context} (16-bit)"
        + (", and as much per token of the encoder" if inspection.cross_attention else ""),
    }
    if inspection.latent is not None:
        kernels = latent_kernels(inspection.latent)
        rows["latent"] = f"{inspection.latent.kv_lora_rank}, and a rotary key of {inspection.latent.qk_rope_head_dim}; "
        rows["latent"] += f"no fast kernels: {kernels}" if kernels else "there are fast kernels for these sizes"
    for target in inspection.targets:
        changes = target.model_type not in (None, inspection.model_type)
        rows[target.command] = _options(target) if target.possible else f"not possible: {target.reason}"
        rows[target.command] += f", as {target.model_type}" if changes else ""
    if any(target.possible and target.command in _READING_A_TEXT for target in inspection.targets):
        rows["calibration"] = _WORTH_OF_A_TEXT
    for model_type, engines in inspection.serving.items():
        label = "served by" if len(inspection.serving) == 1 else model_type
        rows[label] = engines_line(engines)
    if inspection.approximation:
        rows["note"] = f"pooling is only approximate: {inspection.approximation}"
    console.print(inspection.model)
    width = max(13, *map(len, rows))
    for label, text in (*rows.items(), *(("note", note) for note in inspection.notes)):
        console.print(f"  {label:<{width}} {text}")


def show_cache_plan(plan: CachePlan, console: Console) -> None:
    """Print the plan as a table, a line for each model, and what is counted below it."""
    formats = [each.name for each in plan.formats]
    console.print(f"plan for {_count(plan, 'sequence')} of {plan.context_length} tokens{_encoder(plan)}")
    fits = [] if plan.usable_bytes is None else formats
    header = ["", "", "weights", f"+ {_count(plan, 'cache')}", *formats, *fits]
    title, *rows = _aligned([header, *(_cells(model, plan, formats) for model in plan.models)])
    console.print(f"  {_over(title, ['cache of one sequence', *(['sequences that fit'] if fits else [])], formats[0])}")
    for line in (title, *rows):
        console.print(f"  {line}")
    for note in _plan_notes(plan):
        console.print(f"  {note}")


def _count(plan: CachePlan, what: str) -> str:
    return f"1 {what}" if plan.batch == 1 else f"{plan.batch} {what}s"


def _over(title: str, groups: Iterable[str], first: str) -> str:
    """The names of groups of columns, each above the column of the title that is called `first`."""
    line, begin = "", -1
    for group in groups:
        begin = title.index(first, begin + 1)
        line = f"{line:<{begin}}{group}"
    return line


def _cells(model: PlannedModel, plan: CachePlan, formats: Sequence[str]) -> list[str]:
    costs = [model.costs.get(name) for name in formats]
    cells = [model.name, model.attention, human_bytes(model.weights_bytes)]
    cells.append(human_bytes(model.costs[formats[0]].total_bytes))
    cells += ["–" if cost is None else human_bytes(cost.bytes_per_sequence) for cost in costs]
    if plan.usable_bytes is not None:
        cells += ["–" if cost is None else str(cost.sequences) for cost in costs]
    return cells


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """The rows as lines: names to the left, numbers to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        names = [f"{cell:<{width}}" for cell, width in zip(row[:2], widths, strict=False)]
        numbers = [f"{cell:>{width}}" for cell, width in zip(row[2:], widths[2:], strict=True)]
        lines.append("  ".join([*names, *numbers]).rstrip())
    return lines


def _encoder(plan: CachePlan) -> str:
    return f", and {plan.encoder_length} of the encoder" if plan.encoder_length else ""


def _plan_notes(plan: CachePlan) -> Iterable[str]:
    """What the table counts, and what it leaves out."""
    first = plan.formats[0].name
    yield f"weights + {_count(plan, 'cache')}: in {first}"
    if plan.memory_bytes is not None and plan.usable_bytes is not None:
        yield (
            f"sequences that fit: beside the weights in {human_bytes(plan.usable_bytes)}, "
            f"{100 * plan.memory_fraction:g} % of {human_bytes(plan.memory_bytes)}; the rest is for activations and "
            "the engine"
        )
    yield "what a conversion, or a smaller format, loses is not planned here: kvconvert evaluate measures it"
    yield from (f"{each.name}: {each.engines}" for each in plan.formats[1:])
    more = [
        f"{human_bytes(model.bytes_per_sequence_in_transformers)} {model.name}"
        for model in plan.models
        if model.bytes_per_sequence_in_transformers > model.costs[first].bytes_per_sequence
    ]
    if more:
        yield f"transformers caches more than that for one sequence in {first}: {', '.join(more)}"
    yield from (f"note: {note}" for note in plan.notes)
