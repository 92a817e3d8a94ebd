"""Where a text can be cut so that the token ids of its two sides are those of the whole."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["PIECE_CHARACTERS", "Beginning", "encode_beginning"]

PIECE_CHARACTERS = 2**16
# What follows a cut and is seen when the text before it is encoded. Only what looks ahead further could notice the cut:
# no pre-tokenizer does that, and no added token is so long.
_LOOKAHEAD_CHARACTERS = 2**10
_MAX_TRIES = 16
_BESIDE_SPACE = re.compile(r"(?<=\S)\s|(?<=\n)\S")
_SPACES = "\u2581\u0120 "  # as vocabularies write a space: sentencepiece's, that of byte-level BPE, and itself


@dataclass(frozen=True)
class Beginning:
    """The token ids of a text's first `num_characters`; what follows is encoded as a text of its own."""

    ids: list[int]
    num_characters: int


def encode_beginning(text: str, tokenizer: PreTrainedTokenizerBase) -> Beginning | None:
    """Encode `text`, which goes on behind its end, up to a place where it can be cut; None where none is found.

    A place will do if three things hold. Pre-tokenization breaks there, so that no token lies across it (or, without
    pre-tokenization, no token of the BPE's vocabulary could). At least 1024 characters that follow were seen, so that
    the tokens before it do not depend on the text's end. And what follows, encoded from there, has the ids that it has
    behind the text before it: no prefix is put before it and nothing before it is looked back at.
    """
    if not getattr(tokenizer, "is_fast", False) or len(text) <= _LOOKAHEAD_CHARACTERS:
        return None
    encoded = _encode(text, tokenizer)
    places = [
        match.start() for match in _BESIDE_SPACE.finditer(text, len(text) // 2, len(text) - _LOOKAHEAD_CHARACTERS)
    ]
    for place in places[: -_MAX_TRIES - 1 : -1]:
        # what puts a space before every text finds it there if the text begins behind it
        for begin in (place, place + 1) if text[place] == " " else (place,):
            following = _encode(text[begin:], tokenizer)["input_ids"][0]
            ids = encoded["input_ids"][0]
            number = len(ids) - len(following)
            if following and ids[number:] == following and _breaks(encoded, number, text, place, tokenizer):
                return Beginning(ids[:number], begin)
    return None


def _encode(text: str, tokenizer: PreTrainedTokenizerBase) -> Any:
    return tokenizer(
        [text], add_special_tokens=False, return_attention_mask=False, return_offsets_mapping=True, verbose=False
    )


def _breaks(encoded: Any, number: int, text: str, place: int, tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether token `number` begins at a place of the text, and nothing can lie across the place."""
    offsets, words = encoded["offset_mapping"][0], encoded.word_ids(0)
    if number == 0 or not offsets[number - 1][1] <= place <= offsets[number][0]:
        return False
    if words[number - 1] != words[number]:
        return True
    before = text[place - 1]
    return text[place] == " " and before.isascii() and before.isprintable() and _keeps_words_apart(tokenizer)


@lru_cache(maxsize=2)
def _keeps_words_apart(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether it is a BPE without a token that holds a space behind another character: no merge goes across one."""
    model = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    if model["type"] != "BPE" or model.get("dropout"):
        return False
    inside = re.compile(f"[^{_SPACES}][{_SPACES}]")
    return not any(inside.search(token) for token in model["vocab"])
