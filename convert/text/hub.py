"""Datasets that are named: whether the hub or the cache has them, at which commit, and their rows."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..checkpoint.hub import ANSWER_SECONDS, hub_refusal, is_final_refusal, quiet_hub
from ..errors import DataError, first_line, is_out_of_memory
from .formats import file_kind
from .sources import TextSource

__all__ = ["check_dataset", "is_dataset_name", "pin_revision", "read_dataset_rows"]

_NAME = re.compile(r"([\w-][\w.-]*/)?[\w-][\w.-]*")
# endings of files, which no name of a dataset has
_ENDING = re.compile(r"\.(gz|zst|xz|bz2|zip|tar|csv|tsv|html?|xml|ya?ml|pdf|bin|npy|text|log)", re.IGNORECASE)


def is_dataset_name(location: str) -> bool:
    """Return whether a location can be the name of a dataset; one with the ending of a file is a file's."""
    path = Path(location)
    is_file = file_kind(path) is not None or _ENDING.fullmatch(path.suffix) is not None
    return _NAME.fullmatch(location) is not None and not is_file


def check_dataset(source: TextSource) -> None:
    """Raise DataError where a named dataset is surely not to be had: not on the hub, or out of reach and not cached."""
    from huggingface_hub import HfApi

    try:
        HfApi().dataset_info(source.location, revision=source.revision, timeout=ANSWER_SECONDS)
    except Exception as error:  # the HTTP library behind the hub has errors of its own
        if is_out_of_memory(error):
            raise
        if is_final_refusal(error) and not _is_cached(source.location):
            raise _refused(source, *hub_refusal(error, "dataset", source.revision)) from error


def pin_revision(source: TextSource, *, remark: Callable[[str], object] = lambda text: None) -> TextSource:
    """Return the source with `revision` set to the commit that its dataset is at now; files are returned unchanged.

    A dataset that the hub does not tell the commit of is returned unchanged too, since it may be in the cache, and
    `remark` is called with one sentence that says so and why: read again later, such text may be another one.
    """
    if source.path.exists():
        return source
    from huggingface_hub import HfApi

    try:
        info = HfApi().dataset_info(source.location, revision=source.revision, timeout=ANSWER_SECONDS)
        return replace(source, revision=info.sha)
    except Exception as error:  # as above
        if is_out_of_memory(error):
            raise
        reason, _ = hub_refusal(error, "dataset", source.revision)
        remark(f"{source.location} is read without a fixed commit, so it may change between runs: {reason}")
    return source


def read_dataset_rows(source: TextSource) -> Iterator[tuple[str, Any]]:
    """Yield where each row of a named dataset stands, and the row. Raises DataError where it cannot be read."""
    import datasets

    try:
        with quiet_hub():
            dataset: Any = datasets.load_dataset(
                source.location, source.config, split=source.chosen_split, revision=source.revision, streaming=True
            )
            rows = iter(dataset)
    except Exception as error:
        raise _unreadable(source, error) from error
    number = 0
    while True:
        try:
            row = next(rows)
        except StopIteration:
            return
        except Exception as error:
            raise _unreadable(source, error) from error
        number += 1
        yield f"{source.location}, row {number}", row


def _unreadable(source: TextSource, error: Exception) -> Exception:
    """What to raise for an error of the datasets library, or of a library below it."""
    if is_out_of_memory(error):
        return error
    reason = first_line(error)
    for word, settings in (("split", ("split",)), ("config", ("config", "data_config"))):
        if isinstance(error, ValueError) and word in reason.lower():
            return DataError(f"{source.location}: {reason}", hint=f"name the {word} to read", settings=settings)
    if is_final_refusal(error):
        return _refused(source, *hub_refusal(error, "dataset", source.revision))
    return _refused(source, reason, None)


def _refused(source: TextSource, reason: str, hint: str | None) -> DataError:
    otherwise = f"; if it is a dataset, {hint}" if hint else ""
    return DataError(
        f"{source.location}: no such file here, and not a readable dataset: {reason}",
        hint=f"if it is a path, check its spelling{otherwise}",
    )


def _is_cached(name: str) -> bool:
    """Whether the hub's cache or that of datasets has something of a dataset, which is then tried without network."""
    import datasets
    from huggingface_hub import constants

    folder = Path(constants.HF_HUB_CACHE) / f"datasets--{name.replace('/', '--')}"
    prepared = Path(datasets.config.HF_DATASETS_CACHE) / name.replace("/", "___")
    return folder.is_dir() or prepared.is_dir()
