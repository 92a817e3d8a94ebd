"""The evaluation of a checkpoint on held-out text: what the command calls."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, get_args

from typing_extensions import Doc

from ..convert.checkpoint.opening import open_checkpoint
from ..convert.conversion import Progress, no_progress
from ..convert.device import default_device
from ..convert.errors import InputError
from ..convert.text.sources import DocumentSeparator, LineDocuments, SkipBadLines, TextField, TextSource, parse_text

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
    bos: Annotated[Bos, Doc("BOS before each window; auto: as the tokenizer does.")] = "auto"
    max_windows: Annotated[
        int | None, Doc("Score at most so many windows, of a directory in turn from all its files. Default: all.")
    ] = None
    text_field: TextField = "text"
    split: Annotated[str | None, Doc("Split of a dataset. Default: test.")] = None
    config: Annotated[str | None, Doc("Configuration of a dataset.")] = None
    line_documents: LineDocuments = False
    document_separator: DocumentSeparator = None
    skip_bad_lines: SkipBadLines = False
    batch_size: Annotated[int, Doc("Windows per forward pass.")] = 8
    dtype: Annotated[Dtype, Doc("Precision of the models; auto: float32 on a CPU, the checkpoint's on a GPU.")] = "auto"

    def __post_init__(self) -> None:
        for name, least in (("window", 2), ("stride", 1), ("max_windows", 1), ("batch_size", 1)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise InputError(f"{name} is {value}, expected {least} or more")
        for name, known in (("bos", get_args(Bos)), ("dtype", get_args(Dtype))):
            if getattr(self, name) not in known:
                raise InputError(f"{name} is {getattr(self, name)!r}, expected one of {', '.join(known)}")

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


def evaluate(
    model: str | Path,
    data: str | Path,
    *,
    against: str | Path | None = None,
    settings: EvaluationSettings = EvaluationSettings(),
    revision: str | None = None,
    progress: Progress = no_progress,
    remark: Callable[[str], object] = lambda text: None,
) -> Evaluation:
    """Perplexity of a checkpoint, a directory or a hub id, on held-out text, alone or against its original.

    `data` is a text, JSON or parquet file, a directory of them, or the name of a dataset, which may say its split,
    field, config and revision between brackets (`parse_text`). `remark` is called with what a person should know.
    Raises InputError (of it CheckpointError and DataError) for what cannot be read, whose vocabularies differ, or whose
    context is shorter than a window.
    """
    import torch

    from .held_out import check_window, default_window, evaluate_checkpoint, load_windows

    with open_checkpoint(model, revision=revision) as checkpoint:
        directory = checkpoint.directory
    original = None
    if against is not None:
        with open_checkpoint(against) as opened:
            original = opened.directory
    window = settings.window or default_window(directory, original)
    check_window(window, directory, original)
    windows = load_windows(
        directory,
        settings.source(str(data)),
        window=window,
        stride=settings.stride,
        bos=settings.bos,
        max_windows=settings.max_windows,
        remark=remark,
    )
    precision = settings.precision
    with progress("evaluating", len(windows.input_ids)) as advance:
        return evaluate_checkpoint(
            directory,
            windows,
            against=original,
            dtype=precision if precision == "auto" else getattr(torch, precision),
            batch_size=settings.batch_size,
            progress=advance,
        )
