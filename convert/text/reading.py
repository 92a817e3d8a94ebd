"""How a text is read, beside what it is: for which tokenizer."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from .notes import ReadingNotes
from .sources import TextSource

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["Reading", "separators"]

_END_OF_TEXT = "<|endoftext|>"


@dataclass(frozen=True)
class Reading:
    """How a text is read, and notes of what was met on the way, which readers write.

    The tokenizer gives conversations their chat template and plain text its separator; its ids are made elsewhere.
    """

    tokenizer: PreTrainedTokenizerBase | None = None
    notes: ReadingNotes = field(default_factory=ReadingNotes)


def separators(source: TextSource, tokenizer: PreTrainedTokenizerBase | None, *, plain: bool) -> tuple[str, ...]:
    """Return what divides the documents of a text, plain or in rows: what the source says, else by default.

    By default plain text is divided at <|endoftext|> and at the tokenizer's EOS, unless the chat template itself writes
    that token, which then ends a turn and no document.
    """
    if source.document_separator is not None:
        return (source.document_separator,) if source.document_separator else ()
    if not plain:
        return ()
    eos = None if tokenizer is None else tokenizer.eos_token
    ends_turns = eos is not None and eos in str(getattr(tokenizer, "chat_template", None) or "")
    return (_END_OF_TEXT,) if eos in (None, _END_OF_TEXT) or ends_turns else (_END_OF_TEXT, str(eos))
