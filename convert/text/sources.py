"""Where documents come from: files, directories of them, and named datasets."""

from __future__ import annotations

import gzip
import json
import random
import re
import zlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..checkpoint.hub import hub_refusal
from ..errors import DataError, is_out_of_memory
from .tokens import encode_batch

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = [
    "TextSource",
    "estimate_tokens",
    "pin_revision",
    "read_documents",
    "read_files",
    "read_interleaved",
    "text_bytes",
]

_ENCODE_BATCH = 64
_SAMPLE_DOCUMENTS = 256
_DATASET_NAME = re.compile(r"(?!.*\.(txt|md|jsonl|gz|parquet)$)([\w-][\w.-]*/)?[\w-][\w.-]*")
_KINDS_HINT = "give a text, JSONL or parquet file, a directory of them, or the name of a dataset on the hub"
_SAMPLE_CHARACTERS = 2**14  # of a document, which may be a book
_MAX_OPEN_FILES = 16


@dataclass(frozen=True)
class TextSource:
    """A source of text: a file, a directory of files, or the name of a dataset on the hub.

    A .txt or .md file is one document; a row of a JSONL or parquet file or of a dataset is one, whose text is in the
    column `text_field`. `config` and `split` select a part of a named dataset, and `revision` a branch, tag or commit.
    """

    location: str
    text_field: str = "text"
    split: str = "train"
    config: str | None = None
    revision: str | None = None

    @property
    def path(self) -> Path:
        """The location as a path, which need not exist."""
        try:
            return Path(self.location).expanduser()
        except RuntimeError:  # there is no such user
            return Path(self.location)


def read_documents(source: TextSource) -> Iterator[str]:
    """Yield the non-empty documents of the source in order.

    Raises DataError where the source is missing or unreadable, or all its documents are empty.
    """
    found = False
    for documents in read_files(source):
        for document in documents:
            found = True
            yield document
    if not found:
        raise DataError(f"{source.location}: no text in it", hint="every document is empty")


def read_files(source: TextSource) -> list[Iterator[str]]:
    """Return one iterator over non-empty documents per file of the source, or a single one for a named dataset.

    Raises DataError where there is no usable file; iterating raises it where a file cannot be read.
    """
    files = _files(source)
    if files is None:
        return [_non_empty(_read_dataset(source))]
    return [_non_empty(_read_file(file, source.text_field)) for file in files]


def read_interleaved(source: TextSource, *, seed: int) -> Iterator[str]:
    """Yield the non-empty documents of the source in a mixed order, whose beginning is a sample of all its files.

    The files are shuffled with `seed`, 16 of them are open at a time, and each gives one document after another file's.
    Raises DataError as `read_documents` does.
    """
    files = read_files(source)
    random.Random(seed).shuffle(files)
    waiting = iter(files)
    reading = deque(islice(waiting, _MAX_OPEN_FILES))
    found = False
    while reading:
        file = reading.popleft()
        document = next(file, None)
        if document is None:
            reading.extend(islice(waiting, 1))
            continue
        reading.append(file)
        found = True
        yield document
    if not found:
        raise DataError(f"{source.location}: no text in it", hint="every document is empty")


def text_bytes(source: TextSource) -> int | None:
    """Return the total size of the source's files in bytes, or None for a named dataset.

    Raises DataError where there is no usable file.
    """
    files = _files(source)
    return None if files is None else sum(file.stat().st_size for file in files)


def estimate_tokens(source: TextSource, tokenizer: PreTrainedTokenizerBase) -> int | None:
    """Estimate how many tokens the source's files hold, from a sample; None for a dataset or compressed files.

    Keys and escapes of JSONL count as text, so that the estimate is rather too large. Raises DataError as
    `read_documents` does.
    """
    files = _files(source)
    if files is None or any(file.suffix in (".gz", ".parquet") for file in files):
        return None
    documents = islice(read_interleaved(source, seed=0), _SAMPLE_DOCUMENTS)
    sample = [document[:_SAMPLE_CHARACTERS] for document in documents]
    num_bytes = sum(len(text.encode(errors="surrogatepass")) for text in sample)
    num_tokens = sum(map(len, encode_batch(sample, tokenizer)))
    return round(num_tokens / num_bytes * sum(file.stat().st_size for file in files))


def pin_revision(source: TextSource, *, remark: Callable[[str], object] = lambda text: None) -> TextSource:
    """Return the source with `revision` set to the commit that its dataset is at now; files are returned unchanged.

    A dataset that the hub does not tell the commit of is returned unchanged too, since it may be in the cache, and
    `remark` is called with one sentence that says so and why: read again later, such text may be another one.
    """
    if source.path.exists():
        return source
    from huggingface_hub import HfApi

    try:
        return replace(source, revision=HfApi().dataset_info(source.location, revision=source.revision).sha)
    except Exception as error:  # the HTTP library behind the hub has errors of its own
        if is_out_of_memory(error):
            raise
        reason, _ = hub_refusal(error, "dataset", source.revision)
        remark(f"{source.location} is read without a fixed commit, so it may change between runs: {reason}")
    return source


def _files(source: TextSource) -> list[Path] | None:
    """The source's files in the order of their names, or None if it is a named dataset. Raises DataError."""
    path = source.path
    if not path.exists() and not _DATASET_NAME.fullmatch(source.location):
        raise DataError(f"{source.location}: no such file", hint=_KINDS_HINT)
    if path.is_dir():
        files = sorted(file for file in path.rglob("*") if file.is_file() and _reader(file))
        if not files:
            raise DataError(f"{path}: no .txt, .jsonl or .parquet file in this directory")
        return files
    if not path.is_file():
        return None
    if not _reader(path):
        raise DataError(f"{path}: unknown kind of file", hint="give .txt, .jsonl, .jsonl.gz or .parquet")
    return [path]


def _non_empty(documents: Iterable[str]) -> Iterator[str]:
    return (document for document in documents if document.strip())


def _reader(path: Path) -> str | None:
    suffixes = "".join(path.suffixes[-2:]) if path.suffix == ".gz" else path.suffix
    readers = {".txt": "text", ".md": "text", ".jsonl": "jsonl", ".jsonl.gz": "jsonl", ".parquet": "parquet"}
    return readers.get(suffixes)


def _read_file(path: Path, text_field: str) -> Iterator[str]:
    reader = _reader(path)
    try:
        if reader == "text":
            yield path.read_text(encoding="utf-8")
        elif reader == "jsonl":
            yield from _read_jsonl(path, text_field)
        else:
            yield from _read_parquet(path, text_field)
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 (byte {error.start})") from error
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path}: cannot be read ({error})") from error


def _read_jsonl(path: Path, text_field: str) -> Iterator[str]:
    open_text = gzip.open if path.suffix == ".gz" else open
    with open_text(path, "rt", encoding="utf-8") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                record = json.loads(line)
            except ValueError as error:
                raise DataError(f"{path}, line {number}: not JSON ({error})") from error
            yield _text_of(record, text_field, f"{path}, line {number}")


def _read_parquet(path: Path, text_field: str) -> Iterator[str]:
    import pyarrow as pa
    from pyarrow import parquet

    try:
        file = parquet.ParquetFile(path)
        if text_field not in file.schema_arrow.names:
            raise _no_field(str(path), text_field, file.schema_arrow.names)
        for batch in file.iter_batches(columns=[text_field], batch_size=_ENCODE_BATCH):
            for record in batch.to_pylist():
                yield _text_of(record, text_field, str(path))
    except pa.ArrowInvalid as error:
        raise DataError(f"{path}: not a parquet file ({error})") from error


def _read_dataset(source: TextSource) -> Iterator[str]:
    import datasets

    try:
        dataset: Any = datasets.load_dataset(
            source.location, source.config, split=source.split, revision=source.revision, streaming=True
        )
        for record in dataset:
            yield _text_of(record, source.text_field, source.location)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        reason = str(error).strip().splitlines()[0]
        raise DataError(
            f"{source.location}: no such file here, and not a readable dataset ({reason})",
            hint=_KINDS_HINT,
        ) from error


def _text_of(record: Any, text_field: str, where: str) -> str:
    if not isinstance(record, dict) or text_field not in record:
        raise _no_field(where, text_field, list(record) if isinstance(record, dict) else [])
    text = record[text_field]
    if text is not None and not isinstance(text, str):
        raise DataError(f"{where}: field {text_field!r} is {type(text).__name__}, not text")
    return text or ""


def _no_field(where: str, text_field: str, fields: list[str]) -> DataError:
    return DataError(
        f"{where}: no field {text_field!r} (there is {', '.join(fields) or 'none'})",
        hint="name the column that holds the text",
        settings=("text_field",),
    )
