"""A corpus packed into a folder: the whole of it, or what is needed next."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ...convert.checkpoint.output import write_text
from ...convert.errors import DataError, InputError
from ...convert.text.sources import estimate_tokens, pin_revision, read_interleaved, text_bytes
from ...convert.text.tokens import adds_bos, encode_batch
from . import shards
from .corpus import Corpus, CorpusIndex, Origin, source_folder
from .documents import DocumentStream
from .mixture import drawn_seed
from .shards import INDEX_NAME
from .writer import SourcePacker

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["CorpusPacker", "build"]


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
                source_folder(folder, number),
                self._stream(number, validation=False),
                layout,
                should_stop=should_stop,
                progress=progress,
            )
            for number, layout in enumerate(self._index.layouts)
        ]
        self._validation = [
            SourcePacker(
                source_folder(folder / "validation", number),
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

    def _open_index(self) -> CorpusIndex:
        path = self._folder / INDEX_NAME
        if path.exists():
            index = CorpusIndex.read(self._folder)
            _check_same_corpus(self._folder, index.corpus, self.corpus)
            return index
        for rest in [*self._folder.glob("source-*"), self._folder / "validation"]:
            shutil.rmtree(rest, ignore_errors=True)
        sources = [source.text for source in self.corpus.sources]
        origins = tuple(
            Origin(pin_revision(source).revision, text_bytes(source), estimate_tokens(source, self._tokenizer))
            for source in sources
        )
        index = CorpusIndex(self.corpus, max(shards.SHARD_TOKENS // self.corpus.sequence_length, 1), origins)
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


def _check_same_corpus(folder: Path, saved: Corpus, corpus: Corpus) -> None:
    was, now = asdict(saved), asdict(corpus)
    changed = [f"{name} was {was[name]!r}, now {now[name]!r}" for name in now if was[name] != now[name]]
    if changed:
        raise InputError(
            f"{folder}: the packed text is another: {'; '.join(changed)}",
            hint="resume with the same settings, or start over",
        )
