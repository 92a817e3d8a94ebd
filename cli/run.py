"""kvconvert run."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from ..measure.gates import GATE_FORMATS, describe_failure
from .console import Terminal, human_bytes
from .github import publish_evaluation
from .options import DryRun, Json, Quiet
from .uptrain import metrics_line, resume_command

if TYPE_CHECKING:
    from rich.console import Console

    from ..pipeline import Run, RunPlan

__all__ = ["Overrides", "carry_out", "run", "schema"]

_Stage = Literal["convert", "uptrain", "evaluate", "benchmark", "report", "push"]


Overrides = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="KEY=VALUE",
        help="Change the recipe, as uptrain.tokens=1B; null takes a key away. Repeatable.",
        show_default=False,
    ),
]


def run(
    recipe: Annotated[Path, typer.Argument(metavar="RECIPE", help="A recipe, a YAML file (kvconvert schema).")],
    overrides: Overrides = None,
    first: Annotated[
        _Stage | None,
        typer.Option("--from", help="Make this stage again, and all after it.", show_default=False),
    ] = None,
    last: Annotated[_Stage | None, typer.Option("--until", help="Stop after this stage.", show_default=False)] = None,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            help="Directory of the run. Default: the recipe's output, or its file's name in the current directory.",
            show_default=False,
        ),
    ] = None,
    dry_run: DryRun = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Carry out a recipe: convert, uptrain, evaluate, benchmark, report. The same command goes on after an end.

    Example: kvconvert run recipe.yaml --set uptrain.tokens=1B
    """
    carry_out(
        recipe,
        overrides or (),
        output=output,
        first=first,
        last=last,
        dry_run=dry_run,
        as_json=as_json,
        quiet=quiet,
    )


def carry_out(
    recipe: Path,
    overrides: Sequence[str],
    *,
    output: Path | None,
    first: str | None = None,
    last: str | None = None,
    dry_run: bool,
    as_json: bool,
    quiet: bool,
) -> None:
    """Run a recipe, or plan it, and show what came of it."""
    from .. import pipeline

    terminal = Terminal(as_json=as_json, quiet=quiet)
    if dry_run:
        plan = pipeline.plan_run(
            recipe, overrides=overrides, output=output, first=first, last=last, remark=terminal.remark
        )
        terminal.result(plan.to_json(), lambda console: _show_plan(plan, console))
        return
    try:
        result = pipeline.run(
            recipe,
            overrides=overrides,
            output=output,
            first=first,
            last=last,
            command=resume_command(),
            progress=terminal.progress,
            remark=terminal.remark,
            show=lambda record: terminal.remark(metrics_line(record)),
        )
    except pipeline.FailedGatesError as error:  # all is done and written, and shown before the verdict
        _tell(error.run, terminal)
        raise
    _tell(result, terminal)


def schema() -> None:
    """Print what a recipe may say, as a JSON schema, with which editors complete and check recipes.

    Example: kvconvert schema > recipe.schema.json
    """
    from .. import pipeline

    Terminal(as_json=True).result(pipeline.json_schema(), lambda console: None)


def _tell(result: Run, terminal: Terminal) -> None:
    _tell_github(result)
    terminal.result(result.to_json(), lambda console: _show(result, console))


def _tell_github(result: Run) -> None:
    """Write figures as summary and outputs of a step of GitHub Actions, and annotations of gates that failed."""
    if result.evaluation is not None:
        failures = [(gate.name, describe_failure(gate)) for gate in result.gates if not gate.passed]
        publish_evaluation(result.evaluation, failures, output=result.output, model=result.model)


def _show_plan(plan: RunPlan, console: Console) -> None:
    console.print(f"{plan.recipe}: would write to {plan.output}, at most {human_bytes(plan.disk_bytes)}")
    for stage in plan.stages:
        console.print(f"  {stage.name:<10} {'done before' if stage.done_before else stage.why}")
        for name, value in stage.facts.items():
            if value not in (None, [], {}):
                console.print(f"    {name.replace('_', ' '):<22} {_in_words(name, value)}")


def _in_words(name: str, value: Any) -> str:
    if isinstance(value, dict):
        arrow = {"source", "result"} == value.keys()
        return (
            " → ".join(map(str, value.values())) if arrow else ", ".join(f"{key} {one}" for key, one in value.items())
        )
    if isinstance(value, list):
        return ", ".join(map(str, value))
    if name.endswith("_bytes"):
        return human_bytes(value)
    if isinstance(value, float):
        return f"{value:.3g}"
    return str(value)


def _show(result: Run, console: Console) -> None:
    for fact in result.headline:
        console.print(f"{fact.label:<18} {fact.value}{f' ({fact.note})' if fact.note else ''}")
    for gate in result.gates:
        form, verdict = GATE_FORMATS[gate.name].format, "passed" if gate.passed else "failed"
        console.print(f"{'gate':<18} {gate.name}: {form(gate.value)}, limit {form(gate.threshold)}: {verdict}")
    seconds = ", ".join(f"{name} {record.seconds:.0f}" for name, record in result.stages.items())
    console.print(f"{'seconds':<18} {seconds}")
    console.print(f"{'model':<18} {result.model}")
    for path in result.files:
        console.print(f"{'report':<18} {path}")
