"""Documents in parts, so that a long one is never held whole, and plain text divided into documents."""

from __future__ import annotations

import codecs
import io
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import BinaryIO, NamedTuple

from ..errors import DataError

__all__ = ["TextPart", "by_document", "decode_file", "divide", "not_utf8", "without_blank", "without_mark"]

_PART_CHARACTERS = 2**20
PART_BYTES = 2**20


class TextPart(NamedTuple):
    """A part of a document, of about a million characters at most; most documents are one. `ends` marks the last."""

    text: str
    ends: bool


def decode_file(file: BinaryIO, name: str) -> Iterator[str]:
    """Yield the text of a UTF-8 file in parts, without a byte order mark, with a line feed for each line break.

    Raises DataError for what is not UTF-8, with line and byte as counted from the beginning of the decompressed file.
    """
    decoder = codecs.getincrementaldecoder("utf-8")()
    breaks = io.IncrementalNewlineDecoder(None, translate=True)
    first = file.read(PART_BYTES)
    part = without_mark(first, name)
    num_bytes, num_lines = len(first) - len(part), 0  # before what is decoded next
    while True:
        pending = len(decoder.getstate()[0])
        try:
            text = decoder.decode(part, final=not part)
        except UnicodeDecodeError as error:
            line = num_lines + 1 + error.object[: error.start].count(b"\n")
            raise not_utf8(name, line, num_bytes - pending + error.start) from error
        yield breaks.decode(text, final=not part)
        if not part:
            return
        num_bytes += len(part)
        num_lines += part.count(b"\n")
        part = file.read(PART_BYTES)


def without_mark(beginning: bytes, name: str) -> bytes:
    """Return the beginning of a file without UTF-8's byte order mark. Raises DataError for that of UTF-16."""
    if beginning.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        raise DataError(f"{name}: UTF-16, not UTF-8", hint="convert it, for example with `iconv -f UTF-16 -t UTF-8`")
    return beginning.removeprefix(codecs.BOM_UTF8)


def not_utf8(name: str, line: int, byte: int) -> DataError:
    """Make the error for bytes that are not UTF-8; the byte is counted from 0 and the line from 1."""
    return DataError(
        f"{name}, line {line}: not UTF-8 (byte {byte} of the file)",
        hint="if it is Latin-1, convert it with `iconv -f LATIN1 -t UTF-8`",
    )


def divide(
    texts: Iterable[str], separators: Sequence[str], met: set[str], *, with_breaks: bool = True
) -> Iterator[TextPart]:
    """Cut a text that comes in pieces into documents at each of `separators`, and long documents into parts.

    A line break on either side of a separator belongs to it, unless `with_breaks` is false. The separators that occur
    are added to `met`.
    """
    pattern = _pattern(separators, with_breaks)
    longest = max(map(len, separators), default=0) + 2
    waiting = ""
    for text in texts:
        waiting += text
        begin = 0
        for match in pattern.finditer(waiting) if pattern else ():
            if match.end() > len(waiting) - longest:
                break  # with more text it could be longer, or another one
            met.add(match[1])
            yield from _in_parts(waiting[begin : match.start()])
            begin = match.end()
        waiting = waiting[begin:]
        while len(waiting) > _PART_CHARACTERS + 2 * longest:  # a match that waits for more text is not cut
            yield TextPart(waiting[:_PART_CHARACTERS], ends=False)
            waiting = waiting[_PART_CHARACTERS:]
    begin = 0
    for match in pattern.finditer(waiting) if pattern else ():
        met.add(match[1])
        yield from _in_parts(waiting[begin : match.start()])
        begin = match.end()
    yield from _in_parts(waiting[begin:])


def _pattern(separators: Sequence[str], with_breaks: bool) -> re.Pattern[str] | None:
    if not separators:
        return None
    longest_first = "|".join(map(re.escape, sorted(separators, key=len, reverse=True)))
    return re.compile(rf"\n?({longest_first})\n?" if with_breaks else f"({longest_first})")


def by_document(parts: Iterable[TextPart]) -> Iterator[Iterator[TextPart]]:
    """Yield for each document an iterator over its parts; what is not taken of one is passed by with the next."""
    waiting = iter(parts)
    for first in waiting:
        document = _of_one(first, waiting)
        yield document
        for _ in document:
            pass


def _of_one(first: TextPart, following: Iterator[TextPart]) -> Iterator[TextPart]:
    part = first
    yield part
    while not part.ends:
        part = next(following)
        yield part


def without_blank(parts: Iterable[TextPart]) -> Iterator[TextPart]:
    """Leave out the documents that hold no more than white space."""
    begun = False
    for part in parts:
        if begun or not part.ends or part.text.strip():
            yield part
        begun = not part.ends


def _in_parts(document: str) -> Iterator[TextPart]:
    for begin in range(0, max(len(document), 1), _PART_CHARACTERS):
        end = begin + _PART_CHARACTERS
        yield TextPart(document[begin:end], ends=end >= len(document))
