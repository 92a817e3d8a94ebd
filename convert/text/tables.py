"""Rows of parquet and arrow files."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .rows import no_field

__all__ = ["read_arrow_rows", "read_parquet_rows"]

_ROWS = 64


def read_parquet_rows(path: Path, text_field: str) -> Iterator[tuple[str, Any]]:
    """Yield where each row of a parquet file stands, and the row with the column of the text only.

    Raises DataError where there is no such column; pyarrow's errors for a damaged file are the caller's.
    """
    from pyarrow import parquet

    with parquet.ParquetFile(path) as file:
        column = _column(path, text_field, file.schema_arrow.names)
        yield from _rows(path, file.iter_batches(columns=[column], batch_size=_ROWS))


def read_arrow_rows(path: Path, text_field: str) -> Iterator[tuple[str, Any]]:
    """Yield where each row of an arrow file stands, and the row; as `read_parquet_rows`."""
    import pyarrow as pa

    with pa.memory_map(str(path)) as source:
        try:
            file = pa.ipc.open_file(source)
            batches = map(file.get_batch, range(file.num_record_batches))
        except pa.ArrowInvalid:  # datasets writes the other of arrow's two layouts
            source.seek(0)
            file = batches = pa.ipc.open_stream(source)
        column = _column(path, text_field, file.schema.names)
        pieces = (batch.slice(begin, _ROWS) for batch in batches for begin in range(0, batch.num_rows, _ROWS))
        yield from _rows(path, (piece.select([column]) for piece in pieces))


def _column(path: Path, text_field: str, names: list[str]) -> str:
    """The outermost column that holds the text."""
    outer = text_field if text_field in names else text_field.partition(".")[0]
    if outer not in names:
        raise no_field(str(path), text_field, names)
    return outer


def _rows(path: Path, batches: Iterator[Any]) -> Iterator[tuple[str, Any]]:
    number = 0
    for batch in batches:
        for row in batch.to_pylist():
            number += 1
            yield f"{path}, row {number}", row
