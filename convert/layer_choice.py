"""Which layers to let share keys and values: those whose sharing changes the least, by a trial on text."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from itertools import pairwise
from typing import TYPE_CHECKING

from .architecture import Architecture, AttentionShape, read_attention
from .calibration import CalibrationText, LayerwiseModel, layer_moments
from .checkpoint import Checkpoint
from .errors import UnsupportedError
from .layer_merge import Freedom, Heads, LayerInput, best_grouping, merge_layers
from .layers import LayerGrouping
from .projections import read_projections
from .rotary import read_rotary

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Damages", "best_layers", "measure_damages"]

Damages = Mapping[tuple[int, int], float]
"""What is lost if only layer c reads the keys and values of p, for pairs (p, c)."""

_TRIAL_PASSES = 4


def measure_damages(
    checkpoint: Checkpoint,
    architecture: Architecture,
    text: CalibrationText,
    *,
    reach: int,
    device: str = "cpu",
    precision: str = "fp32",
    progress: Callable[[int], object] = lambda num_layers: None,
) -> Damages:
    """For every two layers at most `reach` apart that may share: E ‖h' − h‖² / ‖h‖² of the hidden states that leave the
    second, where h' are those of a model in which these two share, merged but not refitted, and no others.

    checkpoint: as CrossLayerDecoder. Hidden states enter the first layer as the original has them.
    """
    import torch

    shape = read_attention(checkpoint, architecture)
    rotary = read_rotary(checkpoint, architecture, shape)
    free = architecture.approximation(checkpoint) is None
    model = LayerwiseModel(checkpoint, architecture, device=device, precision=precision)
    damages: dict[tuple[int, int], float] = {}
    with torch.inference_mode():
        states = [model.embed(batch) for batch in text.batches]
        model.release_embeddings()
        for first in range(shape.num_hidden_layers):
            layers = tuple(range(first, min(first + reach + 1, shape.num_hidden_layers)))
            grams, crosses = layer_moments(model, layers, states, device)
            inputs = [
                LayerInput(read_projections(checkpoint, architecture, shape, layer), gram, cross)
                for layer, gram, cross in zip(layers, grams, crosses, strict=True)
            ]
            for index, second in enumerate(layers[1:], start=1):
                if shape.windows[second] != shape.windows[first]:
                    continue
                heads = Heads([inputs[0], inputs[index]], shape, Freedom(rotary[first], keys=free))
                grouping = (best_grouping if free else Heads.in_order)(heads, shape.num_key_value_heads)
                pair = merge_layers(heads, grouping).projections
                merged = {
                    layer: projections.tensors(checkpoint, architecture, shape, layer)
                    for layer, projections in zip((first, second), pair, strict=True)
                }
                damages[first, second] = _trial(model, layers[: index + 1], merged, states[:_TRIAL_PASSES])
            with model.layer(first) as module:
                states = [model.run(module, first, batch) for batch in states]
            progress(1)
    return damages


def _trial(
    model: LayerwiseModel, layers: tuple[int, ...], merged: Mapping[int, dict[str, Tensor]], batches: list[Tensor]
) -> float:
    """The relative error after `layers`, of which the first and the last share what `merged` holds."""
    errors = []
    with ExitStack() as loaded:
        original = [loaded.enter_context(model.layer(layer)) for layer in layers]
        wanted = []
        for states in batches:
            for layer, module in zip(layers, original, strict=True):
                states = model.run(module, layer, states)
            wanted.append(states)
    with ExitStack() as loaded:
        sources = [layers[0] if layer in merged else layer for layer in layers]
        modules = [
            loaded.enter_context(model.layer(layer, merged.get(layer), source))
            for layer, source in zip(layers, sources, strict=True)
        ]
        for states, expected in zip(batches, wanted, strict=True):
            shared: dict[int, tuple[Tensor, Tensor]] = {}
            for layer, module in zip(layers, modules, strict=True):
                states = model.run(module, layer, states, shared=shared)
            errors.append(((states - expected).square().sum(-1) / expected.square().sum(-1)).mean().item())
    return sum(errors) / len(errors)


def best_layers(
    shape: AttentionShape,
    num_key_value_layers: int,
    damages: Damages,
    *,
    keep_first: int = 0,
    keep_last: int = 0,
) -> LayerGrouping:
    """Groups of neighbours, as many as layers shall keep keys and values, with the least sum of damages.

    What a group loses is taken for the sum of what its layers do that read the first's. Raises UnsupportedError where
    no groups of measured pairs are so few.
    """
    num_layers = shape.num_hidden_layers
    front, back = keep_first, num_layers - keep_last
    infinite = float("inf")

    def loss(begin: int, end: int) -> float:
        alone = begin < front or end > back
        if alone and end - begin > 1:
            return infinite
        return sum(damages.get((begin, layer), infinite) for layer in range(begin + 1, end))

    # of the first `end` layers in `count` groups: the least loss, and where the last group begins
    best: dict[tuple[int, int], tuple[float, int]] = {(0, 0): (0.0, 0)}
    for end in range(1, num_layers + 1):
        for count in range(1, min(end, num_key_value_layers) + 1):
            candidates = [
                (best[begin, count - 1][0] + loss(begin, end), begin)
                for begin in range(end)
                if (begin, count - 1) in best
            ]
            if candidates and min(candidates)[0] < infinite:
                best[end, count] = min(candidates)
    if (num_layers, num_key_value_layers) not in best:
        raise UnsupportedError(
            f"{num_layers} layers cannot share so that {num_key_value_layers} keep keys and values",
            hint="ask for more, or keep fewer at the ends",
        )
    ends = [num_layers]
    for count in range(num_key_value_layers, 0, -1):
        ends.append(best[ends[-1], count][1])
    return LayerGrouping.of_sizes(tuple(end - begin for begin, end in pairwise(reversed(ends))))
