"""How much memory a checkpoint's weights and caches take, now and after each conversion, and how many sequences fit."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from ..algebra.attention_shape import AttentionShape
from ..algebra.kv_cache import CACHE_FORMATS, CacheFormat, num_blocks
from ..architectures.source import Source
from ..checkpoint.opening import open_checkpoint
from ..checkpoint.tensors import Checkpoint
from ..errors import InputError
from ..methods.cla import Cla
from ..methods.gqa import Gqa
from ..methods.mla import Mla
from ..translations.routes import targets
from .engines import cached_by_transformers
from .inspection import Inspection, Target, inspect_checkpoint

__all__ = ["MEMORY_FRACTION", "CacheCost", "CachePlan", "PlannedModel", "plan_cache"]

MEMORY_FRACTION = 0.9
"""The part of a memory that weights and caches may take, as with a gpu_memory_utilization of 0.9 in vLLM."""

_Method = Gqa | Cla | Mla


@dataclass(frozen=True)
class CacheCost:
    """What the cache of a model takes in one format.

    `bytes_per_sequence` is for one sequence of the plan's length, `total_bytes` for the weights and the cache of its
    batch. `sequences` is how many fit, and `blocks` are those that vLLM makes of what the weights leave, of
    `VLLM_BLOCK_TOKENS` tokens each. Both are None without a memory, and `blocks` also with windows or an encoder, of
    which vLLM's blocks depend on how it is started.
    """

    bytes_per_sequence: int
    total_bytes: int
    sequences: int | None = None
    blocks: int | None = None


@dataclass(frozen=True)
class PlannedModel:
    """A model as it is, or as a conversion would make it: `name` is what the name of the result ends with.

    `command` and `settings` are the conversion, by the names of the method's fields; None and empty for the model as it
    is. `weights_bytes` are those of its tensors, as they are stored. `costs` has an entry for each `CacheFormat` that
    can hold the cache. `bytes_per_sequence_in_transformers` is what transformers allocates in 16 bits, more than
    `costs` say where its class caches more than it reads.
    """

    name: str
    model_type: str
    attention: str
    weights_bytes: int
    costs: dict[str, CacheCost]
    bytes_per_sequence_in_transformers: int
    command: str | None = None
    settings: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class CachePlan:
    """The memory of a model and of what it can become, for `batch` sequences of `context_length` tokens each.

    The first of `models` is the model as it is. `usable_bytes` are `memory_fraction` of `memory_bytes`, which weights
    and caches share; activations and an engine's own memory are counted nowhere. `encoder_length` is 0 for a model
    without an encoder. `notes` say what a person has to know to read the figures.
    """

    inspection: Inspection
    context_length: int
    batch: int
    encoder_length: int
    memory_bytes: int | None
    memory_fraction: float
    usable_bytes: int | None
    formats: tuple[CacheFormat, ...]
    models: tuple[PlannedModel, ...]
    notes: tuple[str, ...]


@dataclass(frozen=True)
class _Demand:
    """What is to be held: sequences, their tokens, and the memory there is for them."""

    context_length: int
    encoder_length: int
    batch: int
    usable_bytes: int | None


def plan_cache(
    model: str | Path,
    *,
    context_length: int | None = None,
    batch: int = 1,
    memory_bytes: int | None = None,
    memory_fraction: float = MEMORY_FRACTION,
    revision: str | None = None,
) -> CachePlan:
    """Plan the memory of the checkpoint in a directory or of a hub id, and of each conversion that is possible.

    Reads headers only. context_length: tokens of each sequence; by default as for `inspect`. batch: sequences at once.
    memory_bytes: that of one GPU, of which `memory_fraction` is used; without it nothing is said of what fits. Raises
    InputError for a number that is not positive, or a fraction above 1; otherwise as `inspect` does.
    """
    for name, number in {"context_length": context_length, "batch": batch, "memory_bytes": memory_bytes}.items():
        if number is not None and number < 1:
            raise InputError(f"{name} = {number}: use 1 or more")
    if not 0 < memory_fraction <= 1:
        raise InputError(f"memory_fraction = {memory_fraction}: use more than 0 and at most 1")
    usable = None if memory_bytes is None else int(memory_bytes * memory_fraction)
    with open_checkpoint(model, revision=revision, headers_only=True) as checkpoint:
        inspection = inspect_checkpoint(checkpoint, context_length=context_length)
        source = next(view for view in targets(checkpoint) if isinstance(view, Source))
        encoder_length = _encoder_length(source, inspection.context_length)
        demand = _Demand(inspection.context_length, encoder_length, batch, usable)
        models = (
            _as_it_is(checkpoint, source, demand),
            *(_converted(checkpoint, command, method, demand) for command, method in _conversions(inspection)),
        )
    return CachePlan(
        inspection=inspection,
        context_length=demand.context_length,
        batch=batch,
        encoder_length=encoder_length,
        memory_bytes=memory_bytes,
        memory_fraction=memory_fraction,
        usable_bytes=usable,
        formats=CACHE_FORMATS,
        models=models,
        notes=tuple(_notes(inspection, source)),
    )


def _encoder_length(source: Source, context_length: int) -> int:
    """The encoder's tokens: as many as the decoder's, or the fixed number of one that reads sound (Whisper)."""
    if not source.shape.cross_attention:
        return 0
    return int(source.checkpoint.full_config.get("max_source_positions") or context_length)


def _conversions(inspection: Inspection) -> Iterator[tuple[str, _Method]]:
    """What the checkpoint can become: each number of heads, pairs of layers, latents with fast kernels."""
    for target in inspection.targets:
        for method in _methods(target, inspection.num_key_value_heads) if target.possible else ():
            yield target.command, method


def _methods(target: Target, num_key_value_heads: int) -> Iterator[_Method]:
    for number in sorted(target.groups, reverse=True):
        yield Gqa(number)
    if target.share is not None:
        yield Cla(share=2)
        if num_key_value_heads > 1:
            yield Cla(share=2, num_key_value_heads=1)
    for rank, rope_dim, v_head_dim in target.kernel_sizes:
        latent = Mla(rank, rope_dim, v_head_dim=v_head_dim)
        yield replace(latent, latent_norm="exact") if target.latent_norm else latent


def _as_it_is(checkpoint: Checkpoint, source: Source, demand: _Demand) -> PlannedModel:
    model_type = str(checkpoint.config["model_type"])
    weights_bytes = sum(info.num_bytes for info in checkpoint.tensors.values())
    return _planned("as it is", model_type, checkpoint.full_config, source.shape, weights_bytes, demand)


def _converted(checkpoint: Checkpoint, command: str, method: _Method, demand: _Demand) -> PlannedModel:
    """The result of a conversion that `inspect` has found to be possible."""
    source = method.source(checkpoint)
    plan = method.resolve(source).plan(source)
    name = method.suffix(source)
    settings = {each.name: value for each in fields(method) if (value := getattr(method, each.name)) != each.default}
    planned = _planned(name, plan.model_type, plan.config, plan.result, plan.bytes_out, demand)
    return replace(planned, command=command, settings=settings)


def _planned(
    name: str, model_type: str, config: Mapping[str, Any], shape: AttentionShape, weights_bytes: int, demand: _Demand
) -> PlannedModel:
    lengths = demand.context_length, demand.encoder_length
    return PlannedModel(
        name=name,
        model_type=model_type,
        attention=shape.kind,
        weights_bytes=weights_bytes,
        costs={each.name: _cost(each, shape, weights_bytes, demand) for each in CACHE_FORMATS if each.holds(shape)},
        bytes_per_sequence_in_transformers=CACHE_FORMATS[0].sequence_bytes(
            cached_by_transformers(model_type, config, shape), *lengths
        ),
    )


def _cost(cache_format: CacheFormat, shape: AttentionShape, weights_bytes: int, demand: _Demand) -> CacheCost:
    sequence_bytes = cache_format.sequence_bytes(shape, demand.context_length, demand.encoder_length)
    cost = CacheCost(sequence_bytes, weights_bytes + demand.batch * sequence_bytes)
    if demand.usable_bytes is None:
        return cost
    left = max(0, demand.usable_bytes - weights_bytes)
    in_blocks = not shape.cross_attention and not any(shape.key_value_windows)
    blocks = num_blocks(left, bytes_per_token=cache_format.bytes_per_token(shape)) if in_blocks else None
    return replace(cost, sequences=left // sequence_bytes, blocks=blocks)


def _notes(inspection: Inspection, source: Source) -> Iterator[str]:
    longest = source.longest_context
    if longest is not None and inspection.context_length > longest:
        yield f"the model takes {longest} tokens, and {inspection.context_length} are planned"
    if inspection.dtype == "F32":
        yield "weights are counted in 32 bits, as they are stored: an engine that holds them in 16 bits takes half"
