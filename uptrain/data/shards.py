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
SHARD_TOKENS = 2**25  # 64 or 128 MiB; a kill without warning costs the tokenising of one at most, minutes
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
    """The shards of a source that were packed, and the one that was begun when packing stopped.

    `leftover_tokens` is None until the text has ended: then so many did not fill a last block.
    """

    shards: tuple[Shard, ...] = ()
    partial: Shard | None = None
    leftover_tokens: int | None = None

    @property
    def num_blocks(self) -> int:
        return sum(shard.num_blocks for shard in self.shards)

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


def check_size(path: Path, num_bytes: int) -> None:
    """Raise DataError unless the file has this size."""
    if path.stat().st_size != num_bytes:
        raise DataError(f"{path}: {path.stat().st_size} bytes, {INDEX_NAME} says {num_bytes}", hint=REPACK)


def sha256_of(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
