"""What was met while a text was read, for the person who gave it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

__all__ = ["ReadingNotes"]


@dataclass
class ReadingNotes:
    """Counts of what was read otherwise than it stands in the files. Readers add to them while they go.

    `first_skipped` and `first_surrogate` say what was met first, and where. `separators` are those at which
    a text was split, and `files` what was opened, in that order.
    """

    num_skipped: int = 0
    first_skipped: str = ""
    num_surrogates: int = 0
    first_surrogate: str = ""
    separators: set[str] = field(default_factory=set)
    files: list[Path] = field(default_factory=list)

    def skip(self, what: str) -> None:
        """Count a row that is left out."""
        self.num_skipped += 1
        self.first_skipped = self.first_skipped or what

    def replace_surrogate(self, where: str) -> None:
        """Count a document with half a character in it."""
        self.num_surrogates += 1
        self.first_surrogate = self.first_surrogate or where

    def sentences(self, name: str) -> Iterator[str]:
        """Yield what a person should know of the reading of the text of this name, a sentence each."""
        if self.separators:
            yield f"{name}: split into documents at {', '.join(map(repr, sorted(self.separators)))}"
        if self.num_skipped:
            yield f"{name}: left out {_rows(self.num_skipped)} without readable text, the first: {self.first_skipped}"
        if self.num_surrogates:
            yield (
                f"{name}: half a character (a lone surrogate) is read as U+FFFD in {_rows(self.num_surrogates)}, "
                f"the first: {self.first_surrogate}"
            )


def _rows(number: int) -> str:
    return "1 row" if number == 1 else f"{number} rows"
