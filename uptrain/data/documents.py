"""The documents of one source as token ids, from any place in them on."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["Cursor", "DocumentStream", "Piece"]

_ENCODE_BATCH = 64


@dataclass(frozen=True)
class Cursor:
    """A place in a source: so many documents, and so many tokens of the next document, lie before it."""

    documents: int = 0
    tokens: int = 0


@dataclass(frozen=True)
class Piece:
    """Tokens of one document, from the place `begin` to the place `end`; it has none where documents were left out."""

    ids: NDArray[Any]
    begin: Cursor
    end: Cursor

    def split(self, num_tokens: int) -> tuple[Piece, Piece]:
        """Cut the piece in two, the first of which has `num_tokens` tokens."""
        middle = replace(self.begin, tokens=self.begin.tokens + num_tokens)
        return Piece(self.ids[:num_tokens], self.begin, middle), Piece(self.ids[num_tokens:], middle, self.end)


@dataclass(frozen=True)
class DocumentStream:
    """The documents of a source as token ids, which can be read from any cursor on.

    `name` is for messages. `open_text()` gives the texts, always the same ones in the same order, `encode` the token
    ids of some texts; texts that `keeps` refuses are left out.
    """

    name: str
    open_text: Callable[[], Iterator[str]]
    encode: Callable[[Sequence[str]], Sequence[Sequence[int]]]
    keeps: Callable[[str], bool]
    dtype: np.dtype[Any]

    def pieces(self, begin: Cursor) -> Iterator[Piece]:
        """Yield the documents from `begin` on, and an empty piece after each batch of them."""
        documents, first, done = self.open_text(), begin.documents, 0
        while batch := list(islice(documents, min(_ENCODE_BATCH, first - done) if done < first else _ENCODE_BATCH)):
            if done >= first:
                kept = [(done + i, text) for i, text in enumerate(batch) if self.keeps(text)]
                encoded = self.encode([text for _, text in kept]) if kept else []
                for (place, _), ids in zip(kept, encoded, strict=True):
                    skipped = begin.tokens if place == first else 0
                    tokens = np.asarray(ids[skipped:], dtype=self.dtype)
                    yield Piece(tokens, Cursor(place, skipped), Cursor(place + 1))
            done += len(batch)
            # what is skipped is no place to stop at: a run that begins here has not been there
            yield self._nothing(Cursor(done) if done > first else begin)

    def _nothing(self, place: Cursor) -> Piece:
        return Piece(np.empty(0, dtype=self.dtype), place, place)
