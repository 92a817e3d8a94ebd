"""The code blocks of a page of the docs, and what the page says of running them.

A block of `bash`, `console` or `python` is run as it stands, in the order of the page. A comment right before it says
otherwise:

    <!-- not run: needs a GPU -->             it is not run, for this reason
    <!-- run with: --dry-run --groups 2 -->   its commands get these options, in place of those of the same names
    <!-- exits with 2 -->                     its command ends with this code

Blocks of other languages are shown only, and hold no commands. Code that is indented in place of fenced is refused.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

RUN = ("bash", "console", "python")
SHOWN = ("dockerfile", "ini", "json", "text", "toml", "yaml")
_FENCE = re.compile(r"^```(\S*)\s*$")
_NOTE = re.compile(r"^<!-- (not run|run with|exits with):? (.+) -->$")


@dataclass(frozen=True)
class Block:
    """A fenced block: where it begins, its language and its text, and the notes before it."""

    line: int
    language: str
    text: str
    not_run: str | None = None
    run_with: tuple[str, ...] = ()
    exits_with: int = 0

    @property
    def commands(self) -> list[list[str]]:
        """The commands of a `bash` or `console` block, as words: comments are left out and variables filled in."""
        lines = self.text.replace("\\\n", " ").splitlines()
        if self.language == "console":
            lines = [line.removeprefix("$ ") for line in lines if line.startswith("$ ")]
        variables: dict[str, str] = {}
        found = []
        for line in _whole(lines):
            for part in line.split(" && "):
                assignment = re.fullmatch(r"(\w+)=(\"[^\"]*\"|\S*)", part.strip())
                if assignment:
                    variables[assignment[1]] = assignment[2].strip('"')
                    continue
                filled = re.sub(r"\$(\w+)", lambda name: variables.get(name[1], name[0]), part)
                words = shlex.split(filled, comments=True)
                if words:
                    found.append(words)
        return found

    @property
    def output(self) -> str:
        """What a `console` block shows behind its commands."""
        lines = self.text.replace("\\\n", " ").splitlines()
        return "\n".join(line for line in lines if not line.startswith("$ "))


def blocks_of(path: Path) -> list[Block]:
    """The blocks of a page. Raises ValueError for one without a known language and for code that is indented."""
    found: list[Block] = []
    notes: dict[str, str] = {}
    lines = path.read_text().splitlines()
    number = 0
    while number < len(lines):
        line = lines[number]
        fence, note = _FENCE.match(line), _NOTE.match(line)
        if note:
            notes[note[1]] = note[2]
        elif fence:
            end = lines.index("```", number + 1)
            if fence[1] not in RUN + SHOWN:
                raise ValueError(f"{path.name}:{number + 1}: a block without a known language ({fence[1]!r})")
            block = Block(
                line=number + 1,
                language=fence[1],
                text="\n".join(lines[number + 1 : end]) + "\n",
                not_run=notes.get("not run"),
                run_with=tuple(shlex.split(notes.get("run with", ""))),
                exits_with=int(notes.get("exits with", 0)),
            )
            if fence[1] in SHOWN and re.search(r"^(\$ |kvconvert )", block.text, re.MULTILINE):
                raise ValueError(f"{path.name}:{number + 1}: commands in a block that is not run ({fence[1]})")
            found.append(block)
            notes, number = {}, end
        elif (
            re.match(r"    \S", line) and (number == 0 or not lines[number - 1].strip()) and not _in_list(lines, number)
        ):
            raise ValueError(f"{path.name}:{number + 1}: code that is indented; fence it, and say its language")
        elif line.strip():
            notes = {}
        number += 1
    return found


def _whole(lines: list[str]) -> Iterator[str]:
    """The lines, those joined over which a quotation goes on."""
    begun = ""
    for line in lines:
        begun += line
        if begun.count('"') % 2 == 0:
            yield begun
            begun = ""
        else:
            begun += "\n"
    yield begun


def _in_list(lines: list[str], number: int) -> bool:
    """Whether an indented line goes on with an item of a list, or with the options of a directive."""
    for line in reversed(lines[:number]):
        if line and not line.startswith("  "):
            return bool(re.match(r"([-*]|\d+\.|:::|!!!) ", line))
    return False
