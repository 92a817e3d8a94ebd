"""What a benchmark times, and what comes out of it: data, and the arithmetic between the two."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from typing import Annotated, Any, Literal, get_args

from typing_extensions import Doc

from ..convert.errors import InputError

__all__ = [
    "Benchmark",
    "BenchmarkSettings",
    "Durations",
    "EngineCache",
    "Gain",
    "Point",
    "Rounds",
    "Timing",
    "largest_batch",
    "mean_cache_bytes",
]

Engine = Literal["transformers", "vllm"]
Dtype = Literal["auto", "float32", "bfloat16", "float16"]


@dataclass(frozen=True)
class BenchmarkSettings:
    """What is timed, and how often.

    Raises InputError for sizes that cannot be, names that are not known, and settings that exclude each other.
    """

    batches: Annotated[tuple[int, ...], Doc("Sequences at once; repeatable, or a list as 1,8,64.")] = (1,)
    contexts: Annotated[tuple[int, ...], Doc("Tokens of the prompt; repeatable, or a list as 1024,8192.")] = (1024,)
    tokens: Annotated[int, Doc("Decoded tokens that are timed in each round.")] = 32
    warm_up: Annotated[int, Doc("Decoded tokens before them, which do not count; with vLLM, whole runs.")] = 4
    repeats: Annotated[int, Doc("Rounds; in each, original and result take their turn.")] = 5
    prefill: Annotated[
        bool,
        Doc("Time decoding only: fill the cache with copies of one token's keys and values, where prompts take long."),
    ] = True
    compile: Annotated[bool, Doc("Compile the decoding step, over a static cache.")] = False
    engine: Annotated[Engine, Doc("What runs the models; vllm: `vllm bench latency`, where vLLM is installed.")] = (
        "transformers"
    )
    dtype: Annotated[Dtype, Doc("Precision of the models; auto: float32 on a CPU, the checkpoint's on a GPU.")] = "auto"
    memory_bytes: Annotated[
        int | None, Doc("Say how many sequences fit into so much memory, weights and cache alone, for example 80GB.")
    ] = None

    def __post_init__(self) -> None:
        for name in ("batches", "contexts"):
            values = getattr(self, name)
            if not values:
                raise InputError(f"{name} is empty, expected one number or more")
            if min(values) < 1:
                raise InputError(f"{name} has {min(values)}, expected 1 or more")
        for name, least in (("tokens", 1), ("warm_up", 0), ("repeats", 1), ("memory_bytes", 1)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise InputError(f"{name} is {value}, expected {least} or more")
        for name, known in (("engine", get_args(Engine)), ("dtype", get_args(Dtype))):
            if getattr(self, name) not in known:
                raise InputError(f"{name} is {getattr(self, name)!r}, expected one of {', '.join(known)}")
        if self.engine == "vllm":
            self._check_vllm()

    def _check_vllm(self) -> None:
        reasons = {
            "compile": (self.compile, "it compiles by itself"),
            "prefill": (not self.prefill, "it fills its cache from prompts only"),
            "memory_bytes": (self.memory_bytes is not None, "it says how many sequences fit the memory it has"),
        }
        for name, (given, reason) in reasons.items():
            if given:
                raise InputError(
                    f"vLLM takes no {name}: {reason}", hint="leave out one of the two", settings=("engine", name)
                )

    @property
    def num_new_tokens(self) -> int:
        """The tokens that a turn decodes, counted or not."""
        return self.warm_up + self.tokens

    @property
    def shapes(self) -> list[tuple[int, int]]:
        """The pairs of batch and context that are timed, in order, each once."""
        return list(dict.fromkeys(product(self.batches, self.contexts)))


@dataclass(frozen=True)
class Durations:
    """Durations of one kind in seconds, their median and 90th percentile."""

    median: float
    p90: float
    seconds: tuple[float, ...]

    @classmethod
    def of(cls, seconds: Sequence[float]) -> Durations:
        """The median and the 90th percentile, between the two nearest values, of one duration or more."""
        p90 = statistics.quantiles(seconds, n=10, method="inclusive")[-1] if len(seconds) > 1 else seconds[0]
        return cls(statistics.median(seconds), p90, tuple(seconds))


@dataclass(frozen=True)
class Rounds:
    """The durations of every round, (rounds, durations of each)."""

    seconds: tuple[tuple[float, ...], ...]

    @property
    def durations(self) -> Durations:
        """Those of all rounds together."""
        return Durations.of([each for one in self.seconds for each in one])

    @property
    def medians(self) -> list[float]:
        """The median of each round."""
        return [statistics.median(one) for one in self.seconds]


@dataclass(frozen=True)
class EngineCache:
    """What vLLM says of its cache when it starts; None where its version does not say it.

    `max_concurrency` is how many sequences of `max_model_len` tokens fit at once.
    """

    memory_bytes: int | None = None
    num_tokens: int | None = None
    num_blocks: int | None = None
    max_model_len: int | None = None
    max_concurrency: float | None = None


@dataclass(frozen=True)
class Timing:
    """What one model does at one batch and context.

    decode: seconds of a step, which decodes one token of each sequence. prefill: seconds of a whole batch of prompts.
    cache_bytes: the live cache when it holds the context, from its tensors. step_bytes: what a step has to read, the
    weights and the cache, on average over the steps that were timed. peak_bytes: the weights, and the most that a turn
    took beside them. largest_batch: how many sequences of the context fit the memory that was asked about.
    """

    decode: Durations
    decode_tokens_per_second: float
    prefill: Durations | None
    prefill_tokens_per_second: float | None
    weight_bytes: int | None
    cache_bytes: int | None
    step_bytes: int | None
    peak_bytes: int | None
    largest_batch: int | None
    engine_cache: EngineCache | None = None


@dataclass(frozen=True)
class Gain:
    """How many times faster the result is than its original: the median of the ratios of single rounds.

    least and greatest: of those ratios. bound: the ratio of the bytes that a step has to read; None where no gain
    follows from bytes. of_bound: ratio / bound. A step that reads nothing else cannot gain more than the bound; one
    that copies the cache as it grows, which eager code of transformers does, can, since the larger cache is copied too.
    """

    ratio: float
    least: float
    greatest: float
    bound: float | None
    of_bound: float | None

    @property
    def is_noisy(self) -> bool:
        """Whether the ratios of two rounds differ by more than half of the smaller."""
        return self.greatest > 1.5 * self.least

    @classmethod
    def between(cls, original: Rounds, result: Rounds, *, bound: float | None = None) -> Gain:
        """The gain from the rounds of both, which took turns: what slows the machine down for a while slows both."""
        single = [before / after for before, after in zip(original.medians, result.medians, strict=True)]
        ratio = statistics.median(single)
        return cls(ratio, min(single), max(single), bound, None if bound is None else ratio / bound)


@dataclass(frozen=True)
class Point:
    """One batch and context. A model is None where its memory ran out, and a gain where there is none to speak of."""

    batch: int
    context: int
    result: Timing | None
    original: Timing | None
    decode_gain: Gain | None
    prefill_gain: Gain | None


@dataclass(frozen=True)
class Benchmark:
    """The points, in the order of the settings, and what they depend on.

    `method` says in words how they were timed, `notes` what a reader of them should know.
    """

    dtype: str
    machine: dict[str, Any]
    versions: dict[str, str]
    method: str
    notes: tuple[str, ...]
    points: tuple[Point, ...]


def largest_batch(memory_bytes: int, *, weight_bytes: int, sequence_bytes: int) -> int:
    """How many sequences, with `sequence_bytes` of cache each, fit into the memory beside the weights."""
    return max(0, (memory_bytes - weight_bytes) // sequence_bytes)


def mean_cache_bytes(first: int, last: int, *, warm_up: int, tokens: int) -> float:
    """The cache that a timed step reads on average.

    first and last: its bytes before the first of `warm_up` + `tokens` steps and after the last. Each step adds a token
    to it before it reads it, and those of the warm-up are not timed.
    """
    growth = (last - first) / (warm_up + tokens)
    return first + growth * (warm_up + (tokens + 1) / 2)
