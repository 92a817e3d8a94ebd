"""From what a user asks for to a checked job, and from there to its result."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from ..convert.checkpoint.opening import open_checkpoint
from ..convert.checkpoint.tensors import Checkpoint
from ..convert.conversion import Progress, default_output, no_progress
from ..convert.device import default_precision
from ..convert.errors import CheckpointError, InputError
from ..convert.text.sources import TextSource
from .checks import check_job, of_eval_data
from .data.sources import WeightedSource, parse_source
from .estimate.budget import Batch, Budget, check_asked_batch, default_global_batch_tokens, derive_batch, plan_budget
from .estimate.cost import RunCost, require_consent, run_cost
from .estimate.flops import stage_flops_per_token
from .estimate.gpu import detect_gpu, peak_flops, require_known_gpu
from .estimate.pretraining import lookup_pretraining_tokens
from .inputs import Inputs
from .job import UptrainJob
from .launcher import count_processes
from .observation import Observation
from .recipe import LossWeights, Recipe
from .request import Length, Machine, Monitoring, TextSettings, UptrainRequest, UptrainSettings
from .run import UptrainResult, run_checked
from .rundir.prepare import no_held_out_text
from .rundir.trials import Trial, find_sweep, goes_on_to_replace, trial_settings, with_best_rate
from .settings import Execution, RunSettings, default_learning_rate, default_sequence_length
from .sweep import check_sweep, sweep_learning_rates
from .teacher import as_teacher

__all__ = ["UptrainPlan", "carry_out", "plan_uptraining", "summarise", "uptrain"]

_EVAL_WINDOWS = 64
_DEFAULT_VALIDATION_FRACTION = 0.01


@dataclass(frozen=True)
class UptrainPlan:
    """A run that can be started: its job, how long it is, what it costs.

    `trials` are the settings of all trials of a learning-rate sweep; `sweeps` says that some are still to be run, after
    which the job takes the best rate. `force` says that an output may be replaced. `deadline` is on time.monotonic()'s
    clock.
    """

    request: UptrainRequest
    job: UptrainJob
    trials: tuple[RunSettings, ...]
    sweeps: bool
    force: bool
    budget: Budget
    cost: RunCost
    held_out: TextSource | None
    deadline: float | None


def uptrain(
    model: str | Path,
    *,
    data: str | Path | WeightedSource | Sequence[str | Path | WeightedSource],
    output: str | Path | None = None,
    teacher: str | Path | None = None,
    steps: int | None = None,
    tokens: int | None = None,
    fraction: float | None = None,
    pretraining_tokens: int | None = None,
    settings: UptrainSettings | None = None,
    text: TextSettings | None = None,
    machine: Machine | None = None,
    monitoring: Monitoring | None = None,
    revision: str | None = None,
    yes: bool = False,
    force: bool = False,
    progress: Progress = no_progress,
    remark: Callable[[str], object] = lambda text: None,
    show: Callable[[dict[str, Any]], object] = lambda record: None,
    score: Callable[[Any], float] | None = None,
) -> UptrainResult:
    """Train a converted checkpoint briefly, so that it recovers, and write the result to `output`.

    `data` is text as `kvconvert uptrain --data` takes it: files, directories or names of datasets, each with a weight
    if there are several ("a.jsonl:0.7"). The run is as long as one of `steps`, `tokens` and `fraction` says; without
    any it is 5 % of the pretraining tokens, and one of more than 100 H100 hours then needs `yes`. The teacher is the
    original, or a larger model of its vocabulary. Without `output` the result is beside the model, with the suffix
    -uptrained. The same call goes on with a run that was stopped; `force` starts over and replaces an output.

    `progress` is called as that of `kvconvert.convert.convert`, `show` with each record of metrics, `remark` with what
    a person should know. `score(model)` gives held-out nats per token in place of those of `text.eval_data`. Raises
    InputError for whatever can be refused before training, DivergedError on a loss or gradient that is not finite,
    PreemptedError after a signal to stop or `monitoring.max_time`, once a checkpoint is saved.
    """
    request = UptrainRequest(
        model=model,
        data=(data,) if isinstance(data, str | Path | WeightedSource) else tuple(data),
        output=output,
        teacher=teacher,
        revision=revision,
        length=Length(steps=steps, tokens=tokens, fraction=fraction, pretraining_tokens=pretraining_tokens, yes=yes),
        text=text or TextSettings(),
        settings=settings or UptrainSettings(),
        machine=machine or Machine(),
        monitoring=monitoring or Monitoring(),
        force=force,
    )
    plan = plan_uptraining(request, remark=remark, scored=score is not None)
    return carry_out(plan, progress=progress, remark=remark, show=show, score=score)


def plan_uptraining(
    request: UptrainRequest, *, remark: Callable[[str], object] = lambda text: None, scored: bool = False
) -> UptrainPlan:
    """Make a checked plan of a request; nothing is written. Raises InputError for whatever can be refused by now.

    `scored` says that `carry_out` will be given a score of its own.
    """
    max_time = request.monitoring.max_time
    deadline = None if max_time is None else time.monotonic() + max_time
    if request.machine.gpu is not None:
        require_known_gpu(request.machine.gpu)

    # 1. the models, and how long the run is
    checkpoint = open_checkpoint(request.model, revision=request.revision)
    teacher = None if request.teacher is None else open_checkpoint(request.teacher)
    batch = _batch(request, checkpoint, teacher)
    asked = request.settings.global_batch_tokens
    nearly = None if asked is None else check_asked_batch(asked, batch)
    if nearly is not None:
        remark(nearly)
    known = lookup_pretraining_tokens(checkpoint, teacher)
    for text in (*_notes(checkpoint, teacher), *known.remarks):
        remark(text)
    length = request.length
    budget = plan_budget(
        steps=length.steps,
        tokens=length.tokens,
        fraction=length.fraction,
        pretraining_tokens=length.pretraining_tokens,
        lookup=known,
        tokens_per_step=batch.tokens_per_step,
    )
    if length.tokens is not None and length.tokens < batch.tokens_per_step:
        remark(f"{length.tokens} tokens are less than one step of {batch.tokens_per_step}: the run takes one step")

    # 2. the job, at the rate that trials have chosen if they are done
    job = _job(request, checkpoint, teacher, _settings(request, checkpoint, batch, budget), batch)
    if teacher is not None and job.teacher is None:
        remark(f"--teacher {request.teacher} is not used: {job.objective} compares with no teacher")
    num_rates, force = request.settings.lr_sweep, request.force
    trials = trial_settings(job.settings, num_rates)
    begun = find_sweep(job, num_rates, force=force) if num_rates else None
    if begun is not None:
        force = force or goes_on_to_replace(begun, job)
        job = with_best_rate(job, begun.trials) if begun.is_done else job
    sweeps = bool(num_rates) and (begun is None or not begun.is_done)

    # 3. whatever can be refused
    held_out = request.text.held_out
    check_job(job, held_out=held_out, force=force)
    if job.inputs.check_ids.remark is not None:
        remark(job.inputs.check_ids.remark)
    scored = scored or held_out is not None
    if request.settings.keep_best and not scored and job.validation_fraction == 0:
        raise no_held_out_text("--keep-best")
    if sweeps:
        check_sweep(job, scored=scored, force=force)

    # 4. what it costs
    stages = [stage for settings in trials for stage in settings.stages]
    gpu_name = request.machine.gpu or detect_gpu()
    cost = run_cost(job.shape, budget, sources=job.source_sizes, trials=stages, gpu_name=gpu_name)
    return UptrainPlan(request, job, trials, sweeps, force, budget, cost, held_out, deadline)


def carry_out(
    plan: UptrainPlan,
    *,
    progress: Progress = no_progress,
    remark: Callable[[str], object] = lambda text: None,
    show: Callable[[dict[str, Any]], object] = lambda record: None,
    command: str = "",
    score: Callable[[Any], float] | None = None,
) -> UptrainResult:
    """Run a plan, after the trials of a sweep that are not done; returns what it ended with.

    `command` is what a person types to go on, for the status file; `score` is as for `uptrain`. Raises InputError for a
    run of many GPU hours that nobody agreed to, and what `run_checked` and `sweep_learning_rates` raise.
    """
    job, monitoring = plan.job, plan.request.monitoring
    require_consent(plan.cost, plan.budget.explicit, plan.request.length.yes)
    detected = detect_gpu()
    watch = Observation(
        save_steps=monitoring.save_steps,
        log_steps=monitoring.log_steps,
        eval_steps=monitoring.eval_steps,
        deadline=plan.deadline,
        score=score or (None if plan.held_out is None else _scorer(job, plan.held_out, remark)),
        show=show,
        remark=remark,
        flops_per_token={stage.name: stage_flops_per_token(job.shape, stage) for stage in job.settings.stages},
        peak_flops=None if detected is None else peak_flops(detected),
        command=command,
        wants_score=bool(plan.request.text.validation_fraction) or plan.request.settings.keep_best,
    )
    if plan.sweeps:
        num_rates = plan.request.settings.lr_sweep
        trials = sweep_learning_rates(job, watch, num_rates=num_rates, force=plan.force)
        job = with_best_rate(job, trials)
        _tell(trials, job.settings.learning_rate, remark)
    with progress("uptraining", job.settings.steps) as advance:
        return run_checked(job, replace(watch, progress=advance), force=plan.force)


def summarise(plan: UptrainPlan, result: UptrainResult | None = None) -> dict[str, Any]:
    """What a plan is, and what it ended with if it was carried out, as an object for JSON.

    The settings are those that the run had in the end, as a sweep chooses a rate.
    """
    job, budget = plan.job, plan.budget
    settings = job.settings if result is None else result.settings
    summary = {
        "model": job.checkpoint.name,
        "output": str(job.output),
        "objective": job.objective,
        "teacher": job.teacher,
        "tokens": budget.tokens,
        "budget": asdict(budget) | {"fraction_of_pretraining": budget.fraction_of_pretraining},
        "stages": [asdict(stage) for stage in settings.stages],
        "settings": asdict(settings),
        "trials": [{"learning_rate": trial.learning_rate, "steps": trial.steps} for trial in plan.trials],
        "execution": asdict(job.execution),
        "cost": asdict(plan.cost),
        "dry_run": result is None,
    }
    if result is None:
        return summary
    return summary | {
        "passes": result.passes,
        "held_out_nats_per_token": {"before": result.held_out_before, "after": result.held_out},
        "kept_step": result.kept_step,
        "start": None if result.start is None else asdict(result.start),
        "seconds": round(result.seconds, 1),
        "left_behind": dict(result.left_behind),
    }


def _tell(trials: Sequence[Trial], chosen: float, remark: Callable[[str], object]) -> None:
    for trial in trials:
        score = "diverged" if trial.nats_per_token is None else f"held-out {trial.nats_per_token:.4f} nats/token"
        remark(f"lr {_peak(trial):.2e}: {score} after {trial.steps} steps")
    remark(f"learning rate {next(_peak(trial) for trial in trials if trial.learning_rate == chosen):.2e}")


def _peak(trial: Trial) -> float:
    """The peak rate that a trial was run at, as far as it came to be known."""
    return trial.peak_learning_rate or trial.learning_rate


def _batch(request: UptrainRequest, checkpoint: Checkpoint, teacher: Checkpoint | None) -> Batch:
    settings, micro_batch = request.settings, request.machine.micro_batch
    tokens, length = settings.global_batch_tokens, settings.sequence_length
    if length is None:
        length = default_sequence_length(checkpoint, None if teacher is None else as_teacher(teacher))
    return derive_batch(
        global_batch_tokens=default_global_batch_tokens(checkpoint.num_parameters) if tokens is None else tokens,
        sequence_length=length,
        num_processes=count_processes(),
        micro_batch=micro_batch if isinstance(micro_batch, int) else None,
    )


def _settings(request: UptrainRequest, checkpoint: Checkpoint, batch: Batch, budget: Budget) -> RunSettings:
    asked = request.settings
    recipe = asked.recipe or (Recipe.pretraining if request.teacher is None else Recipe.distill)
    weights = _weights(asked, recipe)
    return RunSettings(
        steps=budget.steps,
        sequence_length=batch.sequence_length,
        sequences_per_step=batch.sequences_per_step,
        learning_rate=default_learning_rate(checkpoint, recipe) if asked.lr is None else asked.lr,
        recipe=recipe,
        weights=weights,
        trained=asked.train_only,
        layerwise_fraction=asked.layerwise_fraction,
        layerwise_learning_rate=asked.layerwise_lr,
        body_lr_multiplier=asked.body_lr_multiplier,
        lr_scheduler=asked.lr_scheduler.value,
        warmup_fraction=asked.warmup_fraction,
        weight_decay=asked.weight_decay,
        max_grad_norm=asked.max_grad_norm,
        precision=default_precision() if asked.precision == "auto" else asked.precision,
        seed=asked.seed,
        keep_best=asked.keep_best,
        rate_from_start=asked.lr is None and recipe is not Recipe.layerwise and weights.kl > 0,
    )


def _weights(asked: UptrainSettings, recipe: Recipe) -> LossWeights:
    kl, cross_entropy = (0.0, 1.0) if recipe is Recipe.pretraining else (1.0, 0.0)
    if recipe is Recipe.pretraining and asked.kl_weight:
        raise InputError("recipe pretraining has no KL", hint="use --recipe distill with --kl-weight and --ce-weight")
    return LossWeights(
        kl=kl if asked.kl_weight is None else asked.kl_weight,
        cross_entropy=cross_entropy if asked.ce_weight is None else asked.ce_weight,
        temperature=asked.temperature,
    )


def _notes(*opened: Checkpoint | None) -> tuple[str, ...]:
    """What a person should know of the files of the checkpoints that there are."""
    return tuple(note for checkpoint in opened if checkpoint is not None for note in checkpoint.notes)


def _job(
    request: UptrainRequest, checkpoint: Checkpoint, teacher: Checkpoint | None, settings: RunSettings, batch: Batch
) -> UptrainJob:
    """The job of a request; a teacher that nothing is compared with is left out."""
    machine, text = request.machine, request.text
    used = teacher if settings.uses_teacher else None
    fraction = text.validation_fraction
    if fraction is None:
        fraction = _DEFAULT_VALIDATION_FRACTION if text.eval_data is None else 0.0
    name = None if used is None else str(used.directory)
    return UptrainJob(
        checkpoint=checkpoint,
        settings=settings,
        sources=tuple(
            given if isinstance(given, WeightedSource) else parse_source(str(given), text.defaults)
            for given in request.data
        ),
        output=default_output(checkpoint, "uptrained") if request.output is None else Path(request.output),
        teacher=name,
        execution=Execution(
            micro_batch=None if machine.micro_batch == "auto" else batch.micro_batch,
            num_processes=batch.num_processes,
            fsdp=machine.fsdp,
            compile=machine.compile,
            activation_checkpointing=machine.activation_checkpointing,
            report_to=tuple(tracker.value for tracker in machine.report_to),
        ),
        validation_fraction=fraction,
        inputs=Inputs(checkpoint, name, opened=used),
    )


def _scorer(
    job: UptrainJob, source: TextSource, remark: Callable[[str], object] = lambda text: None
) -> Callable[[Any], float]:
    """Nats per token on the first windows of held-out text, nan of a model whose logits are not finite.

    Raises DataError where the text cannot be read.
    """
    from ..measure.held_out import load_windows
    from ..measure.perplexity import evaluate

    with of_eval_data():
        windows = load_windows(
            job.checkpoint.directory,
            source,
            window=job.settings.sequence_length,
            max_windows=_EVAL_WINDOWS,
            remark=remark,
        )

    def score(model: Any) -> float:
        try:
            return evaluate(model, windows, batch_size=job.execution.micro_batch or 1).nats_per_token
        except CheckpointError:  # training knows which weights these are
            return math.nan

    return score
