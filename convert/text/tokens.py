"""How documents become token ids, and whether two tokenizers give the same ones."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..checkpoint.tokenizer import load_tokenizer, vocabulary_size
from ..errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["adds_bos", "check_tokenizers", "encode_batch", "encode_documents", "tokenizer_hash"]

_ENCODE_BATCH = 64
# the parts of a fast tokenizer that decide which ids a text becomes; truncation and padding change as it is used
_FAST_TOKENIZER_PARTS = ("added_tokens", "normalizer", "pre_tokenizer", "post_processor", "model")


def adds_bos(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Return whether the tokenizer itself puts a BOS before a text, as Llama's does and GPT-NeoX's does not."""
    ids = tokenizer("a")["input_ids"]
    return tokenizer.bos_token_id is not None and len(ids) > 0 and ids[0] == tokenizer.bos_token_id


def encode_batch(texts: Sequence[str], tokenizer: PreTrainedTokenizerBase, *, bos: bool = False) -> list[list[int]]:
    """Return the token ids of each text: BOS if `bos`, the text without other special tokens, EOS if there is one."""
    before = [tokenizer.bos_token_id] if bos else []
    after = [tokenizer.eos_token_id] if tokenizer.eos_token_id is not None else []
    encoded = tokenizer(list(texts), add_special_tokens=False, return_attention_mask=False, verbose=False)
    return [before + ids + after for ids in encoded["input_ids"]]


def encode_documents(
    documents: Iterable[str], tokenizer: PreTrainedTokenizerBase, *, bos: bool = False
) -> Iterator[list[int]]:
    """Yield the token ids of each document as `encode_batch` gives them, encoding 64 documents at a time."""
    iterator = iter(documents)
    while batch := list(islice(iterator, _ENCODE_BATCH)):
        yield from encode_batch(batch, tokenizer, bos=bos)


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
