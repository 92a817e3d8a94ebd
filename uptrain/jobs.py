"""What an uptraining run is: its settings, how it is carried out, and whether it can be."""

from __future__ import annotations

import json
import math
import os
from dataclasses import asdict, dataclass, field
from hashlib import sha256
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from ..convert.architectures.table import find_architecture
from ..convert.cache_check import check_runtime
from ..convert.checkpoint.loading import class_config
from ..convert.checkpoint.opening import open_checkpoint
from ..convert.checkpoint.output import check_apart, check_output, read_provenance
from ..convert.checkpoint.tensors import Checkpoint
from ..convert.checkpoint.tokenizer import load_tokenizer
from ..convert.errors import InputError, OutputError, UnsupportedError
from ..convert.text.sources import TextSource, text_bytes
from ..convert.text.tokens import check_tokenizers, tokenizer_hash
from .attention_regression import require_same_size
from .budget import Batch
from .cost import Sharding
from .data import Corpus, WeightedSource
from .recipe import LossWeights, Objective, Recipe, Stage, Trained, stages
from .teacher import as_teacher

__all__ = [
    "REPLACES_NAME",
    "SETTINGS_NAME",
    "Execution",
    "UptrainJob",
    "UptrainSettings",
    "batch_of",
    "begun_before",
    "check_job",
    "corpus_of",
    "count_processes",
    "default_learning_rate",
    "default_sequence_length",
    "describe",
    "finished_before",
    "replaces_output",
    "sharding_of",
    "sweep_directory",
    "take_over_fsdp",
    "uses_deepspeed",
    "work_directory",
]

SETTINGS_NAME = "settings.json"
REPLACES_NAME = "force"
_FINGERPRINT_BYTES = 64
_MAX_DEFAULT_SEQUENCE_LENGTH = 2048
_MAX_VALIDATION_BLOCKS = 64


@dataclass(frozen=True)
class UptrainSettings:
    """What decides the trajectory of a run; a resumed run must have the same.

    `warmup_fraction` is of a stage's steps; `precision` is "bf16" (autocast over float32 weights) or "fp32".
    """

    steps: int
    sequence_length: int
    sequences_per_step: int
    learning_rate: float
    recipe: Recipe = Recipe.gqa
    weights: LossWeights = field(default_factory=lambda: LossWeights(kl=0.0, cross_entropy=1.0))
    trained: Trained = Trained.all
    layerwise_fraction: float = 0.0
    layerwise_learning_rate: float | None = None
    body_lr_multiplier: float = 1.0
    lr_scheduler: str = "cosine"
    warmup_fraction: float = 0.03
    weight_decay: float = 0.1
    max_grad_norm: float = 1.0
    precision: str = "fp32"
    seed: int = 0

    def __post_init__(self) -> None:
        rates = [rate for rate in (self.learning_rate, self.layerwise_learning_rate) if rate is not None]
        checks = (
            ("steps", self.steps >= 1, "at least 1"),
            ("sequences_per_step", self.sequences_per_step >= 1, "at least 1"),
            ("sequence_length", self.sequence_length >= 2, "at least 2"),
            ("learning_rate", 0 < rates[0] < math.inf, "a positive number"),
            ("layerwise_learning_rate", 0 < rates[-1] < math.inf, "a positive number"),
            ("body_lr_multiplier", 0 <= self.body_lr_multiplier < math.inf, "0 or more"),
            ("weight_decay", 0 <= self.weight_decay < math.inf, "0 or more"),
            ("max_grad_norm", 0 <= self.max_grad_norm < math.inf, "0 or more"),
            ("warmup_fraction", 0 <= self.warmup_fraction <= 1, "a number from 0 to 1"),
            ("precision", self.precision in ("bf16", "fp32"), "'bf16' or 'fp32'"),
            ("seed", 0 <= self.seed < 2**32, "a number from 0 to 2**32 - 1"),
        )
        for name, holds, expected in checks:
            if not holds:
                raise UnsupportedError(f"{name.replace('_', ' ')} is {getattr(self, name)!r}, expected {expected}")
        _ = self.stages

    @property
    def tokens_per_step(self) -> int:
        return self.sequences_per_step * self.sequence_length

    @property
    def stages(self) -> tuple[Stage, ...]:
        return stages(
            self.recipe,
            steps=self.steps,
            learning_rate=self.learning_rate,
            layerwise_fraction=self.layerwise_fraction,
            layerwise_learning_rate=self.layerwise_learning_rate or self.learning_rate,
            trained=self.trained,
        )

    @property
    def uses_teacher(self) -> bool:
        """Whether any stage compares with a teacher."""
        return any(stage.uses_teacher(self.weights) for stage in self.stages)


@dataclass(frozen=True)
class Execution:
    """How a run is carried out. Another number of processes or micro-batch changes its result by rounding only.

    `micro_batch` counts the sequences that a process takes at once; None stands for as many as fit. `fsdp` shards
    weights, gradients and optimizer over the processes (FSDP2). `report_to` names trackers of transformers.
    """

    micro_batch: int | None = 8
    num_processes: int = 1
    fsdp: bool = False
    compile: bool = False
    activation_checkpointing: bool = False
    report_to: tuple[str, ...] = ()


@dataclass(frozen=True)
class UptrainJob:
    """What is trained, on what, towards what, and where the result goes.

    `validation_fraction` of the documents are kept out of training and scored during it. With `stream` text is packed
    while it is needed, and what was read is deleted.
    """

    checkpoint: Checkpoint
    settings: UptrainSettings
    sources: tuple[WeightedSource, ...]
    output: Path
    teacher: str | None = None
    execution: Execution = field(default_factory=Execution)
    validation_fraction: float = 0.0
    stream: bool = False

    def __post_init__(self) -> None:
        if not self.output.name:
            raise OutputError(f"{self.output} is no place for a new directory", hint="name one with --output")
        if self.execution.fsdp and self.execution.num_processes > 1:
            _require_sharding()

    @property
    def work(self) -> Path:
        return work_directory(self.output)

    @property
    def shares_frozen(self) -> bool:
        """Whether what is frozen is the teacher's own; FSDP2, which wants one dtype in a layer, shards each by itself.

        What is shared has one dtype, and without autocast that is the one that is trained in.
        """
        sharded = self.execution.fsdp and self.execution.num_processes > 1
        return self.settings.recipe is Recipe.light and not sharded

    @property
    def num_samples(self) -> int:
        """Sequences that the whole run reads."""
        return self.settings.steps * self.settings.sequences_per_step

    def window_tokens(self, save_steps: int) -> int | None:
        """Of a streamed text, the tokens that a run keeps to fall back to; None if all of it is kept.

        Those since the older of two checkpoints, to the next one, or the one after if text is packed while it is saved.
        """
        return 3 * save_steps * self.settings.tokens_per_step if self.stream else None

    @property
    def objective(self) -> str:
        """In words, for people and for the record."""
        settings = self.settings
        parts = []
        if settings.stages[0].objective is Objective.attention_regression:
            parts.append("attention regression")
        if settings.stages[-1].objective is Objective.prediction:
            names = {"forward KL": settings.weights.kl, "cross-entropy": settings.weights.cross_entropy}
            parts.append(" + ".join(name for name, weight in names.items() if weight))
        return ", then ".join(parts)


def default_sequence_length(checkpoint: Checkpoint) -> int:
    """The longest the model takes, at most 2048."""
    return min(_longest_sequence(checkpoint), _MAX_DEFAULT_SEQUENCE_LENGTH)


def default_learning_rate(checkpoint: Checkpoint, recipe: Recipe) -> float:
    """Near the peak that models of this size are pretrained with: 1e-3 below 100M parameters, 3e-4 below 3B, 1e-4.

    For cross-entropy after a merge on calibration text, which leaves little to recover, a quarter of it: at the peak it
    unlearns more than it recovers at first.
    """
    size = checkpoint.num_parameters
    peak = 1e-3 if size < 1e8 else 3e-4 if size < 3e9 else 1e-4
    merged = read_provenance(checkpoint.directory).get("method") == "svd"
    return peak / 4 if merged and recipe is Recipe.gqa else peak


def _require_sharding() -> None:
    """Raise UnsupportedError where transformers cannot shard a model, unit by unit, while it loads it."""
    from ..convert.runtime.transformers_interface import require

    try:
        require("sharding")
    except ImportError as error:
        hint = "install transformers 5.23 or newer, or train without --fsdp"
        raise UnsupportedError(f"--fsdp cannot be used here: {error}", hint=hint) from error


def count_processes() -> int:
    """How many processes `accelerate launch` or `torchrun` started for this run."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def take_over_fsdp() -> bool:
    """Whether accelerate's configuration asks for FSDP. kvconvert shards models while it loads them, by itself."""
    return os.environ.pop("ACCELERATE_USE_FSDP", "false").lower() == "true"


def sharding_of(execution: Execution) -> Sharding:
    """What a process holds a part of only: as --fsdp or accelerate's configuration of DeepSpeed says."""
    if execution.fsdp:
        return "fsdp"
    stage = os.environ.get("ACCELERATE_DEEPSPEED_ZERO_STAGE") if uses_deepspeed() else None
    return "zero2" if stage == "2" else "zero3" if stage == "3" else "none"


def uses_deepspeed() -> bool:
    """Whether accelerate's configuration asks for DeepSpeed."""
    return os.environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower() == "true"


def work_directory(output: Path) -> Path:
    """Where a run keeps its blocks, checkpoints, metrics and status until `output` is whole."""
    return output.with_name(f"{output.name}.uptraining")


def sweep_directory(output: Path) -> Path:
    """Where trials of learning rates are kept until the run that they are for is finished."""
    return output.with_name(f"{output.name}.lr-sweep")


def corpus_of(job: UptrainJob) -> Corpus:
    """What the run reads. Raises InputError for what cannot be."""
    tokenizer = load_tokenizer(job.checkpoint.directory)
    return Corpus(
        sources=job.sources,
        sequence_length=job.settings.sequence_length,
        num_blocks=job.num_samples,
        tokenizer_hash=tokenizer_hash(tokenizer),
        vocab_size=1 + max(tokenizer.get_vocab().values()),
        seed=job.settings.seed,
        validation_fraction=job.validation_fraction,
        max_validation_blocks=_MAX_VALIDATION_BLOCKS,
        stream=job.stream,
    )


def check_job(job: UptrainJob, *, held_out: TextSource | None = None, force: bool = False) -> None:
    """Raise InputError for whatever can be refused before training; touches nothing.

    `held_out` is text that is read beside the job's own.
    """
    _check_places(job, held_out, force=force)
    _check_model(job)
    _check_needs(job)
    batch_of(job, job.execution.micro_batch or 1)
    corpus_of(job)
    _check_teacher(job)
    if not force and job.work.exists():
        _check_same_run(job.work, describe(job))


def _check_places(job: UptrainJob, held_out: TextSource | None, *, force: bool) -> None:
    """Raise InputError unless what is read is there, and nothing of it where something is written or removed."""
    texts = [source.text for source in job.sources] + ([held_out] if held_out is not None else [])
    inputs = [job.checkpoint.directory, *(text.path for text in texts)]
    inputs += [Path(job.teacher)] if job.teacher is not None else []
    for place in (job.work, sweep_directory(job.output)):
        check_apart(place, inputs)
    if not finished_before(job):
        check_output(job.output, force=force or replaces_output(job), inputs=inputs)
        for text in texts:
            text_bytes(text)
    if force and job.work.exists() and not (job.work / SETTINGS_NAME).exists():
        raise OutputError(f"{job.work} is in the way and not a run's", hint="remove it, or choose another --output")


def _check_model(job: UptrainJob) -> None:
    """Raise InputError unless its class works here, and can be trained on packed text of this length."""
    check_runtime(job.checkpoint.directory)
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


def _check_teacher(job: UptrainJob) -> None:
    """Raise InputError for a teacher that cannot be one."""
    check_tokenizers(job.checkpoint.directory, job.teacher)
    if job.teacher is None:
        return
    check_runtime(job.teacher)
    with open_checkpoint(job.teacher) as opened:
        config = as_teacher(opened).config
    if _regresses(job.settings):
        require_same_size(class_config(job.checkpoint.config), class_config(config))


def _check_needs(job: UptrainJob) -> None:
    """Raise InputError where the recipe's teacher or a tracker is missing."""
    settings = job.settings
    if (_regresses(settings) or settings.weights.kl > 0) and job.teacher is None:
        raise InputError(
            f"recipe {settings.recipe} needs the original model", hint="pass it as --teacher, or use --recipe gqa"
        )
    if job.execution.micro_batch is None and uses_deepspeed():
        raise UnsupportedError(
            "what fits is measured before DeepSpeed shards anything", hint="say how many with --micro-batch"
        )
    for tracker in job.execution.report_to:
        if find_spec(tracker) is None:
            raise InputError(f"--report-to {tracker}: {tracker} is not installed", hint=f"pip install {tracker}")


def _regresses(settings: UptrainSettings) -> bool:
    return any(stage.objective is Objective.attention_regression for stage in settings.stages)


def finished_before(job: UptrainJob) -> bool:
    """Whether the output holds the result of this very run."""
    record = read_provenance(job.output).get("uptraining")
    return record is not None and all(record.get(key) == value for key, value in describe(job).items())


def begun_before(job: UptrainJob) -> bool:
    """Whether the work directory holds this very run, not finished."""
    return (job.work / SETTINGS_NAME).exists() and not _changes(job.work, describe(job))


def describe(job: UptrainJob) -> dict[str, Any]:
    """All that decides the result, as JSON has it; what differs is another run."""
    description = {
        "model": Path(job.checkpoint.name).name,
        "model_fingerprint": _fingerprint(job.checkpoint),
        "objective": job.objective,
        "teacher": None if job.teacher is None else Path(job.teacher).name,
        "teacher_fingerprint": _teacher_fingerprint(job),
        "data": [asdict(source) for source in job.sources],
        "validation_fraction": job.validation_fraction,
        "stream": job.stream,
        **asdict(job.settings),
    }
    return dict(json.loads(json.dumps(description)))


def _teacher_fingerprint(job: UptrainJob) -> str | None:
    if job.teacher is None:
        return None
    with open_checkpoint(job.teacher) as teacher:
        return _fingerprint(teacher)


def _fingerprint(checkpoint: Checkpoint) -> str:
    """Another one for other weights: a digest of the config and of some bytes of every tensor."""
    digest = sha256(json.dumps(checkpoint.config, sort_keys=True).encode())
    for name, info in sorted(checkpoint.tensors.items()):
        with (checkpoint.directory / info.file).open("rb") as file:
            file.seek((info.begin + info.end) // 2)
            digest.update(f"{name} {info.dtype} {info.shape} ".encode() + file.read(_FINGERPRINT_BYTES))
    return digest.hexdigest()


def _check_same_run(work: Path, description: dict[str, Any]) -> None:
    if not (work / SETTINGS_NAME).exists():
        raise OutputError(f"{work} is in the way and not a run's", hint="remove it, or choose another --output")
    changed = _changes(work, description)
    if changed:
        raise InputError(
            f"{work} holds an unfinished run with other settings: {'; '.join(changed)}",
            hint="go on with the same settings, start over with --force, or choose another --output",
        )


def _changes(work: Path, description: dict[str, Any]) -> list[str]:
    """What a run's work directory has otherwise."""
    saved = json.loads((work / SETTINGS_NAME).read_text())
    return [
        f"{key} was {saved.get(key)!r}, now {value!r}" for key, value in description.items() if saved.get(key) != value
    ]


def batch_of(job: UptrainJob, micro_batch: int) -> Batch:
    """How the sequences of a step are shared out. Raises UnsupportedError where they cannot be."""
    settings = job.settings
    return Batch(settings.sequences_per_step, settings.sequence_length, job.execution.num_processes, micro_batch)


def replaces_output(job: UptrainJob) -> bool:
    """Whether the run that is under way began with force, so that it may replace an output."""
    path = job.work / SETTINGS_NAME
    return path.exists() and bool(json.loads(path.read_text()).get(REPLACES_NAME))


def _longest_sequence(checkpoint: Checkpoint) -> int:
    name = find_architecture(checkpoint).config_name("max_position_embeddings")
    return checkpoint.config_int(name, default=_MAX_DEFAULT_SEQUENCE_LENGTH)
