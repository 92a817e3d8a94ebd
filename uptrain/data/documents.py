"""The documents of one source as token ids, from any place in them on."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from hashlib import blake2b
from itertools import chain
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...convert.errors import DataError
from ...convert.text.parts import TextPart, by_document

__all__ = ["Cursor", "DocumentStream", "Piece"]

_ENCODE_BATCH = 64
_BATCH_CHARACTERS = 2**18  # a second of tokenizing on a slow core, so that a stop is heard soon
_BEGINNING = blake2b(digest_size=16)


@dataclass(frozen=True)
class Cursor:
    """A place in a source: so many documents, and so many tokens of the next document, lie before it.

    `digest` is one of the texts of these documents and of these tokens, "" where it is not known.
    """

    documents: int = 0
    tokens: int = 0
    digest: str = ""


@dataclass(frozen=True)
class Piece:
    """Tokens of one document, from the place `begin` to the place `end`; it has none where documents were left out.

    `before` has hashed what `begin.digest` is a digest of.
    """

    ids: NDArray[Any]
    begin: Cursor
    end: Cursor
    before: blake2b = field(default=_BEGINNING, repr=False, compare=False)

    def split(self, num_tokens: int) -> tuple[Piece, Piece]:
        """Cut the piece in two, the first of which has `num_tokens` tokens."""
        hashed = _hashed(self.before, self.ids[:num_tokens])
        middle = replace(self.begin, tokens=self.begin.tokens + num_tokens, digest=hashed.hexdigest())
        return (
            Piece(self.ids[:num_tokens], self.begin, middle, self.before),
            Piece(self.ids[num_tokens:], middle, self.end, hashed),
        )


@dataclass(frozen=True)
class DocumentStream:
    """The documents of a source as token ids, which can be read from any cursor on.

    `name` is for messages. `open_text()` gives the documents in parts, always the same ones in the same order, `encode`
    the token ids of some texts, and `encode_long` those of one text that comes in pieces. Texts that `keeps` refuses,
    asked for their first part, are left out.
    """

    name: str
    open_text: Callable[[], Iterator[TextPart]]
    encode: Callable[[Sequence[str]], Sequence[Sequence[int]]]
    encode_long: Callable[[Iterable[str]], Iterable[Sequence[int]]]
    keeps: Callable[[str], bool]
    dtype: np.dtype[Any]

    def pieces(self, begin: Cursor) -> Iterator[Piece]:
        """Yield the documents from `begin` on, and an empty piece wherever it is a good place to stop.

        Raises DataError where the text before `begin` is not the one that its digest was made of.
        """
        return _Reader(self, begin).pieces()


class _Reader:
    """One reading of a stream: how far it has come, and a digest of all that lies before."""

    def __init__(self, stream: DocumentStream, begin: Cursor) -> None:
        self._stream = stream
        self._begin = begin
        self._hashed = _BEGINNING.copy()
        self._number = 0  # of the document that comes next
        self._batch: list[tuple[int, str, blake2b, Cursor]] = []
        self._num_documents = self._num_characters = 0  # since the last place to stop

    def pieces(self) -> Iterator[Piece]:
        for document in by_document(self._stream.open_text()):
            if self._number == self._begin.documents and self._begin.tokens == 0:
                self._check(self._hashed)
            first = next(document)
            is_kept = self._number >= self._begin.documents and self._stream.keeps(first.text)
            if not first.ends:
                yield from self._encoded()
                read = self._long if is_kept else self._passed_by
                yield from read(chain([first], document))
                continue
            before = self._hashed.copy()
            self._take(first.text)
            end = self._finish_document()
            if is_kept:
                self._batch.append((end.documents - 1, first.text, before, end))
            if self._num_documents >= _ENCODE_BATCH or self._num_characters >= _BATCH_CHARACTERS:
                yield from self._encoded()
        yield from self._encoded()
        if self._number < self._begin.documents or (self._number, 0) == (self._begin.documents, self._begin.tokens):
            self._check(self._hashed)

    def _take(self, text: str) -> None:
        self._hashed.update(text.encode(errors="surrogatepass"))
        self._num_characters += len(text)

    def _finish_document(self) -> Cursor:
        self._hashed.update(b"\xff")  # no text has this byte: the documents "ab" and "c" are not "a" and "bc"
        self._number += 1
        self._num_documents += 1
        return Cursor(self._number, 0, self._hashed.hexdigest())

    def _encoded(self) -> Iterator[Piece]:
        """The documents of the batch, and a place to stop."""
        encoded = self._stream.encode([text for _, text, _, _ in self._batch]) if self._batch else []
        for (number, _, before, end), ids in zip(self._batch, encoded, strict=True):
            yield self._piece(np.asarray(ids, dtype=self._stream.dtype), Cursor(number), end, before)
        self._batch.clear()
        yield self._place_to_stop(Cursor(self._number, 0, self._hashed.hexdigest()))

    def _long(self, parts: Iterator[TextPart]) -> Iterator[Piece]:
        """A document that is encoded in pieces, and a place to stop behind each."""

        def texts() -> Iterator[str]:
            for part in parts:
                self._take(part.text)
                yield part.text

        hashed, place = self._hashed.copy(), Cursor(self._number)
        for ids in self._stream.encode_long(texts()):
            tokens = np.asarray(ids, dtype=self._stream.dtype)
            after = _hashed(hashed, tokens)
            end = Cursor(place.documents, place.tokens + len(tokens), after.hexdigest())
            yield self._piece(tokens, place, end, hashed)
            yield self._place_to_stop(end)
            hashed, place = after, end
        if self._begin.documents == place.documents and place.tokens < self._begin.tokens:
            self._check(hashed)
        yield self._place_to_stop(self._finish_document())

    def _passed_by(self, parts: Iterator[TextPart]) -> Iterator[Piece]:
        """A long document that is left out, and places to stop meanwhile, from which it is read again."""
        place = Cursor(self._number, 0, self._hashed.hexdigest())
        for part in parts:
            self._take(part.text)
            yield self._place_to_stop(place)
        yield self._place_to_stop(self._finish_document())

    def _piece(self, tokens: NDArray[Any], place: Cursor, end: Cursor, hashed: blake2b) -> Piece:
        """Tokens that begin at a place of a document, without those before the place where the reading begins."""
        piece = Piece(tokens, replace(place, digest=hashed.hexdigest()), end, hashed)
        begin = self._begin
        if place.documents != begin.documents or place.tokens >= begin.tokens:
            return piece
        num_known = begin.tokens - place.tokens
        if len(tokens) < num_known and end.documents == begin.documents:  # the document goes on
            return Piece(tokens[:0], begin, begin)  # a run that stops here has still packed up to where it began
        _, rest = piece.split(num_known)
        self._check(rest.before)
        return replace(rest, end=end)

    def _place_to_stop(self, place: Cursor) -> Piece:
        self._num_documents = self._num_characters = 0
        # what is skipped is no place to stop at: a run that begins here has not been there
        is_ahead = (place.documents, place.tokens) > (self._begin.documents, self._begin.tokens)
        place = place if is_ahead else self._begin
        return Piece(np.empty(0, dtype=self._stream.dtype), place, place)

    def _check(self, hashed: blake2b) -> None:
        if self._begin.digest not in ("", hashed.hexdigest()):
            raise DataError(
                f"{self._stream.name}: the text that was packed is another now",
                hint="put back what stood before the place where packing had stopped, or start over",
            )


def _hashed(before: blake2b, tokens: NDArray[Any]) -> blake2b:
    after = before.copy()
    after.update(tokens.tobytes())
    return after
