"""How documents become token ids, and whether two tokenizers give the same ones."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..checkpoint.tokenizer import load_tokenizer, vocabulary_size
from ..errors import DataError
from .cuts import PIECE_CHARACTERS, encode_beginning
from .parts import TextPart, by_document

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = [
    "Batch",
    "adds_bos",
    "check_tokenizers",
    "encode_batch",
    "encode_documents",
    "encode_long",
    "tokenizer_hash",
]

_ENCODE_BATCH = 64
_BATCH_CHARACTERS = 2**18  # a second of tokenizing on a slow core, so that a stop is heard soon
# the parts of a fast tokenizer that decide which ids a text becomes; truncation and padding change as it is used
_FAST_TOKENIZER_PARTS = ("added_tokens", "normalizer", "pre_tokenizer", "post_processor", "model")


def adds_bos(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Return whether the tokenizer itself puts a BOS before a text, as Llama's does and GPT-NeoX's does not."""
    ids = tokenizer("a")["input_ids"]
    return tokenizer.bos_token_id is not None and len(ids) > 0 and ids[0] == tokenizer.bos_token_id


def encode_batch(texts: Sequence[str], tokenizer: PreTrainedTokenizerBase, *, bos: bool = False) -> list[list[int]]:
    """Return the token ids of each text: BOS if `bos`, the text without other special tokens, EOS if there is one.

    A text that begins with BOS or ends with EOS itself, written out, gets no second one; white space behind a written
    EOS is left out.
    """
    if not texts:  # which some versions of transformers cannot encode
        return []
    ended = [_without_space_behind_eos(text, tokenizer) for text in texts]
    encoded = tokenizer(ended, add_special_tokens=False, return_attention_mask=False, verbose=False)
    return [_with_bos(ids, tokenizer, bos) + _missing_eos(ids, tokenizer) for ids in encoded["input_ids"]]


def encode_long(texts: Iterable[str], tokenizer: PreTrainedTokenizerBase, *, bos: bool = False) -> Iterator[list[int]]:
    """Yield the token ids of one text, which comes in pieces: together those of `encode_batch` for the whole text.

    Memory does not grow with the text, unless there is no place in it where the tokenizer can be shown to break
    (`encode_beginning`).
    """
    held, size, begun = "", PIECE_CHARACTERS, False
    for text in texts:
        held += text
        while len(held) > size:
            beginning = encode_beginning(held[:size], tokenizer)
            if beginning is None:
                size *= 2
                continue
            yield beginning.ids if begun else _with_bos(beginning.ids, tokenizer, bos)
            begun, held, size = True, held[beginning.num_characters :], PIECE_CHARACTERS
    (ids,) = encode_batch([held], tokenizer, bos=bos and not begun)
    yield ids


def encode_documents(
    parts: Iterable[TextPart], tokenizer: PreTrainedTokenizerBase, *, bos: bool = False
) -> Iterator[list[int]]:
    """Yield the token ids of documents one after another as `encode_batch` gives them, a long document in pieces."""
    batch = Batch()
    for document in by_document(parts):
        first = next(document)
        if first.ends and not batch.add(first.text):
            continue
        yield from encode_batch(batch.take(), tokenizer, bos=bos)
        if not first.ends:
            yield from encode_long((part.text for part in chain([first], document)), tokenizer, bos=bos)
    yield from encode_batch(batch.take(), tokenizer, bos=bos)


class Batch:
    """Texts that are encoded at once: 64, or fewer where they are long, so that a stop is heard in between."""

    def __init__(self) -> None:
        self._texts: list[str] = []
        self._num_characters = 0

    def add(self, text: str) -> bool:
        """Add a text, and tell whether the batch is full now."""
        self._texts.append(text)
        self._num_characters += len(text)
        return len(self._texts) == _ENCODE_BATCH or self._num_characters >= _BATCH_CHARACTERS

    def take(self) -> list[str]:
        """Return the texts, and be empty."""
        texts, self._texts, self._num_characters = self._texts, [], 0
        return texts


def _without_space_behind_eos(text: str, tokenizer: PreTrainedTokenizerBase) -> str:
    eos = getattr(tokenizer, "eos_token", None)
    stripped = text.rstrip() if eos else text
    return stripped if eos and stripped.endswith(eos) else text


def _with_bos(ids: list[int], tokenizer: PreTrainedTokenizerBase, bos: bool) -> list[int]:
    return [int(tokenizer.bos_token_id), *ids] if bos and ids[:1] != [tokenizer.bos_token_id] else ids


def _missing_eos(ids: list[int], tokenizer: PreTrainedTokenizerBase) -> list[int]:
    eos = tokenizer.eos_token_id
    return [] if eos is None or ids[-1:] == [eos] else [int(eos)]


def tokenizer_hash(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return the SHA-256 of what decides the ids of a text: vocabulary, special tokens, parts of a fast tokenizer."""
    described: dict[str, Any] = {
        "vocabulary": tokenizer.get_vocab(),
        "special_tokens": {name: str(token) for name, token in tokenizer.special_tokens_map.items()},
        "special_ids": sorted(tokenizer.all_special_ids),
        "bos": adds_bos(tokenizer),
    }
    if tokenizer.is_fast:
        serialised = json.loads(tokenizer.backend_tokenizer.to_str())
        described |= {part: serialised[part] for part in _FAST_TOKENIZER_PARTS}
    return hashlib.sha256(json.dumps(described, sort_keys=True).encode()).hexdigest()


def check_tokenizers(model: str | Path, original: str | Path | None) -> None:
    """Raise DataError if `model` has no tokenizer, or its logits and those of `original` have other meanings.

    Only ids that both models have a logit for are compared: beyond the smaller vocabulary lie rows of padding, and
    tokens that were added later, which no text may need that both models read (`TokenIdCheck`).
    """
    tokenizer = load_tokenizer(model)
    if original is None:
        return
    sizes = [size for size in (vocabulary_size(original), vocabulary_size(model)) if size is not None]
    shared = min(sizes, default=None)
    if _meanings(load_tokenizer(original), shared) != _meanings(tokenizer, shared):
        raise DataError(
            f"{original}: its tokenizer differs from that of {model}", hint="use the original that was converted"
        )


def _meanings(tokenizer: PreTrainedTokenizerBase, vocab_size: int | None) -> dict[str, int]:
    """The tokens whose ids are below a vocabulary size, with these ids."""
    return {token: index for token, index in tokenizer.get_vocab().items() if vocab_size is None or index < vocab_size}
