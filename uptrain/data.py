"""Training data: documents tokenised once into memory-mapped blocks, and the order in which they are seen."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from ..convert.errors import DataError
from ..convert.output import write_text

__all__ = ["INDEX_NAME", "BlockIndex", "PackedBlocks", "pack_documents"]

_TOKENS_NAME = "tokens.bin"
_STARTS_NAME = "document_starts.bin"
INDEX_NAME = "index.json"
_IGNORED_LABEL = -100


@dataclass(frozen=True)
class BlockIndex:
    """What a folder of packed blocks holds, and from what it was made."""

    source: str
    sequence_length: int
    num_blocks: int
    num_documents: int
    dtype: str


def pack_documents(
    documents: Iterable[list[int]],
    folder: Path,
    *,
    source: str,
    vocab_size: int,
    sequence_length: int,
    max_blocks: int,
) -> BlockIndex:
    """Write token ids of documents, one after the other, until `max_blocks` blocks are full or the text ends.

    `folder` receives the tokens (uint16 or uint32), the position at which each document starts (int64) and
    index.json, written last. Raises DataError when the text does not fill one block.
    """
    folder.mkdir(parents=True, exist_ok=True)
    dtype = np.dtype(np.uint16 if vocab_size <= 2**16 else np.uint32)
    wanted = max_blocks * sequence_length
    num_tokens, starts = 0, []
    with (folder / _TOKENS_NAME).open("wb") as file:
        for ids in documents:
            starts.append(num_tokens)
            raw = np.asarray(ids[: wanted - num_tokens], dtype=dtype).tobytes()
            file.write(raw)
            num_tokens += len(raw) // dtype.itemsize
            if num_tokens == wanted:
                break
    num_blocks = num_tokens // sequence_length
    if num_blocks == 0:
        raise DataError(
            f"{source}: {num_tokens} tokens, fewer than one block of {sequence_length}",
            hint="use more text or a smaller --sequence-length",
        )
    np.asarray(starts, dtype=np.int64).tofile(folder / _STARTS_NAME)
    index = BlockIndex(
        source=source,
        sequence_length=sequence_length,
        num_blocks=num_blocks,
        num_documents=len(starts),
        dtype=dtype.name,
    )
    write_text(folder / INDEX_NAME, json.dumps(asdict(index), indent=2) + "\n")
    return index


class PackedBlocks(Dataset[dict[str, Tensor]]):
    """`num_samples` training samples from packed blocks, block order drawn anew for each pass from `seed`.

    A sample has input_ids, position_ids and labels, each (sequence_length,) int64. position_ids restart at each
    document: without an attention mask, transformers' attention then keeps the documents of a block apart. The first
    token of a document is not predicted from the document before it.
    """

    def __init__(self, folder: Path, *, num_samples: int, seed: int) -> None:
        self.index = BlockIndex(**json.loads((folder / INDEX_NAME).read_text()))
        shape = (self.index.num_blocks, self.index.sequence_length)
        self._tokens = np.memmap(folder / _TOKENS_NAME, dtype=self.index.dtype, mode="r", shape=shape)
        self._starts = np.fromfile(folder / _STARTS_NAME, dtype=np.int64)
        self._num_samples = num_samples
        self._permutation = lru_cache(maxsize=2)(
            lambda epoch: torch.randperm(self.index.num_blocks, generator=torch.Generator().manual_seed(seed + epoch))
        )

    def __len__(self) -> int:
        return self._num_samples

    def __getitem__(self, sample: int) -> dict[str, Tensor]:
        epoch, place = divmod(sample, self.index.num_blocks)
        block = int(self._permutation(epoch)[place])
        input_ids = torch.from_numpy(self._tokens[block].astype(np.int64))
        positions = np.arange(self.index.sequence_length, dtype=np.int64)
        first = block * self.index.sequence_length
        begin, end = np.searchsorted(self._starts, [first, first + self.index.sequence_length])
        starts = self._starts[begin:end] - first
        labels = input_ids.clone()
        for start in starts:
            positions[start:] = np.arange(self.index.sequence_length - start)
            labels[start] = _IGNORED_LABEL
        return {"input_ids": input_ids, "position_ids": torch.from_numpy(positions), "labels": labels}
