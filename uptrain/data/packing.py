"""A corpus packed into a folder, in one process: its validation slice, and the blocks that a run trains on."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ...convert.checkpoint.differences import differences
from ...convert.checkpoint.files import write_text
from ...convert.errors import DataError, InputError
from ...convert.text.documents import describe_files, read_interleaved
from ...convert.text.estimate import estimate_tokens
from ...convert.text.hub import pin_revision
from ...convert.text.parts import TextPart
from ...convert.text.reading import Reading
from ...convert.text.sources import TextSource
from ...convert.text.tokens import adds_bos, encode_batch, encode_long
from . import shards
from .corpus import Corpus, CorpusIndex, Origin, source_folder
from .documents import DocumentStream
from .identity import content_digest
from .mixture import drawn_seed
from .shards import INDEX_NAME
from .writer import SourcePacker

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["build"]


def build(
    corpus: Corpus,
    folder: Path,
    tokenizer: PreTrainedTokenizerBase,
    *,
    num_tokens: Callable[[TextSource], int | None] | None = None,
    check_ids: Callable[[Sequence[int], str], object] = lambda ids, text: None,
    should_stop: Callable[[], bool] = lambda: False,
    on_held_out: Callable[[], object] = lambda: None,
    progress: Callable[[int], object] = lambda num_blocks: None,
    remark: Callable[[str], object] = lambda text: None,
) -> None:
    """Pack the validation slice and the training blocks into `folder`, or go on where an earlier call stopped.

    `num_tokens` says about how many tokens a text holds, None if that is not known; without it the text is sampled.
    `check_ids` is called with the token ids of each document and the place of its text, before any of them is packed.
    `on_held_out` is called once the validation slice is packed, before any training block is.
    No source is packed beyond its share of `num_blocks` nor beyond one pass over its text. `progress` receives the
    number of training blocks packed since it was last called, `remark` a sentence for a dataset that the hub does not
    tell the commit of. Raises PreemptedError once `should_stop()` and the state is on disk, InputError when `folder`
    holds another corpus, DataError for damaged shards and for text that does not fill a block.
    """
    estimate = num_tokens or (lambda text: estimate_tokens(text, tokenizer))
    index = _open_index(corpus, folder, estimate, remark)
    readings = [Reading(tokenizer) for _ in corpus.sources]
    training = [
        SourcePacker(
            source_folder(folder, number),
            _stream(corpus, index, number, readings[number], tokenizer, check_ids, validation=False),
            layout,
            should_stop=should_stop,
            progress=progress,
        )
        for number, layout in enumerate(index.layouts)
    ]
    validation = [
        SourcePacker(
            source_folder(folder / "validation", number),
            _stream(corpus, index, number, Reading(tokenizer), tokenizer, check_ids, validation=True),
            index.layout(num_blocks),
            should_stop=should_stop,
        )
        for number, num_blocks in enumerate(corpus.validation_shares)
    ]
    for packer in training + validation:
        packer.verify()
    for packer in validation:
        packer.pack()
    on_held_out()
    for packer, source, reading in zip(training, corpus.sources, readings, strict=True):
        packer.pack()
        for sentence in reading.notes.sentences(source.text.location):
            remark(sentence)
        if packer.layout.num_blocks and not packer.index.num_blocks:
            if corpus.validation_fraction and not packer.index.leftover_tokens:
                raise DataError(
                    f"{source.text.location}: a validation fraction of {corpus.validation_fraction:g} holds out every "
                    "document, so that nothing is left to train on",
                    hint="use a smaller --validation-fraction, or more documents",
                )
            raise DataError(
                f"{source.text.location}: {packer.index.leftover_tokens} tokens, fewer than one block of "
                f"{corpus.sequence_length}",
                hint="use more text or a smaller --sequence-length",
            )


def _open_index(
    corpus: Corpus, folder: Path, num_tokens: Callable[[TextSource], int | None], remark: Callable[[str], object]
) -> CorpusIndex:
    """Read the index of the folder, or begin a new one. Raises InputError for that of another corpus."""
    path = folder / INDEX_NAME
    if path.exists():
        index = CorpusIndex.read(folder)
        _check_same_corpus(folder, index, corpus)
        return index
    for rest in [*folder.glob("source-*"), folder / "validation"]:
        shutil.rmtree(rest, ignore_errors=True)
    for source in corpus.sources:
        files = describe_files(source.text)
        if files is not None:
            remark(files)
    origins = tuple(
        Origin(pin_revision(source.text, remark=remark).revision, num_tokens(source.text), content_digest(source.text))
        for source in corpus.sources
    )
    index = CorpusIndex(corpus, max(shards.SHARD_TOKENS // corpus.sequence_length, 1), origins)
    folder.mkdir(parents=True, exist_ok=True)
    write_text(path, json.dumps(asdict(index), indent=2) + "\n")
    return index


def _stream(
    corpus: Corpus,
    index: CorpusIndex,
    number: int,
    reading: Reading,
    tokenizer: PreTrainedTokenizerBase,
    check_ids: Callable[[Sequence[int], str], object],
    *,
    validation: bool,
) -> DocumentStream:
    """The documents of a source that are trained on, or those that never are."""
    source = replace(corpus.sources[number].text, revision=index.origins[number].revision)
    bos = adds_bos(tokenizer)

    def open_text() -> Iterator[TextPart]:
        return read_interleaved(source, reading, seed=drawn_seed(corpus.seed, "files", number, 0))

    def checked(encoded: Iterable[list[int]]) -> Iterator[list[int]]:
        for ids in encoded:
            check_ids(ids, source.location)
            yield ids

    return DocumentStream(
        name=source.location,
        open_text=open_text,
        encode=lambda texts: list(checked(encode_batch(texts, tokenizer, bos=bos))),
        encode_long=lambda texts: checked(encode_long(texts, tokenizer, bos=bos)),
        keeps=lambda text: corpus.is_validation(text) == validation,
        dtype=np.dtype(corpus.dtype),
    )


def _check_same_corpus(folder: Path, index: CorpusIndex, corpus: Corpus) -> None:
    """Raise InputError for another corpus; the same text may lie elsewhere by now."""
    was, now = _described(index.corpus), _described(corpus)
    for origin, before, source, given in zip(
        index.origins, was["sources"], now["sources"], corpus.sources, strict=False
    ):
        moved = before["text"]["location"] != source["text"]["location"]
        if moved and origin.content is not None and origin.content == content_digest(given.text):
            before["text"]["location"] = source["text"]["location"]
    changed = list(differences("", was, now))
    if changed:
        raise InputError(
            f"{folder}: the packed text is another: {'; '.join(changed)}",
            hint="resume with the same settings, or start over",
        )


def _described(corpus: Corpus) -> dict[str, Any]:
    """All that decides what is packed."""
    return asdict(corpus) | {"sources": [source.description for source in corpus.sources]}
