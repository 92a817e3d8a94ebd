"""Training data: several weighted sources packed into blocks on disk, and the samples of a run drawn from them."""

from __future__ import annotations

import json
import math
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from hashlib import blake2b
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from ..convert.checkpoint.output import write_text
from ..convert.errors import DataError, InputError
from ..convert.text.sources import TextSource, estimate_tokens, pin_revision, read_interleaved, text_bytes
from ..convert.text.tokens import adds_bos, encode_batch
from . import packing
from .cost import SourceSize
from .mixture import Mixture, drawn_seed, shuffled
from .packing import (
    INDEX_NAME,
    DocumentStream,
    Layout,
    SourceIndex,
    SourcePacker,
    check_size,
    read_json,
    starts_path,
    tokens_path,
)

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = [
    "INDEX_NAME",
    "Corpus",
    "CorpusPacker",
    "PackedBlocks",
    "WeightedSource",
    "build",
    "holds_shards",
    "measure_sources",
    "most_passes",
    "validation_blocks",
]

_IGNORED_LABEL = -100
_POLL_SECONDS = 0.2


@dataclass(frozen=True)
class WeightedSource:
    """Text, and how much of the samples comes from it, relative to the other sources."""

    text: TextSource
    weight: float = 1.0


def measure_sources(
    sources: Sequence[WeightedSource], tokenizer: PreTrainedTokenizerBase | None
) -> tuple[SourceSize, ...]:
    """The part of the samples that comes from each source, and about how many tokens it holds.

    Without a tokenizer no text is read and none of these are known. Raises DataError for what is no text.
    """
    return tuple(
        SourceSize(share, None if tokenizer is None else estimate_tokens(source.text, tokenizer))
        for share, source in zip(_shares(sources), sources, strict=True)
    )


def _shares(sources: Sequence[WeightedSource]) -> tuple[float, ...]:
    """The weights, with sum 1."""
    total = math.fsum(source.weight for source in sources)
    return tuple(source.weight / total for source in sources)


@dataclass(frozen=True)
class Corpus:
    """What a run reads: it decides every token of every sample.

    `num_blocks` counts training blocks of `sequence_length` tokens over all sources, as many as the run has samples.
    `validation_fraction` is of the documents. With `stream` only the shards that are needed next are on the disk.
    `vocab_size` is one more than the largest token id. Raises InputError for settings that cannot be.
    """

    sources: tuple[WeightedSource, ...]
    sequence_length: int
    num_blocks: int
    tokenizer_hash: str
    vocab_size: int
    seed: int = 0
    validation_fraction: float = 0.0
    max_validation_blocks: int = 256
    stream: bool = False

    def __post_init__(self) -> None:
        if not self.sources:
            raise InputError("there is no text to train on")
        for source in self.sources:
            if not 0 < source.weight < math.inf:
                raise InputError(f"{source.text.location}: weight is {source.weight:g}, expected a positive number")
        for name in ("sequence_length", "num_blocks", "vocab_size"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} is {getattr(self, name)}, expected at least 1")
        if not 0 <= self.validation_fraction < 1:
            raise InputError(f"validation fraction is {self.validation_fraction:g}, expected 0 or more and less than 1")
        if self.max_validation_blocks < 0:
            raise InputError(f"max_validation_blocks is {self.max_validation_blocks}, expected 0 or more")
        _ = self.mixture

    @property
    def shares(self) -> tuple[float, ...]:
        """The weights, with sum 1."""
        return _shares(self.sources)

    @property
    def mixture(self) -> Mixture:
        return Mixture.of(self.shares, seed=self.seed)

    @property
    def dtype(self) -> str:
        return "uint16" if self.vocab_size <= 2**16 else "uint32"

    @property
    def validation_shares(self) -> tuple[int, ...]:
        """Validation blocks of each source, in proportion to the weights: a loss on them is one on the mixture."""
        if self.validation_fraction == 0:
            return (0,) * len(self.sources)
        sums = np.cumsum((0.0, *self.shares)) * self.max_validation_blocks
        return tuple(np.diff(np.rint(sums).astype(int)).tolist())

    def is_validation(self, text: str) -> bool:
        """Whether a document is never trained on; equal texts give equal answers, wherever they stand."""
        if self.validation_fraction == 0:
            return False
        digest = blake2b(text.encode(errors="surrogatepass"), digest_size=8, key=str(self.seed).encode()).digest()
        return int.from_bytes(digest, "little") < self.validation_fraction * 2**64


@dataclass(frozen=True)
class _Origin:
    """What a source was when packing began: the commit of a dataset, the size of files, about how many tokens."""

    revision: str | None
    text_bytes: int | None
    num_tokens: int | None = None


@dataclass(frozen=True)
class _CorpusIndex:
    """index.json of a corpus' folder; each source's own index has the counts and checksums of its shards."""

    corpus: Corpus
    blocks_per_shard: int
    origins: tuple[_Origin, ...]

    @classmethod
    def read(cls, folder: Path) -> _CorpusIndex:
        path = folder / INDEX_NAME
        content = read_json(path)
        try:
            corpus = content["corpus"]
            sources = [WeightedSource(TextSource(**row["text"]), row["weight"]) for row in corpus["sources"]]
            origins = tuple(_Origin(**origin) for origin in content["origins"])
            return cls(Corpus(**{**corpus, "sources": tuple(sources)}), content["blocks_per_shard"], origins)
        except (KeyError, TypeError) as error:
            raise packing.damaged(path, error) from error

    def layout(self, num_blocks: int) -> Layout:
        return Layout(self.corpus.sequence_length, num_blocks, self.blocks_per_shard, self.corpus.dtype)

    @property
    def layouts(self) -> list[Layout]:
        """Of each source's training blocks."""
        return [self.layout(count) for count in self.corpus.mixture.counts(self.corpus.num_blocks)]

    def passes(self, packed: Sequence[SourceIndex], num_samples: int) -> tuple[float | None, ...]:
        """How often each source, of which so much is packed, is seen in the first `num_samples` samples.

        At least so often if it is streamed. Until a text was packed to its end, by the estimate of its tokens; None
        without one. If no more of it is needed than is packed, that is at most once.
        """
        counts = self.corpus.mixture.counts(num_samples)
        return tuple(map(self._passes_over, packed, self.origins, counts))

    def _passes_over(self, packed: SourceIndex, origin: _Origin, num_blocks: int) -> float | None:
        whole = packed.blocks_of_a_pass
        if whole is not None:
            return num_blocks / max(whole, 1)
        if num_blocks == 0:
            return 0.0
        if origin.num_tokens is None:
            return None
        passes = num_blocks * self.corpus.sequence_length / max(origin.num_tokens, 1)
        return min(passes, 1.0) if num_blocks <= packed.num_blocks else passes


def most_passes(passes: Sequence[float | None]) -> float | None:
    """Of the source that is seen most often; None where it may be one of which that is not known.

    At the end of a run it then was seen at most once.
    """
    known = [value for value in passes if value is not None]
    most = max(known, default=0.0)
    return most if most >= 1 or len(known) == len(passes) else None


def build(
    corpus: Corpus,
    folder: Path,
    tokenizer: PreTrainedTokenizerBase,
    *,
    first_sample: int = 0,
    should_stop: Callable[[], bool] = lambda: False,
    progress: Callable[[int], object] = lambda num_blocks: None,
) -> CorpusPacker:
    """Pack the validation slice and the training blocks into `folder`, or go on where an earlier call stopped.

    Of a streamed corpus, the training blocks are those that samples from `first_sample` on begin with; the packer that
    is returned packs the others. Not streamed, no source is packed beyond its share of `num_blocks` nor beyond one pass
    over its text. To be called by one process. `progress` receives the number of training blocks packed since it was
    last called. Raises PreemptedError once `should_stop()` and the state is on disk, InputError when `folder` holds
    another corpus, DataError for damaged shards and for text that does not fill a block.
    """
    packer = CorpusPacker(corpus, folder, tokenizer, should_stop=should_stop, progress=progress)
    packer.pack_validation()
    if corpus.stream:
        packer.ensure(first_sample)
    else:
        packer.pack_all()
    return packer


class CorpusPacker:
    """Packs a corpus into a folder, all of it or, streamed, ahead of training; in one process.

    Raises InputError when `folder` holds another corpus, DataError when a shard in it is damaged.
    """

    def __init__(
        self,
        corpus: Corpus,
        folder: Path,
        tokenizer: PreTrainedTokenizerBase,
        *,
        should_stop: Callable[[], bool] = lambda: False,
        progress: Callable[[int], object] = lambda num_blocks: None,
    ) -> None:
        self.corpus = corpus
        self._folder = folder
        self._tokenizer = tokenizer
        self._bos = adds_bos(tokenizer)
        self._index = self._open_index()
        self._training = [
            SourcePacker(
                _source_folder(folder, number),
                self._stream(number, validation=False),
                layout,
                should_stop=should_stop,
                progress=progress,
            )
            for number, layout in enumerate(self._index.layouts)
        ]
        self._validation = [
            SourcePacker(
                _source_folder(folder / "validation", number),
                self._stream(number, validation=True),
                self._index.layout(num_blocks),
                should_stop=should_stop,
            )
            for number, num_blocks in enumerate(corpus.validation_shares)
        ]
        for packer in self._training + self._validation:
            packer.verify()

    @property
    def passes(self) -> tuple[float | None, ...]:
        """How often the whole run sees each source, as far as is known by now; see PackedBlocks."""
        return self._index.passes([packer.index for packer in self._training], self.corpus.num_blocks)

    def pack_validation(self) -> None:
        for packer in self._validation:
            packer.require_all()

    def pack_all(self) -> None:
        for packer, source in zip(self._training, self.corpus.sources, strict=True):
            packer.require_all()
            if packer.layout.num_blocks and not packer.index.num_blocks:
                raise DataError(
                    f"{source.text.location}: {packer.index.leftover_tokens} tokens, fewer than one block of "
                    f"{self.corpus.sequence_length}",
                    hint="use more text or a smaller --sequence-length",
                )

    def ensure(self, sample: int) -> None:
        """Pack the shards that hold `sample` and what follows it, and one more of each source.

        To be called ahead of training, with samples that grow; shards that were deleted are made again. Does nothing
        for a corpus that is not streamed.
        """
        if not self.corpus.stream:
            return
        for packer, place in zip(self._training, self._shards_at(sample), strict=True):
            for shard in (place, place + 1):
                if shard < packer.layout.num_shards:
                    packer.require(shard)

    def release(self, sample: int) -> None:
        """Delete the shards that hold only what comes before `sample`; nothing unless the corpus is streamed.

        To be called when no run can fall back to before `sample`, or when it may pack them again.
        """
        if self.corpus.stream:
            for packer, place in zip(self._training, self._shards_at(sample), strict=True):
                packer.drop_before(place)

    def _shards_at(self, sample: int) -> list[int]:
        """Of each source, the shard with its first sample that is not before `sample`."""
        counts = self.corpus.mixture.counts(min(sample, self.corpus.num_blocks))
        return [count // self._index.blocks_per_shard for count in counts]

    def _open_index(self) -> _CorpusIndex:
        path = self._folder / INDEX_NAME
        if path.exists():
            index = _CorpusIndex.read(self._folder)
            _check_same_corpus(self._folder, index.corpus, self.corpus)
            return index
        for rest in [*self._folder.glob("source-*"), self._folder / "validation"]:
            shutil.rmtree(rest, ignore_errors=True)
        sources = [source.text for source in self.corpus.sources]
        origins = tuple(
            _Origin(pin_revision(source).revision, text_bytes(source), estimate_tokens(source, self._tokenizer))
            for source in sources
        )
        index = _CorpusIndex(self.corpus, max(packing.SHARD_TOKENS // self.corpus.sequence_length, 1), origins)
        self._folder.mkdir(parents=True, exist_ok=True)
        write_text(path, json.dumps(asdict(index), indent=2) + "\n")
        return index

    def _stream(self, number: int, *, validation: bool) -> DocumentStream:
        corpus, source, origin = self.corpus, self.corpus.sources[number].text, self._index.origins[number]

        def open_pass(turn: int) -> Iterator[str]:
            size = text_bytes(source)
            if size != origin.text_bytes:
                raise DataError(
                    f"{source.location}: {size} bytes of text, it had {origin.text_bytes} when packing began",
                    hint="put the text back as it was, or start over",
                )
            pinned = replace(source, revision=origin.revision)
            return read_interleaved(pinned, seed=drawn_seed(corpus.seed, "files", number, turn))

        return DocumentStream(
            name=source.location,
            open_pass=open_pass,
            encode=lambda texts: encode_batch(texts, self._tokenizer, bos=self._bos),
            keeps=lambda text: corpus.is_validation(text) == validation,
            dtype=np.dtype(corpus.dtype),
            max_passes=None if corpus.stream and not validation else 1,
        )


class PackedBlocks(Dataset[dict[str, Tensor]]):
    """Samples `first_sample` to `first_sample + num_samples` of a corpus that `build` packs into `folder`.

    A sample has input_ids, position_ids and labels, each (sequence_length,) int64. position_ids restart at each
    document: without an attention mask, transformers' attention then keeps the documents of a block apart. The first
    token of a document is not predicted from the document before it.
    The j-th sample of a source is a block of pass `j // num_blocks`, in an order drawn for this pass; of a streamed
    corpus, a block of its j-th place's shard, in an order drawn for this shard. A shard of a streamed corpus that is
    not there yet is waited for: DataError after `wait_seconds`. Raises InputError for samples beyond the corpus and
    DataError when it is not packed.
    """

    def __init__(self, folder: Path, *, num_samples: int, first_sample: int = 0, wait_seconds: float = 3600.0) -> None:
        if not (folder / INDEX_NAME).exists():
            raise DataError(f"{folder}: no packed text in it")
        index = _CorpusIndex.read(folder)
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
        self._wait_seconds = wait_seconds
        self._sources = [SourceIndex.read(_source_folder(folder, number)) for number in range(len(self._layouts))]
        if not self.corpus.stream:
            for number, (source, layout) in enumerate(zip(self._sources, self._layouts, strict=True)):
                if not source.is_whole(layout) or (layout.num_blocks and not source.num_blocks):
                    raise DataError(f"{_source_folder(folder, number)}: packing has not come to its end")
        self._orders: dict[tuple[int, int], NDArray[np.uint32]] = {}
        self._shards: dict[tuple[int, int], tuple[NDArray[Any], NDArray[np.int64]]] = {}

    @property
    def passes(self) -> tuple[float | None, ...]:
        """How often each source is seen from the run's first sample to this dataset's last, as far as is known by now.

        Over what is packed, if its text has ended; at least so often if it is streamed. Else by an estimate of the
        text's tokens, or None where that cannot be made, of a named dataset say.
        """
        folders = [_source_folder(self._folder, number) for number in range(len(self._layouts))]
        packed = [SourceIndex.read(folder) for folder in folders] if self.corpus.stream else self._sources
        return self._index.passes(packed, self._first_sample + self._num_samples)

    def __len__(self) -> int:
        return self._num_samples

    def __getitem__(self, sample: int) -> dict[str, Tensor]:
        if not 0 <= sample < self._num_samples:
            raise IndexError(f"sample {sample} of {self._num_samples}")
        source, number = self._mixture.locate(self._first_sample + sample)
        size = self._layouts[source].blocks_per_shard
        if self.corpus.stream:
            shard, place = divmod(number, size)
            block = int(self._order(source, shard, self._layouts[source].blocks_of(shard))[place])
        else:
            turn, place = divmod(number, self._sources[source].num_blocks)
            shard, block = divmod(int(self._order(source, turn, self._sources[source].num_blocks)[place]), size)
        tokens, starts = self._open(source, shard)
        return _sample(tokens[block], starts, block * self.corpus.sequence_length)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_orders": {}, "_shards": {}}

    def _order(self, source: int, turn: int, count: int) -> NDArray[np.uint32]:
        if (source, turn) not in self._orders:
            _forget_all_but_last(self._orders, source)
            self._orders[source, turn] = shuffled(count, self.corpus.seed, "blocks", source, turn)
        return self._orders[source, turn]

    def _open(self, source: int, shard: int) -> tuple[NDArray[Any], NDArray[np.int64]]:
        if (source, shard) not in self._shards:
            folder = _source_folder(self._folder, source)
            if self.corpus.stream:
                _forget_all_but_last(self._shards, source)  # a deleted file takes its space while it is mapped
                self._wait(source, shard)
            self._shards[source, shard] = _map_shard(folder, shard, self._sources[source], self._layouts[source])
        return self._shards[source, shard]

    def _wait(self, source: int, shard: int) -> None:
        folder = _source_folder(self._folder, source)
        give_up = time.monotonic() + self._wait_seconds
        while True:
            if shard >= len(self._sources[source].shards):
                self._sources[source] = SourceIndex.read(folder)
            packed = shard < len(self._sources[source].shards)
            if packed and tokens_path(folder, shard).exists() and starts_path(folder, shard).exists():
                return
            if time.monotonic() > give_up:
                raise DataError(
                    f"{tokens_path(folder, shard)}: not there after {self._wait_seconds:g} s",
                    hint="the run's first process packs it; see there why it does not",
                )
            time.sleep(_POLL_SECONDS)


def holds_shards(folder: Path) -> bool:
    """Whether at least one shard of the text is packed in a folder of `build`."""
    return any(SourceIndex.read(path.parent).shards for path in folder.glob(f"*/{INDEX_NAME}"))


def validation_blocks(folder: Path) -> dict[str, Tensor] | None:
    """The documents that are never trained on, in the form of PackedBlocks' samples; None when there are none.

    input_ids, position_ids and labels, each (num_blocks, sequence_length) int64, source after source. Raises DataError
    when a file is missing or has another size than its index says.
    """
    index = _CorpusIndex.read(folder)
    samples = []
    for number, num_blocks in enumerate(index.corpus.validation_shares):
        place, layout = _source_folder(folder / "validation", number), index.layout(num_blocks)
        source = SourceIndex.read(place)
        for shard, row in enumerate(source.shards):
            tokens, starts = _map_shard(place, shard, source, layout)
            samples += [_sample(tokens[b], starts, b * layout.sequence_length) for b in range(row.num_blocks)]
    if not samples:
        return None
    return {name: torch.stack([sample[name] for sample in samples]) for name in samples[0]}


def _source_folder(folder: Path, number: int) -> Path:
    return folder / f"source-{number}"


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


def _forget_all_but_last(cache: dict[tuple[int, int], Any], source: int) -> None:
    """Keep what was put in last for a source: workers read a little back and forth around a border."""
    for key in [key for key in cache if key[0] == source][:-1]:
        del cache[key]


def _check_same_corpus(folder: Path, saved: Corpus, corpus: Corpus) -> None:
    was, now = asdict(saved), asdict(corpus)
    changed = [f"{name} was {was[name]!r}, now {now[name]!r}" for name in now if was[name] != now[name]]
    if changed:
        raise InputError(
            f"{folder}: the packed text is another: {'; '.join(changed)}",
            hint="resume with the same settings, or start over",
        )
