"""One uptraining run, from a converted checkpoint and text to a recovered checkpoint."""

from __future__ import annotations

import json
import math
import os
import shutil
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from transformers import (
    GenerationConfig,
    PrinterCallback,
    TrainerCallback,
    TrainingArguments,
    default_data_collator,
)

from ..convert.architectures import find_architecture
from ..convert.card import write_card
from ..convert.checkpoint import CONFIG_NAME, Checkpoint, torch_dtype
from ..convert.companions import copy_companions, copy_runtime_code
from ..convert.errors import InputError, OutputError, PreemptedError, UnsupportedError
from ..convert.execute import DEFAULT_MAX_SHARD_BYTES
from ..convert.loading import check_opens, load_model, quiet_transformers
from ..convert.output import (
    PROVENANCE_NAME,
    check_free_space,
    check_output,
    disk_errors,
    staged_directory,
    write_text,
)
from ..convert.text import (
    TextSource,
    adds_bos,
    check_tokenizers,
    encode_documents,
    load_tokenizer,
    read_documents,
)
from .data import INDEX_NAME, PackedBlocks, pack_documents
from .trainer import MetricsLog, PeriodicEvaluation, StepProgress, StopOnSignal, UptrainTrainer

__all__ = [
    "METRICS_NAME",
    "Observation",
    "UptrainJob",
    "UptrainResult",
    "UptrainSettings",
    "check_job",
    "count_processes",
    "default_learning_rate",
    "default_sequence_length",
    "uptrain",
    "work_directory",
]

METRICS_NAME = "metrics.jsonl"
SETTINGS_NAME = "settings.json"
_MAX_DEFAULT_SEQUENCE_LENGTH = 2048
_OPTIMIZER = "adamw_torch"


@dataclass(frozen=True)
class UptrainSettings:
    """What decides the trajectory of a run; a resumed run must have the same.

    `batch_size` counts sequences per process and micro-batch; `warmup_fraction` is of all steps; `precision` is "bf16"
    (autocast over float32 weights) or "fp32".
    """

    steps: int
    sequence_length: int
    learning_rate: float
    batch_size: int = 8
    gradient_accumulation_steps: int = 1
    lr_scheduler: str = "cosine"
    warmup_fraction: float = 0.03
    weight_decay: float = 0.1
    max_grad_norm: float = 1.0
    precision: str = "fp32"
    seed: int = 0
    num_processes: int = 1

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "gradient_accumulation_steps"):
            if getattr(self, name) < 1:
                raise UnsupportedError(f"{name.replace('_', ' ')} is {getattr(self, name)}, expected at least 1")
        if self.sequence_length < 2:
            raise UnsupportedError(f"sequence length is {self.sequence_length}, expected at least 2")
        if not 0 < self.learning_rate < math.inf:
            raise UnsupportedError(f"learning rate is {self.learning_rate}, expected a positive number")

    @property
    def sequences_per_step(self) -> int:
        return self.batch_size * self.gradient_accumulation_steps * self.num_processes

    @property
    def tokens_per_step(self) -> int:
        return self.sequences_per_step * self.sequence_length


@dataclass(frozen=True)
class UptrainResult:
    """`passes` is how often the text was seen. Time and rate are those since the start or the last resume."""

    output: Path
    passes: float
    steps: int
    tokens: int
    objective: str
    settings: UptrainSettings
    seconds: float
    tokens_per_second: float


def default_sequence_length(checkpoint: Checkpoint) -> int:
    """The longest the model takes, at most 2048."""
    return min(_longest_sequence(checkpoint), _MAX_DEFAULT_SEQUENCE_LENGTH)


def default_learning_rate(checkpoint: Checkpoint) -> float:
    """Near the peak that models of this size are pretrained with: 1e-3 below 100M parameters, 3e-4 below 3B, 1e-4."""
    size = checkpoint.num_parameters
    return 1e-3 if size < 1e8 else 3e-4 if size < 3e9 else 1e-4


def count_processes() -> int:
    """How many processes `accelerate launch` or `torchrun` started for this run."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def work_directory(output: Path) -> Path:
    """Where a run keeps its blocks, checkpoints and metrics until `output` is whole."""
    return output.with_name(f"{output.name}.uptraining")


@dataclass(frozen=True)
class UptrainJob:
    """What is trained, on what, towards what, and where the result goes."""

    checkpoint: Checkpoint
    settings: UptrainSettings
    source: TextSource
    output: Path
    teacher: str | None = None

    @property
    def work(self) -> Path:
        return work_directory(self.output)

    @property
    def objective(self) -> str:
        return "cross-entropy" if self.teacher is None else "forward KL"


@dataclass(frozen=True)
class Observation:
    """What is watched during a run; none of it changes the result.

    `score(model)` gives held-out nats per token every `eval_steps`. `show` receives each metrics record, `progress`
    the number of steps done since it was last called.
    """

    save_steps: int = 500
    log_steps: int = 10
    eval_steps: int = 100
    score: Callable[[Any], float] | None = None
    progress: Callable[[int], object] = lambda num_steps: None
    show: Callable[[dict[str, Any]], object] = lambda record: None


def uptrain(job: UptrainJob, watch: Observation, *, resume: bool = False, force: bool = False) -> UptrainResult:
    """Train a converted checkpoint and write the result, in the source's dtypes, to `job.output`.

    The objective is cross-entropy, or forward KL to the teacher if there is one. The student is loaded in float32: in
    bfloat16 most updates at usual learning rates are lost in rounding. Until the end everything is in `job.work`;
    with `resume` a run goes on from its last checkpoint, bit-exactly.
    Raises InputError for unusable input, DivergedError on a non-finite loss or gradient (before the optimizer step),
    PreemptedError after SIGTERM or SIGINT, once a checkpoint is saved.
    """
    with disk_errors(job.work):
        return _uptrain(job, watch, resume=resume, force=force)


def _uptrain(job: UptrainJob, watch: Observation, *, resume: bool, force: bool) -> UptrainResult:
    # without cpu=True accelerate takes the processes of a launcher on a CPU for one each
    state = PartialState(cpu=not torch.accelerator.is_available())
    settings = job.settings
    num_samples = settings.steps * settings.sequences_per_step
    torch.manual_seed(settings.seed)
    # 1. Refuse what can be refused; load the models before anything is written.
    with state.main_process_first():
        check_job(job, resume=resume or not state.is_main_process, force=force)
        student = load_model(job.checkpoint.directory, dtype=torch.float32, device=state.device)
        teacher = None
        if job.teacher is not None:
            teacher = load_model(job.teacher, dtype="auto", device=state.device).requires_grad_(False)
        if state.is_main_process:
            _prepare(job, num_samples, resume=resume)
    # 2. Train.
    dataset = PackedBlocks(job.work / "data", num_samples=num_samples, seed=settings.seed)
    signals = StopOnSignal()
    trainer = UptrainTrainer(
        model=student,
        teacher=teacher,
        args=_training_arguments(job, watch, state.device),
        train_dataset=dataset,
        data_collator=default_data_collator,
        callbacks=[*_reports(job, watch), signals],
    )
    trainer.remove_callback(PrinterCallback)
    last = _last_checkpoint(job.work)
    num_steps_before = int(last.name.rpartition("-")[2]) if last else 0
    start = time.monotonic()
    with signals, quiet_transformers():
        trainer.train(resume_from_checkpoint=str(last) if last else None)
    if trainer.state.global_step < settings.steps:
        raise PreemptedError(
            f"stopped at step {trainer.state.global_step} of {settings.steps}; saved in {job.work}",
            hint="run the same command with --resume to go on",
        )
    seconds = time.monotonic() - start
    # 3. Write the result.
    if state.is_main_process:
        _publish(job, student, num_tokens=settings.steps * settings.tokens_per_step, force=force)
    state.wait_for_everyone()
    return UptrainResult(
        output=job.output,
        passes=num_samples / dataset.index.num_blocks,
        steps=settings.steps,
        tokens=settings.steps * settings.tokens_per_step,
        objective=job.objective,
        settings=settings,
        seconds=seconds,
        tokens_per_second=(settings.steps - num_steps_before) * settings.tokens_per_step / max(seconds, 1e-9),
    )


def check_job(job: UptrainJob, *, resume: bool = False, force: bool = False) -> None:
    """Raise InputError for whatever can be refused before training; touches nothing."""
    inputs = [job.checkpoint.directory, Path(job.source.location)]
    inputs += [Path(job.teacher)] if job.teacher is not None else []
    check_output(job.output, force=force, inputs=inputs)
    architecture = find_architecture(job.checkpoint)
    if architecture.cross_attention is not None:
        raise UnsupportedError(
            f"{job.checkpoint.name}: uptrain takes decoders only, not the encoder-decoder {architecture.model_type}",
            hint="train it with transformers' Seq2SeqTrainer, which takes it as any other model",
        )
    if not architecture.separates_documents:
        raise UnsupportedError(
            f"{job.checkpoint.name}: in transformers' {architecture.model_type} documents that share a sequence see "
            "each other, so that uptrain, which packs them, would teach it nonsense"
        )
    longest, length = _longest_sequence(job.checkpoint), job.settings.sequence_length
    if length > longest:
        raise UnsupportedError(
            f"sequence length {length} does not fit {job.checkpoint.name} (it takes {longest} tokens)",
            hint=f"use --sequence-length {longest} or less",
        )
    check_tokenizers(job.checkpoint.directory, job.teacher)
    if resume:
        _check_same_run(job.work, _describe(job))
    elif job.work.exists() and not (job.work / SETTINGS_NAME).exists():
        raise OutputError(f"{job.work} is in the way and not a run's", hint="remove it, or choose another --output")
    elif job.work.exists() and not force:
        raise OutputError(
            f"{job.work} holds an unfinished run", hint="pass --resume to go on with it, or --force to start over"
        )


def _prepare(job: UptrainJob, num_samples: int, *, resume: bool) -> None:
    """Pack the training text into the work directory; leaves nothing behind when it cannot."""
    if resume and (job.work / "data" / INDEX_NAME).exists():
        return
    tokenizer = load_tokenizer(job.checkpoint.directory)
    shutil.rmtree(job.work, ignore_errors=True)
    try:
        # a checkpoint is float32 weights and two AdamW moments; two are kept while a third is written
        check_free_space(job.output, 3 * 12 * job.checkpoint.num_parameters)
        job.work.mkdir(parents=True)
        write_text(job.work / SETTINGS_NAME, json.dumps(_describe(job), indent=2) + "\n")
        pack_documents(
            encode_documents(read_documents(job.source), tokenizer, bos=adds_bos(tokenizer)),
            job.work / "data",
            source=job.source.location,
            vocab_size=len(tokenizer),
            sequence_length=job.settings.sequence_length,
            max_blocks=num_samples,
        )
    except BaseException:
        shutil.rmtree(job.work, ignore_errors=True)
        raise


def _describe(job: UptrainJob) -> dict[str, Any]:
    return {
        "model": job.checkpoint.name,
        "objective": job.objective,
        "teacher": job.teacher,
        "data": asdict(job.source),
        **asdict(job.settings),
    }


def _check_same_run(work: Path, description: dict[str, Any]) -> None:
    path = work / SETTINGS_NAME
    if not path.exists():
        raise InputError(f"{work}: no run to resume here", hint="leave --resume out to start one")
    saved = json.loads(path.read_text())
    changed = [
        f"{key} was {saved.get(key)!r}, now {value!r}" for key, value in description.items() if saved.get(key) != value
    ]
    if changed:
        raise InputError(
            f"{work}: the run to resume had other settings: {'; '.join(changed)}",
            hint="resume with the same settings, or start over with --force in place of --resume",
        )


def _last_checkpoint(work: Path) -> Path | None:
    """The newest complete checkpoint: the Trainer writes trainer_state.json last."""
    found = [path for path in (work / "checkpoints").glob("checkpoint-*") if (path / "trainer_state.json").exists()]
    return max(found, key=lambda path: int(path.name.rpartition("-")[2]), default=None)


def _reports(job: UptrainJob, watch: Observation) -> list[TrainerCallback]:
    tokens_per_step = job.settings.tokens_per_step
    log = MetricsLog(job.work / METRICS_NAME, tokens_per_step=tokens_per_step, show=watch.show)
    reports: list[TrainerCallback] = [log, StepProgress(watch.progress)]
    if watch.score is not None:
        reports.append(PeriodicEvaluation(watch.score, log, every=watch.eval_steps, tokens_per_step=tokens_per_step))
    return reports


def _training_arguments(job: UptrainJob, watch: Observation, device: torch.device) -> TrainingArguments:
    settings = job.settings
    arguments = TrainingArguments(
        output_dir=str(job.work / "checkpoints"),
        max_steps=settings.steps,
        per_device_train_batch_size=settings.batch_size,
        gradient_accumulation_steps=settings.gradient_accumulation_steps,
        learning_rate=settings.learning_rate,
        lr_scheduler_type=settings.lr_scheduler,
        warmup_steps=math.ceil(settings.warmup_fraction * settings.steps),
        optim=_OPTIMIZER,
        weight_decay=settings.weight_decay,
        adam_beta2=0.95,
        max_grad_norm=settings.max_grad_norm,
        bf16=settings.precision == "bf16",
        use_cpu=device.type == "cpu",
        seed=settings.seed,
        logging_steps=watch.log_steps,
        logging_nan_inf_filter=False,  # it would hide a NaN and go on
        save_strategy="steps",
        save_steps=watch.save_steps,
        save_total_limit=2,
        train_sampling_strategy="sequential",  # the blocks are in their drawn order already
        remove_unused_columns=False,
        disable_tqdm=True,
        report_to="none",
    )
    arguments._n_gpu = min(arguments.n_gpu, 1)  # several GPUs need a launcher; the Trainer would wrap in DataParallel
    return arguments


def _publish(job: UptrainJob, student: Any, *, num_tokens: int, force: bool) -> None:
    """Write weights in the source's dtypes, config and companions of the source, metrics; then drop the work."""
    source = job.checkpoint
    provenance_path = source.directory / PROVENANCE_NAME
    provenance = json.loads(provenance_path.read_text()) if provenance_path.exists() else {}
    provenance["uptraining"] = _describe(job) | {"model": Path(source.name).name, "tokens": num_tokens}
    with torch.no_grad():
        for name, parameter in student.named_parameters():
            dtype = source.tensors[name].dtype if name in source.tensors else source.dtype
            parameter.data = parameter.data.to(torch_dtype(dtype))
    with staged_directory(job.output, force=force) as staging:
        student.generation_config = GenerationConfig()  # the source's own is copied below, valid or not
        with quiet_transformers():
            student.save_pretrained(staging, max_shard_size=DEFAULT_MAX_SHARD_BYTES)
        (staging / "generation_config.json").unlink(missing_ok=True)
        copy_companions(source.directory, staging)
        copy_runtime_code(str(source.config.get("model_type")), staging)
        shutil.copyfile(source.directory / CONFIG_NAME, staging / CONFIG_NAME)
        shutil.copyfile(job.work / METRICS_NAME, staging / METRICS_NAME)
        write_text(staging / PROVENANCE_NAME, json.dumps(provenance, indent=2) + "\n")
        write_card(source.directory, staging, provenance)
        check_opens(staging)
    shutil.rmtree(job.work)


def _longest_sequence(checkpoint: Checkpoint) -> int:
    name = find_architecture(checkpoint).config_name("max_position_embeddings")
    return checkpoint.config_int(name, default=_MAX_DEFAULT_SEQUENCE_LENGTH)
