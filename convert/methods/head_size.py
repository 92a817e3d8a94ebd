"""K/V heads of another size than the source's: what a class must hold for them, its config and the heads to merge into.

docs/merging.md says why a few wide heads hold more than as many numbers in heads of the source's size.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from ..algebra.head_merge import SharedHead
from ..algebra.rotations import Rotary
from ..architectures.rotary import read_rotary, rotary_scaling, score_scaling
from ..architectures.source import Source
from ..checkpoint.loading import empty_model
from ..errors import UnsupportedError

__all__ = ["RopeSelection", "check_head_size", "resized_config", "shared_heads", "spread"]

RopeSelection = Literal["source", "default"]
"""The frequencies of a resized head: those of the source, each perhaps several times, or its kind of RoPE as it is."""

_STILL = ("default", "linear", "llama3", "yarn")  # whose frequencies do not depend on the length of the text
_SAME_FREQUENCY = 1e-5  # relative; float32 frequencies differ by about 1e-7


def check_head_size(source: Source, num_key_value_heads: int, head_dim: int) -> None:
    """Raise UnsupportedError where the source cannot get so many K/V heads of so many dims, with the reason."""
    reason, hint = _refusal(source, num_key_value_heads, head_dim)
    if reason:
        raise UnsupportedError(f"{source.name}: head_dim = {head_dim}: {reason}", hint=hint, settings=("head_dim",))


def _refusal(source: Source, num_key_value_heads: int, head_dim: int) -> tuple[str | None, str | None]:
    """Why not, and what would work."""
    checkpoint, architecture, shape = source.checkpoint, source.architecture, source.shape
    model_type, keep = architecture.model_type, "leave head_dim out"
    fixed = architecture.approximation(checkpoint)
    if fixed is None and not architecture.free_values:
        fixed = f"{model_type} computes more of values than sums"
    if fixed is not None:
        return f"{fixed}, so that heads keep their size", keep
    if head_dim < 2 or head_dim % 2:
        return "heads of an odd size fit no engine, and no rotary pairs", f"use {max(2, head_dim + 1)}"
    before = shape.num_key_value_heads * shape.head_dim
    if num_key_value_heads * head_dim >= before:
        most = (before - 1) // num_key_value_heads
        return (
            f"{num_key_value_heads} K/V heads of {head_dim} are {num_key_value_heads * head_dim} numbers of keys, and "
            f"the {shape.num_key_value_heads} of {shape.head_dim} that it has are {before}: the cache would not shrink",
            f"use {most - most % 2} or less",
        )
    if not any(rotary.dims for rotary in source.rotary):
        return None, None
    parameters = checkpoint.full_config.get("rope_parameters") or {}
    rope_type = parameters.get("rope_type")
    if rope_type not in _STILL:
        named = f"its RoPE is of type {rope_type}" if rope_type else "its layers have several RoPEs"
        return f"{named}, and heads are resized with one of these: {', '.join(_STILL)}", keep
    turning = _rotary_dims(source, head_dim)
    if turning < 2 or turning % 2:
        part = parameters.get("partial_rotary_factor")
        return (
            f"with partial_rotary_factor = {part} its rotary dims would be {turning}, which are no pairs",
            f"use a multiple of {2 * round(1 / float(part))}" if part else None,
        )
    return None, None


def resized_config(
    source: Source, num_key_value_heads: int, head_dim: int, rope_selection: RopeSelection
) -> dict[str, Any]:
    """config.json with so many K/V heads of so many dims, and with the frequencies that `rope_selection` says.

    RoPE settings with a factor for each frequency (longrope) are written only where the source's own kind of RoPE does
    not give the frequencies of `spread`.
    """
    config = source.architecture.result_config(source.checkpoint, num_key_value_heads, head_dim)
    turning = next((rotary for rotary in source.rotary if rotary.dims), None)
    if turning is None or rope_selection == "default":
        return config
    wanted = spread(turning.frequencies, _rotary_dims(source, head_dim) // 2)
    natural = _frequencies(source, config)
    if all(map(_same, natural, wanted)):
        return config
    full = source.checkpoint.full_config
    parameters = _one_by_one(full["rope_parameters"], full["max_position_embeddings"], wanted)
    config |= {
        "rope_parameters": parameters,
        # as versions of transformers before 5, and engines, read it
        "rope_theta": parameters["rope_theta"],
        "rope_scaling": {name: value for name, value in parameters.items() if name != "rope_theta"},
    }
    if not _has_frequencies(source, config, wanted):
        raise UnsupportedError(
            f"{source.name}: {source.architecture.model_type} takes no frequencies one by one",
            hint="take its kind of RoPE as it is: rope_selection = default",
            settings=("rope_selection",),
        )
    return config


def spread(frequencies: Sequence[float], num_pairs: int) -> tuple[float, ...]:
    """Return as many of the frequencies as there are to be pairs, in order, each about as often as any other."""
    return tuple(frequencies[place * len(frequencies) // num_pairs] for place in range(num_pairs))


def shared_heads(source: Source, config: Mapping[str, Any]) -> tuple[SharedHead, ...]:
    """Return for each layer the head that a group shares in the class of `config`, which `resized_config` made."""
    model, head_dim = empty_model(config), int(config["head_dim"])
    # what the class multiplies scores by, which RoPE may do too
    scale = score_scaling(source.empty_model) / score_scaling(model)
    scale *= (rotary_scaling(source.empty_model) / rotary_scaling(model)) ** 2
    layers = read_rotary(source.checkpoint, source.architecture, source.shape, model)
    return tuple(SharedHead(head_dim, rotary, scale) for rotary in layers)


def _rotary_dims(source: Source, head_dim: int) -> int:
    part = (source.checkpoint.full_config.get("rope_parameters") or {}).get("partial_rotary_factor")
    return int(head_dim * (1.0 if part is None else float(part)))


def _frequencies(source: Source, config: Mapping[str, Any]) -> tuple[float, ...]:
    """The frequencies that the class of a config computes, of the first layer that has any."""
    layers: list[Rotary] = read_rotary(source.checkpoint, source.architecture, source.shape, empty_model(config))
    return next(rotary.frequencies for rotary in layers if rotary.dims)


def _has_frequencies(source: Source, config: Mapping[str, Any], wanted: Sequence[float]) -> bool:
    """Whether the class of a config computes these frequencies; Phi3's checks their number against other entries."""
    from huggingface_hub.errors import StrictDataclassError

    try:
        return all(map(_same, _frequencies(source, config), wanted))
    except (StrictDataclassError, RuntimeError, ValueError):
        return False


def _same(one: float, other: float) -> bool:
    return math.isclose(one, other, rel_tol=_SAME_FREQUENCY)


def _one_by_one(parameters: Mapping[str, Any], context: int, frequencies: Sequence[float]) -> dict[str, Any]:
    """RoPE settings with these frequencies, whatever the length of the text."""
    theta = float(parameters["rope_theta"])
    factors = [theta ** (-place / len(frequencies)) / frequency for place, frequency in enumerate(frequencies)]
    part = {name: parameters[name] for name in ("partial_rotary_factor",) if name in parameters}
    return {
        "rope_type": "longrope",
        "rope_theta": theta,
        **part,
        "short_factor": factors,
        "long_factor": factors,
        "factor": 1.0,
        "attention_factor": 1.0,
        "original_max_position_embeddings": context,
    }
