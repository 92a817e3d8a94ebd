"""kvconvert evaluate."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from .. import measure
from ..convert.errors import InputError, QualityGateError
from ..measure.evaluation import EvaluationSettings
from .console import Terminal
from .options import Data, Given, Json, Model, Quiet, Revision, SettingsOptions, TrustRemoteCode, accepts
from .values import parse_percentage

if TYPE_CHECKING:
    from ..measure import Evaluation

__all__ = ["evaluate"]

_SETTINGS = SettingsOptions(
    "settings",
    EvaluationSettings,
    "Scoring",
    flags={"config": ("--data-config",)},
    bounds={"window": 2, "stride": 1, "max_windows": 1, "batch_size": 1},
)


@dataclass(frozen=True)
class Request:
    """What is compared, and what is shown."""

    against: Annotated[
        str | None,
        typer.Option(
            help="The original: adds KL, top-1 agreement and excess loss.", show_default=False, rich_help_panel="Model"
        ),
    ] = None
    max_ppl_increase: Annotated[
        str | None,
        typer.Option(
            help="Exit with 3 if perplexity is further above the original, for example 5%.",
            show_default=False,
            rich_help_panel="Gates",
        ),
    ] = None
    revision: Revision = None
    trust_remote_code: TrustRemoteCode = False
    as_json: Json = False
    quiet: Quiet = False


@accepts(_SETTINGS, Request)
def evaluate(model: Model, data: Data, settings: Given[EvaluationSettings], request: Request) -> None:
    """Measure perplexity on held-out text, alone or against the original.

    Example: kvconvert evaluate model_dir-gqa8 --data held_out.jsonl --against model_dir --max-ppl-increase 5%
    """
    terminal = Terminal(as_json=request.as_json, quiet=request.quiet)
    threshold = None if request.max_ppl_increase is None else parse_percentage(request.max_ppl_increase)
    if threshold is not None and request.against is None:
        raise InputError("--max-ppl-increase needs --against", hint="name the original model with --against")
    chosen = settings.build()
    evaluation = measure.evaluate(
        model,
        data,
        against=request.against,
        settings=chosen,
        revision=request.revision,
        progress=terminal.progress,
        remark=terminal.remark,
    )
    gate = _gate(evaluation, threshold)
    summary = {"model": model, "data": data, "dtype": chosen.precision} | asdict(evaluation) | {"gate": gate}
    terminal.result(summary, lambda console: _show(model, request.against, evaluation, console))
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
    console.print(f"  nats/token    {_with_error(evaluation.nats_per_token, evaluation.standard_error)}")
    console.print(f"  scored        {evaluation.num_tokens} tokens in {evaluation.num_windows} windows")
    console.print(f"  method        {evaluation.method}")
    comparison = evaluation.against
    if comparison is not None:
        console.print(f"against {against}")
        console.print(
            f"  perplexity    {comparison.original_perplexity:.4g}, this is {comparison.perplexity_increase:+.1%}"
        )
        excess = _with_error(comparison.excess_nats_per_token, comparison.excess_standard_error)
        console.print(f"  excess loss   {excess}")
        divergence = _with_error(comparison.kl_nats_per_token, comparison.kl_standard_error)
        console.print(f"  KL            {divergence} nats/token")
        console.print(f"  top-1 agrees  {comparison.top1_agreement:.1%}")


def _with_error(value: float, error: float) -> str:
    """A number and its standard error, which a single window does not have."""
    return f"{value:.4f}" if math.isnan(error) else f"{value:.4f} ± {error:.4f}"
