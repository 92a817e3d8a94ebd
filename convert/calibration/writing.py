"""Calibration text that the model writes itself."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, count
from typing import TYPE_CHECKING, Any

from ..algebra.kv_cache import kv_cache_bytes_per_token
from ..architectures.source import Source
from ..checkpoint.loading import load_model
from ..checkpoint.tokenizer import TokenIdCheck, load_tokenizer
from ..errors import DataError, UnsupportedError, in_one_line
from ..text.documents import read_documents
from ..text.sources import TextSource
from ..text.tokens import adds_bos
from .streams import Hardware
from .text import CalibrationText

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase

__all__ = ["SelfWriting", "write_calibration_text"]

_OPENING_TOKENS = 16
_MAX_ROWS = 64  # sequences at once: more are not faster on a CPU, whose products are large enough by then
_MAX_CACHE_BYTES = 2**32
_MARK = "\u2042"  # stands in a conversation where an opening will


@dataclass(frozen=True)
class SelfWriting:
    """How a model writes a text: sampled at `temperature`, with random numbers that follow from `seed`.

    `openings` is a text whose documents lend it their first tokens. Raises DataError for a temperature that is not
    positive.
    """

    openings: TextSource
    seed: int = 0
    temperature: float = 1.0

    def __post_init__(self) -> None:
        if not self.temperature > 0:
            raise DataError(f"temperature {self.temperature} is not positive")

    def describe(self, num_sequences: int, sequence_length: int) -> str:
        """Say in words what was written, for the record of a conversion."""
        return (
            f"written by the model itself: {num_sequences} sequences of {sequence_length} tokens, temperature "
            f"{self.temperature:g}, seed {self.seed}, from BOS, from first tokens of {self.openings.path.name} and "
            "through the chat template where there is one"
        )


def write_calibration_text(
    source: Source,
    writing: SelfWriting,
    *,
    num_tokens: int,
    sequence_length: int,
    hardware: Hardware,
    progress: Callable[[int], object] = lambda num_tokens: None,
) -> CalibrationText:
    """Let the model write `num_tokens` tokens, in whole sequences of `sequence_length`, and at least one sequence.

    A sequence is a stream of documents, as in a text that is read: it begins with a prompt, the model goes on until it
    writes an EOS, and the next prompt follows. Prompts are in turn BOS (EOS for a tokenizer that has no BOS), the first
    16 tokens of a document of `writing.openings`, and the same as a user's message in the chat template, if there is
    one. Nothing is padded: a sequence has a token of a prompt, or one that was sampled, at every place. Each sequence
    has random numbers of its own, which depend on the seed and its number only.

    The model is in memory whole, in bf16 or float32 as `hardware` says, with a cache of 4 GiB at most. `progress` is
    called with how many tokens were written since. Raises DataError for a tokenizer or openings that cannot be used,
    UnsupportedError for a model that is no decoder or whose logits are not finite.
    """
    import torch

    directory = source.checkpoint.directory
    tokenizer = load_tokenizer(directory)
    model = load_model(
        directory, dtype=torch.bfloat16 if hardware.precision == "bf16" else torch.float32, device=hardware.device
    )
    num_sequences = max(num_tokens // sequence_length, 1)
    prompts = _Prompts.of(tokenizer, writing.openings, name=source.name)
    TokenIdCheck.of(directory, tokenizer)(list(chain.from_iterable(prompts.turns)), writing.openings.location)
    ends = _end_ids(model, tokenizer)
    known = min(model.config.get_text_config().vocab_size, max(tokenizer.get_vocab().values()) + 1)
    generator = torch.Generator().manual_seed(writing.seed)
    numbers = torch.rand(num_sequences, sequence_length, generator=generator, dtype=torch.float64)
    streams = [prompts.stream(number, num_sequences) for number in range(num_sequences)]
    shape = source.shape
    cached = kv_cache_bytes_per_token(
        num_layers=shape.num_key_value_layers,
        values=shape.cached_values,
        bytes_per_value=2 if hardware.precision == "bf16" else 4,
    )
    rows = max(min(_MAX_ROWS, _MAX_CACHE_BYTES // (cached * sequence_length)), 1)
    written = []
    for begin in range(0, num_sequences, rows):
        part = slice(begin, begin + rows)
        written.append(
            _write(
                model,
                streams[part],
                numbers[part],
                ends=ends,
                num_known=known,
                temperature=writing.temperature,
                name=source.name,
                progress=progress,
            )
        )
    return CalibrationText(torch.cat(written), writing.describe(num_sequences, sequence_length))


@dataclass(frozen=True)
class _Prompts:
    """What documents begin with, one after another and then again; `start` is what a sequence may begin with."""

    turns: tuple[tuple[int, ...], ...]

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase, openings: TextSource, *, name: str) -> _Prompts:
        start = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
        before = [tokenizer.bos_token_id] if adds_bos(tokenizer) else []
        around = _chat_template(tokenizer, name=name)
        turns: list[tuple[int, ...]] = []
        for document in read_documents(openings):
            # 16 tokens are seldom longer, and the rest of a book need not be encoded
            text = document[: 16 * _OPENING_TOKENS]
            opening = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"][:_OPENING_TOKENS]
            if start is not None:
                turns.append((start,))
            turns.append((*before, *opening))
            if around is not None:
                turns.append((*around[0], *opening, *around[1]))
        return cls(tuple(turns))

    def stream(self, number: int, num_streams: int) -> Iterator[tuple[int, ...]]:
        """The prompts of one of several sequences, which take them in turn."""
        for round_ in count():
            yield self.turns[(number + round_ * num_streams) % len(self.turns)]


def _chat_template(tokenizer: PreTrainedTokenizerBase, *, name: str) -> tuple[list[int], list[int]] | None:
    """The token ids before and behind a user's message, up to where the answer begins; None without a template."""
    if not tokenizer.chat_template:
        return None
    messages = [{"role": "user", "content": _MARK}]
    try:
        text = str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))
    except Exception as error:  # a template is a program, which says in its own words what it does not take
        raise DataError(f"{name}: the chat template does not take a user's message ({in_one_line(error)})") from error
    before, mark, behind = text.partition(_MARK)
    if not mark:
        raise DataError(f"{name}: the chat template leaves out the user's message")
    first, second = (tokenizer(part, add_special_tokens=False, verbose=False)["input_ids"] for part in (before, behind))
    return first, second


def _end_ids(model: Any, tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """The ids that end a document: the tokenizer's EOS, and those that generation stops at."""
    configured = getattr(model.generation_config, "eos_token_id", None)
    ids = configured if isinstance(configured, list) else [configured]
    return frozenset(number for number in [tokenizer.eos_token_id, *ids] if number is not None)


def _write(
    model: Any,
    streams: Sequence[Iterator[tuple[int, ...]]],
    numbers: Tensor,
    *,
    ends: frozenset[int],
    num_known: int,
    temperature: float,
    name: str,
    progress: Callable[[int], object],
) -> Tensor:
    """Write one token of every sequence after another, (sequences, sequence_length), with a random number for each."""
    import torch

    from ..runtime.transformers_interface import CACHE_NAME, cache_of

    waiting = [deque(next(stream)) for stream in streams]
    written = torch.empty(numbers.shape, dtype=torch.int64)
    sampled: list[int] = []
    cache: dict[str, Any] = {}
    with torch.inference_mode():
        for place in range(numbers.shape[1]):
            for row, prompt in enumerate(waiting):
                if prompt:
                    written[row, place] = prompt.popleft()
                    continue
                written[row, place] = token = sampled[row]
                if token in ends:
                    prompt.extend(next(streams[row]))
                    if prompt[0] == token:  # a tokenizer whose BOS is its EOS
                        prompt.popleft()
            if place + 1 < numbers.shape[1]:
                outputs = model(input_ids=written[:, place : place + 1].to(model.device), use_cache=True, **cache)
                cache = {CACHE_NAME: cache_of(outputs)}
                sampled = _sample(outputs.logits[:, -1, :num_known], numbers[:, place + 1], temperature, name).tolist()
            progress(len(streams))
    return written


def _sample(logits: Tensor, numbers: Tensor, temperature: float, name: str) -> Tensor:
    """An id for each row of logits, (rows, ids): where its number in [0, 1) falls in the distribution."""
    import torch

    if logits.device.type == "mps":  # which has no float64
        logits = logits.cpu()
    cumulated = (logits.float() / temperature).softmax(-1).double().cumsum(-1)
    total = cumulated[:, -1:]
    if not total.isfinite().all():
        raise UnsupportedError(
            f"{name}: its logits are not finite, so that it cannot write",
            hint="give a text, and fp32 if this was bf16",
            settings=("data", "precision"),
        )
    ids = torch.searchsorted(cumulated, numbers[:, None].to(total) * total, right=True)
    possible = (cumulated < total).sum(-1, keepdim=True)  # the last id with a probability, where rounding leads past it
    return torch.minimum(ids, possible).squeeze(-1)
