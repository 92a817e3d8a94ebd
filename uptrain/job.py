"""An uptraining job: what is trained, on what, towards what, and where the result goes."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ..convert.checkpoint.tensors import Checkpoint
from ..convert.errors import InputError, OutputError
from ..convert.record import place_name
from .data.corpus import Corpus
from .data.sources import SourceSize, WeightedSource, shares_of
from .estimate.budget import Batch, default_micro_batch
from .estimate.shape import Models, RunShape
from .inputs import Inputs
from .launcher import sharding_of
from .recipe import Objective, Recipe
from .settings import Execution, RunSettings

__all__ = ["UptrainJob", "sweep_directory", "work_directory"]

_MAX_VALIDATION_BLOCKS = 64


@dataclass(frozen=True)
class UptrainJob:
    """What is trained, on what, towards what, and where the result goes.

    `validation_fraction` of the documents are kept out of training and scored during it. `inputs` is what was read of
    checkpoint and teacher, which jobs that are made of each other share.
    Raises OutputError for an output without a name, InputError for a teacher that no loss compares with.
    """

    checkpoint: Checkpoint
    settings: RunSettings
    sources: tuple[WeightedSource, ...]
    output: Path
    teacher: str | None = None
    execution: Execution = field(default_factory=Execution)
    validation_fraction: float = 0.0
    inputs: Inputs = field(default=None, repr=False, compare=False)  # type: ignore[assignment]

    def __post_init__(self) -> None:
        if not self.output.name:
            raise OutputError(f"{self.output} is no place for a new directory", hint="name one with --output")
        if self.teacher is not None and not self.settings.uses_teacher:
            raise InputError(
                f"{self.teacher} would not be used: {self.objective} compares with no teacher",
                hint="leave the teacher out, or choose a recipe or loss weights that use one",
            )
        known: Inputs | None = self.inputs
        if known is None or (known.checkpoint, known.teacher_name) != (self.checkpoint, self.teacher):
            object.__setattr__(self, "inputs", Inputs(self.checkpoint, self.teacher))

    @property
    def work(self) -> Path:
        """Where the run keeps its blocks, checkpoints, metrics and status until the output is whole."""
        return work_directory(self.output)

    @property
    def places_read(self) -> tuple[Path, ...]:
        """Where model, teacher and text are, if they are on this machine; nothing of it is replaced."""
        teacher = () if self.teacher is None else (Path(self.teacher),)
        return (self.checkpoint.directory, *(source.text.path for source in self.sources), *teacher)

    @property
    def is_sharded(self) -> bool:
        """Whether FSDP2 gives each process a part of every parameter."""
        return self.execution.fsdp and self.execution.num_processes > 1

    @property
    def shares_frozen(self) -> bool:
        """Whether frozen weights of the student are the teacher's own tensors.

        They are with the recipe light, except under FSDP2, which wants one dtype in a layer and shards each model by
        itself. What is shared has one dtype, and without autocast that is the one that is trained in.
        """
        return self.settings.recipe is Recipe.light and not self.is_sharded

    @property
    def num_samples(self) -> int:
        """Sequences that the whole run reads."""
        return self.settings.steps * self.settings.sequences_per_step

    @property
    def objective(self) -> str:
        """What is minimised, in words, for people and for the record."""
        settings = self.settings
        parts = []
        if settings.stages[0].objective is Objective.attention_regression:
            parts.append("attention regression")
        if settings.stages[-1].objective is Objective.prediction:
            names = {"forward KL": settings.weights.kl, "cross-entropy": settings.weights.cross_entropy}
            parts.append(" + ".join(name for name, weight in names.items() if weight))
        return ", then ".join(parts)

    def batch(self, micro_batch: int | None = None) -> Batch:
        """Share out the sequences of a step: with this micro-batch, else the job's, else the default one.

        Raises UnsupportedError where they cannot be shared out evenly.
        """
        settings, num_processes = self.settings, self.execution.num_processes
        sizes = settings.sequences_per_step, settings.sequence_length, num_processes
        return Batch(*sizes, micro_batch or self.execution.micro_batch or default_micro_batch(*sizes))

    @property
    def shape(self) -> RunShape:
        """The run in numbers, from which its costs are computed."""
        inputs = self.inputs
        return RunShape(
            models=Models(
                student=inputs.student_size,
                teacher=inputs.teacher_size,
                shares=self.shares_frozen,
                bf16=self.settings.precision == "bf16",
            ),
            stages=self.settings.stages,
            weights=self.settings.weights,
            batch=self.batch(),
            sharding=sharding_of(self.execution),
            activation_checkpointing=self.execution.activation_checkpointing,
            teacher_copy_bytes=inputs.teacher_copy_bytes,
            keeps_best=self.settings.keep_best,
        )

    @property
    def source_sizes(self) -> tuple[SourceSize, ...]:
        """The part of the samples that comes from each source, and about how many tokens it holds.

        Raises DataError for what is no text.
        """
        return tuple(
            SourceSize(share, self.inputs.num_tokens(source.text))
            for share, source in zip(shares_of(self.sources), self.sources, strict=True)
        )

    @property
    def corpus(self) -> Corpus:
        """What the run reads. Raises InputError for what cannot be."""
        return Corpus(
            sources=self.sources,
            sequence_length=self.settings.sequence_length,
            num_blocks=self.num_samples,
            tokenizer_hash=self.inputs.tokenizer_hash,
            vocab_size=1 + max(self.inputs.tokenizer.get_vocab().values()),
            seed=self.settings.seed,
            validation_fraction=self.validation_fraction,
            max_validation_blocks=_MAX_VALIDATION_BLOCKS,
        )

    @property
    def description(self) -> dict[str, Any]:
        """All that decides the result, as JSON has it: two jobs with one description are the same run.

        So are two that differ only in where model, teacher and text lie, as long as their digests are the same.
        """
        description = {
            "model": Path(self.checkpoint.name).name,
            "model_fingerprint": self.inputs.fingerprint,
            "objective": self.objective,
            "teacher": None if self.teacher is None else Path(self.teacher).name,
            "teacher_fingerprint": self.inputs.teacher_fingerprint,
            "data": [source.description | {"content": self.inputs.content(source.text)} for source in self.sources],
            "validation_fraction": self.validation_fraction,
            **asdict(self.settings),
        }
        return dict(json.loads(json.dumps(description)))

    @property
    def record(self) -> dict[str, Any]:
        """The description for a manifest, which says the same wherever model, teacher and text lie."""
        named = {"model": place_name(self.checkpoint.name), "teacher": self.teacher and place_name(self.teacher)}
        sources = self.description["data"]
        data = [
            {**source, "text": {**source["text"], "location": place_name(source["text"]["location"])}}
            for source in sources
        ]
        return self.description | named | {"data": data}


def work_directory(output: Path) -> Path:
    """Name the directory where a run keeps its blocks, checkpoints, metrics and status until `output` is whole."""
    return output.with_name(f"{output.name}.uptraining")


def sweep_directory(output: Path) -> Path:
    """Name the directory where trials of learning rates are kept until the run that they are for is finished."""
    return output.with_name(f"{output.name}.lr-sweep")
