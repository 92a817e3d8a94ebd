"""The samples of a run, read from packed blocks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from ...convert.errors import DataError, InputError
from .corpus import CorpusIndex, source_folder
from .mixture import shuffled
from .shards import INDEX_NAME, Layout, SourceIndex, check_size, starts_path, tokens_path

__all__ = ["PackedBlocks", "holds_shards", "validation_blocks", "validation_sources"]


_IGNORED_LABEL = -100


class PackedBlocks(Dataset[dict[str, Tensor]]):
    """Samples `first_sample` to `first_sample + num_samples` of a corpus that `build` has packed into `folder`.

    A sample has input_ids, position_ids and labels, each (sequence_length,) int64. position_ids restart at each
    document: without an attention mask, transformers' attention then keeps the documents of a block apart. The first
    token of a document is not predicted from the document before it.
    The j-th sample of a source is a block of pass `j // num_blocks`, in an order drawn for this pass. Raises
    InputError for samples beyond the corpus and DataError when it is not packed.
    """

    def __init__(self, folder: Path, *, num_samples: int, first_sample: int = 0) -> None:
        if not (folder / INDEX_NAME).exists():
            raise DataError(f"{folder}: no packed text in it")
        index = CorpusIndex.read(folder)
        self.corpus = index.corpus
        if first_sample + num_samples > self.corpus.num_blocks:
            raise InputError(
                f"{folder}: packed for {self.corpus.num_blocks} samples, not for {first_sample + num_samples}"
            )
        self._folder = folder
        self._index = index
        self._layouts = index.layouts
        self._mixture = self.corpus.mixture
        self._num_samples = num_samples
        self._first_sample = first_sample
        self._sources = [SourceIndex.read(source_folder(folder, number)) for number in range(len(self._layouts))]
        for number, (source, layout) in enumerate(zip(self._sources, self._layouts, strict=True)):
            if not source.is_whole(layout) or (layout.num_blocks and not source.num_blocks):
                raise DataError(f"{source_folder(folder, number)}: packing has not come to its end")
        self._orders: dict[tuple[int, int], NDArray[np.uint32]] = {}
        self._shards: dict[tuple[int, int], tuple[NDArray[Any], NDArray[np.int64]]] = {}

    @property
    def passes(self) -> tuple[float | None, ...]:
        """Tell how often each source is seen from the run's first sample to this dataset's last.

        This is counted where the text was packed to its end, else estimated from a sample of the text, and None where
        that cannot be done, as for a named dataset.
        """
        return self._index.passes(self._sources, self._first_sample + self._num_samples)

    def __len__(self) -> int:
        return self._num_samples

    def __getitem__(self, sample: int) -> dict[str, Tensor]:
        if not 0 <= sample < self._num_samples:
            raise IndexError(f"sample {sample} of {self._num_samples}")
        source, number = self._mixture.locate(self._first_sample + sample)
        size = self._layouts[source].blocks_per_shard
        turn, place = divmod(number, self._sources[source].num_blocks)
        shard, block = divmod(int(self._order(source, turn)[place]), size)
        tokens, starts = self._open(source, shard)
        return _sample(tokens[block], starts, block * self.corpus.sequence_length)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_orders": {}, "_shards": {}}

    def _order(self, source: int, turn: int) -> NDArray[np.uint32]:
        """The blocks of a source in the order of a pass over it, (num_blocks,)."""
        if (source, turn) not in self._orders:
            # workers read a little back and forth around the border of two passes
            for key in [key for key in self._orders if key[0] == source][:-1]:
                del self._orders[key]
            count = self._sources[source].num_blocks
            self._orders[source, turn] = shuffled(count, self.corpus.seed, "blocks", source, turn)
        return self._orders[source, turn]

    def _open(self, source: int, shard: int) -> tuple[NDArray[Any], NDArray[np.int64]]:
        if (source, shard) not in self._shards:
            folder = source_folder(self._folder, source)
            self._shards[source, shard] = _map_shard(folder, shard, self._sources[source], self._layouts[source])
        return self._shards[source, shard]


def holds_shards(folder: Path) -> bool:
    """Tell whether `build` has packed at least one shard of the text into a folder, or a part of one."""
    indices = [SourceIndex.read(path.parent) for path in folder.glob(f"*/{INDEX_NAME}")]
    return any(index.shards or (index.partial is not None and index.partial.tokens_bytes) for index in indices)


def validation_blocks(folder: Path) -> dict[str, Tensor] | None:
    """Read the documents that are never trained on, in the form of PackedBlocks' samples; None when there are none.

    They are input_ids, position_ids and labels, each (num_blocks, sequence_length) int64, source after source.
    Raises DataError when a file is missing or has another size than its index says.
    """
    index = CorpusIndex.read(folder)
    samples = []
    for number, num_blocks in enumerate(index.corpus.validation_shares):
        place, layout = source_folder(folder / "validation", number), index.layout(num_blocks)
        source = SourceIndex.read(place)
        for shard, row in enumerate(source.shards):
            tokens, starts = _map_shard(place, shard, source, layout)
            samples += [_sample(tokens[b], starts, b * layout.sequence_length) for b in range(row.num_blocks)]
    if not samples:
        return None
    return {name: torch.stack([sample[name] for sample in samples]) for name in samples[0]}


def validation_sources(folder: Path) -> list[SourceIndex]:
    """Read the indices of what is held out of each source. Raises DataError for a damaged one."""
    count = len(CorpusIndex.read(folder).corpus.sources)
    return [SourceIndex.read(source_folder(folder / "validation", number)) for number in range(count)]


def _map_shard(folder: Path, shard: int, source: SourceIndex, layout: Layout) -> tuple[NDArray[Any], NDArray[np.int64]]:
    """Tokens (num_blocks, sequence_length) and the places in them where documents start, both memory-mapped."""
    row = source.shards[shard]
    for path, num_bytes in (
        (tokens_path(folder, shard), row.tokens_bytes),
        (starts_path(folder, shard), row.starts_bytes),
    ):
        check_size(path, num_bytes)
    shape = (row.num_blocks, layout.sequence_length)
    tokens = np.memmap(tokens_path(folder, shard), dtype=layout.dtype, mode="r", shape=shape)
    if row.num_documents == 0:  # an empty file cannot be mapped
        return tokens, np.empty(0, dtype=np.int64)
    return tokens, np.memmap(starts_path(folder, shard), dtype=np.int64, mode="r")


def _sample(block: NDArray[Any], starts: NDArray[np.int64], first: int) -> dict[str, Tensor]:
    """Of one block, (sequence_length,), which begins at token `first` of its shard."""
    input_ids = torch.from_numpy(block.astype(np.int64))
    begin, end = np.searchsorted(starts, [first, first + len(block)])
    inside = starts[begin:end] - first
    document_starts = np.zeros(len(block), dtype=np.int64)
    document_starts[inside] = inside
    positions = np.arange(len(block)) - np.maximum.accumulate(document_starts)
    labels = input_ids.clone()
    labels[torch.from_numpy(np.asarray(inside))] = _IGNORED_LABEL
    return {"input_ids": input_ids, "position_ids": torch.from_numpy(positions), "labels": labels}
