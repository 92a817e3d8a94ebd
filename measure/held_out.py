"""Held-out text and checkpoints, from their names to an evaluation."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from itertools import chain, islice
from pathlib import Path
from typing import Any, Literal

import torch

from ..convert.architectures.context import check_context, longest_context
from ..convert.cache_check import check_runtime
from ..convert.checkpoint.loading import load_model
from ..convert.checkpoint.tokenizer import TokenIdCheck, load_tokenizer
from ..convert.device import default_device
from ..convert.errors import DataError
from ..convert.text.sources import TextSource, read_documents
from ..convert.text.tokens import adds_bos, check_tokenizers, encode_documents
from .perplexity import Evaluation, Windows, cut_windows, evaluate

__all__ = ["check_window", "default_window", "evaluate_checkpoint", "load_windows"]

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
            check_context(each, window, name=str(each), what="window")


def load_windows(
    model: str | Path,
    source: TextSource,
    *,
    window: int,
    stride: int | None = None,
    bos: Literal["auto", "always", "never"] = "auto",
    max_windows: int | None = None,
) -> Windows:
    """The source's documents, tokenised for `model`, joined by EOS where it has one, and cut into windows.

    bos "auto" puts BOS before each window if the tokenizer puts one before a text. Raises DataError for empty or
    short text, a missing tokenizer, BOS asked of a tokenizer that has none, or a token that the model's embedding has
    no row for.
    """
    tokenizer = load_tokenizer(model)
    if bos == "always" and tokenizer.bos_token_id is None:
        raise DataError(f"{model}: its tokenizer has no BOS token", hint="use --bos never")
    with_bos = bos == "always" or (bos == "auto" and adds_bos(tokenizer))
    num_needed = None if max_windows is None else window + (max_windows - 1) * (stride or window)
    check_ids = TokenIdCheck.of(model, tokenizer)
    if with_bos:
        check_ids([tokenizer.bos_token_id], source.location)

    def checked(documents: Iterable[list[int]]) -> Iterator[list[int]]:
        for ids in documents:
            check_ids(ids, source.location)
            yield ids

    ids = chain.from_iterable(checked(encode_documents(read_documents(source), tokenizer)))
    token_ids = torch.tensor(list(islice(ids, num_needed)))
    return cut_windows(
        token_ids,
        window=window,
        stride=stride,
        bos_token_id=tokenizer.bos_token_id if with_bos else None,
        max_windows=max_windows,
        joined_by_eos=tokenizer.eos_token_id is not None,
    )


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
    """Load `model`, and its original if given, and evaluate it on the windows.

    Raises DataError if the two do not share their vocabulary, or the original has no row for a token of the windows,
    UnsupportedError if a window is longer than one of them takes, CheckpointError if a class of ours, with this version
    of transformers, computes something else with a cache than without, or if logits are not finite.
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
    loaded = load_model(model, dtype=dtype, device=device)
    return evaluate(
        loaded,
        windows,
        original=original,
        batch_size=batch_size,
        names=(str(model), str(against)),
        progress=progress,
    )
