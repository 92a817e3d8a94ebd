"""kvconvert evaluate."""

from __future__ import annotations

from dataclasses import asdict
from enum import StrEnum
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from ..convert.checkpoint.opening import open_checkpoint
from ..convert.device import default_device
from ..convert.errors import InputError, QualityGateError
from ..convert.text.sources import TextSource
from .console import Terminal
from .options import (
    BatchSize,
    Data,
    DataConfig,
    Json,
    Model,
    Quiet,
    Revision,
    Split,
    TextField,
    TrustRemoteCode,
)

if TYPE_CHECKING:
    from ..measure.perplexity import Evaluation

from .values import parse_percentage

__all__ = ["evaluate"]


class Bos(StrEnum):
    auto = "auto"
    always = "always"
    never = "never"


class Dtype(StrEnum):
    auto = "auto"
    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


def evaluate(
    model: Model,
    data: Data,
    against: Annotated[
        str | None, typer.Option(help="The original: adds KL, top-1 agreement and excess loss.", show_default=False)
    ] = None,
    max_ppl_increase: Annotated[
        str | None,
        typer.Option(
            help="Exit with 3 if perplexity is further above the original, for example 5%.", show_default=False
        ),
    ] = None,
    window: Annotated[int, typer.Option(min=2, help="Tokens per window.")] = 512,
    stride: Annotated[
        int | None, typer.Option(min=1, help="Tokens between windows. Default: no overlap.", show_default=False)
    ] = None,
    bos: Annotated[Bos, typer.Option(help="BOS before each window; auto: as the tokenizer does.")] = Bos.auto,
    max_windows: Annotated[
        int | None, typer.Option(min=1, help="Score only the first windows. Default: all.", show_default=False)
    ] = None,
    text_field: TextField = "text",
    split: Split = "test",
    data_config: DataConfig = None,
    batch_size: BatchSize = 8,
    dtype: Annotated[
        Dtype, typer.Option(help="Precision of the models; auto: float32 on a CPU, the checkpoint's on a GPU.")
    ] = Dtype.auto,
    revision: Revision = None,
    trust_remote_code: TrustRemoteCode = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Measure perplexity on held-out text, alone or against the original.

    Example: kvconvert evaluate model_dir-gqa8 --data held_out.jsonl --against model_dir --max-ppl-increase 5%
    """
    terminal = Terminal(as_json=as_json, quiet=quiet)
    threshold = None if max_ppl_increase is None else parse_percentage(max_ppl_increase)
    if threshold is not None and against is None:
        raise InputError("--max-ppl-increase needs --against", hint="name the original model with --against")
    with open_checkpoint(model, revision=revision) as checkpoint:
        directory = checkpoint.directory
    original = None
    if against is not None:
        with open_checkpoint(against) as opened:
            original = opened.directory

    import torch

    from ..measure.held_out import evaluate_checkpoint, load_windows

    device = default_device()
    source = TextSource(data, text_field=text_field, split=split, config=data_config)
    windows = load_windows(directory, source, window=window, stride=stride, bos=bos.value, max_windows=max_windows)
    precision: Any = dtype.value if dtype is not Dtype.auto else "float32" if device.type == "cpu" else "auto"
    with terminal.progress("evaluating", len(windows.input_ids)) as advance:
        evaluation = evaluate_checkpoint(
            directory,
            windows,
            against=original,
            dtype=precision if precision == "auto" else getattr(torch, precision),
            device=device,
            batch_size=batch_size,
            progress=advance,
        )
    gate = _gate(evaluation, threshold)
    summary = {"model": model, "data": data, "dtype": precision} | asdict(evaluation) | {"gate": gate}
    terminal.result(summary, lambda console: _show(model, against, evaluation, console))
    if gate and not gate["passed"]:
        raise QualityGateError(
            f"perplexity is {gate['value']:.1%} above the original, more than the allowed {gate['threshold']:.1%}"
        )


def _gate(evaluation: Evaluation, threshold: float | None) -> dict[str, Any] | None:
    if threshold is None or evaluation.against is None:
        return None
    increase = evaluation.against.perplexity_increase
    return {"name": "max_ppl_increase", "value": increase, "threshold": threshold, "passed": increase <= threshold}


def _show(model: str, against: str | None, evaluation: Evaluation, console: Console) -> None:
    console.print(model)
    console.print(f"  perplexity    {evaluation.perplexity:.4g}")
    console.print(f"  nats/token    {evaluation.nats_per_token:.4f} ± {evaluation.standard_error:.4f}")
    console.print(f"  scored        {evaluation.num_tokens} tokens in {evaluation.num_windows} windows")
    console.print(f"  method        {evaluation.method}")
    comparison = evaluation.against
    if comparison is not None:
        console.print(f"against {against}")
        console.print(
            f"  perplexity    {comparison.original_perplexity:.4g}, this is {comparison.perplexity_increase:+.1%}"
        )
        console.print(
            f"  excess loss   {comparison.excess_nats_per_token:.4f} ± {comparison.excess_standard_error:.4f}"
        )
        console.print(
            f"  KL            {comparison.kl_nats_per_token:.4f} ± {comparison.kl_standard_error:.4f} nats/token"
        )
        console.print(f"  top-1 agrees  {comparison.top1_agreement:.1%}")
