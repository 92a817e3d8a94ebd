"""Kinds of files that hold text, told by their endings, and the bytes in them."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

from ..checkpoint.input_files import NotRegularError
from ..errors import DataError

__all__ = ["ENDINGS", "file_kind", "is_compressed", "open_binary", "reading_errors"]

_KINDS = {
    ".txt": "plain",
    ".md": "plain",
    ".json": "json",
    ".jsonl": "json",
    ".ndjson": "json",
    ".parquet": "parquet",
    ".arrow": "arrow",
}
_COMPRESSIONS = (".gz", ".zst", ".xz", ".bz2")
ENDINGS = f"{', '.join(_KINDS)}; text and JSON also with {', '.join(_COMPRESSIONS)} behind it"


def file_kind(path: Path) -> str | None:
    """Return "plain", "json", "parquet" or "arrow" by a file's endings, in whatever case; None for any other file."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes and suffixes[-1] in _COMPRESSIONS:
        kind = _KINDS.get(suffixes[-2]) if len(suffixes) > 1 else None
        return kind if kind in ("plain", "json") else None
    return _KINDS.get(suffixes[-1]) if suffixes else None


def is_compressed(path: Path) -> bool:
    """Return whether a file's size says little of how much text is in it."""
    return path.suffix.lower() in (*_COMPRESSIONS, ".parquet", ".arrow")


@contextmanager
def open_binary(path: Path) -> Iterator[io.BufferedReader]:
    """Open a file for reading, decompressed if its ending says that it is compressed."""
    suffix = path.suffix.lower()
    if suffix == ".zst":
        import pyarrow as pa  # the zstd of Python itself is there from 3.14 on

        with io.BufferedReader(pa.CompressedInputStream(pa.OSFile(str(path)), "zstd")) as file:
            yield cast(io.BufferedReader, file)
        return
    openers: dict[str, Any] = {".gz": gzip.open, ".xz": lzma.open, ".bz2": bz2.open}
    with openers.get(suffix, open)(path, "rb") as file:
        yield cast(io.BufferedReader, file)


@contextmanager
def reading_errors(path: Path) -> Iterator[None]:
    """Turn the errors of a file that cannot be read into DataError, which names it."""
    import pyarrow as pa

    try:
        yield
    except NotRegularError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from error
    except (OSError, EOFError, zlib.error, lzma.LZMAError, pa.ArrowException) as error:
        raise DataError(f"{path}: cannot be read ({' '.join(str(error).split())})") from error
