"""kvconvert inspect."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated

import typer
from rich.console import Console

from .. import convert as library
from ..convert.describe.engines import engines_line, latent_kernels
from ..convert.describe.inspection import Inspection, Target
from .console import Terminal, human_bytes, human_count
from .options import Json, Model, Quiet, Revision

__all__ = ["inspect"]

_MOST_TOKENS = 2**40


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
    revision: Revision = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Show what a checkpoint is, what its K/V cache costs and what it can become. Reads headers only.

    Example: kvconvert inspect model_dir --context 32768
    """
    terminal = Terminal(as_json=as_json, quiet=quiet)
    inspection = library.inspect(model, context_length=context, revision=revision)
    terminal.result(asdict(inspection), lambda console: show_inspection(inspection, console))


_READING_A_TEXT = ("mha2cla", "mha2mla")  # and mha2gqa, of the same models
# docs/measurements.md, "The calibration text"
_WORTH_OF_A_TEXT = (
    "best on text like what the model will see (--calibration): for Wikipedia, text of its kind left an excess of 0.49 "
    "nats, the default text 0.90 (SmolLM2-135M, 3 K/V heads become 1 by --method svd --fit-steps 0)"
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
