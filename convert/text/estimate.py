"""About how many tokens a text holds, from a sample of it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from .documents import find_text, read_interleaved
from .formats import is_compressed
from .parts import TextPart
from .reading import Reading
from .sources import TextSource
from .tokens import encode_batch

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["estimate_tokens"]

_SAMPLE_DOCUMENTS = 256
_SAMPLE_CHARACTERS = 2**14  # of a document, which may be a book
_MAX_READ_CHARACTERS = 2**25  # to come from one document to the next


def estimate_tokens(source: TextSource, tokenizer: PreTrainedTokenizerBase) -> int | None:
    """Estimate how many tokens the source's files hold, from a sample; None for a dataset or compressed files.

    Keys and escapes of JSON count as text, so that the estimate is rather too large. Raises DataError as
    `read_documents` does.
    """
    found = find_text(source)
    if found is None or any(is_compressed(file) for file in found.files):
        return None
    sample = _beginnings(read_interleaved(source, Reading(tokenizer), seed=0))
    num_bytes = sum(len(text.encode()) for text in sample)
    num_tokens = sum(map(len, encode_batch(sample, tokenizer)))
    return round(num_tokens / num_bytes * sum(file.stat().st_size for file in found.files))


def _beginnings(parts: Iterable[TextPart]) -> list[str]:
    """The beginnings of some documents; no more is read of a very long one."""
    sample: list[str] = []
    num_read, begins = 0, True
    for part in parts:
        if begins:
            sample.append(part.text[:_SAMPLE_CHARACTERS])
        begins = part.ends
        num_read += len(part.text)
        if (begins and len(sample) == _SAMPLE_DOCUMENTS) or num_read >= _MAX_READ_CHARACTERS:
            break
    return sample
