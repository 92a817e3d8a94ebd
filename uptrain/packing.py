"""One source's documents packed into shards of blocks on disk: resumable at any moment, the same bytes each time."""

from __future__ import annotations

import hashlib
import json
import os
from array import array
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import accumulate, islice
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..convert.checkpoint.output import write_text
from ..convert.errors import DataError, PreemptedError

__all__ = [
    "INDEX_NAME",
    "SHARD_TOKENS",
    "Cursor",
    "DocumentStream",
    "Layout",
    "Shard",
    "SourceIndex",
    "SourcePacker",
    "check_size",
    "damaged",
    "read_json",
    "starts_path",
    "tokens_path",
]

INDEX_NAME = "index.json"
SHARD_TOKENS = 2**25  # 64 or 128 MiB; a kill without warning costs the tokenising of one at most, minutes
_ENCODE_BATCH = 64
_WRITE_BUFFER_BYTES = 2**20
_REPACK = "remove this file; building again packs the same shard from the text"


@dataclass(frozen=True)
class Cursor:
    """A place in a source: passes over it, documents of this pass, tokens of the next document that are behind it."""

    passes: int = 0
    documents: int = 0
    tokens: int = 0


@dataclass(frozen=True)
class Piece:
    """Tokens of one document, from the place `begin` to the place `end`; none of them where a document is left out."""

    ids: NDArray[Any]
    begin: Cursor
    end: Cursor

    def split(self, num_tokens: int) -> tuple[Piece, Piece]:
        middle = replace(self.begin, tokens=self.begin.tokens + num_tokens)
        return Piece(self.ids[:num_tokens], self.begin, middle), Piece(self.ids[num_tokens:], middle, self.end)


@dataclass(frozen=True)
class DocumentStream:
    """A source's documents as token ids, from any place on, pass after pass.

    `name` is for messages. `open_pass(number)` gives the texts of a pass, always the same, `encode` the token ids of
    some texts; texts that `keeps` refuses are left out. `max_passes` None: without end.
    """

    name: str
    open_pass: Callable[[int], Iterator[str]]
    encode: Callable[[Sequence[str]], Sequence[Sequence[int]]]
    keeps: Callable[[str], bool]
    dtype: np.dtype[Any]
    max_passes: int | None = 1

    def pieces(self, begin: Cursor) -> Iterator[Piece]:
        """Documents, and an empty piece after each batch of them. Raises DataError when none of them is kept."""
        number, first = begin.passes, begin.documents
        while self.max_passes is None or number < self.max_passes:
            num_tokens = 0
            for piece in self._pieces_of_pass(number, first, begin.tokens if number == begin.passes else 0):
                num_tokens += len(piece.ids)
                yield piece
            if self.max_passes is None and first == 0 and num_tokens == 0:
                raise DataError(f"{self.name}: no token in it to train on", hint="use more text or less validation")
            number, first = number + 1, 0
            yield self._nothing(Cursor(number))

    def _pieces_of_pass(self, number: int, first: int, skip_tokens: int) -> Iterator[Piece]:
        documents = self.open_pass(number)
        done = 0
        while batch := list(islice(documents, min(_ENCODE_BATCH, first - done) if done < first else _ENCODE_BATCH)):
            if done >= first:
                kept = [(done + i, text) for i, text in enumerate(batch) if self.keeps(text)]
                encoded = self.encode([text for _, text in kept]) if kept else []
                for (place, _), ids in zip(kept, encoded, strict=True):
                    skipped = skip_tokens if place == first else 0
                    tokens = np.asarray(ids[skipped:], dtype=self.dtype)
                    yield Piece(tokens, Cursor(number, place, skipped), Cursor(number, place + 1))
            done += len(batch)
            # what is skipped is no place to stop at: a run that begins here has not been there
            yield self._nothing(Cursor(number, done) if done > first else Cursor(number, first, skip_tokens))

    def _nothing(self, place: Cursor) -> Piece:
        return Piece(np.empty(0, dtype=self.dtype), place, place)


@dataclass(frozen=True)
class Layout:
    """How a source's tokens are cut: `num_blocks` at most, in shards of `blocks_per_shard`, the last one shorter."""

    sequence_length: int
    num_blocks: int
    blocks_per_shard: int
    dtype: str

    @property
    def num_shards(self) -> int:
        return -(-self.num_blocks // self.blocks_per_shard)

    def blocks_of(self, shard: int) -> int:
        return min(self.blocks_per_shard, self.num_blocks - shard * self.blocks_per_shard)


@dataclass(frozen=True)
class Shard:
    """What one pair of files holds, between which places of the source."""

    num_blocks: int
    num_documents: int
    begin: Cursor
    end: Cursor
    tokens_bytes: int
    tokens_sha256: str
    starts_bytes: int
    starts_sha256: str

    @classmethod
    def of_json(cls, row: dict[str, Any]) -> Shard:
        return cls(**{**row, "begin": Cursor(**row["begin"]), "end": Cursor(**row["end"])})


@dataclass(frozen=True)
class SourceIndex:
    """The shards of a source that were packed, deleted ones too, and the one that was begun when packing stopped.

    `leftover_tokens` is None until the text has ended: then so many did not fill a last block.
    """

    shards: tuple[Shard, ...] = ()
    partial: Shard | None = None
    leftover_tokens: int | None = None

    @property
    def num_blocks(self) -> int:
        return sum(shard.num_blocks for shard in self.shards)

    @property
    def blocks_of_a_pass(self) -> float | None:
        """The blocks that the text fills, once it was packed to its end; None before.

        Where it was packed several times over, a little more than these: an end is known to lie within a shard.
        """
        if self.leftover_tokens is not None:
            return self.num_blocks
        packed = accumulate(shard.num_blocks for shard in self.shards)
        turns = [count / shard.end.passes for count, shard in zip(packed, self.shards, strict=True) if shard.end.passes]
        return min(turns, default=None)

    def is_whole(self, layout: Layout) -> bool:
        return self.leftover_tokens is not None or len(self.shards) == layout.num_shards

    @classmethod
    def read(cls, folder: Path) -> SourceIndex:
        """The index in a source's folder, an empty one if there is none. Raises DataError when it is damaged."""
        path = folder / INDEX_NAME
        if not path.exists():
            return cls()
        content = read_json(path)
        try:
            return cls(
                shards=tuple(Shard.of_json(row) for row in content["shards"]),
                partial=Shard.of_json(content["partial"]) if content["partial"] else None,
                leftover_tokens=content["leftover_tokens"],
            )
        except (KeyError, TypeError) as error:
            raise damaged(path, error) from error


def read_json(path: Path) -> Any:
    """Raises DataError when the file is not JSON."""
    try:
        return json.loads(path.read_text())
    except ValueError as error:
        raise damaged(path, error) from error


def damaged(path: Path, error: Exception) -> DataError:
    return DataError(
        f"{path}: not an index of packed blocks ({error})", hint=f"remove {path.parent}, then the text is packed again"
    )


def tokens_path(folder: Path, shard: int) -> Path:
    return folder / f"tokens-{shard:05}.bin"


def starts_path(folder: Path, shard: int) -> Path:
    return folder / f"starts-{shard:05}.bin"


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
                    if _sha256(path) != sha256:
                        raise DataError(f"{path}: damaged, its checksum is not the one in {INDEX_NAME}", hint=_REPACK)

    def require(self, number: int) -> None:
        """Make shard `number` be there, unless the text ends before it; those before it that never were are packed.

        Raises DataError when a shard that is made again differs from the first one.
        """
        for wanted in range(min(number, len(self.index.shards)), number + 1):
            if wanted < len(self.index.shards):
                if not all(path.exists() for path, *_ in self._files(wanted, self.index.shards[wanted])):
                    self._make_again(wanted)
            elif not self.index.is_whole(self.layout):
                self._make_next()

    def require_all(self) -> None:
        for number in range(self.layout.num_shards):
            self.require(number)

    def drop_before(self, number: int) -> None:
        """Delete the files of the shards before `number`; the index keeps their rows, to make them again."""
        for shard in range(min(number, len(self.index.shards))):
            for path in (tokens_path(self._folder, shard), starts_path(self._folder, shard)):
                path.unlink(missing_ok=True)

    def _make_next(self) -> None:
        self._folder.mkdir(parents=True, exist_ok=True)
        begin = self.index.shards[-1].end if self.index.shards else Cursor()
        partial = self.index.partial
        with _ShardWriter(self._folder, len(self.index.shards), self.layout, begin, partial) as writer:
            try:
                ended = self._fill(writer)
            except PreemptedError:
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
            self._tokens_path.write_bytes(b"")
        self._file = self._tokens_path.open("ab", _WRITE_BUFFER_BYTES)

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
        with self._starts_path.open("wb") as file:
            file.write(self._starts.tobytes())
            file.flush()
            os.fsync(file.fileno())
        return Shard(
            num_blocks=self._num_tokens // self._layout.sequence_length,
            num_documents=len(self._starts),
            begin=self._begin,
            end=self.end,
            tokens_bytes=self._tokens_path.stat().st_size,
            tokens_sha256=_sha256(self._tokens_path),
            starts_bytes=self._starts_path.stat().st_size,
            starts_sha256=_sha256(self._starts_path),
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
            if _sha256(path) != sha256:
                return False
        return True


def check_size(path: Path, num_bytes: int) -> None:
    """Raise DataError unless the file has this size."""
    if path.stat().st_size != num_bytes:
        raise DataError(f"{path}: {path.stat().st_size} bytes, {INDEX_NAME} says {num_bytes}", hint=_REPACK)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
