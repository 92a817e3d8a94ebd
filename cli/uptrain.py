"""kvconvert uptrain."""

from __future__ import annotations

import os
import shlex
import sys
import time
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass, replace
from enum import StrEnum
from typing import TYPE_CHECKING, Annotated, Any

import psutil
import typer
from rich.console import Console

from ..convert.checkpoint.opening import open_checkpoint
from ..convert.checkpoint.tensors import Checkpoint
from ..convert.checkpoint.tokenizer import load_tokenizer
from ..convert.conversion import default_output
from ..convert.errors import InputError
from ..convert.text.sources import TextSource
from ..uptrain.estimate.budget import Batch, Budget, default_global_batch_tokens, derive_batch, plan_budget
from ..uptrain.estimate.cost import RunCost, require_consent, run_cost
from ..uptrain.estimate.flops import flops_per_token
from ..uptrain.estimate.gpu import detect_gpu, peak_flops, require_known_gpu
from ..uptrain.estimate.pretraining import lookup_pretraining_tokens
from ..uptrain.estimate.size import measure_size
from ..uptrain.recipe import LossWeights, Recipe, Trained
from .console import Terminal, human_bytes, human_count
from .options import (
    DataConfig,
    DryRun,
    Force,
    Json,
    Model,
    Output,
    Precision,
    PrecisionOption,
    Quiet,
    Revision,
    Split,
    TextField,
    TrustRemoteCode,
    accepts,
)

if TYPE_CHECKING:
    from ..uptrain.job import UptrainJob
    from ..uptrain.run import Observation, UptrainResult
    from ..uptrain.settings import RunSettings

from .values import parse_count, parse_duration, parse_percentage, parse_weighted

__all__ = ["uptrain"]

_EVAL_WINDOWS = 64
_AUTO = "auto"
_DEFAULT_VALIDATION_FRACTION = 0.01


class Schedule(StrEnum):
    cosine = "cosine"
    linear = "linear"
    constant = "constant_with_warmup"


class Tracker(StrEnum):
    tensorboard = "tensorboard"
    wandb = "wandb"
    trackio = "trackio"
    mlflow = "mlflow"


@dataclass(frozen=True, kw_only=True)
class Request:
    """The options of `kvconvert uptrain`."""

    model: Model
    data: Annotated[
        list[str],
        typer.Option(
            "--data",
            help="Text: a .txt, .jsonl or .parquet file, a directory of them, or a dataset name; repeatable, with "
            "weights as a.jsonl:0.7.",
        ),
    ]
    steps: Annotated[int | None, typer.Option(min=1, help="Optimizer steps.", show_default=False)] = None
    tokens: Annotated[str | None, typer.Option(metavar="COUNT", help="Tokens: 1B, 300M.", show_default=False)] = None
    fraction: Annotated[
        str | None,
        typer.Option(
            metavar="PART",
            help="Part of the pretraining tokens. Default of the three: 0.05, where these are known.",
            show_default=False,
        ),
    ] = None
    pretraining_tokens: Annotated[
        str | None,
        typer.Option(
            metavar="COUNT",
            help="On how many tokens the original was trained, where kvconvert does not know: 2T.",
            show_default=False,
        ),
    ] = None
    global_batch_tokens: Annotated[
        str | None,
        typer.Option(
            metavar="COUNT",
            help="Tokens per step over all processes. Default: 16384 below 100M parameters, 131072 below 1B, 524288.",
            show_default=False,
        ),
    ] = None
    yes: Annotated[bool, typer.Option("--yes", help="Start a run of many GPU hours.")] = False
    teacher: Annotated[
        str | None, typer.Option(help="The original, or a larger model of its vocabulary.", show_default=False)
    ] = None
    recipe: Annotated[
        Recipe | None, typer.Option(help="What is minimised. Default: distill with a teacher.", show_default=False)
    ] = None
    train_only: Annotated[Trained, typer.Option(help="Parameters to train.")] = Trained.all
    kl_weight: Annotated[
        float | None, typer.Option(min=0, help="Of forward KL. Default: 1, 0 for gqa.", show_default=False)
    ] = None
    ce_weight: Annotated[
        float | None, typer.Option(min=0, help="Of cross-entropy. Default: 0, 1 for gqa.", show_default=False)
    ] = None
    temperature: Annotated[float, typer.Option(help="At which distributions are compared.")] = 1.0
    layerwise_fraction: Annotated[
        float, typer.Option(min=0, help="Part of the steps that first fit attention layer by layer.")
    ] = 0.0
    lr: Annotated[
        float | None,
        typer.Option(
            help="Peak learning rate. Default: 1e-3 below 100M parameters, 3e-4 below 3B, 1e-4 above; a quarter of it "
            "for gqa after --method svd.",
            show_default=False,
        ),
    ] = None
    lr_sweep: Annotated[
        int, typer.Option(min=0, help="Try so many learning rates in short runs first, and take the best.")
    ] = 0
    layerwise_lr: Annotated[
        float | None, typer.Option(help="Of the layer-wise stage. Default: --lr.", show_default=False)
    ] = None
    body_lr_multiplier: Annotated[
        float, typer.Option(min=0, help="Learning rate outside of attention, as a part of --lr.")
    ] = 1.0
    lr_scheduler: Annotated[Schedule, typer.Option(help="How the learning rate goes down after warm-up.")] = (
        Schedule.cosine
    )
    warmup_fraction: Annotated[float, typer.Option(min=0, max=1, help="Part of the steps that warm up.")] = 0.03
    weight_decay: Annotated[float, typer.Option(min=0, help="AdamW's, on matrices only.")] = 0.1
    max_grad_norm: Annotated[float, typer.Option(min=0, help="Clip the gradient to this norm; 0: do not.")] = 1.0
    seed: Annotated[int, typer.Option(help="Seed of the block order.")] = 0
    sequence_length: Annotated[
        int | None,
        typer.Option(help="Tokens per block. Default: the model's longest, at most 2048.", show_default=False),
    ] = None
    micro_batch: Annotated[
        str | None,
        typer.Option(
            metavar="N|auto",
            help="Sequences that a process takes at once; auto: as many as fit. Default: up to 8.",
            show_default=False,
        ),
    ] = None
    precision: PrecisionOption = Precision.auto
    compile: Annotated[bool, typer.Option("--compile", help="torch.compile student and teacher.")] = False
    activation_checkpointing: Annotated[
        bool, typer.Option("--activation-checkpointing", help="Less memory, a third more time.")
    ] = False
    fsdp: Annotated[
        bool, typer.Option("--fsdp", help="Shard models, gradients and optimizer over the processes (FSDP2).")
    ] = False
    gpu: Annotated[
        str | None,
        typer.Option(help="GPU to reckon hours for, as torch names it. Default: this machine's.", show_default=False),
    ] = None
    validation_fraction: Annotated[
        float | None,
        typer.Option(
            min=0, max=1, help="Documents to hold out. Default: 0.01, 0 with --eval-data.", show_default=False
        ),
    ] = None
    stream: Annotated[
        bool, typer.Option("--stream", help="Pack text while it is needed, for a corpus larger than the disk.")
    ] = False
    eval_data: Annotated[
        str | None, typer.Option(help="Held-out text, scored during training.", show_default=False)
    ] = None
    eval_steps: Annotated[int, typer.Option(min=1, help="Steps between scores of held-out text.")] = 100
    save_steps: Annotated[int, typer.Option(min=1, help="Steps between checkpoints to go on from.")] = 500
    log_steps: Annotated[int, typer.Option(min=1, help="Steps between records in metrics.jsonl.")] = 10
    max_time: Annotated[
        str | None,
        typer.Option(metavar="TIME", help="Save and exit with 75 before: 5h45m.", show_default=False),
    ] = None
    report_to: Annotated[
        list[Tracker] | None, typer.Option(help="A tracker that is installed; repeatable.", show_default=False)
    ] = None
    text_field: TextField = "text"
    split: Split = "train"
    data_config: DataConfig = None
    data_revision: Annotated[
        str | None, typer.Option(help="Branch, tag or commit of a named dataset.", show_default=False)
    ] = None
    output: Output = None
    revision: Revision = None
    trust_remote_code: TrustRemoteCode = False
    dry_run: DryRun = False
    force: Force = False
    as_json: Json = False
    quiet: Quiet = False


@accepts(Request)
def uptrain(request: Request) -> None:
    """Train a converted checkpoint briefly, so that it recovers. Runs under `accelerate launch` and `torchrun` too.

    The same command again goes on with a run that was stopped.

    Example: kvconvert uptrain model_dir-gqa8 --data text.jsonl --teacher model_dir --tokens 1B
    """
    terminal = Terminal(as_json=request.as_json, quiet=request.quiet)
    deadline = None if request.max_time is None else time.monotonic() + parse_duration(request.max_time)
    with ExitStack() as stack:
        checkpoint = stack.enter_context(open_checkpoint(request.model, revision=request.revision))
        teacher = None if request.teacher is None else stack.enter_context(open_checkpoint(request.teacher))
        plan = _plan(request, checkpoint, teacher, terminal)

        from ..uptrain import run, sweep
        from ..uptrain.checks import check_job
        from ..uptrain.rundir import trials

        job, force = plan.job, request.force
        begun = trials.find_sweep(job, request.lr_sweep, force=force) if request.lr_sweep else None
        if begun is not None:
            force = force or trials.goes_on_to_replace(begun, job)
            job = trials.with_best_rate(job, begun.trials) if begun.is_done else job
        sweeps = bool(request.lr_sweep) and (begun is None or not begun.is_done)
        check_job(job, held_out=_held_out(request), force=force)
        if sweeps:
            sweep.check_sweep(job, scored=request.eval_data is not None, force=force)
        if request.dry_run:
            if plan.cost.warning is not None:
                terminal.remark(plan.cost.warning)
            terminal.result(_summary(plan) | {"dry_run": True}, lambda console: _show_plan(plan, console))
            return
        require_consent(plan.cost, plan.budget.explicit, request.yes)
        watch = _observation(request, plan, terminal, deadline)
        with run.joined_processes():
            if sweeps:
                job = _swept(job, watch, terminal, num_rates=request.lr_sweep, force=force)
            with terminal.progress("uptraining", job.settings.steps) as advance:
                result = run.uptrain(job, replace(watch, progress=advance), force=force)
    outcome = {"passes": result.passes, "seconds": round(result.seconds, 1), "dry_run": False}
    terminal.result(_summary(replace(plan, job=job)) | outcome, lambda console: _show(result, console))


@dataclass(frozen=True)
class _Plan:
    job: UptrainJob
    trials: tuple[RunSettings, ...]
    budget: Budget
    cost: RunCost
    flops_per_token: dict[str, float]
    peak_flops: float | None


def _plan(request: Request, checkpoint: Checkpoint, teacher: Checkpoint | None, terminal: Terminal) -> _Plan:
    """What the options come to: the job, how long it is, what it costs."""
    from ..uptrain.data.sources import measure_sources
    from ..uptrain.launcher import count_processes, sharding_of
    from ..uptrain.rundir.trials import trial_settings
    from ..uptrain.settings import default_sequence_length
    from ..uptrain.teacher import copied_bytes

    if request.gpu is not None:
        require_known_gpu(request.gpu)
    batch_tokens = default_global_batch_tokens(checkpoint.num_parameters)
    batch = derive_batch(
        global_batch_tokens=batch_tokens
        if request.global_batch_tokens is None
        else parse_count(request.global_batch_tokens),
        sequence_length=default_sequence_length(checkpoint)
        if request.sequence_length is None
        else request.sequence_length,
        num_processes=count_processes(),
        micro_batch=None if request.micro_batch in (None, _AUTO) else _parse_micro_batch(request.micro_batch),
    )
    known = lookup_pretraining_tokens(checkpoint, teacher)
    for remark in known.remarks:
        terminal.remark(remark)
    budget = plan_budget(
        steps=request.steps,
        tokens=None if request.tokens is None else parse_count(request.tokens),
        fraction=None if request.fraction is None else parse_percentage(request.fraction),
        pretraining_tokens=None if request.pretraining_tokens is None else parse_count(request.pretraining_tokens),
        lookup=known,
        tokens_per_step=batch.tokens_per_step,
    )
    settings = _settings(request, checkpoint, batch, budget)
    if not settings.uses_teacher:
        teacher = None
    job = _job(request, checkpoint, teacher, settings, micro_batch=batch.micro_batch)
    if request.teacher is not None and teacher is None:
        terminal.remark(f"--teacher {request.teacher} is not used: {job.objective} compares with no teacher")
    trials = trial_settings(settings, request.lr_sweep)
    detected = detect_gpu()
    student = measure_size(checkpoint)
    original = None if teacher is None else measure_size(teacher)
    cost = run_cost(
        budget,
        batch,
        [stage for part in (*trials, settings) for stage in part.stages],
        student,
        original,
        weights=settings.weights,
        sources=measure_sources(job.sources, load_tokenizer(checkpoint.directory) if request.dry_run else None),
        window_tokens=job.window_tokens(request.save_steps),
        teacher_copy_bytes=0 if teacher is None else copied_bytes(teacher),
        shares=job.shares_frozen,
        gpu_name=request.gpu or detected,
        sharding=sharding_of(job.execution),
        bf16=settings.precision == "bf16",
        activation_checkpointing=request.activation_checkpointing,
    )
    per_token = {
        stage.name: flops_per_token(
            student,
            original if stage.uses_teacher(settings.weights) else None,
            stage.objective,
            stage.trained,
            batch.sequence_length,
        )
        for stage in settings.stages
    }
    return _Plan(job, trials, budget, cost, per_token, None if detected is None else peak_flops(detected))


def _settings(request: Request, checkpoint: Checkpoint, batch: Batch, budget: Budget) -> RunSettings:
    from ..uptrain.settings import RunSettings, default_learning_rate

    recipe = request.recipe or (Recipe.gqa if request.teacher is None else Recipe.distill)
    return RunSettings(
        steps=budget.steps,
        sequence_length=batch.sequence_length,
        sequences_per_step=batch.sequences_per_step,
        learning_rate=default_learning_rate(checkpoint, recipe) if request.lr is None else request.lr,
        recipe=recipe,
        weights=_weights(request, recipe),
        trained=request.train_only,
        layerwise_fraction=request.layerwise_fraction,
        layerwise_learning_rate=request.layerwise_lr,
        body_lr_multiplier=request.body_lr_multiplier,
        lr_scheduler=request.lr_scheduler.value,
        warmup_fraction=request.warmup_fraction,
        weight_decay=request.weight_decay,
        max_grad_norm=request.max_grad_norm,
        precision=request.precision.chosen,
        seed=request.seed,
    )


def _job(
    request: Request,
    checkpoint: Checkpoint,
    teacher: Checkpoint | None,
    settings: RunSettings,
    *,
    micro_batch: int,
) -> UptrainJob:
    from ..uptrain.data.sources import WeightedSource
    from ..uptrain.job import UptrainJob
    from ..uptrain.launcher import count_processes, take_over_fsdp
    from ..uptrain.settings import Execution

    return UptrainJob(
        checkpoint=checkpoint,
        settings=settings,
        sources=tuple(
            WeightedSource(
                TextSource(
                    place,
                    text_field=request.text_field,
                    split=request.split,
                    config=request.data_config,
                    revision=request.data_revision,
                ),
                weight,
            )
            for place, weight in map(parse_weighted, request.data)
        ),
        output=request.output or default_output(checkpoint, "uptrained"),
        teacher=None if teacher is None else str(teacher.directory),
        execution=Execution(
            micro_batch=None if request.micro_batch == _AUTO else micro_batch,
            num_processes=count_processes(),
            fsdp=take_over_fsdp() or request.fsdp,
            compile=request.compile,
            activation_checkpointing=request.activation_checkpointing,
            report_to=tuple(tracker.value for tracker in request.report_to or ()),
        ),
        validation_fraction=_validation_fraction(request),
        stream=request.stream,
    )


def _validation_fraction(request: Request) -> float:
    if request.validation_fraction is not None:
        return request.validation_fraction
    return _DEFAULT_VALIDATION_FRACTION if request.eval_data is None else 0.0


def _weights(request: Request, recipe: Recipe) -> LossWeights:
    kl, cross_entropy = (0.0, 1.0) if recipe is Recipe.gqa else (1.0, 0.0)
    if recipe is Recipe.gqa and request.kl_weight:
        raise InputError("recipe gqa has no KL", hint="use --recipe distill with --kl-weight and --ce-weight")
    return LossWeights(
        kl=kl if request.kl_weight is None else request.kl_weight,
        cross_entropy=cross_entropy if request.ce_weight is None else request.ce_weight,
        temperature=request.temperature,
    )


def _parse_micro_batch(text: str) -> int:
    if not text.isdigit() or int(text) == 0:
        raise typer.BadParameter(f"{text!r} is not a number of sequences, nor {_AUTO}")
    return int(text)


def _observation(request: Request, plan: _Plan, terminal: Terminal, deadline: float | None) -> Observation:
    from ..uptrain import run

    held_out = _held_out(request)
    return run.Observation(
        save_steps=request.save_steps,
        log_steps=request.log_steps,
        eval_steps=request.eval_steps,
        deadline=deadline,
        score=None if held_out is None else _scorer(plan.job, held_out),
        show=lambda record: terminal.remark(_metrics_line(record)),
        remark=terminal.remark,
        flops_per_token=plan.flops_per_token,
        peak_flops=plan.peak_flops,
        command=_resume_command(),
    )


def _resume_command() -> str:
    """What a person types to go on, with the launcher that started this process, if one did."""
    from ..uptrain.launcher import count_processes

    arguments = sys.argv[1:]
    program = ["kvconvert"]
    if count_processes() > 1:
        with suppress(psutil.Error):
            launched = psutil.Process(os.getppid()).cmdline()
            if launched[-len(arguments) :] == arguments:
                program = launched[: -len(arguments)]
    return shlex.join([*program, *(word for word in arguments if word != "--force")])


def _held_out(request: Request) -> TextSource | None:
    """The text that --eval-data names."""
    if request.eval_data is None:
        return None
    return TextSource(request.eval_data, text_field=request.text_field, split=request.split, config=request.data_config)


def _scorer(job: UptrainJob, source: TextSource) -> Any:
    """Nats per token on the first windows of held-out text."""
    from ..measure.held_out import load_windows
    from ..measure.perplexity import evaluate

    windows = load_windows(
        job.checkpoint.directory, source, window=job.settings.sequence_length, max_windows=_EVAL_WINDOWS
    )
    return lambda model: evaluate(model, windows, batch_size=job.execution.micro_batch or 1).nats_per_token


def _swept(job: UptrainJob, watch: Observation, terminal: Terminal, *, num_rates: int, force: bool) -> UptrainJob:
    """The job at the learning rate that short runs choose, and their table."""
    from ..uptrain.rundir.trials import with_best_rate
    from ..uptrain.sweep import sweep_learning_rates

    trials = sweep_learning_rates(job, watch, num_rates=num_rates, force=force)
    for trial in trials:
        score = "diverged" if trial.nats_per_token is None else f"held-out {trial.nats_per_token:.4f} nats/token"
        terminal.remark(f"lr {trial.learning_rate:.2e}: {score} after {trial.steps} steps")
    best = with_best_rate(job, trials)
    terminal.remark(f"learning rate {best.settings.learning_rate:.2e}")
    return best


def _metrics_line(record: dict[str, Any]) -> str:
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


def _summary(plan: _Plan) -> dict[str, Any]:
    job, budget = plan.job, plan.budget
    return {
        "model": job.checkpoint.name,
        "output": str(job.output),
        "objective": job.objective,
        "teacher": job.teacher,
        "tokens": budget.tokens,
        "budget": asdict(budget) | {"fraction_of_pretraining": budget.fraction_of_pretraining},
        "stages": [asdict(stage) for stage in job.settings.stages],
        "settings": asdict(job.settings),
        "trials": [{"learning_rate": trial.learning_rate, "steps": trial.steps} for trial in plan.trials],
        "execution": asdict(job.execution),
        "cost": asdict(plan.cost),
    }


def _show_plan(plan: _Plan, console: Console) -> None:
    job, budget, cost = plan.job, plan.budget, plan.cost
    settings, execution = job.settings, job.execution
    console.print(f"{job.checkpoint.name}: {settings.steps} steps, {human_count(budget.tokens)} tokens")
    part = budget.fraction_of_pretraining
    if part is not None:
        console.print(f"  pretraining  {part:.2%} of {human_count(budget.pretraining_tokens or 0)} ({budget.source})")
    console.print(f"  objective    {job.objective}" + (f" to {job.teacher}" if job.teacher else ""))
    for stage in settings.stages:
        console.print(
            f"  stage        {stage.name}: {stage.steps} steps, {stage.trained} parameters, "
            f"{settings.lr_scheduler}, peak {stage.learning_rate:g}, {settings.precision}"
        )
    if plan.trials:
        rates = ", ".join(f"{trial.learning_rate:g}" for trial in plan.trials)
        console.print(f"  trials       {plan.trials[0].steps} steps at each learning rate of {rates}")
    at_once = "what fits" if execution.micro_batch is None else str(execution.micro_batch)
    console.print(
        f"  batch        {human_count(settings.tokens_per_step)} tokens in blocks of {settings.sequence_length}: "
        f"{at_once} at a time on each of {execution.num_processes}"
    )
    if cost.passes is not None:
        console.print(f"  data         {_passes(cost.passes)}")
    with_trials = ", trials included" if plan.trials else ""
    console.print(f"  compute      {cost.flops:.2e} FLOPs, {_hours(cost)}{with_trials}")
    console.print(f"  memory       about {human_bytes(cost.memory_bytes)} per process")
    console.print(f"  disk         at most {human_bytes(cost.disk_bytes)}")
    console.print(f"  would write  {job.output}")


def _hours(cost: RunCost) -> str:
    """At 40 % of the peak of a GPU that is known, else of an H100."""
    if cost.gpu_hours is not None:
        return f"about {cost.gpu_hours:.3g} hours of one {cost.gpu_name}"
    return f"about {cost.h100_hours:.3g} hours of one H100"


def _passes(passes: float | None) -> str:
    return "at most one pass over the text" if passes is None else f"about {passes:.2g} passes over the text"


def _show(result: UptrainResult, console: Console) -> None:
    console.print(f"uptrained for {result.steps} steps, {human_count(result.tokens)} tokens, {result.objective}")
    console.print(f"  {result.seconds:.0f} s, {result.tokens_per_second:.0f} tokens/s, {_passes(result.passes)}")
    console.print(f"  wrote {result.output}")
