"""Limits that an evaluation has to keep, and whether it keeps them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..convert.checkpoint.json_files import read_object
from ..convert.errors import InputError

if TYPE_CHECKING:
    from .perplexity import Comparison, Evaluation

__all__ = ["GATE_FORMATS", "Gate", "Limits", "check_limits", "describe_failure", "read_baseline"]

GATE_FORMATS = {"max_ppl_increase": "{:.1%}", "min_recovery": "{:.1%}", "max_kl": "{:.4f}", "baseline": "{:.4f}"}
"""How the value and the limit of each gate are written for people."""

_LEAST_SLACK = 1e-3  # nats per token: other machines round otherwise


@dataclass(frozen=True)
class Limits:
    """What an evaluation has to keep; None does not matter.

    max_ppl_increase: relative to the original, 0.05 being 5 %. min_recovery: the part of the excess that came back, and
    of each task's score the part of the original's.
    max_kl: nats per token. baseline: what `evaluate --json` printed of an earlier model on the same text, as
    `read_baseline` gives it: the loss must not be higher than there by more than twice the standard error of the
    difference over windows, or by more than 0.001 nats per token if that is more.
    """

    max_ppl_increase: float | None = None
    min_recovery: float | None = None
    max_kl: float | None = None
    baseline: Mapping[str, Any] | None = None


@dataclass(frozen=True)
class Gate:
    """A limit, the value that it is for, of a task if it is of one, and whether the value keeps it.

    The value's standard error, where it is known, decides nothing: it says how sure the verdict is.
    """

    name: str
    value: float
    threshold: float
    passed: bool
    standard_error: float | None = None
    task: str | None = None

    @classmethod
    def at_most(cls, name: str, value: float, threshold: float, error: float | None = None) -> Gate:
        return cls(name, value, threshold, value <= threshold, error)  # which a value that is not a number is not

    @classmethod
    def at_least(
        cls, name: str, value: float, threshold: float, error: float | None = None, task: str | None = None
    ) -> Gate:
        return cls(name, value, threshold, value >= threshold, error, task)


def check_limits(evaluation: Evaluation, limits: Limits) -> tuple[Gate, ...]:
    """Compare an evaluation with its limits.

    Raises InputError for a limit of something that the evaluation does not have: an increase or KL without an original,
    a recovery without what was before, a baseline of another text.
    """
    gates: list[Gate] = []
    if limits.max_ppl_increase is not None:
        against = _of_original(evaluation, "max_ppl_increase")
        increase = against.perplexity_increase
        error = (1 + increase) * against.excess_standard_error
        gates.append(Gate.at_most("max_ppl_increase", increase, limits.max_ppl_increase, error))
    if limits.max_kl is not None:
        against = _of_original(evaluation, "max_kl")
        gates.append(Gate.at_most("max_kl", against.kl_nats_per_token, limits.max_kl, against.kl_standard_error))
    if limits.min_recovery is not None:
        gates += _recovery_gates(evaluation, limits.min_recovery)
    if limits.baseline is not None:
        gates.append(_baseline_gate(evaluation, limits.baseline))
    return tuple(gates)


def describe_failure(gate: Gate) -> str:
    """Say which limit was not kept, and by what."""
    value, threshold = GATE_FORMATS[gate.name].format(gate.value), GATE_FORMATS[gate.name].format(gate.threshold)
    if gate.name == "min_recovery":
        what = "of the excess came back" if gate.task is None else f"of the original's score on {gate.task} is kept"
        return f"{value} {what}, less than the required {threshold}"
    what = {
        "max_ppl_increase": f"perplexity is {value} above the original",
        "max_kl": f"the KL to the original is {value} nats per token",
        "baseline": f"the loss is {value} nats per token above the baseline's",
    }[gate.name]
    return f"{what}, more than the allowed {threshold}"


def read_baseline(path: str | Path) -> dict[str, Any]:
    """Read what `evaluate --json` printed into a file. Raises InputError where it is not that."""
    found = read_object(Path(path))
    numbers = found.get("window_nats")
    if (
        not isinstance(numbers, list)
        or len(numbers) != found.get("num_windows")
        or not all(isinstance(number, float | int) for number in numbers)
        or not isinstance(found.get("text_sha256"), str)
    ):
        raise InputError(
            f"{path}: no result of an evaluation, with text_sha256 and a number of window_nats for each window",
            hint="write one with kvconvert evaluate --json > results.json",
            settings=("baseline",),
        )
    return found


def _of_original(evaluation: Evaluation, name: str) -> Comparison:
    if evaluation.against is None:
        raise InputError(f"{name} compares with an original", settings=(name, "against"))
    return evaluation.against


def _recovery_gates(evaluation: Evaluation, threshold: float) -> list[Gate]:
    """Of the excess since before uptraining, and of each task's score beside the original's."""
    gates = [
        Gate.at_least("min_recovery", score.kept, threshold, task=score.task)
        for score in evaluation.tasks
        if score.kept is not None
    ]
    if evaluation.recovery is not None:
        found = evaluation.recovery
        gates.insert(0, Gate.at_least("min_recovery", found.recovered, threshold, found.standard_error))
    if not gates:
        raise InputError(
            "a recovery is since a checkpoint before uptraining, or of tasks beside the original's",
            settings=("min_recovery", "before", "tasks"),
        )
    return gates


def _baseline_gate(evaluation: Evaluation, baseline: Mapping[str, Any]) -> Gate:
    """Windows paired: the loss of this model minus that of the baseline, in nats per token."""
    if baseline["text_sha256"] != evaluation.text_sha256:
        raise InputError(
            "the baseline is of other tokens or other windows, so that the two cannot be compared",
            hint="evaluate both with the same text and the same options",
            settings=("baseline",),
        )
    pairs = zip(evaluation.window_nats, baseline["window_nats"], strict=True)
    differences = [now - before for now, before in pairs]
    mean, error = sum(differences) / len(differences), 0.0
    if len(differences) > 1:
        variance = sum((each - mean) ** 2 for each in differences) / (len(differences) - 1)
        error = math.sqrt(variance / len(differences))
    return Gate.at_most("baseline", mean, max(2 * error, _LEAST_SLACK), error)
