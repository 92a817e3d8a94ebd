"""One source's documents packed into shards on disk: resumable at any moment, the same bytes each time."""

from __future__ import annotations

import json
import os
from array import array
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np

from ...convert.checkpoint.files import append_file, replaced_file, write_text
from ...convert.errors import DataError, PreemptedError
from .documents import Cursor, DocumentStream, Piece
from .shards import (
    INDEX_NAME,
    REPACK,
    Layout,
    Shard,
    SourceIndex,
    check_size,
    sha256_of,
    starts_path,
    tokens_path,
)

__all__ = ["SourcePacker"]


_WRITE_BUFFER_BYTES = 2**20


class SourcePacker:
    """Packs one source into a folder, shard after shard, in one process.

    A shard is two files: tokens, and the places (int64, in tokens of the shard) where documents start. They are
    written under other names and renamed when they are whole; then the index says so. `should_stop` is asked between
    batches of documents: PreemptedError follows once what was packed is on disk. `progress` receives the number of
    blocks of each new shard.
    """

    def __init__(
        self,
        folder: Path,
        stream: DocumentStream,
        layout: Layout,
        *,
        should_stop: Callable[[], bool] = lambda: False,
        progress: Callable[[int], object] = lambda num_blocks: None,
    ) -> None:
        self.layout = layout
        self.index = SourceIndex.read(folder)
        self._folder = folder
        self._stream = stream
        self._should_stop = should_stop
        self._progress = progress
        self._pieces: Iterator[Piece] = iter(())
        self._rest: Piece | None = None
        self._place: Cursor | None = None  # where the next piece begins

    def verify(self) -> None:
        """Raise DataError if a file that is there is not the one that was packed."""
        for number, shard in enumerate(self.index.shards):
            for path, num_bytes, sha256 in self._files(number, shard):
                if path.exists():
                    check_size(path, num_bytes)
                    if sha256_of(path) != sha256:
                        raise DataError(f"{path}: damaged, its checksum is not the one in {INDEX_NAME}", hint=REPACK)

    def pack(self) -> None:
        """Pack every shard that is not there, until the text ends.

        Raises DataError when a shard that is made again differs from the first one.
        """
        for number, shard in enumerate(self.index.shards):
            if not all(path.exists() for path, *_ in self._files(number, shard)):
                self._make_again(number)
        while not self.index.is_whole(self.layout):
            self._make_next()

    def _make_next(self) -> None:
        self._folder.mkdir(parents=True, exist_ok=True)
        begin = self.index.shards[-1].end if self.index.shards else Cursor()
        partial = self.index.partial
        with _ShardWriter(self._folder, len(self.index.shards), self.layout, begin, partial) as writer:
            try:
                ended = self._fill(writer)
            except (PreemptedError, DataError):  # of text that can be corrected, what stands before stays packed
                self._save(replace(self.index, partial=writer.suspend()))
                raise
            shard, num_left = writer.finish()
            shards = self.index.shards
            if shard.num_blocks:
                writer.publish()
                shards = (*shards, shard)
            self._save(SourceIndex(shards=shards, leftover_tokens=num_left if ended else None))
        self._progress(shard.num_blocks)

    def _make_again(self, number: int) -> None:
        known = self.index.shards[number]
        with _ShardWriter(self._folder, number, self.layout, known.begin) as writer:
            self._fill(writer)
            if writer.finish()[0] != known:
                raise DataError(
                    f"{self._stream.name}: shard {number} came out otherwise than the first time",
                    hint="the text or the tokenizer changed since the run began; start over",
                )
            writer.publish()

    def _fill(self, writer: _ShardWriter) -> bool:
        """Write until the shard is full or the text has ended; whether it has."""
        if writer.end != self._place:
            self._pieces, self._rest = self._stream.pieces(writer.end), None
        self._place = None  # until the end of this, nobody knows
        while writer.num_missing > 0:
            piece = self._rest or next(self._pieces, None)
            self._rest = None
            if piece is None:
                return True
            if len(piece.ids) > writer.num_missing:
                piece, self._rest = piece.split(writer.num_missing)
            writer.append(piece)
            if not len(piece.ids) and self._should_stop():
                raise PreemptedError(
                    f"{self._stream.name}: stopped while packing; what is done is in {self._folder}",
                    hint="run the same command again to go on",
                )
        self._place = writer.end
        return False

    def _files(self, number: int, shard: Shard) -> list[tuple[Path, int, str]]:
        return [
            (tokens_path(self._folder, number), shard.tokens_bytes, shard.tokens_sha256),
            (starts_path(self._folder, number), shard.starts_bytes, shard.starts_sha256),
        ]

    def _save(self, index: SourceIndex) -> None:
        write_text(self._folder / INDEX_NAME, json.dumps(asdict(index), indent=1) + "\n")
        self.index = index


class _ShardWriter:
    """The two files of a shard while they are written; goes on with a `partial` one if its files are sound."""

    def __init__(self, folder: Path, number: int, layout: Layout, begin: Cursor, partial: Shard | None = None) -> None:
        self._layout = layout
        self._names = (starts_path(folder, number), tokens_path(folder, number))
        self._starts_path, self._tokens_path = (path.with_suffix(".partial") for path in self._names)
        self._itemsize = np.dtype(layout.dtype).itemsize
        self._num_wanted = layout.blocks_of(number) * layout.sequence_length
        self._num_tokens = 0
        self._starts = array("q")
        self._begin = self.end = begin
        if partial is not None and self._holds(partial):
            self._num_tokens = partial.tokens_bytes // self._itemsize
            self._starts.frombytes(self._starts_path.read_bytes())
            self.end = partial.end
        else:
            self._tokens_path.unlink(missing_ok=True)
        self._file = append_file(self._tokens_path)

    def __enter__(self) -> _ShardWriter:
        return self

    def __exit__(self, *exception: object) -> None:
        self._file.close()

    @property
    def num_missing(self) -> int:
        """Tokens until the shard is full."""
        return self._num_wanted - self._num_tokens

    def append(self, piece: Piece) -> None:
        if len(piece.ids):
            if piece.begin.tokens == 0:
                self._starts.append(self._num_tokens)
            self._file.write(piece.ids.tobytes())
            self._num_tokens += len(piece.ids)
        self.end = piece.end

    def suspend(self) -> Shard:
        """Put what there is on the disk; its row."""
        self._file.flush()
        os.fsync(self._file.fileno())
        with replaced_file(self._starts_path) as file:
            file.write(self._starts.tobytes())
        return Shard(
            num_blocks=self._num_tokens // self._layout.sequence_length,
            num_documents=len(self._starts),
            begin=self._begin,
            end=self.end,
            tokens_bytes=self._tokens_path.stat().st_size,
            tokens_sha256=sha256_of(self._tokens_path),
            starts_bytes=self._starts_path.stat().st_size,
            starts_sha256=sha256_of(self._starts_path),
        )

    def finish(self) -> tuple[Shard, int]:
        """Cut to whole blocks and put them on the disk; the row, and how many tokens were cut off."""
        num_left = self._num_tokens % self._layout.sequence_length
        self._num_tokens -= num_left
        self._file.flush()
        self._file.truncate(self._num_tokens * self._itemsize)
        while self._starts and self._starts[-1] >= self._num_tokens:
            self._starts.pop()
        return self.suspend(), num_left

    def publish(self) -> None:
        """Give both files their names; the tokens last, so that a reader who sees them finds the starts too."""
        self._starts_path.replace(self._names[0])
        self._tokens_path.replace(self._names[1])

    def _holds(self, partial: Shard) -> bool:
        """Whether the files begin as the row says; what was written after it is cut off."""
        for path, num_bytes, sha256 in (
            (self._tokens_path, partial.tokens_bytes, partial.tokens_sha256),
            (self._starts_path, partial.starts_bytes, partial.starts_sha256),
        ):
            if not path.exists() or path.stat().st_size < num_bytes:
                return False
            os.truncate(path, num_bytes)
            if sha256_of(path) != sha256:
                return False
        return True
