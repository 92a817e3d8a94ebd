"""How the packed tokens of one source lie on the disk: shards of blocks, and their index."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...convert.errors import DataError
from .documents import Cursor

__all__ = [
    "INDEX_NAME",
    "REPACK",
    "SHARD_TOKENS",
    "Layout",
    "Shard",
    "SourceIndex",
    "check_size",
    "damaged",
    "read_json",
    "sha256_of",
    "starts_path",
    "tokens_path",
]


INDEX_NAME = "index.json"
SHARD_TOKENS = 2**25  # 64 or 128 MiB; a kill loses the tokenising of one shard at most, minutes
REPACK = "remove this file; building again packs the same shard from the text"


@dataclass(frozen=True)
class Layout:
    """How a source's tokens are cut: `num_blocks` at most, in shards of `blocks_per_shard`, the last one shorter."""

    sequence_length: int
    num_blocks: int
    blocks_per_shard: int
    dtype: str

    @property
    def num_shards(self) -> int:
        """The number of shards of all blocks."""
        return -(-self.num_blocks // self.blocks_per_shard)

    def blocks_of(self, shard: int) -> int:
        """The number of blocks in one shard."""
        return min(self.blocks_per_shard, self.num_blocks - shard * self.blocks_per_shard)


@dataclass(frozen=True)
class Shard:
    """The record of one shard: what its two files hold, and the places of the source where it begins and ends."""

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
        """Read a row of the index."""
        return cls(**{**row, "begin": Cursor(**row["begin"]), "end": Cursor(**row["end"])})


@dataclass(frozen=True)
class SourceIndex:
    """The finished shards of a source, and the one that was begun when packing stopped.

    `leftover_tokens` is None until the text has ended, then the number of trailing tokens that did not fill a block.
    """

    shards: tuple[Shard, ...] = ()
    partial: Shard | None = None
    leftover_tokens: int | None = None

    @property
    def num_blocks(self) -> int:
        """The number of blocks in all finished shards."""
        return sum(shard.num_blocks for shard in self.shards)

    def is_whole(self, layout: Layout) -> bool:
        """Tell whether packing is complete: all blocks of the layout are packed, or all that the text has."""
        return self.leftover_tokens is not None or len(self.shards) == layout.num_shards

    @classmethod
    def read(cls, folder: Path) -> SourceIndex:
        """Read the index in a source's folder, an empty one if there is none. Raises DataError when it is damaged."""
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
    """Read a JSON file. Raises DataError when it is not JSON."""
    try:
        return json.loads(path.read_text())
    except ValueError as error:
        raise damaged(path, error) from error


def damaged(path: Path, error: Exception) -> DataError:
    """Make the error that says that an index cannot be read."""
    return DataError(
        f"{path}: not an index of packed blocks ({error})", hint=f"remove {path.parent}, then the text is packed again"
    )


def tokens_path(folder: Path, shard: int) -> Path:
    """The file with the tokens of a shard, (num_blocks, sequence_length) uint16 or uint32."""
    return folder / f"tokens-{shard:05}.bin"


def starts_path(folder: Path, shard: int) -> Path:
    """The file with the places where the documents of a shard start, (num_documents,) int64, in tokens of the shard."""
    return folder / f"starts-{shard:05}.bin"


def check_size(path: Path, num_bytes: int) -> None:
    """Raise DataError unless the file has this size."""
    if path.stat().st_size != num_bytes:
        raise DataError(f"{path}: {path.stat().st_size} bytes, {INDEX_NAME} says {num_bytes}", hint=REPACK)


def sha256_of(path: Path) -> str:
    """The SHA-256 of a file, in hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
