"""Held-out text and checkpoints, from their names to an evaluation."""

from __future__ import annotations

from array import array
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from ..convert.architectures.context import check_context, longest_context
from ..convert.cache_check import check_runtime
from ..convert.checkpoint.loading import load_model
from ..convert.checkpoint.tokenizer import TokenIdCheck, load_tokenizer
from ..convert.device import default_device
from ..convert.errors import DataError
from ..convert.text.documents import describe_files, join_files, read_files, read_parts
from ..convert.text.parts import TextPart
from ..convert.text.reading import Reading
from ..convert.text.sources import TextSource
from ..convert.text.tokens import adds_bos, check_tokenizers, encode_documents
from .perplexity import Evaluation, summarise
from .scoring import Scores, score
from .windows import Windows, cut_windows, join_windows

__all__ = [
    "check_window",
    "default_window",
    "evaluate_checkpoint",
    "load_checked",
    "load_windows",
    "score_checkpoint",
]

_MAX_DEFAULT_WINDOW = 512


def default_window(model: str | Path, original: str | Path | None) -> int:
    """Choose as many tokens per window as both models take, but at most 512."""
    longest = [longest_context(each) for each in (model, original) if each is not None]
    return min([_MAX_DEFAULT_WINDOW, *(length for length in longest if length is not None)])


def check_window(window: int, model: str | Path, original: str | Path | None) -> None:
    """Raise UnsupportedError if a window is longer than one of the models takes.

    A model with rotary positions would compute something without an error, which is far from what it can predict.
    """
    for each in (model, original):
        if each is not None:
            check_context(longest_context(each), window, name=str(each), what="window")


def load_windows(
    model: str | Path,
    source: TextSource,
    *,
    window: int,
    stride: int | None = None,
    bos: Literal["auto", "always", "never"] = "auto",
    max_windows: int | None = None,
    remark: Callable[[str], object] = lambda text: None,
) -> Windows:
    """The source's documents, tokenised for `model`, joined by EOS where it has one, and cut into windows.

    bos "auto" puts BOS before each window if the tokenizer puts one before a text. With `max_windows`, windows are
    taken in turn from the files of a directory, of more than 64 files from 64 places among them. `remark` is called
    with sentences that say which tokens the model's embedding has no row for, which files of a directory are read, and
    what was read otherwise than it stands there.
    Raises DataError for empty or short text, a missing tokenizer, BOS asked of a tokenizer that has none, or a token
    that the model's embedding has no row for.
    """
    tokenizer = load_tokenizer(model)
    if bos == "always" and tokenizer.bos_token_id is None:
        raise DataError(f"{model}: its tokenizer has no BOS token", hint="use --bos never")
    with_bos = bos == "always" or (bos == "auto" and adds_bos(tokenizer))
    check_ids = TokenIdCheck.of(model, tokenizer)
    if with_bos:
        check_ids([tokenizer.bos_token_id], source.location)
    for sentence in (check_ids.remark, describe_files(source)):
        if sentence is not None:
            remark(sentence)

    def encode(parts: Iterable[TextPart]) -> Iterator[list[int]]:
        for ids in encode_documents(parts, tokenizer):
            check_ids(ids, source.location)
            yield ids

    length = window - with_bos
    sizes = (length, stride or length)
    reading = Reading(tokenizer)
    places = None if max_windows is None else _in_turn(read_files(source, reading), encode, *sizes, max_windows)
    if places is None:
        reading = Reading(tokenizer)
        place = _Place(encode(read_parts(source, reading)))
        place.fill(None if max_windows is None else sizes[0] + (max_windows - 1) * sizes[1])
        places = [(place.token_ids, max_windows)]
    for sentence in reading.notes.sentences(source.location):
        remark(sentence)
    cut = [
        cut_windows(
            token_ids,
            window=window,
            stride=stride,
            bos_token_id=tokenizer.bos_token_id if with_bos else None,
            max_windows=num_windows,
            documents=_in_words(tokenizer, reading, len(places)),
        )
        for token_ids, num_windows in places
    ]
    return _with_bytes(join_windows(cut), tokenizer)


def _with_bytes(windows: Windows, tokenizer: Any) -> Windows:
    """The windows with the length of what is scored of them, as text, in bytes of UTF-8.

    Special tokens are no text. A character that a window cuts through counts on the side where it begins, so that each
    window may be off by a byte or three, of thousands.
    """

    def num_bytes(token_ids: Tensor) -> int:
        text = tokenizer.decode(token_ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return len(text.encode(errors="replace"))

    total = sum(
        num_bytes(row) - num_bytes(row[:first])
        for row, first in zip(windows.input_ids, windows.scored_from, strict=True)
    )
    return replace(windows, num_bytes=total)


def _in_turn(
    files: Sequence[Iterator[TextPart]],
    encode: Callable[[Iterable[TextPart]], Iterator[list[int]]],
    length: int,
    step: int,
    num_windows: int,
) -> list[tuple[Tensor, int | None]] | None:
    """Token ids, (num_tokens,), and how many windows of `length` tokens, every `step`, to cut of them, from each place.

    Windows are taken in turn from places among the files. None where there is a single file, or the files are so short
    that places do not fill so many windows.
    """
    places = [_Place(encode(parts)) for parts in join_files(files, num_windows)]
    counts = [0] * len(places)
    waiting = deque(range(len(places) if len(files) > 1 else 0))
    while waiting and sum(counts) < num_windows:
        number = waiting.popleft()
        if places[number].fill(length + counts[number] * step):
            counts[number] += 1
            waiting.append(number)
    if sum(counts) < num_windows:
        return None
    return [(place.token_ids, count) for place, count in zip(places, counts, strict=True)]


class _Place:
    """A part of a text, of which tokens are read as they are needed."""

    def __init__(self, encoded: Iterator[list[int]]) -> None:
        self._encoded = encoded
        self._held = array("q")

    def fill(self, num_tokens: int | None) -> bool:
        """Read until so many tokens are held, or all; whether there are so many."""
        while num_tokens is None or len(self._held) < num_tokens:
            ids = next(self._encoded, None)
            if ids is None:
                return num_tokens is None
            self._held.extend(ids)
        return True

    @property
    def token_ids(self) -> Tensor:
        """The tokens that were read, (num_tokens,) int64."""
        return torch.tensor(self._held, dtype=torch.int64)


def _in_words(tokenizer: Any, reading: Reading, num_places: int) -> str:
    """How documents were made one stream of tokens."""
    taken = f" from {num_places} places of the text in turn" if num_places > 1 else ""
    at = ", ".join(map(repr, sorted(reading.notes.separators)))
    split = f" split at {at} and" if at else ""
    joined = "joined by EOS" if tokenizer.eos_token_id is not None else "joined without EOS, as the tokenizer has none"
    return f"documents{taken}{split} {joined}"


def evaluate_checkpoint(
    model: str | Path,
    windows: Windows,
    *,
    against: str | Path | None = None,
    dtype: Any = torch.float32,
    device: Any = None,
    batch_size: int = 8,
    progress: Callable[[int], object] = lambda num_windows: None,
) -> Evaluation:
    """Load `model`, and its original if given, and evaluate it on the windows; errors are `score_checkpoint`'s."""
    options: dict[str, Any] = {"dtype": dtype, "device": device, "batch_size": batch_size, "progress": progress}
    return summarise(score_checkpoint(model, windows, against=against, **options), windows)


def score_checkpoint(
    model: str | Path,
    windows: Windows,
    *,
    against: str | Path | None = None,
    dtype: Any = torch.float32,
    device: Any = None,
    batch_size: int = 8,
    progress: Callable[[int], object] = lambda num_windows: None,
) -> Scores:
    """Load `model`, and its original if given, and score it on the windows, token by token.

    Errors are those of `load_checked` and `score`.
    """
    loaded, original = load_checked(model, windows, against=against, dtype=dtype, device=device)
    names = str(model), str(against)
    return score(loaded, windows, original=original, batch_size=batch_size, names=names, progress=progress)


def load_checked(
    model: str | Path, windows: Windows, *, against: str | Path | None, dtype: Any, device: Any = None
) -> tuple[Any, Any | None]:
    """Load `model`, and its original if given, once it is known that both can read the windows.

    Raises DataError if the two do not share their vocabulary, or the original has no row for a token of the windows,
    UnsupportedError if a window is longer than one of them takes, CheckpointError if a class of ours, with this version
    of transformers, computes something else with a cache than without.
    """
    device = device or default_device()
    check_window(windows.input_ids.shape[1], model, against)
    check_tokenizers(model, against)
    if against is not None:
        TokenIdCheck.of(against, load_tokenizer(model))(windows.input_ids.flatten().tolist(), "the text")
    for checkpoint in (model, against):
        if checkpoint is not None:
            check_runtime(checkpoint)
    original = load_model(against, dtype=dtype, device=device) if against is not None else None
    return load_model(model, dtype=dtype, device=device), original
