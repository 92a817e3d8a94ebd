"""What a run reads, and what is written down of it in the folder that it is packed into."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path

import numpy as np

from ...convert.errors import InputError
from ...convert.text.sources import TextSource
from .mixture import Mixture
from .shards import INDEX_NAME, Layout, SourceIndex, damaged, read_json
from .sources import WeightedSource, shares_of

__all__ = ["Corpus", "CorpusIndex", "Origin", "most_passes", "source_folder"]


@dataclass(frozen=True)
class Corpus:
    """What a run reads, which decides every token of every sample.

    `num_blocks` counts training blocks of `sequence_length` tokens over all sources, as many as the run has samples.
    `validation_fraction` is of the documents.
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
        """The weights of the sources, scaled to the sum 1."""
        return shares_of(self.sources)

    @property
    def mixture(self) -> Mixture:
        """The rule by which each sample has its source."""
        return Mixture.of(self.shares, seed=self.seed)

    @property
    def dtype(self) -> str:
        """The type of a token on the disk: the smaller one that holds every token id."""
        return "uint16" if self.vocab_size <= 2**16 else "uint32"

    @property
    def validation_shares(self) -> tuple[int, ...]:
        """The validation blocks of each source, in proportion to its weight: a loss on them is one on the mixture."""
        if self.validation_fraction == 0:
            return (0,) * len(self.sources)
        sums = np.cumsum((0.0, *self.shares)) * self.max_validation_blocks
        return tuple(np.diff(np.rint(sums).astype(int)).tolist())

    def is_validation(self, text: str) -> bool:
        """Tell whether a document is never trained on; equal texts give equal answers, wherever they stand.

        Of a document that is read in parts, `text` is the first part.
        """
        if self.validation_fraction == 0:
            return False
        digest = blake2b(text.encode(errors="surrogatepass"), digest_size=8, key=str(self.seed).encode()).digest()
        return int.from_bytes(digest, "little") < self.validation_fraction * 2**64


@dataclass(frozen=True)
class Origin:
    """What a source was when packing began: a dataset's commit, about how many tokens, a digest of files."""

    revision: str | None
    num_tokens: int | None = None
    content: str | None = None


@dataclass(frozen=True)
class CorpusIndex:
    """The content of index.json in the folder of a corpus.

    Each source has an index of its own, with the counts and checksums of its shards.
    """

    corpus: Corpus
    blocks_per_shard: int
    origins: tuple[Origin, ...]

    @classmethod
    def read(cls, folder: Path) -> CorpusIndex:
        """Read the index of a folder. Raises DataError when it is damaged."""
        path = folder / INDEX_NAME
        content = read_json(path)
        try:
            corpus = content["corpus"]
            sources = [WeightedSource(TextSource(**row["text"]), row["weight"]) for row in corpus["sources"]]
            origins = tuple(Origin(**origin) for origin in content["origins"])
            return cls(Corpus(**{**corpus, "sources": tuple(sources)}), content["blocks_per_shard"], origins)
        except (KeyError, TypeError) as error:
            raise damaged(path, error) from error

    def layout(self, num_blocks: int) -> Layout:
        """The layout of `num_blocks` blocks of one source."""
        return Layout(self.corpus.sequence_length, num_blocks, self.blocks_per_shard, self.corpus.dtype)

    @property
    def layouts(self) -> list[Layout]:
        """The layout of each source's training blocks."""
        return [self.layout(count) for count in self.corpus.mixture.counts(self.corpus.num_blocks)]

    def passes(self, packed: Sequence[SourceIndex], num_samples: int) -> tuple[float | None, ...]:
        """Tell how often each source is seen in the first `num_samples` samples, given what is packed of it.

        A text that was packed to its end is counted, any other is estimated from its tokens, or None where they are not
        known. Where what is packed suffices, the estimate is at most 1.
        """
        counts = self.corpus.mixture.counts(num_samples)
        return tuple(map(self._passes_over, packed, self.origins, counts))

    def _passes_over(self, packed: SourceIndex, origin: Origin, num_blocks: int) -> float | None:
        if packed.leftover_tokens is not None:
            return num_blocks / max(packed.num_blocks, 1)
        if num_blocks == 0:
            return 0.0
        if origin.num_tokens is None:
            return None
        passes = num_blocks * self.corpus.sequence_length / max(origin.num_tokens, 1)
        return min(passes, 1.0) if num_blocks <= packed.num_blocks else passes


def most_passes(passes: Sequence[float | None]) -> float | None:
    """The passes over the source that is seen most often, None where that may be a source whose passes are not known.

    At the end of a run None means that no text was seen more than once.
    """
    known = [value for value in passes if value is not None]
    most = max(known, default=0.0)
    return most if most >= 1 or len(known) == len(passes) else None


def source_folder(folder: Path, number: int) -> Path:
    """The folder of one source in the folder of a corpus."""
    return folder / f"source-{number}"
