"""Which layers to let share keys and values: those whose sharing changes the least, by a trial on text."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from itertools import pairwise
from typing import TYPE_CHECKING

from ..algebra.attention_shape import AttentionShape
from ..algebra.head_merge import Heads, LayerInput, merge_layers
from ..algebra.head_search import best_grouping
from ..algebra.layer_grouping import LayerGrouping
from ..architectures.projections import projection_tensors, read_projections
from ..architectures.source import Source
from ..calibration.streams import CPU, Hardware, Stream
from ..calibration.text import CalibrationText
from ..errors import UnsupportedError
from .merging import free_transformations

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Damages", "best_layers", "measure_damages", "permitted_pairs"]

Damages = Mapping[tuple[int, int], float]
"""What is lost if only layer c reads the keys and values of p, for pairs (p, c)."""

_TRIAL_PASSES = 4  # of the text's forward passes: an average over 16 384 tokens needs no more


def permitted_pairs(
    shape: AttentionShape, reach: int, *, keep_first: int = 0, keep_last: int = 0
) -> list[tuple[int, int]]:
    """Layers (p, c) of which c may read the keys and values of p: at most `reach` apart, with the same window."""
    between = range(keep_first, shape.num_hidden_layers - keep_last)
    return [
        (first, second)
        for first in between
        for second in between[between.index(first) + 1 :][:reach]
        if shape.windows[first] == shape.windows[second]
    ]


def measure_damages(
    source: Source,
    text: CalibrationText,
    pairs: Collection[tuple[int, int]],
    *,
    hardware: Hardware = CPU,
    progress: Callable[[int], object] = lambda num_layers: None,
) -> Damages:
    """For every pair of layers: E ‖h' − h‖² / ‖h‖² of the hidden states that leave the second, where h' are those of a
    model in which these two share, merged but not refitted, and no others.

    source: as CrossLayerDecoder. Hidden states enter the first layer as the original has them.
    """
    shape = source.shape
    original = Stream.of(source, text, hardware)
    damages: dict[tuple[int, int], float] = {}
    for first in range(shape.num_hidden_layers):
        readers = [second for producer, second in pairs if producer == first]
        layers = tuple(range(first, max(readers, default=first) + 1))
        grams, crosses = original.moments(layers) if readers else ([], [])
        free = free_transformations(source, first)
        for second in readers:
            inputs = [
                LayerInput(read_projections(source, layer), grams[layer - first], crosses[layer - first])
                for layer in (first, second)
            ]
            heads = Heads(inputs, shape, free)
            grouping = (best_grouping if free.keys else Heads.in_order)(heads, shape.num_key_value_heads)
            pair = merge_layers(heads, grouping).projections
            merged = {
                layer: projection_tensors(projections, source, layer)
                for layer, projections in zip((first, second), pair, strict=True)
            }
            damages[first, second] = _trial(original, range(first, second + 1), merged)
        original.advance(first)
        progress(1)
    return damages


def _trial(original: Stream, layers: range, merged: Mapping[int, dict[str, Tensor]]) -> float:
    """The relative error after `layers`, of which the first and the last share what `merged` holds."""
    import torch

    model, wanted = original.model, original.states(_TRIAL_PASSES)
    found = wanted
    shared: list[dict[int, tuple[Tensor, Tensor]]] = [{} for _ in found]
    with torch.no_grad():
        for layer in layers:
            with model.layer(layer) as module:
                wanted = [model.run(module, layer, batch) for batch in wanted]
            source = layers[0] if layer in merged else layer
            with model.layer(layer, merged.get(layer), source) as module:
                found = [
                    model.run(module, layer, batch, shared=kept) for batch, kept in zip(found, shared, strict=True)
                ]
    errors = [_relative_error(one, other) for one, other in zip(found, wanted, strict=True)]
    return sum(errors) / len(errors)


def _relative_error(found: Tensor, wanted: Tensor) -> float:
    """The mean over tokens of ‖found − wanted‖² / ‖wanted‖²; a token for which both are zero has no error."""
    power = wanted.square().sum(-1)
    errors: Tensor = (found - wanted).square().sum(-1) / power.clamp(min=1e-30)
    return errors.mean().item()


def best_layers(num_layers: int, num_key_value_layers: int, damages: Damages) -> LayerGrouping:
    """Groups of neighbours, as many as layers shall keep keys and values, with the least sum of damages.

    In a group the first layer computes keys and values and the others read them. The damage of a group is the sum of
    the damages of the pairs (first, reader), as if each shared alone. Raises UnsupportedError where no grouping of
    these pairs has so few groups.
    """
    infinite = float("inf")

    def loss(begin: int, end: int) -> float:
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
            hint="only neighbours with the same window share; ask for more, or keep fewer at the ends",
        )
    ends = [num_layers]
    for count in range(num_key_value_layers, 0, -1):
        ends.append(best[ends[-1], count][1])
    return LayerGrouping.of_sizes(tuple(end - begin for begin, end in pairwise(reversed(ends))))
