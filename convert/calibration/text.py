"""The text that a model is measured on, as sequences of token ids."""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

from ..checkpoint.tensors import Checkpoint
from ..checkpoint.tokenizer import TokenIdCheck, load_tokenizer
from ..errors import DataError
from ..text.documents import describe_files, join_files, read_files
from ..text.parts import TextPart, by_document
from ..text.reading import Reading
from ..text.sources import TextSource
from ..text.tokens import adds_bos, encode_documents

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["CalibrationText", "read_calibration_text"]

_TOKENS_PER_PASS = 4096
_CHARACTERS = 8  # that are read for a token, which is seldom longer
_MAX_DOCUMENT_CHARACTERS = 2**24  # of a longer document only the beginning is drawn from, which memory holds


@dataclass(frozen=True)
class CalibrationText:
    """Token ids, (num_sequences, sequence_length), where they come from, and the files that were opened for them."""

    token_ids: Tensor
    description: str
    files: tuple[Path, ...] = ()

    @property
    def num_tokens(self) -> int:
        return self.token_ids.numel()

    @property
    def batches(self) -> list[Tensor]:
        return list(self.token_ids.split(max(_TOKENS_PER_PASS // self.token_ids.shape[1], 1)))


def read_calibration_text(
    checkpoint: Checkpoint,
    source: TextSource,
    *,
    num_tokens: int,
    sequence_length: int,
    remark: Callable[[str], object] = lambda text: None,
) -> CalibrationText:
    """Read up to `num_tokens` tokens in whole sequences, from files in turn and from a file's documents in turn.

    More than 64 files are read in turn from 64 places among them, each as one file. Every document gives one passage,
    drawn with a fixed seed and cut to the length of a sequence; a document gives a second passage when all of its file
    have given one. A passage begins with BOS if the tokenizer adds it, and ends with EOS where there is one; passages
    follow each other without padding, so that sequences need not begin with one.
    If all passages together are too short, what was cut off them is taken too. Fewer tokens than asked for are returned
    where the text has no more. `remark` is called with sentences that say which tokens the model's embedding has no row
    for, which files of a directory are read, and what was read otherwise than it stands there.
    Raises DataError for text that is missing, unreadable, shorter than one sequence, or needs a token that the model's
    embedding has no row for.
    """
    import torch

    tokenizer = load_tokenizer(checkpoint.directory)
    check_ids = TokenIdCheck.of(checkpoint.directory, tokenizer)
    bos = adds_bos(tokenizer)
    generator = random.Random(0)
    reading = Reading(tokenizer)
    for sentence in (check_ids.remark, describe_files(source)):
        if sentence is not None:
            remark(sentence)
    size = sequence_length * _CHARACTERS
    files = read_files(source, reading)
    passages = [_passages(_beginnings(parts), size, generator) for parts in join_files(files, len(files))]
    ids: list[int] = []
    cut_off: list[int] = []
    in_turn = (TextPart(passage, ends=True) for passage in _in_turn(passages))
    for tokens in encode_documents(in_turn, tokenizer, bos=bos):
        check_ids(tokens, source.location)
        ids += tokens[:sequence_length]
        cut_off += tokens[sequence_length:]
        if len(ids) >= num_tokens:
            break
    for sentence in reading.notes.sentences(source.location):
        remark(sentence)
    ids += cut_off[: max(num_tokens - len(ids), 0)]
    num_sequences = min(len(ids), num_tokens) // sequence_length
    if num_sequences == 0:
        raise DataError(f"{source.location}: {len(ids)} tokens, fewer than one sequence of {sequence_length}")
    token_ids = torch.tensor(ids[: num_sequences * sequence_length]).view(num_sequences, sequence_length)
    return CalibrationText(token_ids, source.location, tuple(reading.notes.files))


def _beginnings(parts: Iterable[TextPart]) -> Iterator[str]:
    """The documents, of a very long one only so many characters as memory may hold."""
    for document in by_document(parts):
        texts: list[str] = []
        for part in document:
            texts.append(part.text)
            if sum(map(len, texts)) >= _MAX_DOCUMENT_CHARACTERS:
                break
        yield "".join(texts)


def _passages(documents: Iterable[str], size: int, generator: random.Random) -> Iterator[str]:
    """Passages of at most `size` characters: one of each document, then a second of each that has more, and so on."""
    waiting = []
    for document in documents:
        starts = list(range(0, len(document), size))
        generator.shuffle(starts)
        start = starts.pop()
        yield document[start : start + size]
        if starts:
            waiting.append((document, starts))
    while waiting:
        for document, starts in waiting:
            start = starts.pop()
            yield document[start : start + size]
        waiting = [(document, starts) for document, starts in waiting if starts]


def _in_turn(iterators: Iterable[Iterator[str]]) -> Iterator[str]:
    waiting = deque(iterators)
    while waiting:
        iterator = waiting.popleft()
        for item in islice(iterator, 1):
            yield item
            waiting.append(iterator)
