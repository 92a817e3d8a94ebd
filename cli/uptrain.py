"""kvconvert uptrain."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.console import Console

from ..convert.errors import InputError
from ..pipeline import option_groups
from ..pipeline.defaults import config_file, converted_here, teacher_of, uptraining_from_recipe
from ..uptrain.recipe import Recipe
from ..uptrain.request import (
    Length,
    Machine,
    Monitoring,
    TextSettings,
    Tracker,
    UptrainRequest,
    UptrainSettings,
)
from .console import Terminal, human_bytes, human_count, show_left_behind
from .options import (
    DryRun,
    Force,
    Given,
    Json,
    Output,
    Quiet,
    Revision,
    SettingsOptions,
    TrustRemoteCode,
    accepts,
)

if TYPE_CHECKING:
    from ..uptrain import UptrainPlan, UptrainResult

__all__ = ["metrics_line", "resume_command", "take_over_fsdp", "uptrain"]

_LENGTH = SettingsOptions("length", option_groups.LENGTH, "Length")
_TEXT = SettingsOptions("text", option_groups.TRAINING_TEXT, "Text")
_SETTINGS = SettingsOptions("settings", option_groups.TRAINING, "Training")
_MACHINE = SettingsOptions(
    "machine",
    option_groups.MACHINE,
    "Machine",
    types={"micro_batch": str | None, "report_to": list[Tracker] | None},
    defaults={"report_to": None},
)
_MONITORING = SettingsOptions("monitoring", option_groups.MONITORING, "Monitoring")


@dataclass(frozen=True, kw_only=True)
class Request:
    """The options of `kvconvert uptrain` beside those of the library's settings."""

    model: Annotated[
        str | None,
        typer.Argument(
            metavar="[MODEL]",
            help="A checkpoint directory, or a hub id such as org/name. Default: that of the recipe, or the current "
            "directory if it is a converted checkpoint.",
            show_default=False,
        ),
    ] = None
    config: Annotated[
        Path | None,
        typer.Option(
            help="A recipe, whose model and section uptrain hold for what is not typed. Default: kvconvert.yaml in the "
            "current directory, where MODEL or --data is not typed.",
            show_default=False,
            rich_help_panel="Model",
        ),
    ] = None
    data: Annotated[
        list[str] | None,
        typer.Option(
            "--data",
            help="Text to train on: a file of text, JSON or parquet rows, a directory of them, or a dataset name; "
            "repeatable. A source may end in its weight, as a.jsonl:0.7, and before it say its own split, field, "
            "config and revision, as org/name[split=train,field=content]:0.3.",
            show_default=False,
            rich_help_panel="Text",
        ),
    ] = None
    teacher: Annotated[
        str | None,
        typer.Option(
            help="The original, or a larger model of its vocabulary, whose predictions the student learns. Default: "
            "the original that the manifest of MODEL names, where it still is what was converted.",
            show_default=False,
            rich_help_panel="Model",
        ),
    ] = None
    no_teacher: Annotated[
        bool,
        typer.Option("--no-teacher", help="Learn from the text alone, by cross-entropy.", rich_help_panel="Model"),
    ] = False
    output: Output = None
    revision: Revision = None
    trust_remote_code: TrustRemoteCode = False
    dry_run: DryRun = False
    force: Force = False
    as_json: Json = False
    quiet: Quiet = False


@accepts(Request, _LENGTH, _TEXT, _SETTINGS, _MACHINE, _MONITORING)
def uptrain(
    request: Request,
    length: Given[Length],
    text: Given[TextSettings],
    settings: Given[UptrainSettings],
    machine: Given[Machine],
    monitoring: Given[Monitoring],
) -> None:
    """Train a converted checkpoint briefly, so that it recovers. Runs under `accelerate launch` and `torchrun` too.

    The same command again goes on with a run that was stopped.

    Example: kvconvert uptrain model_dir-gqa8 --data text.jsonl --tokens 1B
    """
    terminal = Terminal(as_json=request.as_json, quiet=request.quiet)
    groups = (length, text, settings, machine, monitoring)
    asked = _from_recipe(request, groups) or _as_typed(request, *groups, terminal=terminal)
    if take_over_fsdp():
        asked = replace(asked, machine=replace(asked.machine, fsdp=True))
    asked = replace(asked, force=request.force)

    from ..uptrain import carry_out, joined_processes, plan_uptraining, summarise

    plan = plan_uptraining(asked, remark=terminal.remark)
    if request.dry_run:
        if plan.cost.warning is not None:
            terminal.remark(plan.cost.warning)
        terminal.result(summarise(plan), lambda console: _show_plan(plan, console))
        return
    with joined_processes():
        result = carry_out(
            plan,
            progress=terminal.progress,
            remark=terminal.remark,
            show=lambda record: terminal.remark(metrics_line(record)),
            command=resume_command(),
        )
    terminal.result(summarise(plan, result), lambda console: _show(result, console))


def _from_recipe(request: Request, groups: Sequence[Given[Any]]) -> UptrainRequest | None:
    """What a recipe asks, and the command line changes of it; None where there is no recipe."""
    recipe = request.config
    if recipe is None and (request.model is None or not request.data):
        recipe = config_file()
    if recipe is None:
        return None
    typed = {name: value for group in groups for name, value in group.chosen().items()}
    if "micro_batch" in typed:
        typed["micro_batch"] = ("--micro-batch", _micro_batch(typed["micro_batch"][1]))
    if request.data:
        typed["data"] = ("--data", request.data)
    if request.teacher is not None:
        typed["teacher"] = ("--teacher", request.teacher)
    if request.no_teacher:
        typed["no_teacher"] = ("--no-teacher", True)
    return uptraining_from_recipe(recipe, typed, model=request.model, output=request.output)


def _as_typed(
    request: Request,
    length: Given[Length],
    text: Given[TextSettings],
    settings: Given[UptrainSettings],
    machine: Given[Machine],
    monitoring: Given[Monitoring],
    *,
    terminal: Terminal,
) -> UptrainRequest:
    """What is typed, with the model and the original that the current directory and its manifest name."""
    model = request.model or converted_here()
    if model is None:
        raise InputError(
            "MODEL is missing: there is no kvconvert.yaml here, and this directory is no converted checkpoint",
            hint="name a converted checkpoint, or a recipe with --config",
        )
    if not request.data:
        raise InputError(
            "--data is missing: there is no text to train on", hint="name a text, or a recipe with --config"
        )
    if request.no_teacher and request.teacher is not None:
        raise InputError("--teacher and --no-teacher rule each other out", hint="leave out one of them")
    chosen = settings.build()
    teacher: str | Path | None = request.teacher
    if teacher is None and not request.no_teacher and chosen.recipe is not Recipe.pretraining:
        teacher = teacher_of(model, terminal.remark)
    return UptrainRequest(
        model=model,
        data=tuple(request.data),
        output=request.output,
        teacher=teacher,
        revision=request.revision,
        length=length.build(),
        text=text.build(),
        settings=chosen,
        machine=machine.build(
            micro_batch=_micro_batch(machine.values["micro_batch"]),
            report_to=tuple(machine.values["report_to"] or ()),
        ),
        monitoring=monitoring.build(),
    )


def _micro_batch(text: str | None) -> int | Literal["auto"] | None:
    if text is None or text == "auto":
        return text  # type: ignore[return-value]
    if not text.isdigit() or int(text) == 0:
        raise InputError(f"{text!r} is not a number of sequences, nor auto")
    return int(text)


def take_over_fsdp() -> bool:
    """Whether accelerate's configuration asks for FSDP, which kvconvert does by itself, while it loads models."""
    return os.environ.pop("ACCELERATE_USE_FSDP", "false").lower() == "true"


def resume_command() -> str:
    """What a person types to go on, with the launcher that started this process, if one did."""
    import psutil

    from ..uptrain.launcher import count_processes

    arguments = sys.argv[1:]
    program = ["kvconvert"]
    if count_processes() > 1:
        with suppress(psutil.Error):
            launched = psutil.Process(os.getppid()).cmdline()
            if launched[-len(arguments) :] == arguments:
                program = launched[: -len(arguments)]
    return shlex.join([*program, *(word for word in arguments if word != "--force")])


def metrics_line(record: dict[str, Any]) -> str:
    if "eval_nats_per_token" in record:
        return f"step {record['step']}: held-out {record['eval_nats_per_token']:.4f} nats/token"
    line = f"step {record['step']}: loss {record['loss']:.4f}, lr {record['learning_rate']:.2e}"
    if record.get("tokens_per_second"):
        line += f", {human_count(round(record['tokens_per_second']))} tokens/s"
    if record.get("mfu") is not None:
        line += f", MFU {record['mfu']:.1%}"
    if record.get("eta_seconds") is not None:
        line += f", {record['eta_seconds'] / 60:.0f} min left"
    return line


def _show_plan(plan: UptrainPlan, console: Console) -> None:
    job, budget, cost = plan.job, plan.budget, plan.cost
    settings, execution = job.settings, job.execution
    console.print(f"{job.checkpoint.name}: {settings.steps} steps, {human_count(budget.tokens)} tokens")
    part = budget.fraction_of_pretraining
    if part is not None:
        console.print(f"  pretraining  {part:.2%} of {human_count(budget.pretraining_tokens or 0)} ({budget.source})")
    console.print(f"  objective    {job.objective}" + (f" to {job.teacher}" if job.teacher else ""))
    for stage in settings.stages:
        at_most = "at most " if settings.rate_from_start and stage == settings.stages[-1] else ""
        console.print(
            f"  stage        {stage.name}: {stage.steps} steps, {stage.trained} parameters, "
            f"{settings.lr_scheduler}, peak {at_most}{stage.learning_rate:g}, {settings.precision}"
        )
    if plan.trials:
        rates = ", ".join(f"{trial.learning_rate:g}" for trial in plan.trials)
        at_most = "at most " if settings.rate_from_start else ""
        console.print(f"  trials       {plan.trials[0].steps} steps at each learning rate of {at_most}{rates}")
    at_once = "what fits" if execution.micro_batch is None else str(execution.micro_batch)
    console.print(
        f"  batch        {human_count(settings.tokens_per_step)} tokens in blocks of {settings.sequence_length}: "
        f"{at_once} at a time on each of {execution.num_processes}"
    )
    if cost.passes is not None:
        console.print(f"  data         {_passes(cost.passes)}")
    hours = f"{cost.h100_hours:.3g} hours of one H100"
    if cost.gpu_hours is not None:
        hours = f"{cost.gpu_hours:.3g} hours of one {cost.gpu_name}"
    with_trials = ", trials included" if plan.trials else ""
    console.print(f"  compute      {cost.flops:.2e} FLOPs, about {hours}{with_trials}")
    console.print(f"  memory       about {human_bytes(cost.memory_bytes)} per process")
    console.print(f"  disk         at most {human_bytes(cost.disk_bytes)}")
    console.print(f"  would write  {job.output}")


def _passes(passes: float | None) -> str:
    return "at most one pass over the text" if passes is None else f"about {passes:.2g} passes over the text"


def _show(result: UptrainResult, console: Console) -> None:
    steps = "1 step" if result.steps == 1 else f"{result.steps} steps"
    console.print(f"uptrained for {steps}, {human_count(result.tokens)} tokens, {result.objective}")
    console.print(f"  {result.seconds:.0f} s, {result.tokens_per_second:.0f} tokens/s, {_passes(result.passes)}")
    if result.start is not None:
        console.print(
            f"  peak learning rate {result.start.peak_learning_rate:.2g}, "
            f"from {result.start.kl_nats_per_token:.4f} nats/token of divergence at the start"
        )
    show_left_behind(result.left_behind, console)
    if result.held_out is not None:
        before = "" if result.held_out_before is None else f"{result.held_out_before:.4f} before, "
        after = "after" if result.kept_step is None else f"after step {result.kept_step}, the best, which is kept"
        console.print(f"  held-out {before}{result.held_out:.4f} nats/token {after}")
    console.print(f"  wrote {result.output}")
