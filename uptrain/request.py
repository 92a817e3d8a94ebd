"""What a user asks of an uptraining run: every field has its help beside it, and its default nowhere else."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, Literal

from typing_extensions import Doc

from ..convert.errors import InputError, UnsupportedError
from ..convert.text.sources import DocumentSeparator, LineDocuments, SkipBadLines, TextField, TextSource, parse_text
from .data.sources import WeightedSource
from .recipe import Recipe, Trained
from .schedule import Schedule

__all__ = [
    "Length",
    "Machine",
    "Monitoring",
    "Schedule",
    "TextSettings",
    "Tracker",
    "UptrainRequest",
    "UptrainSettings",
]


class Tracker(StrEnum):
    """What metrics can be sent to, where it is installed."""

    tensorboard = "tensorboard"
    wandb = "wandb"
    trackio = "trackio"
    mlflow = "mlflow"


@dataclass(frozen=True, kw_only=True)
class Length:
    """How long a run is: one of steps, tokens and fraction, or 5 % of the pretraining tokens without any."""

    steps: Annotated[int | None, Doc("Length of the run in optimizer steps.")] = None
    tokens: Annotated[int | None, Doc("Length of the run in tokens, for example 300M or 1B.")] = None
    fraction: Annotated[
        float | None,
        Doc(
            "Length of the run as a part of the tokens that the original was pretrained on, for example 5%. Without "
            "--steps, --tokens and --fraction it is 0.05."
        ),
    ] = None
    pretraining_tokens: Annotated[
        int | None,
        Doc("Tokens that the original was pretrained on, for example 2T. Default: what kvconvert knows of the model."),
    ] = None
    yes: Annotated[
        bool,
        Doc("Start a run of many GPU hours: more than 1000 of an H100, or 100 where nobody chose the length."),
    ] = False


@dataclass(frozen=True, kw_only=True)
class TextSettings:
    """How the text of a run is read; what a source says for itself counts more."""

    text_field: TextField = "text"
    split: Annotated[str | None, Doc("Split of a dataset to train on. Default: train.")] = None
    data_config: Annotated[str | None, Doc("Configuration of a dataset.")] = None
    data_revision: Annotated[str | None, Doc("Branch, tag or commit of a named dataset.")] = None
    line_documents: LineDocuments = False
    document_separator: DocumentSeparator = None
    skip_bad_lines: SkipBadLines = False
    validation_fraction: Annotated[
        float | None,
        Doc("Part of the documents to hold out of training and to score. Default: 0.01, or 0 with --eval-data."),
    ] = None
    eval_data: Annotated[
        str | None, Doc("Held-out text to score during training: files as for --data, or a dataset name.")
    ] = None
    eval_split: Annotated[str | None, Doc("Split of a dataset in --eval-data. Default: test.")] = None

    @property
    def defaults(self) -> TextSource:
        """What holds for every text to train on that does not say otherwise; it names no place."""
        return TextSource(
            "",
            text_field=self.text_field,
            split=self.split,
            config=self.data_config,
            revision=self.data_revision,
            line_documents=self.line_documents,
            document_separator=self.document_separator,
            skip_bad_lines=self.skip_bad_lines,
        )

    @property
    def held_out(self) -> TextSource | None:
        """The text of `eval_data`, None without. Raises InputError where it says what is nothing of a text."""
        if self.eval_data is None:
            return None
        return parse_text(self.eval_data, replace(self.defaults, split=self.eval_split, usual_split="test"))


@dataclass(frozen=True, kw_only=True)
class UptrainSettings:
    """What is trained and how. None stands for a default that depends on the model or on the recipe.

    Raises UnsupportedError for a name that is not known; numbers are checked with the model, when a run is planned.
    """

    recipe: Annotated[
        Recipe | None,
        Doc("What is minimised, and which parameters learn it. Default: distill with a teacher, else pretraining."),
    ] = None
    train_only: Annotated[
        Trained,
        Doc("Parameters to train: all, those of the attention modules, or those that make keys and values."),
    ] = Trained.all
    kl_weight: Annotated[
        float | None,
        Doc("Weight of the forward KL divergence from the teacher. Default: 1, or 0 with --recipe pretraining."),
    ] = None
    ce_weight: Annotated[
        float | None,
        Doc("Weight of the cross-entropy on the text. Default: 0, or 1 with --recipe pretraining."),
    ] = None
    temperature: Annotated[float, Doc("Softmax temperature of teacher and student in the KL loss.")] = 1.0
    layerwise_fraction: Annotated[
        float, Doc("Part of the steps that first fit each layer's attention output to the teacher's.")
    ] = 0.0
    lr: Annotated[
        float | None,
        Doc(
            "Peak learning rate. Default: 1e-3 below 100M parameters, 3e-4 below 3B, 1e-4 above; less where the model "
            "is near its teacher at the start; a quarter of it for cross-entropy after a conversion with --method svd."
        ),
    ] = None
    lr_sweep: Annotated[
        int, Doc("Number of learning rates to try in short runs first; the run takes the best of them. 0: none.")
    ] = 0
    layerwise_lr: Annotated[float | None, Doc("Peak learning rate of the layer-wise stage. Default: --lr.")] = None
    body_lr_multiplier: Annotated[float, Doc("Factor on the learning rate of all parameters outside of attention.")] = (
        1.0
    )
    lr_scheduler: Annotated[Schedule, Doc("How the learning rate goes down after its warm-up.")] = Schedule.cosine
    warmup_fraction: Annotated[float, Doc("Part of a stage's steps in which the learning rate rises linearly.")] = 0.03
    weight_decay: Annotated[float, Doc("Weight decay of AdamW, which applies to matrices only.")] = 0.1
    max_grad_norm: Annotated[
        float, Doc("Norm that the gradient is clipped to before every step. 0 switches clipping off.")
    ] = 1.0
    seed: Annotated[int, Doc("Seed of the order of documents and blocks, of dropout, and of what is held out.")] = 0
    sequence_length: Annotated[
        int | None, Doc("Tokens per block of packed text. Default: as many as the model takes, at most 2048.")
    ] = None
    global_batch_tokens: Annotated[
        int | None,
        Doc(
            "Tokens per optimizer step over all processes, for example 512k. Default: 16384 below 100M parameters, "
            "131072 below 1B, 524288 above."
        ),
    ] = None
    precision: Annotated[
        Literal["auto", "bf16", "fp32"],
        Doc("bf16: autocast over float32 weights; auto: bf16 where the machine is fast at it."),
    ] = "auto"
    keep_best: Annotated[
        bool, Doc("Write the weights of the scored step whose held-out loss is least, not those of the last step.")
    ] = False

    def __post_init__(self) -> None:
        _become(self, "recipe", Recipe)
        _become(self, "train_only", Trained)
        _become(self, "lr_scheduler", Schedule)
        if self.precision not in ("auto", "bf16", "fp32"):
            raise UnsupportedError(f"precision is {self.precision!r}, expected 'auto', 'bf16' or 'fp32'")
        if self.lr_sweep < 0:
            raise UnsupportedError(f"lr sweep is {self.lr_sweep}, expected 0 or more")


@dataclass(frozen=True, kw_only=True)
class Machine:
    """How a run is carried out; none of it changes the result beyond rounding."""

    micro_batch: Annotated[
        int | Literal["auto"] | None,
        Doc("Sequences that a process takes at once; auto measures how many fit. Default: at most 8."),
    ] = None
    compile: Annotated[bool, Doc("Run student and teacher through torch.compile.")] = False
    activation_checkpointing: Annotated[
        bool, Doc("Compute activations again in the backward pass: less memory, a third more time.")
    ] = False
    fsdp: Annotated[bool, Doc("Shard models, gradients and optimizer over the processes (FSDP2).")] = False
    gpu: Annotated[
        str | None,
        Doc("GPU whose hours a run is estimated in, by the name that torch gives it. Default: this machine's."),
    ] = None
    report_to: Annotated[
        tuple[Tracker, ...], Doc("Tracker that receives the metrics, if it is installed; repeatable.")
    ] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "report_to", tuple(_known(Tracker, "report to", each) for each in self.report_to))
        if self.micro_batch not in (None, "auto") and (not isinstance(self.micro_batch, int) or self.micro_batch < 1):
            raise InputError(f"{self.micro_batch!r} is not a number of sequences, nor auto")


@dataclass(frozen=True, kw_only=True)
class Monitoring:
    """How often a run is saved, scored and recorded, and when it stops."""

    eval_steps: Annotated[int, Doc("Steps between scores of held-out text.")] = 100
    save_steps: Annotated[int, Doc("Steps between checkpoints that a stopped run goes on from.")] = 500
    log_steps: Annotated[int, Doc("Steps between records in metrics.jsonl.")] = 10
    max_time: Annotated[
        float | None,
        Doc("Time after which the run has saved a checkpoint and ended with exit code 75, for example 5h45m."),
    ] = None

    def __post_init__(self) -> None:
        for name in ("eval_steps", "save_steps", "log_steps"):
            if getattr(self, name) < 1:
                raise UnsupportedError(f"{name.replace('_', ' ')} is {getattr(self, name)}, expected at least 1")
        if self.max_time is not None and self.max_time <= 0:
            raise UnsupportedError(f"max time is {self.max_time}, expected a positive number of seconds")


@dataclass(frozen=True, kw_only=True)
class UptrainRequest:
    """A run as a user asks for it: which model, on what, towards what, for how long, and how.

    A source of `data` may be text as it is typed, `name[split=train]:0.7`, or a WeightedSource. Raises InputError
    without a source.
    """

    model: str | Path
    data: tuple[str | Path | WeightedSource, ...]
    output: str | Path | None = None
    teacher: str | Path | None = None
    revision: str | None = None
    length: Length = field(default_factory=Length)
    text: TextSettings = field(default_factory=TextSettings)
    settings: UptrainSettings = field(default_factory=UptrainSettings)
    machine: Machine = field(default_factory=Machine)
    monitoring: Monitoring = field(default_factory=Monitoring)
    force: bool = False

    def __post_init__(self) -> None:
        if not self.data:
            raise InputError("there is no text to train on")


def _become(settings: Any, name: str, kind: type[StrEnum]) -> None:
    """Let a field hold a member of `kind` where it was given by its name."""
    value = getattr(settings, name)
    if value is not None:
        object.__setattr__(settings, name, _known(kind, name.replace("_", " "), value))


def _known(kind: type[StrEnum], what: str, value: str) -> StrEnum:
    try:
        return kind(value)
    except ValueError as error:
        raise UnsupportedError(f"{what} {value!r} is not known", hint=f"known are {', '.join(kind)}") from error
