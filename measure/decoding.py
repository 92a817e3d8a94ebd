"""A model of transformers that reads a prompt and decodes after it, with a clock and a look at its memory beside it."""

from __future__ import annotations

import ctypes
import inspect
import os
import platform
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import StaticCache

from ..convert.errors import UnsupportedError, in_one_line, is_out_of_memory
from ..convert.runtime.transformers_interface import CACHE_NAME, cache_of

__all__ = ["Decoder", "Turn", "cache_bytes", "describe_machine", "random_prompt", "versions"]

_STATUS = Path("/proc/self/status")
_SECONDS_BETWEEN_LOOKS = 0.002


@dataclass(frozen=True)
class Turn:
    """What a model took for a prompt and the steps after it.

    prompt and steps: seconds, those of the steps without the ones that warm up. cache_bytes and last_cache_bytes: the
    live cache when it held the prompt, and at the end. peak_bytes: the most memory that the turn took at a time; None
    where it was not measured.
    """

    prompt: float
    steps: tuple[float, ...]
    cache_bytes: int
    last_cache_bytes: int
    peak_bytes: int | None


class Decoder:
    """A loaded model that takes turns. `name` is what errors call it, and `compiled` says whether its steps are.

    Raises UnsupportedError where it has to be compiled and its class, or this process, does not allow it.
    """

    def __init__(self, model: Any, *, name: str, compiled: bool) -> None:
        self.model = model
        self.name = name
        self.compiled = compiled
        self.device: torch.device = model.device
        self.dtype = str(model.dtype).removeprefix("torch.")
        self.weight_bytes = _bytes_of((*model.parameters(), *model.buffers()))
        self.read_weight_bytes = self.weight_bytes - _bytes_of(_looked_up(model))
        self.notes = tuple(f"{name}: {note}" for note in _notes(model))
        self._last_only = {"logits_to_keep": 1} if "logits_to_keep" in _parameters(model) else {}
        self._step = model
        self._cache: Any = None  # a static one stays from turn to turn, since compiled code knows its place in memory
        if compiled:
            self._check_compilable()

    def forget(self) -> None:
        """Drop the cache and the code that was compiled for it, before a turn of another size."""
        self._cache = None
        self._step = self.model
        if self.compiled:
            torch.compiler.reset()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def turn(self, prompt: Tensor, *, tokens: int, warm_up: int, prefill: bool, with_memory: bool) -> Turn:
        """Read the prompt, (B, T), and decode `warm_up` + `tokens` tokens greedily after it.

        Without `prefill` the cache is filled as if the prompt had been read. `with_memory` looks at the memory too,
        which disturbs the clock. Raises UnsupportedError for a class that keeps no cache that can be counted, or cannot
        be compiled; memory that runs out is raised as it is.
        """
        try:
            with torch.no_grad():
                if not with_memory:
                    return self._turn(prompt, tokens, warm_up, prefill)
                held = 0
                if self.compiled and self.device.type == "cpu":  # the compiler's memory is none of the model's
                    held = self._turn(prompt, tokens, warm_up, prefill).cache_bytes
                with _peak_memory(self.device) as peak:
                    turn = self._turn(prompt, tokens, warm_up, prefill)
                return replace(turn, peak_bytes=None if peak.bytes is None else held + peak.bytes)
        except Exception as error:  # what compilers say of a class has no words of its own
            if not self.compiled or isinstance(error, UnsupportedError) or is_out_of_memory(error):
                raise
            raise self._uncompilable(in_one_line(error)) from error

    def _turn(self, prompt: Tensor, tokens: int, warm_up: int, prefill: bool) -> Turn:
        cache = self._empty_cache(prompt.shape[1] + warm_up + tokens)
        begin = self._now()
        outputs = self._read(prompt, cache) if prefill else self._fill(prompt, cache)
        token = outputs.logits[:, -1:].argmax(-1)  # (B, 1)
        after_prompt = self._now()
        cache = self._cache_of(outputs, prompt.shape[1])
        first = cache_bytes(cache)
        del outputs
        if self.compiled and self._step is self.model:
            self._step = self._compile()
        seconds = []
        for _ in range(warm_up + tokens):
            before = self._now()
            if self.compiled:
                torch.compiler.cudagraph_mark_step_begin()
            outputs = self._step(input_ids=token, use_cache=True, **{CACHE_NAME: cache})
            token = outputs.logits[:, -1:].argmax(-1)
            seconds.append(self._now() - before)
        timed = tuple(seconds[warm_up:])
        return Turn(after_prompt - begin, timed, first, cache_bytes(cache), None)

    def _read(self, prompt: Tensor, cache: Any) -> Any:
        given = {} if cache is None else {CACHE_NAME: cache}
        return self.model(input_ids=prompt, use_cache=True, **given, **self._last_only)

    def _fill(self, prompt: Tensor, cache: Any) -> Any:
        """Read the first token, and keep its keys and values as often as the prompt has tokens."""
        outputs = self._read(prompt[:, :1], cache)
        cache = self._cache_of(outputs, 1)
        for number, layer in enumerate(cache.layers):
            states = list(_tensors(vars(layer)))
            if not states:
                continue  # it reads another layer's
            keys, values = getattr(layer, "keys", None), getattr(layer, "values", None)
            if keys is None or values is None or len(states) > 2:
                raise UnsupportedError(
                    f"{self.name}: layer {number} keeps something else than keys and values for each token, which "
                    "cannot be filled in",
                    hint="let it read the prompts",
                    settings=("prefill",),
                )
            more = prompt.shape[1] - 1
            if more:
                copies = [part[..., :1, :].expand(*part.shape[:-2], more, -1) for part in (keys, values)]
                cache.update(*copies, number)
        return outputs

    def _empty_cache(self, length: int) -> Any:
        """None where the class makes its own, which grows; else one of that many tokens."""
        if not self.compiled:
            return None
        if self._cache is None:
            self._cache = StaticCache(config=self.model.config, max_cache_len=length)
        else:
            self._cache.reset()
        return self._cache

    def _cache_of(self, outputs: Any, num_tokens: int) -> Any:
        """The cache of the outputs, which must hold that many tokens."""
        try:
            cache = cache_of(outputs)
            held = int(cache.get_seq_length())
            layers = cache.layers
        except AttributeError as error:
            reason = f"{self.name}: {type(self.model).__name__} keeps no cache of keys and values that can be counted"
            raise UnsupportedError(reason) from error
        if held != num_tokens or not layers:
            raise UnsupportedError(
                f"{self.name}: the cache of {type(self.model).__name__} holds {held} tokens after {num_tokens}"
            )
        return cache

    def _check_compilable(self) -> None:
        if not getattr(self.model, "_can_compile_fullgraph", False):
            raise self._uncompilable("transformers does not compile this class")
        if os.environ.get("TORCHDYNAMO_DISABLE", "0") == "1" or os.environ.get("TORCH_COMPILE_DISABLE", "0") == "1":
            raise self._uncompilable("the environment of this process turns torch.compile off")

    def _compile(self) -> Any:
        # whole and for one size, so that nothing falls back to slower code without an error
        mode = "reduce-overhead" if self.device.type == "cuda" else None
        return torch.compile(self.model, fullgraph=True, dynamic=False, mode=mode)

    def _uncompilable(self, reason: str) -> UnsupportedError:
        return UnsupportedError(
            f"{self.name}: {type(self.model).__name__} cannot be compiled over a static cache ({reason})",
            hint="do not compile it",
            settings=("compile",),
        )

    def _now(self) -> float:
        if self.device.type != "cpu":
            torch.accelerator.synchronize(self.device)
        return time.perf_counter()


def random_prompt(decoder: Decoder, batch: int, context: int) -> Tensor:
    """Token ids, (B, T), the same for every model of this vocabulary."""
    vocab_size = decoder.model.get_input_embeddings().weight.shape[0]
    ids = torch.randint(vocab_size, (batch, context), generator=torch.Generator().manual_seed(0))
    return ids.to(decoder.device)


def cache_bytes(cache: Any) -> int:
    """The bytes of the tensors that the layers of a live cache hold, keys, values and any other state."""
    return _bytes_of(part for layer in cache.layers for part in _tensors(vars(layer)))


def versions() -> dict[str, str]:
    """The versions of what a timing depends on."""
    return {name: version(name) for name in ("kvconvert", "torch", "transformers")} | {
        "python": platform.python_version()
    }


def describe_machine(device: torch.device) -> dict[str, Any]:
    """The device by its name, and the threads that torch uses on a CPU."""
    if device.type == "cpu":
        return {"device": _processor(), "threads": torch.get_num_threads()}
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    return {"device": name, "threads": None}


def _processor() -> str:
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def _parameters(model: Any) -> Iterable[str]:
    return inspect.signature(model.forward).parameters


def _looked_up(model: Any) -> list[Tensor]:
    """The tables of which a step reads a row for each token, unless the head reads the whole of them too."""
    head = model.get_output_embeddings()
    tables = (module.weight for module in model.modules() if isinstance(module, nn.Embedding))
    return [table for table in tables if head is None or table is not head.weight]


def _notes(model: Any) -> Iterator[str]:
    """What a reader of the timings of a model should know of its class."""
    if any("expert" in name for name, _ in model.named_parameters()):
        yield "all experts count as read in a step, and of a small batch some are not, so the bound is rough"
    if getattr(model.config.get_text_config(decoder=True), "kv_lora_rank", None):
        yield "transformers expands the latent of all tokens in every step; engines with kernels for it do not"


def _tensors(value: Any) -> Iterator[Tensor]:
    """The tensors of one dimension or more among the attributes of a layer of a cache; counters have none."""
    if isinstance(value, Tensor):
        if value.dim() and value.numel():
            yield value
    elif isinstance(value, dict):
        for each in value.values():
            yield from _tensors(each)
    elif isinstance(value, list | tuple):
        for each in value:
            yield from _tensors(each)


def _bytes_of(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in {id(each): each for each in tensors}.values())


class _Peak:
    bytes: int | None = None


@contextmanager
def _peak_memory(device: torch.device) -> Iterator[_Peak]:
    """The most memory that the block takes at a time, beyond what is taken when it begins; None where none can tell.

    On a GPU that is what torch allocates, on a CPU the private memory of the process, as Linux counts it.
    """
    peak = _Peak()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        start = torch.cuda.memory_allocated(device)
        yield peak
        peak.bytes = torch.cuda.max_memory_allocated(device) - start
    elif device.type == "cpu" and _STATUS.exists():
        with suppress(OSError, AttributeError):  # what was freed before would not be asked of the system again
            ctypes.CDLL(None).malloc_trim(0)
        start = highest = _private_bytes()
        ended = threading.Event()

        def look() -> None:
            nonlocal highest
            while not ended.wait(_SECONDS_BETWEEN_LOOKS):
                highest = max(highest, _private_bytes())

        observer = threading.Thread(target=look, daemon=True)
        observer.start()
        try:
            yield peak
        finally:
            highest = max(highest, _private_bytes())
            ended.set()
            observer.join()
        peak.bytes = highest - start
    else:
        yield peak


def _private_bytes() -> int:
    status = dict(line.split(":", 1) for line in _STATUS.read_text().splitlines())
    return int(status["RssAnon"].split()[0]) * 1024
