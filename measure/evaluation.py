"""The evaluation of a checkpoint on held-out text: what the command calls."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, get_args

from typing_extensions import Doc

from ..convert.checkpoint.opening import open_checkpoint
from ..convert.conversion import Progress, no_progress
from ..convert.device import default_device
from ..convert.errors import InputError
from ..convert.text.sources import DocumentSeparator, LineDocuments, SkipBadLines, TextField, TextSource, parse_text
from .tasks import TaskSettings, load_tasks, run_tasks, task_scores

if TYPE_CHECKING:
    from .perplexity import Evaluation

__all__ = ["EvaluationSettings", "evaluate"]

Bos = Literal["auto", "always", "never"]
Dtype = Literal["auto", "float32", "bfloat16", "float16"]


@dataclass(frozen=True)
class EvaluationSettings:
    """How held-out text is read, cut into windows and scored.

    Raises InputError for sizes that cannot be, and for names that are not known.
    """

    window: Annotated[
        int | None, Doc("Tokens per window. Default: 512, or as many as the model takes if that is less.")
    ] = None
    stride: Annotated[int | None, Doc("Tokens between the beginnings of windows. Default: no overlap.")] = None
    context: Annotated[
        int | None,
        Doc("Tokens that a window is read in: its own, behind others of the text, not scored again. Default: its own."),
    ] = None
    bos: Annotated[Bos, Doc("BOS before each window; auto: as the tokenizer does.")] = "auto"
    max_windows: Annotated[
        int | None,
        Doc("Score at most so many windows of each text, of a directory in turn from all its files. Default: all."),
    ] = None
    text_field: TextField = "text"
    split: Annotated[str | None, Doc("Split of a dataset. Default: test.")] = None
    config: Annotated[str | None, Doc("Configuration of a dataset.")] = None
    line_documents: LineDocuments = False
    document_separator: DocumentSeparator = None
    skip_bad_lines: SkipBadLines = False
    batch_size: Annotated[int, Doc("Windows per forward pass.")] = 8
    dtype: Annotated[Dtype, Doc("Precision of the models; auto: float32 on a CPU, the checkpoint's on a GPU.")] = "auto"
    samples: Annotated[
        int, Doc("Show how the models go on behind the beginnings of so many windows, spread over the text.")
    ] = 0

    def __post_init__(self) -> None:
        limits = (("window", 2), ("stride", 1), ("context", 2), ("max_windows", 1), ("batch_size", 1), ("samples", 0))
        for name, least in limits:
            value = getattr(self, name)
            if value is not None and value < least:
                raise InputError(f"{name} is {value}, expected {least} or more")
        for name, known in (("bos", get_args(Bos)), ("dtype", get_args(Dtype))):
            if getattr(self, name) not in known:
                raise InputError(f"{name} is {getattr(self, name)!r}, expected one of {', '.join(known)}")

        if self.context is not None and self.stride is not None:
            raise InputError(
                "a context says how far windows overlap, and so does a stride",
                hint="give one of the two",
                settings=("context", "stride"),
            )

    def cut(self, default_window: int) -> tuple[int, int | None]:
        """How long the windows are that the models read, and the tokens between their beginnings, if not as many.

        Raises InputError for a context that is shorter than the window.
        """
        window = self.window or min(default_window, self.context or default_window)
        if self.context is None:
            return window, self.stride
        if self.context < window:
            raise InputError(
                f"context is {self.context}, and a window has {window} tokens",
                hint="use a longer context, or a shorter window",
                settings=("context", "window"),
            )
        return self.context, window

    def source(self, data: str) -> TextSource:
        """The text that is read, as it is typed. Raises InputError for no place and for what says nothing of a text."""
        defaults = TextSource(
            "",
            text_field=self.text_field,
            split=self.split,
            config=self.config,
            usual_split="test",
            line_documents=self.line_documents,
            document_separator=self.document_separator,
            skip_bad_lines=self.skip_bad_lines,
        )
        return parse_text(data, defaults)

    @property
    def precision(self) -> str:
        """The dtype that "auto" stands for on this machine; "auto" itself where it is the checkpoint's own."""
        if self.dtype != "auto":
            return self.dtype
        return "float32" if default_device().type == "cpu" else "auto"


_NO_TASKS = TaskSettings()


def evaluate(
    model: str | Path,
    data: str | Path | Sequence[str | Path],
    *,
    against: str | Path | None = None,
    before: str | Path | None = None,
    settings: EvaluationSettings = EvaluationSettings(),
    tasks: TaskSettings = _NO_TASKS,
    output: Path | None = None,
    revision: str | None = None,
    progress: Progress = no_progress,
    remark: Callable[[str], object] = lambda text: None,
) -> Evaluation:
    """Perplexity of a checkpoint, a directory or a hub id, on held-out text, alone or against its original.

    `data` is a text, JSON or parquet file, a directory of them, or the name of a dataset, which may say its split,
    field, config and revision between brackets (`parse_text`); or several of these, which are scored one by one, and
    together by tokens. `before` is the converted checkpoint before uptraining, of whose excess over the original the
    result then says how much came back. `tasks` are run by lm-evaluation-harness, which writes results of its own below
    the directory `output`, if that is given. `remark` is called with what a person should know.

    Raises InputError (of it CheckpointError and DataError) for what cannot be read, whose vocabularies differ, whose
    context is shorter than a window, and for tasks that cannot be run.
    """
    import torch

    from ..convert.checkpoint.tokenizer import load_tokenizer
    from ..convert.text.tokens import check_tokenizers
    from .held_out import check_window, default_window, load_checked, load_windows, score_checkpoint
    from .perplexity import recovery, summarise
    from .samples import write_samples
    from .scoring import Scores, score
    from .windows import join_windows

    if before is not None and against is None:
        raise InputError(
            "what came back since a checkpoint is a part of its excess over an original, and there is none",
            settings=("before", "against"),
        )
    manager = load_tasks(tasks) if tasks.tasks else None
    directory = _opened(model, revision)
    original = None if against is None else _opened(against)
    converted = None if before is None else _opened(before)
    if converted is not None:
        check_tokenizers(converted, original)
    window, stride = settings.cut(default_window(directory, original))
    check_window(window, directory, original)
    texts = [str(data)] if isinstance(data, str | Path) else list(dict.fromkeys(map(str, data)))
    if not texts:
        raise InputError("no text to evaluate on", settings=("data",))
    by_text = {
        text: load_windows(
            directory,
            settings.source(text),
            window=window,
            stride=stride,
            bos=settings.bos,
            max_windows=settings.max_windows,
            remark=remark,
        )
        for text in texts
    }
    windows = join_windows(list(by_text.values()))
    precision = settings.precision
    dtype = precision if precision == "auto" else getattr(torch, precision)
    names = str(directory), str(original)
    with progress("evaluating", len(windows.input_ids) * (1 if converted is None else 2)) as advance:
        loaded, reference = load_checked(directory, windows, against=original, dtype=dtype)
        tokenizer = load_tokenizer(directory)
        found = [  # first, since a task whose data is missing is refused
            run_tasks(each, tokenizer, tasks, manager, name=str(name), batch_size=settings.batch_size, output=output)
            for each, name in ((loaded, model), (reference, against))
            if tasks.tasks and each is not None
        ]
        scores = {
            text: score(loaded, each, original=reference, batch_size=settings.batch_size, names=names, progress=advance)
            for text, each in by_text.items()
        }
        samples = write_samples(loaded, windows, tokenizer, settings.samples, reference) if settings.samples else ()
        del loaded, reference  # before another model is loaded
        together = Scores.joined(scores.values())
        recovered = None
        if converted is not None:
            earlier = score_checkpoint(
                converted, windows, dtype=dtype, batch_size=settings.batch_size, progress=advance
            )
            recovered = recovery(together, earlier)
    alone = {text: summarise(scores[text], each) for text, each in by_text.items()} if len(texts) > 1 else {}
    return replace(
        summarise(together, windows),
        recovery=recovered,
        by_source=alone,
        samples=samples,
        tasks=task_scores(*found) if found else (),
    )


def _opened(model: str | Path, revision: str | None = None) -> Path:
    """The directory of a checkpoint, which can be opened."""
    with open_checkpoint(model, revision=revision) as checkpoint:
        return checkpoint.directory
