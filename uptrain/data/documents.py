"""The documents of one source as token ids, from any place in them on."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...convert.errors import DataError

__all__ = ["Cursor", "DocumentStream"]


_ENCODE_BATCH = 64


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
