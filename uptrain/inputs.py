"""What is read of a run's models before it begins, each of it once."""

from __future__ import annotations

import json
from functools import cached_property
from hashlib import sha256
from typing import TYPE_CHECKING

from ..convert.checkpoint.opening import open_checkpoint
from ..convert.checkpoint.tensors import Checkpoint
from ..convert.checkpoint.tokenizer import TokenIdCheck, load_tokenizer
from ..convert.text.estimate import estimate_tokens
from ..convert.text.sources import TextSource
from ..convert.text.tokens import tokenizer_hash
from .data.identity import content_digest
from .estimate.size import ModelSize, measure_size
from .teacher import copied_bytes

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["Inputs"]

_FINGERPRINT_BYTES = 64


class Inputs:
    """A checkpoint and its teacher, with what is known of them. Nothing is read before it is asked for.

    Jobs that differ in their settings only, as the trials of a sweep do, have the same one.
    """

    def __init__(self, checkpoint: Checkpoint, teacher: str | None, *, opened: Checkpoint | None = None) -> None:
        self.checkpoint = checkpoint
        self.teacher_name = teacher
        self._opened = opened
        self._num_tokens: dict[TextSource, int | None] = {}
        self._contents: dict[TextSource, str | None] = {}

    @property
    def teacher(self) -> Checkpoint | None:
        """The teacher's headers and config; no weight of it is read here, so that nothing has to be closed."""
        if self._opened is None and self.teacher_name is not None:
            self._opened = open_checkpoint(self.teacher_name)
        return self._opened

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The student's tokenizer, which is the teacher's too."""
        return load_tokenizer(self.checkpoint.directory)

    @cached_property
    def check_ids(self) -> TokenIdCheck:
        """The check that the embeddings of student and teacher have a row for every token id of a text."""
        models = [each.directory for each in (self.checkpoint, self.teacher) if each is not None]
        checks = [TokenIdCheck.of(model, self.tokenizer) for model in models]
        return max(checks, key=lambda check: len(check.beyond))

    @cached_property
    def tokenizer_hash(self) -> str:
        """The digest of all that decides which ids a text becomes."""
        return tokenizer_hash(self.tokenizer)

    def num_tokens(self, text: TextSource) -> int | None:
        """Estimate how many tokens a text holds, None if that is not known. Raises DataError for what is no text."""
        if text not in self._num_tokens:
            self._num_tokens[text] = estimate_tokens(text, self.tokenizer)
        return self._num_tokens[text]

    def content(self, text: TextSource) -> str | None:
        """Return a digest of what a text holds, wherever it lies; None for a named dataset."""
        if text not in self._contents:
            self._contents[text] = content_digest(text)
        return self._contents[text]

    @cached_property
    def student_size(self) -> ModelSize:
        """The student in numbers."""
        return measure_size(self.checkpoint)

    @cached_property
    def teacher_size(self) -> ModelSize | None:
        """The teacher in numbers, None without one."""
        return None if self.teacher is None else measure_size(self.teacher)

    @cached_property
    def teacher_copy_bytes(self) -> int:
        """Bytes on the disk of a teacher that has to be copied into another class, 0 of any other."""
        return 0 if self.teacher is None else copied_bytes(self.teacher)

    @cached_property
    def fingerprint(self) -> str:
        """A digest of the student that differs for other weights."""
        return _fingerprint(self.checkpoint)

    @cached_property
    def teacher_fingerprint(self) -> str | None:
        """A digest of the teacher that differs for other weights, None without one."""
        return None if self.teacher is None else _fingerprint(self.teacher)


def _fingerprint(checkpoint: Checkpoint) -> str:
    """A digest of the config and of some bytes of every tensor."""
    digest = sha256(json.dumps(checkpoint.config, sort_keys=True).encode())
    for name, info in sorted(checkpoint.tensors.items()):
        with (checkpoint.directory / info.file).open("rb") as file:
            file.seek((info.begin + info.end) // 2)
            digest.update(f"{name} {info.dtype} {info.shape} ".encode() + file.read(_FINGERPRINT_BYTES))
    return digest.hexdigest()
