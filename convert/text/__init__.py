"""Text: where documents come from, and how they become token ids."""

from .sources import TextSource
from .tokens import tokenizer_hash

__all__ = ["TextSource", "tokenizer_hash"]
