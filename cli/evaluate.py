"""kvconvert evaluate."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .. import measure
from ..convert.errors import InputError, QualityGateError
from ..measure.evaluation import EvaluationSettings
from ..measure.gates import describe_failure
from ..measure.results import evaluation_summary, make_directory, write_evaluation, write_hub_results
from ..measure.tasks import TaskSettings
from ..pipeline import option_groups
from ..pipeline.defaults import against_of
from ..pipeline.values import parse_percentage
from .console import Terminal
from .evaluation_report import Names, show_evaluation
from .github import publish_evaluation
from .options import Data, Given, Json, Model, Quiet, Revision, SettingsOptions, TrustRemoteCode, accepts

if TYPE_CHECKING:
    from ..measure import Gate, Limits

__all__ = ["evaluate"]

_SETTINGS = SettingsOptions(
    "settings",
    option_groups.EVALUATION,
    "Scoring",
)


_TASKS = SettingsOptions(
    "tasks",
    option_groups.TASKS,
    "Tasks",
    types={"tasks": str | None},
    defaults={"tasks": None},
    help={"tasks": "Tasks of lm-evaluation-harness, separated by commas, for example hellaswag,arc_easy."},
)


def _gate(text: str) -> Any:
    return typer.Option(help=text, show_default=False, rich_help_panel="Gates")


@dataclass(frozen=True)
class Request:
    """What is compared, and what is shown."""

    against: Annotated[
        str | None,
        typer.Option(
            help="The original: adds KL, top-1 agreement and excess loss. Default: the original that the manifest of "
            "MODEL names, where it still is what was converted.",
            show_default=False,
            rich_help_panel="Model",
        ),
    ] = None
    no_against: Annotated[
        bool,
        typer.Option("--no-against", help="Score MODEL alone.", rich_help_panel="Model"),
    ] = False
    before: Annotated[
        str | None,
        typer.Option(
            help="The converted checkpoint before uptraining: adds how much of its excess loss came back.",
            show_default=False,
            rich_help_panel="Model",
        ),
    ] = None
    max_ppl_increase: Annotated[
        str | None, _gate("Exit with 3 if perplexity is further above the original, for example 5%.")
    ] = None
    min_recovery: Annotated[
        str | None, _gate("Exit with 3 if less of the excess loss of --before came back, for example 95%.")
    ] = None
    max_kl: Annotated[
        float | None, _gate("Exit with 3 if the KL to the original is larger, in nats per token, for example 0.05.")
    ] = None
    baseline: Annotated[
        Path | None,
        _gate(
            "What evaluate --json printed of an earlier model on the same text. Exit with 3 if the loss is higher than "
            "there, by more than 0.001 nats and than twice the standard error of the difference."
        ),
    ] = None
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            help="Directory for what --json prints, as evaluation_<date>.json, and for what lm-evaluation-harness "
            "writes of tasks, as <model>/results_<date>.json.",
            show_default=False,
            rich_help_panel="Output",
        ),
    ] = None
    hub_results: Annotated[
        bool,
        typer.Option(
            "--hub-results",
            help="Write .eval_results/<task>.yaml below --output too, for the repository of the model on the hub.",
            rich_help_panel="Output",
        ),
    ] = False
    revision: Revision = None
    trust_remote_code: TrustRemoteCode = False
    as_json: Json = False
    quiet: Quiet = False

    def limits(self, *, with_tasks: bool) -> Limits:
        """The gates. Raises InputError for what they need and is not given, and for numbers that cannot be."""
        needs = {"max_ppl_increase": "against", "max_kl": "against", "min_recovery": "against", "before": "against"}
        for name, other in needs.items():
            if getattr(self, name) is not None and getattr(self, other) is None:
                flag, missing = f"--{name.replace('_', '-')}", f"--{other}"
                raise InputError(f"{flag} needs {missing}", hint="name the original model with --against")
        if self.min_recovery is not None and self.before is None and not with_tasks:
            raise InputError(
                "--min-recovery needs --before or --tasks",
                hint="name the converted checkpoint before uptraining with --before, or tasks to compare scores of",
            )
        if self.max_kl is not None and not self.max_kl >= 0:
            raise InputError(f"--max-kl is {self.max_kl}, expected a number from 0 on")
        return measure.Limits(
            None if self.max_ppl_increase is None else parse_percentage(self.max_ppl_increase),
            None if self.min_recovery is None else parse_percentage(self.min_recovery),
            self.max_kl,
            None if self.baseline is None else measure.read_baseline(self.baseline),
        )


@accepts(_SETTINGS, _TASKS, Request)
def evaluate(
    model: Model, data: Data, settings: Given[EvaluationSettings], tasks: Given[TaskSettings], request: Request
) -> None:
    """Measure perplexity on held-out text, alone or against the original.

    Example: kvconvert evaluate model_dir-gqa8 --data held_out.jsonl --against model_dir --max-ppl-increase 5%
    """
    terminal = Terminal(as_json=request.as_json, quiet=request.quiet)
    chosen = settings.build()
    request = replace(request, against=against_of(model, request.against, request.no_against, terminal.remark))
    named = tasks.build(tasks=tuple(filter(None, map(str.strip, (tasks.values["tasks"] or "").split(",")))))
    limits = request.limits(with_tasks=bool(named.tasks))
    if request.hub_results and (request.output is None or not named.tasks):
        raise InputError("--hub-results is about --tasks, and is written below --output", hint="give both")
    if request.output is not None:
        make_directory(request.output)
    evaluation = measure.evaluate(
        model,
        data,
        against=request.against,
        before=request.before,
        settings=chosen,
        tasks=named,
        output=request.output,
        revision=request.revision,
        progress=terminal.progress,
        remark=terminal.remark,
    )
    gates: tuple[Gate, ...] = ()
    refusal: InputError | None = None
    try:
        gates = measure.check_limits(evaluation, limits)
    except InputError as error:  # of a baseline of another text; what was measured is not lost for it
        refusal = error
    summary = evaluation_summary(model, data, chosen, evaluation, gates)
    if request.output is not None:
        terminal.remark(f"wrote {write_evaluation(request.output, summary)}")
    names = Names(model, request.against, request.before)
    failures = [(gate.name, describe_failure(gate)) for gate in gates if not gate.passed]
    publish_evaluation(summary, failures, output=request.output)
    terminal.result(summary, lambda console: show_evaluation(evaluation, gates, names, console))
    if request.hub_results and request.output is not None:
        for path in write_hub_results(request.output, evaluation.tasks):
            terminal.remark(f"wrote {path}")
    if refusal is not None:
        raise refusal
    if failures:
        raise QualityGateError("; ".join(sentence for _, sentence in failures))
