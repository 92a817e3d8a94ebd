"""Rows of JSON files: a value on each line, one array, or values over several lines."""

from __future__ import annotations

import json
from collections.abc import Iterator
from io import BufferedReader
from typing import Any

from ..checkpoint.json_files import has_too_many_values
from ..errors import DataError
from .parts import decode_file, not_utf8, without_mark

__all__ = ["read_json_rows"]

_SPACE = " \t\r\n"
_PEEKED_BYTES = 8192
_MAX_ROW = 2**25  # bytes of a line, and characters of a value over several; a long book has a fifth of that


def read_json_rows(file: BufferedReader[Any], name: str) -> Iterator[tuple[str, Any]]:
    """Yield what a JSON file holds, row after row: where each stands, and its value, or the DataError of a bad line.

    A file that begins with an array holds its elements; one whose first line is no whole value, as of pretty-printed
    objects, holds one value after another; any other one holds a value on each line. Raises DataError where no further
    row can be found behind what is wrong.
    """
    beginning = without_mark(file.peek(_PEEKED_BYTES), name).lstrip()
    first_line = beginning.partition(b"\n")[0].strip()
    if beginning.startswith(b"[") or _goes_on(first_line):
        yield from _values(decode_file(file, name), name)
    else:
        yield from _lines(file, name)


def _goes_on(line: bytes) -> bool:
    """Whether a line is the first of a pretty-printed object."""
    if line == b"{":
        return True
    if not line.endswith(b","):
        return False
    try:
        return isinstance(json.loads(line[:-1] + b"}"), dict)
    except (ValueError, RecursionError):
        return False


def _lines(file: BufferedReader[Any], name: str) -> Iterator[tuple[str, Any]]:
    num_bytes = 0
    for number, (line, line_bytes) in enumerate(_bounded_lines(file), start=1):
        where = f"{name}, line {number}"
        if len(line) > _MAX_ROW or has_too_many_values(line):
            yield (
                where,
                DataError(f"{where}: longer than the {_MAX_ROW} bytes, or with more values, than a row may have"),
            )
            num_bytes += line_bytes
            continue
        text = without_mark(line, name) if number == 1 else line
        begin, num_bytes = num_bytes + line_bytes - len(text), num_bytes + line_bytes
        try:
            if text.strip():
                yield where, json.loads(text.decode())
        except UnicodeDecodeError as error:
            yield where, not_utf8(name, number, begin + error.start)
        except (ValueError, RecursionError) as error:
            yield where, DataError(f"{where}: not JSON ({error})")


def _bounded_lines(file: BufferedReader[Any]) -> Iterator[tuple[bytes, int]]:
    """Each line of a file with its bytes in it; of one that is too long only so much that it shows."""
    while line := file.readline(_MAX_ROW + 1):
        rest, num_bytes = line, len(line)
        while len(rest) > _MAX_ROW and not rest.endswith(b"\n"):
            rest = file.readline(_MAX_ROW + 1)
            num_bytes += len(rest)
        yield line, num_bytes


def _values(texts: Iterator[str], name: str) -> Iterator[tuple[str, Any]]:
    stream = _Values(texts, name)
    in_array = stream.next_character() == "["
    if in_array:
        stream.take()
    number = 0
    while (character := stream.next_character()) not in ("", "]"):
        number += 1
        if in_array and number > 1:
            if character != ",":
                raise stream.error("expected , or ] after an element")
            stream.take()
            stream.next_character()
        yield f"{name}, row {number} (line {stream.line})", stream.decode()
    if in_array:
        if character != "]":
            raise stream.error("the array does not end")
        stream.take()
        character = stream.next_character()
    if character:
        raise stream.error("something stands behind the end")


class _Values:
    """JSON values in text that comes in pieces, of which only those that a value spans are held."""

    def __init__(self, texts: Iterator[str], name: str) -> None:
        self._texts = texts
        self._name = name
        self._held = ""
        self._place = 0
        self._decoder = json.JSONDecoder()
        self.line = 1

    def next_character(self) -> str:
        """The next character that is no white space, "" at the end; it stays."""
        while True:
            while self._place < len(self._held):
                character = self._held[self._place]
                if character not in _SPACE:
                    return character
                self.take()
            if not self._read(1):
                return ""

    def take(self) -> None:
        """Pass by one character."""
        self.line += self._held[self._place] == "\n"
        self._place += 1

    def decode(self) -> Any:
        """The value that begins here, which is passed by."""
        while True:
            try:
                value, end = self._decoder.raw_decode(self._held, self._place)
            except json.JSONDecodeError as error:
                is_cut = error.msg.startswith("Unterminated string") or error.pos > len(self._held) - 8
                num_held = len(self._held) - self._place
                if is_cut and num_held > _MAX_ROW:
                    raise self.error(f"a value of more than {_MAX_ROW} characters") from error
                if is_cut and self._read(num_held):
                    continue
                line = self.line + self._held.count("\n", self._place, error.pos)
                raise DataError(f"{self._name}, line {line}: not JSON ({error.msg})") from error
            except RecursionError as error:
                raise self.error("nested too deep") from error
            self.line += self._held.count("\n", self._place, end)
            self._place = end
            return value

    def error(self, what: str) -> DataError:
        """Make the error for what is no JSON at this place."""
        return DataError(f"{self._name}, line {self.line}: not JSON ({what})")

    def _read(self, num_characters: int) -> bool:
        """Hold at least so many characters more, if there are; whether there are any."""
        parts = [self._held[self._place :]]
        self._place = 0
        wanted = num_characters
        for text in self._texts:
            parts.append(text)
            wanted -= len(text)
            if wanted <= 0:
                break
        self._held = "".join(parts)
        return len(parts) > 1 and any(parts[1:])
