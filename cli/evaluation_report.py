"""What `kvconvert evaluate` prints of an evaluation."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..measure.gates import GATE_FORMATS

if TYPE_CHECKING:
    from rich.console import Console

    from ..measure import Comparison, Evaluation, Gate, PositionLoss, Recovery, Sample, TaskScore

__all__ = ["Names", "show_evaluation"]


@dataclass(frozen=True)
class Names:
    """What the models of an evaluation are called: the model, its original, and what it was before uptraining."""

    model: str
    against: str | None
    before: str | None


def show_evaluation(evaluation: Evaluation, gates: Sequence[Gate], names: Names, console: Console) -> None:
    """Print an evaluation for a person."""
    console.print(names.model)
    _show_loss(evaluation, console)
    console.print(f"  method        {evaluation.method}; ±: one standard error over windows")
    if evaluation.against is not None:
        console.print(f"against {names.against}")
        _show_comparison(evaluation.against, console)
    if evaluation.recovery is not None:
        console.print(f"since {names.before}")
        _show_recovery(evaluation.recovery, console)
    if len(evaluation.positions) > 1:
        console.print("by position in the window")
        for group in evaluation.positions:
            console.print(f"  {_range(group):<13} {_loss_in_short(group)}")
    if evaluation.by_source:
        _show_sources(evaluation.by_source, console)
    for sample in evaluation.samples:
        _show_sample(sample, console)
    for score in evaluation.tasks:
        console.print(f"task {score.task}: {_task_in_short(score)}")
    if gates and evaluation.by_source:
        console.print("gates are on all texts together")
    for gate in gates:
        name = gate.name if gate.task is None else f"{gate.name}, {gate.task}"
        value, threshold = GATE_FORMATS[gate.name].format(gate.value), GATE_FORMATS[gate.name].format(gate.threshold)
        limit = "at least" if gate.name == "min_recovery" else "at most"
        console.print(f"gate {name}: {value}{_spread(gate)}, {limit} {threshold}: {_verdict(gate)}")


def _spread(gate: Gate) -> str:
    if gate.standard_error is None or math.isnan(gate.standard_error):
        return ""
    return f" ± {GATE_FORMATS[gate.name].format(gate.standard_error)}"


def _verdict(gate: Gate) -> str:
    """Passed or failed, and whether the value is nearer to the limit than its standard error."""
    verdict = "passed" if gate.passed else "failed"
    is_near = gate.standard_error is not None and abs(gate.value - gate.threshold) < gate.standard_error
    return f"{verdict}, within a standard error of the limit" if is_near else verdict


def _show_sources(by_source: Mapping[str, Evaluation], console: Console) -> None:
    console.print("by text")
    for text, alone in by_source.items():
        console.print(f"  {text}")
        _show_loss(alone, console, indent="    ")
        if alone.against is not None:
            console.print("    against the original")
            _show_comparison(alone.against, console, indent="      ")


def _show_comparison(comparison: Comparison, console: Console, indent: str = "  ") -> None:
    perplexity = f"{comparison.original_perplexity:.4g} of the original, this is {comparison.perplexity_increase:+.1%}"
    console.print(f"{indent}perplexity    {perplexity}")
    if comparison.original_bits_per_byte is not None:
        console.print(f"{indent}bits/byte     {comparison.original_bits_per_byte:.4f} of the original")
    excess = _with_error(comparison.excess_nats_per_token, comparison.excess_standard_error)
    console.print(f"{indent}excess loss   {excess} nats/token above the original, windows paired")
    divergence = _with_error(comparison.kl_nats_per_token, comparison.kl_standard_error)
    console.print(f"{indent}KL            {divergence} nats/token")
    console.print(f"{indent}top-1 agrees  {comparison.top1_agreement:.1%} of tokens")


def _show_recovery(recovery: Recovery, console: Console) -> None:
    console.print(f"  excess loss   {recovery.before_excess_nats_per_token:.4f} nats/token before")
    if math.isnan(recovery.recovered):
        console.print("  recovered     nothing was lost before")
    else:
        spread = "" if math.isnan(recovery.standard_error) else f" ± {recovery.standard_error:.1%}"
        console.print(f"  recovered     {recovery.recovered:.1%}{spread} of it")


def _show_sample(sample: Sample, console: Console) -> None:
    console.print(f"prompt        {_in_a_line(sample.prompt)}")
    console.print(f"  this        {_in_a_line(sample.continuation)}")
    if sample.original is not None:
        console.print(f"  original    {_in_a_line(sample.original)}")
        console.print(f"  equal       the first {sample.equal_tokens} tokens")


def _in_a_line(text: str) -> str:
    """A text with its line breaks as signs."""
    return text.replace("\n", " ⏎ ")


def _show_loss(evaluation: Evaluation, console: Console, indent: str = "  ") -> None:
    console.print(f"{indent}perplexity    {evaluation.perplexity:.4g}")
    console.print(f"{indent}nats/token    {_with_error(evaluation.nats_per_token, evaluation.standard_error)}")
    if evaluation.bits_per_byte is not None:
        console.print(f"{indent}bits/byte     {evaluation.bits_per_byte:.4f}")
    console.print(f"{indent}scored        {evaluation.num_tokens} tokens in {evaluation.num_windows} windows")


def _task_in_short(score: TaskScore) -> str:
    """The score that sums a task up, beside the original's, if there is one."""
    error = score.standard_errors.get(score.metric, math.nan)
    text = f"{score.metric} {_with_error(score.value, error)} on {score.num_samples} examples"
    if score.kept is None:
        return text
    return f"{text}, original {score.original_metrics[score.metric]:.4f}, kept {score.kept:.1%}"


def _range(group: PositionLoss) -> str:
    return f"{group.first_position} to {group.last_position}"


def _loss_in_short(group: PositionLoss) -> str:
    """The loss of a group of positions, and the excess over the original, if there is one."""
    text = f"{group.nats_per_token:.4f} nats/token"
    if group.excess_nats_per_token is None or group.excess_standard_error is None:
        return text
    return f"{text}, excess {_with_error(group.excess_nats_per_token, group.excess_standard_error)}"


def _with_error(value: float, error: float) -> str:
    """A number and its standard error, which a single window does not have."""
    return f"{value:.4f}" if math.isnan(error) else f"{value:.4f} ± {error:.4f}"
