"""About how many tokens a text holds, from a sample of it."""

from __future__ import annotations

from itertools import islice
from typing import TYPE_CHECKING

from .documents import find_text, read_interleaved
from .formats import is_compressed
from .parts import by_document
from .reading import Reading
from .sources import TextSource
from .tokens import encode_batch

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["estimate_tokens"]

_SAMPLE_DOCUMENTS = 256
_SAMPLE_CHARACTERS = 2**14  # of a document, which may be a book


def estimate_tokens(source: TextSource, tokenizer: PreTrainedTokenizerBase) -> int | None:
    """Estimate how many tokens the source's files hold, from a sample; None for a dataset or compressed files.

    Keys and escapes of JSON count as text, so that the estimate is rather too large. Raises DataError as
    `read_documents` does.
    """
    found = find_text(source)
    if found is None or any(is_compressed(file) for file in found.files):
        return None
    parts = read_interleaved(source, Reading(tokenizer), seed=0)
    sample = [next(document).text[:_SAMPLE_CHARACTERS] for document in islice(by_document(parts), _SAMPLE_DOCUMENTS)]
    num_bytes = sum(len(text.encode()) for text in sample)
    num_tokens = sum(map(len, encode_batch(sample, tokenizer)))
    return round(num_tokens / num_bytes * sum(file.stat().st_size for file in found.files))
