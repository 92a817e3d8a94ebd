"""Numbers about a model, alone or against its original.

    from kvconvert.measure import evaluate

    evaluate("recovered", "held_out.jsonl", against="model_dir").against.excess_nats_per_token

Prints nothing; docs/library.md explains it.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .benchmarking import benchmark
    from .card_results import add_results
    from .evaluation import EvaluationSettings, evaluate
    from .gates import Gate, Limits, check_limits, read_baseline
    from .perplexity import Comparison, Evaluation, PositionLoss, Recovery
    from .samples import Sample
    from .speed import Benchmark, BenchmarkSettings
    from .tasks import TaskScore, TaskSettings
    from .verification import Verification, verify

__all__ = [
    "Benchmark",
    "BenchmarkSettings",
    "Comparison",
    "Evaluation",
    "EvaluationSettings",
    "Gate",
    "Limits",
    "PositionLoss",
    "Recovery",
    "Sample",
    "TaskScore",
    "TaskSettings",
    "Verification",
    "add_results",
    "benchmark",
    "check_limits",
    "evaluate",
    "read_baseline",
    "verify",
]

# where each name is defined: numbers about a model need torch, which takes seconds, and is imported when asked for
_HOMES = {
    "Benchmark": ".speed",
    "BenchmarkSettings": ".speed",
    "Comparison": ".perplexity",
    "Evaluation": ".perplexity",
    "EvaluationSettings": ".evaluation",
    "Gate": ".gates",
    "Limits": ".gates",
    "PositionLoss": ".perplexity",
    "Recovery": ".perplexity",
    "Sample": ".samples",
    "TaskScore": ".tasks",
    "TaskSettings": ".tasks",
    "Verification": ".verification",
    "add_results": ".card_results",
    "benchmark": ".benchmarking",
    "check_limits": ".gates",
    "evaluate": ".evaluation",
    "read_baseline": ".gates",
    "verify": ".verification",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name], __name__), name)
