"""The documents of a text, from its files or its dataset, in parts of bounded size."""

from __future__ import annotations

import os
import random
import re
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain, islice, pairwise
from pathlib import Path
from typing import Any

from ..checkpoint.input_files import require_regular
from ..errors import DataError
from .directory import FoundFiles, find_files
from .formats import ENDINGS, file_kind, open_binary, reading_errors
from .hub import check_dataset, is_dataset_name, read_dataset_rows
from .json_rows import read_json_rows
from .parts import TextPart, decode_file, divide, without_blank
from .reading import Reading, separators
from .rows import text_of
from .sources import TextSource
from .tables import read_arrow_rows, read_parquet_rows

__all__ = [
    "check_text",
    "describe_files",
    "find_text",
    "join_files",
    "read_documents",
    "read_files",
    "read_interleaved",
    "read_parts",
]

_KINDS_HINT = "give a file of text or JSON or parquet rows, a directory of them, or the name of a dataset on the hub"
_WEIGHTED = re.compile(r"(.+):[\d.]+")  # as one of several texts to train on
_MAX_OPEN_FILES = 16
_MAX_PLACES = 64


def find_text(source: TextSource) -> FoundFiles | None:
    """Find the files of a source, None for the name of a dataset. Raises DataError where there is nothing to read."""
    path = source.path
    if os.path.isdir(path):  # noqa: PTH112, as Path.is_dir raises OSError for a name that is too long
        return find_files(path, source)
    if os.path.exists(path):  # noqa: PTH110, as above
        with reading_errors(path):
            require_regular(path)
        if file_kind(path) is None:
            raise DataError(f"{path}: unknown kind of file", hint=f"text has the endings {ENDINGS}")
        if source.split not in (None, "train"):
            raise DataError(
                f"{path}: no split {source.split!r}: a file has none",
                hint="leave the split out",
                settings=("split",),
            )
        return FoundFiles((path,))
    if not is_dataset_name(source.location):
        weighted = _WEIGHTED.fullmatch(source.location)
        hint = f"one text has no weight: give {weighted[1]}" if weighted else _KINDS_HINT
        raise DataError(f"{source.location}: no such file", hint=hint)
    return None


def check_text(source: TextSource) -> None:
    """Raise DataError where a source has nothing to read; files are looked up, and a dataset is asked of the hub."""
    if find_text(source) is None:
        check_dataset(source)


def describe_files(source: TextSource) -> str | None:
    """Say in a sentence which files of a directory are read and which are not; None where there is nothing to tell."""
    found = find_text(source)
    return None if found is None else found.sentence(source.location)


def read_files(source: TextSource, reading: Reading | None = None) -> list[Iterator[TextPart]]:
    """Return the documents of each file of the source, or of its dataset as of one file; empty ones are left out.

    Raises DataError where there is no usable file; iterating raises it where a file or row cannot be read.
    """
    found, reading = find_text(source), reading or Reading()
    if found is None:
        check_dataset(source)
        return [_of_rows(read_dataset_rows(source), source, reading)]
    return [_of_file(file, source, reading) for file in found.files]


def join_files(files: Sequence[Iterator[TextPart]], at_most: int) -> list[Iterator[TextPart]]:
    """Join the documents of neighbouring files, so that there are `at_most` iterators, each with one file open.

    All of them may be read in turn: 64 files are open at once at most, of the 1024 that a process may often have.
    """
    num_places = min(len(files), at_most, _MAX_PLACES)
    bounds = [number * len(files) // num_places for number in range(num_places + 1)]
    return [chain.from_iterable(files[begin:end]) for begin, end in pairwise(bounds)]


def read_parts(source: TextSource, reading: Reading | None = None) -> Iterator[TextPart]:
    """Yield the documents of the source in order, each in one part or in several.

    Raises DataError as `read_documents` does.
    """
    yield from _not_empty(source, (part for file in read_files(source, reading) for part in file))


def read_documents(source: TextSource, reading: Reading | None = None) -> Iterator[str]:
    """Yield the documents of the source in order, each whole.

    Raises DataError where the source is missing or unreadable, or all its documents are empty.
    """
    parts: list[str] = []
    for part in read_parts(source, reading):
        parts.append(part.text)
        if part.ends:
            yield "".join(parts)
            parts.clear()


def read_interleaved(source: TextSource, reading: Reading | None = None, *, seed: int) -> Iterator[TextPart]:
    """Yield the documents of the source in a mixed order, whose beginning is a sample of all its files.

    The files are shuffled with `seed`, 16 of them are open at a time, and each gives one document after another file's.
    Raises DataError as `read_documents` does.
    """
    files = read_files(source, reading)
    random.Random(seed).shuffle(files)
    yield from _not_empty(source, _in_turn(files))


def _in_turn(files: list[Iterator[TextPart]]) -> Iterator[TextPart]:
    waiting = iter(files)
    open_files = deque(islice(waiting, _MAX_OPEN_FILES))
    while open_files:
        file = open_files.popleft()
        part = None
        for part in file:
            yield part
            if part.ends:
                break
        if part is None:
            open_files.extend(islice(waiting, 1))
        else:
            open_files.append(file)


def _not_empty(source: TextSource, parts: Iterable[TextPart]) -> Iterator[TextPart]:
    found = False
    for part in parts:
        found = True
        yield part
    if not found:
        raise DataError(f"{source.location}: no text in it", hint="every document is empty")


def _of_file(path: Path, source: TextSource, reading: Reading) -> Iterator[TextPart]:
    kind = file_kind(path)
    with reading_errors(path):
        require_regular(path)
        reading.notes.files.append(path)
        if kind == "plain":
            with open_binary(path) as file:
                yield from _of_plain(decode_file(file, str(path)), source, reading)
        elif kind == "json":
            with open_binary(path) as file:
                yield from _of_rows(read_json_rows(file, str(path)), source, reading)
        else:
            read = read_parquet_rows if kind == "parquet" else read_arrow_rows
            yield from _of_rows(read(path, source.text_field), source, reading)


def _of_plain(texts: Iterator[str], source: TextSource, reading: Reading) -> Iterator[TextPart]:
    if source.line_documents:
        return without_blank(divide(texts, ("\n",), set(), with_breaks=False))
    at = separators(source, reading.tokenizer, plain=True)
    return without_blank(divide(texts, at, reading.notes.separators))


def _of_rows(rows: Iterator[tuple[str, Any]], source: TextSource, reading: Reading) -> Iterator[TextPart]:
    at = separators(source, reading.tokenizer, plain=False)
    for where, record in rows:
        try:
            if isinstance(record, DataError):
                raise record
            text = text_of(record, source.text_field, where, reading)
        except DataError as error:
            if not source.skip_bad_lines:
                raise
            reading.notes.skip(str(error))
            continue
        yield from without_blank(divide([text], at, reading.notes.separators))
