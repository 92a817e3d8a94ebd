"""A long text is encoded in pieces, whose ids together are those of the whole."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache
from itertools import chain

import pytest
from conftest import PROSE
from hypothesis import given, settings
from hypothesis import strategies as st
from kvconvert.convert.text import cuts, tokens
from kvconvert.convert.text.parts import TextPart
from kvconvert.convert.text.tokens import encode_batch, encode_documents, encode_long
from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

SPECIAL = ["<unk>", "<s>", "</s>"]
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
CORPUS = [PROSE, PROSE.upper(), "a  b\n\nc 12 345 6789\n  d\te — 中文。字\n", "don't can't we'll"]


def wrapped(tokenizer: Tokenizer) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>")


def byte_level(*pre: pre_tokenizers.PreTokenizer) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(list(pre))
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        CORPUS,
        trainers.BpeTrainer(vocab_size=600, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False),
    )
    return wrapped(tokenizer)


def sentencepiece_bpe(*, legacy: bool) -> PreTrainedTokenizerFast:
    """As Llama 2's: trained on words, then without any pre-tokenization."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.train_from_iterator(
        CORPUS, trainers.BpeTrainer(vocab_size=400, special_tokens=SPECIAL, show_progress=False)
    )
    if legacy:
        tokenizer = Tokenizer(tokenizer.model)
        tokenizer.add_special_tokens(SPECIAL)
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    return wrapped(tokenizer)


def unigram(*, split: bool) -> PreTrainedTokenizerFast:
    """As T5's, and one that is free to put a token across words."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Replace(Regex(" {2,}"), " ")])
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(split=split)
    trainer = trainers.UnigramTrainer(vocab_size=300, special_tokens=SPECIAL, unk_token="<unk>", show_progress=False)
    tokenizer.train_from_iterator(CORPUS, trainer)
    return wrapped(tokenizer)


def across_words() -> PreTrainedTokenizerFast:
    """A BPE without pre-tokenization whose merges go across spaces: no place in a text is known to be safe."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.train_from_iterator(
        CORPUS, trainers.BpeTrainer(vocab_size=400, special_tokens=SPECIAL, show_progress=False)
    )
    return wrapped(tokenizer)


TOKENIZERS: dict[str, Callable[[], PreTrainedTokenizerFast]] = {
    "gpt2": lambda: byte_level(pre_tokenizers.ByteLevel(add_prefix_space=False)),
    "roberta": lambda: byte_level(pre_tokenizers.ByteLevel(add_prefix_space=True)),
    "llama3": lambda: byte_level(
        pre_tokenizers.Split(Regex(LLAMA3), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ),
    "llama2": lambda: sentencepiece_bpe(legacy=False),
    "llama2-legacy": lambda: sentencepiece_bpe(legacy=True),
    "t5": lambda: unigram(split=True),
    "unigram-across-words": lambda: unigram(split=False),
    "bpe-across-words": across_words,
}
WHOLE_ONLY = ("unigram-across-words", "bpe-across-words")


@cache
def tokenizer_named(name: str) -> PreTrainedTokenizerFast:
    tokenizer = TOKENIZERS[name]()
    tokenizer.add_tokens([AddedToken("<tool>", lstrip=True, rstrip=True), AddedToken("New York", single_word=True)])
    return tokenizer


@pytest.fixture(autouse=True)
def small_pieces() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tokens, "PIECE_CHARACTERS", 64)
        patch.setattr(cuts, "_LOOKAHEAD_CHARACTERS", 24)
        yield


WORDS = st.sampled_from(
    [
        *("the", " of", "foolishness", "  ", "\n", "\n\n", " \n", "\t", "12345", "don't", "…", "中文", "。\n", "é"),
        *("</s>", "<tool>", " New York ", "\u00a0", "\u2581", "\u200b", "--", ". ", "e\u0301", " \u0301", "🙂"),
        *("\r", "x" * 30),
    ]
)


@settings(max_examples=25, deadline=None)
@given(words=st.lists(WORDS, min_size=20, max_size=120), step=st.integers(1, 90))
@pytest.mark.parametrize("name", TOKENIZERS)
def test_the_ids_of_pieces_are_those_of_the_whole(name: str, words: list[str], step: int) -> None:
    tokenizer, text = tokenizer_named(name), "".join(words)
    pieces = list(encode_long((text[i : i + step] for i in range(0, len(text), step)), tokenizer, bos=True))
    assert list(chain.from_iterable(pieces)) == encode_batch([text], tokenizer, bos=True)[0]


@pytest.mark.parametrize("name", TOKENIZERS)
def test_prose_is_cut_where_the_tokenizer_is_known_to_break(name: str) -> None:
    text = PROSE * 4
    pieces = list(encode_long([text], tokenizer_named(name)))
    assert len(pieces) == 1 if name in WHOLE_ONLY else len(pieces) > len(text) / 64


def test_a_cut_anywhere_gives_other_ids() -> None:
    """The control: the ids of pieces that are cut every 64 characters are not those of the whole."""
    tokenizer, text = tokenizer_named("gpt2"), PROSE * 4
    pieces = tokenizer([text[i : i + 64] for i in range(0, len(text), 64)])["input_ids"]
    assert list(chain.from_iterable(pieces)) != tokenizer(text)["input_ids"]


def test_long_and_short_documents_follow_each_other() -> None:
    tokenizer = tokenizer_named("gpt2")
    parts = [TextPart("one", True), TextPart(PROSE, False), TextPart(PROSE, True), TextPart("two", True)]
    found = list(chain.from_iterable(encode_documents(parts, tokenizer, bos=True)))
    assert found == list(chain.from_iterable(encode_batch(["one", PROSE * 2, "two"], tokenizer, bos=True)))


def test_a_long_document_may_come_first() -> None:
    """Then no short one waits to be encoded, and transformers 5.23 cannot encode none."""
    tokenizer = tokenizer_named("gpt2")
    parts = [TextPart(PROSE, False), TextPart(PROSE, True), TextPart(PROSE, False), TextPart("end", True)]
    found = list(chain.from_iterable(encode_documents(parts, tokenizer)))
    assert found == list(chain.from_iterable(encode_batch([PROSE * 2, PROSE + "end"], tokenizer)))


@pytest.mark.parametrize("text", ["a text</s>", "a text</s>\n", "<s>a text</s> \n\n", "<s>a text", "a text"])
def test_a_written_eos_or_bos_is_not_put_a_second_time(text: str) -> None:
    tokenizer = tokenizer_named("gpt2")
    inner = tokenizer("a text", add_special_tokens=False)["input_ids"]
    assert encode_batch([text], tokenizer, bos=True) == [[1, *inner, 2]]
    assert list(encode_long([text], tokenizer, bos=True)) == [[1, *inner, 2]]


def test_white_space_at_the_end_is_kept_without_a_written_eos() -> None:
    tokenizer = tokenizer_named("gpt2")
    ids = tokenizer("a text\n", add_special_tokens=False)["input_ids"]
    assert encode_batch(["a text\n"], tokenizer) == [[*ids, 2]]
