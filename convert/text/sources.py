"""What a text is called: a place, and which part of it is meant."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any

from typing_extensions import Doc

from ..errors import InputError

__all__ = ["DocumentSeparator", "LineDocuments", "SkipBadLines", "TextField", "TextSource", "parse_text"]

# fields of settings that say how a text is read, which calibration, training and evaluation share
TextField = Annotated[
    str,
    Doc(
        "Column that holds the text of a JSON, parquet or dataset row; a dot leads into a nested one, as doc.text. "
        "Messages of a conversation become text by the tokenizer's chat template."
    ),
]
LineDocuments = Annotated[bool, Doc("Read each line of a .txt or .md file as a document.")]
DocumentSeparator = Annotated[
    str | None,
    Doc(
        "What stands between the documents of a text, which is split there. Default: in a .txt or .md file the "
        "tokenizer's EOS or <|endoftext|>, elsewhere nothing; '' never splits."
    ),
]
SkipBadLines = Annotated[bool, Doc("Leave out and count the rows that hold no readable text.")]

# what a source may say for itself, and the field of TextSource that holds it
_OWN = {"split": "split", "field": "text_field", "config": "config", "revision": "revision"}
_SUFFIX = re.compile(r"(.*)\[(\w+=[^\[\]=,]*(?:,\w+=[^\[\]=,]*)*)\]", re.DOTALL)
_EXAMPLE = "write for example a.jsonl, or org/name[split=train,field=text]"


@dataclass(frozen=True)
class TextSource:
    """A source of text: a file, a directory, or the name of a dataset on the hub.

    A .txt or .md file is one document, unless `document_separator` or `line_documents` divides it; a row of any other
    file or of a dataset is one, whose text is in the column `text_field`. `split` and `config` select a part of a
    dataset, on the hub or in a directory, and `revision` a branch, tag or commit of one on the hub. Without `split`,
    what has splits is read from `usual_split`, and what has none is read whole. With `skip_bad_lines` a row without
    readable text is left out and counted, else it ends the reading. Raises InputError for a separator of documents that
    are lines.
    """

    location: str
    text_field: str = "text"
    split: str | None = None
    config: str | None = None
    revision: str | None = None
    usual_split: str = "train"
    line_documents: bool = False
    document_separator: str | None = None
    skip_bad_lines: bool = field(default=False, compare=False)  # what is read by then is the same text

    def __post_init__(self) -> None:
        if self.line_documents and self.document_separator is not None:
            raise InputError(
                "a document is a line, or ends at a separator, not both",
                hint="leave out one of them",
                settings=("line_documents", "document_separator"),
            )

    @property
    def path(self) -> Path:
        """The location as a path, which need not exist."""
        try:
            return Path(self.location).expanduser()
        except RuntimeError:  # there is no such user
            return Path(self.location)

    @property
    def chosen_split(self) -> str:
        """The split to read of a dataset that has several."""
        return self.split or self.usual_split


def parse_text(typed: str, defaults: TextSource) -> TextSource:
    """Read a text as it is typed: `place`, or `place[split=train,field=text,config=en,revision=main]`.

    What stands between the brackets counts more than the fields of `defaults`. The name of a file or directory that
    exists is a place as it is, whatever it is made of. Raises InputError for anything else between the brackets, and
    for no place.
    """
    place = typed.strip()
    own: dict[str, Any] = {}
    suffix = None if _exists(place) else _SUFFIX.fullmatch(place)
    if suffix:
        place = suffix[1]
        for part in suffix[2].split(","):
            name, _, value = part.partition("=")
            if name not in _OWN or not value:
                raise InputError(f"{typed!r}: {part} says nothing of a text", hint=f"known are {', '.join(_OWN)}")
            own[_OWN[name]] = value
    if not place:
        raise InputError(f"{typed!r} names no text", hint=_EXAMPLE)
    return replace(defaults, location=place, **own)


def _exists(place: str) -> bool:
    return bool(place) and os.path.lexists(TextSource(place).path)
