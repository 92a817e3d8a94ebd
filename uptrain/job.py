"""An uptraining job: what is trained, on what, towards what, and where the result goes."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any

from ..convert.checkpoint.opening import open_checkpoint
from ..convert.checkpoint.tensors import Checkpoint
from ..convert.checkpoint.tokenizer import load_tokenizer
from ..convert.errors import OutputError, UnsupportedError
from ..convert.text.tokens import tokenizer_hash
from .data.corpus import Corpus
from .data.sources import WeightedSource
from .estimate.budget import Batch
from .recipe import Objective, Recipe
from .settings import Execution, UptrainSettings

__all__ = ["UptrainJob", "batch_of", "corpus_of", "describe", "sweep_directory", "work_directory"]


_FINGERPRINT_BYTES = 64
_MAX_VALIDATION_BLOCKS = 64


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


def _require_sharding() -> None:
    """Raise UnsupportedError where transformers cannot shard a model, unit by unit, while it loads it."""
    from ..convert.runtime.transformers_interface import require

    try:
        require("sharding")
    except ImportError as error:
        hint = "install transformers 5.23 or newer, or train without --fsdp"
        raise UnsupportedError(f"--fsdp cannot be used here: {error}", hint=hint) from error


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


def batch_of(job: UptrainJob, micro_batch: int) -> Batch:
    """How the sequences of a step are shared out. Raises UnsupportedError where they cannot be."""
    settings = job.settings
    return Batch(settings.sequences_per_step, settings.sequence_length, job.execution.num_processes, micro_batch)
