"""kvconvert uptrain."""

from __future__ import annotations

from dataclasses import asdict
from enum import StrEnum
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from ..convert.checkpoint import open_checkpoint
from ..convert.text import TextSource
from .console import Terminal, human_count
from .options import (
    BatchSize,
    Data,
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
    default_output,
)

if TYPE_CHECKING:
    from ..uptrain.run import UptrainJob, UptrainResult

__all__ = ["uptrain"]

_EVAL_WINDOWS = 64


class Schedule(StrEnum):
    cosine = "cosine"
    linear = "linear"
    constant = "constant_with_warmup"


def uptrain(
    model: Model,
    steps: Annotated[int, typer.Option(min=1, help="Optimizer steps.", show_default=False)],
    data: Data,
    teacher: Annotated[
        str | None,
        typer.Option(help="The original: minimise the divergence from it, not cross-entropy.", show_default=False),
    ] = None,
    eval_data: Annotated[
        str | None, typer.Option(help="Held-out text, scored during training.", show_default=False)
    ] = None,
    sequence_length: Annotated[
        int | None,
        typer.Option(help="Tokens per block. Default: the model's longest, at most 2048.", show_default=False),
    ] = None,
    batch_size: BatchSize = 8,
    gradient_accumulation_steps: Annotated[int, typer.Option(min=1, help="Micro-batches per optimizer step.")] = 1,
    lr: Annotated[
        float | None,
        typer.Option(
            help="Peak learning rate. Default: 1e-3 below 100M parameters, 3e-4 below 3B, 1e-4 above.",
            show_default=False,
        ),
    ] = None,
    lr_scheduler: Annotated[
        Schedule, typer.Option(help="How the learning rate goes down after warm-up.")
    ] = Schedule.cosine,
    warmup_fraction: Annotated[float, typer.Option(min=0, max=1, help="Part of the steps that warm up.")] = 0.03,
    weight_decay: Annotated[float, typer.Option(min=0, help="AdamW's, on matrices only.")] = 0.1,
    max_grad_norm: Annotated[float, typer.Option(min=0, help="Clip the gradient to this norm; 0: do not.")] = 1.0,
    precision: PrecisionOption = Precision.auto,
    seed: Annotated[int, typer.Option(help="Seed of the block order.")] = 0,
    save_steps: Annotated[int, typer.Option(min=1, help="Steps between checkpoints to resume from.")] = 500,
    eval_steps: Annotated[int, typer.Option(min=1, help="Steps between scores of --eval-data.")] = 100,
    log_steps: Annotated[int, typer.Option(min=1, help="Steps between records in metrics.jsonl.")] = 10,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with an interrupted run, bit-exactly.")] = False,
    text_field: TextField = "text",
    split: Split = "train",
    data_config: DataConfig = None,
    output: Output = None,
    revision: Revision = None,
    trust_remote_code: TrustRemoteCode = False,
    dry_run: DryRun = False,
    force: Force = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Train a converted checkpoint briefly, so that it recovers. Runs under `accelerate launch` and `torchrun` too.

    Example: kvconvert uptrain --steps 1000 model_dir-gqa8 --data text.jsonl --teacher model_dir
    """
    terminal = Terminal(as_json=as_json, quiet=quiet)
    with open_checkpoint(model, revision=revision) as checkpoint:
        original = None
        if teacher is not None:
            with open_checkpoint(teacher) as opened:
                original = str(opened.directory)

        from ..uptrain import run

        settings = run.UptrainSettings(
            steps=steps,
            sequence_length=run.default_sequence_length(checkpoint) if sequence_length is None else sequence_length,
            learning_rate=run.default_learning_rate(checkpoint) if lr is None else lr,
            batch_size=batch_size,
            gradient_accumulation_steps=gradient_accumulation_steps,
            lr_scheduler=lr_scheduler.value,
            warmup_fraction=warmup_fraction,
            weight_decay=weight_decay,
            max_grad_norm=max_grad_norm,
            precision=precision.chosen,
            seed=seed,
            num_processes=run.count_processes(),
        )
        job = run.UptrainJob(
            checkpoint=checkpoint,
            settings=settings,
            source=TextSource(data, text_field=text_field, split=split, config=data_config),
            output=output or default_output(checkpoint, "uptrained"),
            teacher=original,
        )
        if dry_run:
            run.check_job(job, resume=resume, force=force)
            terminal.result(_summary(job) | {"dry_run": True}, lambda console: _show_plan(job, console))
            return
        run.check_job(job, resume=resume, force=force)
        score = None
        if eval_data is not None:
            score = _scorer(job, TextSource(eval_data, text_field=text_field, split=split, config=data_config))
        with terminal.progress("uptraining", steps) as advance:
            result = run.uptrain(
                job,
                run.Observation(
                    save_steps=save_steps,
                    log_steps=log_steps,
                    eval_steps=eval_steps,
                    score=score,
                    progress=advance,
                    show=lambda record: terminal.remark(_metrics_line(record)),
                ),
                resume=resume,
                force=force,
            )
    outcome = {"passes": result.passes, "seconds": round(result.seconds, 1), "dry_run": False}
    terminal.result(_summary(job) | outcome, lambda console: _show(result, console))


def _scorer(job: UptrainJob, source: TextSource) -> Any:
    """Nats per token on the first windows of held-out text."""
    from ..measure.held_out import load_windows
    from ..measure.perplexity import evaluate

    windows = load_windows(
        job.checkpoint.directory, source, window=job.settings.sequence_length, max_windows=_EVAL_WINDOWS
    )
    return lambda model: evaluate(model, windows, batch_size=job.settings.batch_size).nats_per_token


def _metrics_line(record: dict[str, Any]) -> str:
    if "eval_nats_per_token" in record:
        return f"step {record['step']}: held-out {record['eval_nats_per_token']:.4f} nats/token"
    return (
        f"step {record['step']}: loss {record['loss']:.4f}, lr {record['learning_rate']:.2e}, {record['seconds']:.0f} s"
    )


def _summary(job: UptrainJob) -> dict[str, Any]:
    settings = job.settings
    return {
        "model": job.checkpoint.name,
        "output": str(job.output),
        "objective": job.objective,
        "teacher": job.teacher,
        "tokens": settings.steps * settings.tokens_per_step,
        "settings": asdict(settings),
    }


def _show_plan(job: UptrainJob, console: Console) -> None:
    settings = job.settings
    tokens = settings.steps * settings.tokens_per_step
    console.print(f"{job.checkpoint.name}: {settings.steps} steps, {human_count(tokens)} tokens")
    console.print(f"  objective    {job.objective}" + (f" to {job.teacher}" if job.teacher else ""))
    console.print(f"  batch        {settings.tokens_per_step} tokens in blocks of {settings.sequence_length}")
    console.print(f"  schedule     {settings.lr_scheduler}, peak {settings.learning_rate:g}, {settings.precision}")
    console.print(f"  would write  {job.output}")


def _show(result: UptrainResult, console: Console) -> None:
    console.print(f"uptrained for {result.steps} steps, {human_count(result.tokens)} tokens, {result.objective}")
    console.print(
        f"  {result.seconds:.0f} s, {result.tokens_per_second:.0f} tokens/s, {result.passes:.2f} passes over the text"
    )
    console.print(f"  wrote {result.output}")
