"""The speed and the memory of a checkpoint, alone or beside its original: what the command calls."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..convert.architectures.context import longest_context
from ..convert.cache_check import check_runtime
from ..convert.checkpoint.loading import load_model
from ..convert.checkpoint.opening import open_checkpoint
from ..convert.conversion import Progress, no_progress
from ..convert.device import default_device
from ..convert.errors import InputError, UnsupportedError, is_out_of_memory
from .speed import (
    Benchmark,
    BenchmarkSettings,
    Durations,
    Gain,
    Point,
    Rounds,
    Timing,
    largest_batch,
    mean_cache_bytes,
)

if TYPE_CHECKING:
    from .decoding import Decoder, Turn

__all__ = ["benchmark", "benchmark_models"]

_DEFAULTS = BenchmarkSettings()


def benchmark(
    model: str | Path,
    *,
    against: str | Path | None = None,
    settings: BenchmarkSettings = _DEFAULTS,
    revision: str | None = None,
    progress: Progress = no_progress,
) -> Benchmark:
    """Time a checkpoint, a directory or a hub id, alone or in turn with its original, on random tokens.

    Raises InputError (of it CheckpointError and UnsupportedError) for what cannot be read, a context longer than a
    model takes, two vocabularies, a class that cannot be compiled, and an engine that is not installed.
    """
    with ExitStack() as stack:
        opened = [stack.enter_context(open_checkpoint(model, revision=revision))]
        opened += [stack.enter_context(open_checkpoint(against))] if against is not None else []
        directories = [checkpoint.directory for checkpoint in opened]
        configs = [checkpoint.config for checkpoint in opened]
    names = [str(model), *([str(against)] if against is not None else [])]
    _check_lengths(directories, names, settings)
    vocabularies = [config.get("vocab_size") for config in configs]
    if len({size for size in vocabularies if size is not None}) > 1:
        sizes = f"{vocabularies[0]} tokens, and that of {names[1]} {vocabularies[1]}"
        raise InputError(
            f"the vocabulary of {names[0]} has {sizes}, so that they differ in more than their cache",
            hint="name the original of this model",
            settings=("against",),
        )
    if settings.engine == "vllm":
        from .vllm_bench import benchmark_vllm

        return benchmark_vllm(directories, configs, settings, names=names, progress=progress)
    import torch

    dtype = settings.dtype if settings.dtype != "auto" else _auto_dtype()
    for directory in directories:
        check_runtime(directory)
    loaded = [
        load_model(directory, dtype=dtype if dtype == "auto" else getattr(torch, dtype), device=default_device())
        for directory in directories
    ]
    return benchmark_models(loaded[0], loaded[1] if loaded[1:] else None, settings, names=names, progress=progress)


def benchmark_models(
    model: Any,
    original: Any | None,
    settings: BenchmarkSettings,
    *,
    names: Sequence[str],
    progress: Progress = no_progress,
) -> Benchmark:
    """Time models of transformers that are loaded, on the device where they are.

    names: what errors call them. Raises UnsupportedError for a class that cannot be compiled or keeps something else
    than keys and values where the settings need them alone, and InputError for models of two precisions. Memory that
    runs out makes a point without a timing; where no point has one, its error is raised.
    """
    from .decoding import Decoder, describe_machine, versions

    decoders = [
        Decoder(each, name=name, compiled=settings.compile)
        for each, name in zip([model, *([] if original is None else [original])], names, strict=True)
    ]
    dtypes = [decoder.dtype for decoder in decoders]
    if len(set(dtypes)) > 1:
        raise InputError(
            f"{names[0]} is {dtypes[0]} and {names[1]} {dtypes[1]}, so that they differ in more than their cache",
            hint="say in which precision both run",
            settings=("dtype",),
        )
    shapes = settings.shapes
    with progress("benchmarking", len(shapes) * len(decoders) * (1 + settings.repeats)) as advance:
        points = tuple(_points(decoders, shapes, settings, advance))
    notes = tuple(note for decoder in decoders for note in decoder.notes)
    return Benchmark(
        dtypes[0], describe_machine(decoders[0].device), versions(), _method(settings, len(decoders)), notes, points
    )


def _points(
    decoders: Sequence[Decoder],
    shapes: Sequence[tuple[int, int]],
    settings: BenchmarkSettings,
    advance: Callable[[int], object],
) -> Iterator[Point]:
    from .decoding import random_prompt

    missing: Exception | None = None
    found = False
    for batch, context in shapes:
        prompt = random_prompt(decoders[0], batch, context)
        turns, error = _turns(decoders, prompt, settings, advance)
        missing = error or missing
        found = found or any(turns)
        for decoder in decoders:
            decoder.forget()
        yield _point(batch, context, decoders, turns, settings)
    if not found and missing is not None:
        raise missing


def _turns(
    decoders: Sequence[Decoder], prompt: Any, settings: BenchmarkSettings, advance: Callable[[int], object]
) -> tuple[list[list[Turn]], Exception | None]:
    """The turns of each model: the first warms up and is measured for memory, the others are timed; none if it failed.

    The second of the models is the original, and takes its turn first, so that rounds go A B A B.
    """

    def take(decoder: Decoder, *, with_memory: bool) -> Turn:
        return decoder.turn(
            prompt,
            tokens=settings.tokens,
            warm_up=settings.warm_up,
            prefill=settings.prefill,
            with_memory=with_memory,
        )

    turns: list[list[Turn]] = [[] for _ in decoders]
    failed: dict[int, Exception] = {}
    for number in range(1 + settings.repeats):
        for which in reversed(range(len(decoders))):
            if which not in failed:
                try:
                    turns[which].append(take(decoders[which], with_memory=number == 0))
                except Exception as error:
                    if not is_out_of_memory(error):
                        raise
                    failed[which] = error.with_traceback(None)  # whose frames hold what was allocated
                    turns[which] = []
                    decoders[which].forget()
            advance(1)
    return turns, next(iter(failed.values()), None)


def _point(
    batch: int, context: int, decoders: Sequence[Decoder], turns: Sequence[list[Turn]], settings: BenchmarkSettings
) -> Point:
    timings = [
        _timing(batch, context, decoder, taken, settings) if taken else None
        for decoder, taken in zip(decoders, turns, strict=True)
    ]
    result, original = timings[0], timings[1] if timings[1:] else None
    decode_gain = prefill_gain = None
    if result is not None and original is not None:
        assert result.step_bytes is not None
        assert original.step_bytes is not None
        after, before = (Rounds(tuple(turn.steps for turn in taken[1:])) for taken in turns)
        decode_gain = Gain.between(before, after, bound=original.step_bytes / result.step_bytes)
        if settings.prefill:
            after, before = (Rounds(tuple((turn.prompt,) for turn in taken[1:])) for taken in turns)
            prefill_gain = Gain.between(before, after)
    return Point(batch, context, result, original, decode_gain, prefill_gain)


def _timing(batch: int, context: int, decoder: Decoder, turns: list[Turn], settings: BenchmarkSettings) -> Timing:
    memory, *timed = turns
    decode = Rounds(tuple(turn.steps for turn in timed)).durations
    prefill = Durations.of([turn.prompt for turn in timed]) if settings.prefill else None
    cached = mean_cache_bytes(
        memory.cache_bytes, memory.last_cache_bytes, warm_up=settings.warm_up, tokens=settings.tokens
    )
    fits = None
    if settings.memory_bytes is not None:
        fits = largest_batch(
            settings.memory_bytes, weight_bytes=decoder.weight_bytes, sequence_bytes=memory.cache_bytes // batch
        )
    return Timing(
        decode=decode,
        decode_tokens_per_second=batch / decode.median,
        prefill=prefill,
        prefill_tokens_per_second=None if prefill is None else batch * context / prefill.median,
        weight_bytes=decoder.weight_bytes,
        cache_bytes=memory.cache_bytes,
        step_bytes=decoder.read_weight_bytes + round(cached),
        peak_bytes=None if memory.peak_bytes is None else decoder.weight_bytes + memory.peak_bytes,
        largest_batch=fits,
    )


def _method(settings: BenchmarkSettings, num_models: int) -> str:
    rounds = f"{settings.repeats} rounds" if settings.repeats > 1 else "1 round"
    rounds += ", the models in turn," if num_models > 1 else ""
    steps = f"{settings.tokens} steps timed after {settings.warm_up} that warm up"
    cache = "compiled decoding step over a static cache" if settings.compile else "eager"
    prompt = "prompts of random tokens" if settings.prefill else "a cache filled with copies of one token's state"
    return f"transformers, {cache}; {rounds} of {steps}; {prompt}"


def _auto_dtype() -> str:
    return "float32" if default_device().type == "cpu" else "auto"


def _check_lengths(directories: Sequence[Path], names: Sequence[str], settings: BenchmarkSettings) -> None:
    """Raise UnsupportedError where the longest context and what is decoded after it is more than a model takes."""
    needed = max(settings.contexts) + settings.num_new_tokens
    for directory, name in zip(directories, names, strict=True):
        longest = longest_context(directory)
        if longest is not None and needed > longest:
            room = longest - settings.num_new_tokens
            raise UnsupportedError(
                f"{name} takes {longest} tokens, and a context of {max(settings.contexts)} with "
                f"{settings.num_new_tokens} decoded tokens after it has {needed}",
                hint=f"use a context of {room} or less" if room > 0 else "decode fewer tokens",
                settings=("contexts",) if room > 0 else ("tokens", "warm_up"),
            )
