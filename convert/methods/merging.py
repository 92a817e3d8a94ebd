"""Merging the K/V heads of every layer on calibration text (docs/merging.md)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from ..algebra.head_merge import PREDICTION_PULL, FreeTransformations, Heads, LayerInput, merge_layers
from ..algebra.head_search import best_grouping
from ..algebra.heads import HeadGrouping
from ..algebra.layer_grouping import LayerGrouping
from ..algebra.projections import Projections
from ..architectures.projections import projection_names, projection_tensors, read_projections
from ..architectures.source import Source
from ..calibration.fitting import DEFAULT_FIT, Fit, FitOutcome
from ..calibration.statistics import LayerStatistics
from ..calibration.streams import NewLayer, OriginalAttention, Stream
from ..calibration.text import CalibrationText
from ..checkpoint.overlay import Overlay
from ..errors import UnsupportedError
from .finished import finished_layers, gram_file, layer_file, note_finished
from .head_size import shared_heads
from .prepared import Hardware, LayerReport, Measurements, Preparation, Prepared

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["HeadMerge", "check_mergeable", "free_transformations", "merge_heads", "merge_record"]


@dataclass(frozen=True)
class HeadMerge:
    """How many K/V heads a layer keeps, which heads form a group, and what is fitted afterwards.

    `layers` says which layers share keys and values; without it none do. `grouping` is "similarity" (the groups that
    lose least) or "contiguous" (neighbours). `refit` fits each layer's attention to the original's on calibration text:
    o_proj in closed form, pulled towards that of the merge by `refit_ridge`, a fraction of the mean diagonal of the
    normal equations, then all projections by the gradient steps of `fit`. `prediction_pull` and `at_distances` are
    those of `Heads`; benchmarks compare others. `head_dim` is the size of the heads of the result, where it is another.
    """

    num_key_value_heads: int
    layers: LayerGrouping | None = None
    grouping: str = "similarity"
    refit: bool = True
    refit_ridge: float = 0.2
    fit: Fit = DEFAULT_FIT
    prediction_pull: float = PREDICTION_PULL
    at_distances: bool = True
    head_dim: int | None = None


def merge_heads(
    source: Source,
    merge: HeadMerge,
    preparation: Preparation,
    result_config: Mapping[str, Any],
) -> Prepared:
    """Merge the heads of every layer, from calibration text, from statistics of one, or by the weights alone.

    With text the model runs layer by layer: the original, and beside it, to be fitted to it, the merged one, in the
    source's class with `result_config`, the config of the result. Layers that are to share keys and values need text:
    what one layer reads has to be predicted from another's. Raises UnsupportedError for architectures that have no such
    merge.
    """
    check_mergeable(source)
    resized = None if merge.head_dim in (None, source.shape.head_dim) else shared_heads(source, result_config)
    shape, measurements, keep_gram = source.shape, preparation.measurements, preparation.keep_gram
    sharing = merge.layers or LayerGrouping(tuple(range(shape.num_hidden_layers)))
    overlay, grams = Overlay(preparation.scratch), Overlay(preparation.scratch)
    reports = finished_layers(preparation, sharing.groups)
    original, converted = None, None
    if len(reports) < len(sharing.groups):
        original, converted = _streams(source, merge, preparation, result_config)
    for report in reports:
        _take_up(report, overlay, original, converted)
        if keep_gram:
            grams.adopt(*map(gram_file, report.layers))
        preparation.progress(len(report.layers))
    for layers in sharing.groups[len(reports) :]:
        # 1. what the layers' attention reads
        inputs = _layer_inputs(source, layers, original, measurements)
        # 2. the merge
        heads = Heads(
            inputs,
            shape,
            free_transformations(source, layers[0]),
            shared=None if resized is None else resized[layers[0]],
            prediction_pull=merge.prediction_pull,
            at_distances=merge.at_distances,
        )
        result = merge_layers(heads, _choose_grouping(source, merge, heads))
        outputs = [layer_input.projections.o for layer_input in inputs]
        kept_grams = [layer_input.gram for layer_input in inputs] if keep_gram else []
        del inputs, heads  # gigabytes of a large model, beside what a pass needs
        # 3. the refit, and the way to the next layers
        attentions = _attentions(layers, outputs, original, keep=converted is not None)
        made = [
            _new_layer(source, layer, after, attention, is_reader=layer != layers[0])
            for layer, after, attention in zip(layers, result.projections, attentions, strict=True)
        ]
        outcomes = list[FitOutcome | None]()
        for place, new in enumerate(made):
            if converted is not None:
                readers = made[1:] if place == 0 else []
                outcomes.append(converted.refit(new, ridge=merge.refit_ridge, fit=merge.fit, readers=readers))
            overlay.store(new.tensors, layer_file(new.index))
            if keep_gram:
                grams.store({_gram_name(new.index): kept_grams[place]}, gram_file(new.index))
            preparation.progress(1)
        fits = tuple(outcome for outcome in outcomes if outcome is not None)
        reports.append(LayerReport(layers, result.grouping.groups, result.keys_retained, result.values_retained, fits))
        note_finished(preparation, reports[-1])
        del outputs, kept_grams, result, attentions, made, new  # as much, beside the next layer's
    return Prepared(overlay, tuple(reports), (lambda layer: grams.read(_gram_name(layer))) if keep_gram else None)


def _streams(
    source: Source, merge: HeadMerge, preparation: Preparation, result_config: Mapping[str, Any]
) -> tuple[Stream | None, Stream | None]:
    """The text before the first layer: of the original, and of the model that is made, where that is fitted to it."""
    text = preparation.measurements
    if not isinstance(text, CalibrationText):
        if merge.layers is not None:
            raise ValueError("layers that share keys and values are merged on text")
        return None, None
    original = Stream.of(source, text, preparation.hardware)
    if not merge.refit:
        return original, None
    merged = replace(source, checkpoint=replace(source.checkpoint, config=dict(result_config)))
    return original, Stream.of(merged, text, preparation.hardware)


def _attentions(
    layers: Sequence[int], outputs: Sequence[Tensor], original: Stream | None, *, keep: bool
) -> list[OriginalAttention]:
    """Take the text through layers of the original, and keep, where that is asked for, what their attention read."""
    attentions = [OriginalAttention(output, [], []) for output in outputs]
    if original is not None:
        for layer, attention in zip(layers, attentions, strict=True):
            if keep:
                attention.entered = original.states()
            original.advance(layer, attention.head_outputs if keep else None)
    return attentions


def _new_layer(
    source: Source, layer: int, projections: Projections, original: OriginalAttention, *, is_reader: bool
) -> NewLayer:
    """A merged layer, without keys and values where it reads another's."""
    tensors = projection_tensors(projections, source, layer)
    if is_reader:
        parts = projection_names(source, layer)
        tensors = {name: tensors[name] for part, name in parts.items() if part[0] not in "kv"}
    return NewLayer(layer, tensors, source.architecture.tensor_name(layer, "o_proj"), original)


def _take_up(report: LayerReport, overlay: Overlay, original: Stream | None, converted: Stream | None) -> None:
    """Take the text through layers that are finished, in the original and with what was made of them."""
    for layer in report.layers:
        overlay.adopt(layer_file(layer))
        if original is not None:
            original.advance(layer)
        if converted is not None:
            is_read = layer == report.layers[0] and len(report.layers) > 1
            converted.advance(layer, tensors=overlay.read_file(layer_file(layer)), is_read=is_read)


def _layer_inputs(
    source: Source, layers: Sequence[int], original: Stream | None, measurements: Measurements
) -> list[LayerInput]:
    """The projections of the layers, and the moments of what their attention reads."""
    grams: list[Tensor] = [_gram_without_text(measurements, source, layers[0])]
    crosses: list[Tensor | None] = [None]
    if original is not None:
        grams, crosses = original.moments(layers)
    return [
        LayerInput(read_projections(source, layer), gram, cross)
        for layer, gram, cross in zip(layers, grams, crosses, strict=True)
    ]


def check_mergeable(source: Source) -> None:
    """Raise UnsupportedError for architectures that have no such merge."""
    if source.architecture.cross_attention is not None:
        raise UnsupportedError(
            f"{source.name}: svd merges the heads of decoders only, not of the encoder-decoder "
            f"{source.architecture.model_type}",
            hint="take the mean of the heads",
            settings=("merge",),
        )
    if source.shape.layer_grouping is not None:
        raise UnsupportedError(
            f"{source.name}: svd does not merge heads whose keys and values several layers read",
            hint="merge heads and layers of the original at once, as CLA with fewer heads, or take the mean",
            settings=("merge",),
        )


def free_transformations(source: Source, layer: int) -> FreeTransformations:
    """What a merge may change in a layer: keys and values are free where they are linear in the attention's input."""
    checkpoint, architecture = source.checkpoint, source.architecture
    clipped = checkpoint.config_value(architecture.config_name("clip_qkv")) is not None
    return FreeTransformations(
        source.rotary[layer],
        keys=architecture.approximation(checkpoint) is None,
        values=architecture.free_values and not clipped,
    )


def _choose_grouping(source: Source, merge: HeadMerge, heads: Heads) -> HeadGrouping:
    """The groups of heads. Where a norm over keys, or after the values, has gains for each head, they stay in order."""
    free = heads.free
    may_regroup = free.keys and free.values and not source.architecture.ordered_heads(source.checkpoint.full_config)
    is_choice = merge.num_key_value_heads not in (1, len(heads))
    if merge.grouping == "similarity" and may_regroup and is_choice:
        return best_grouping(heads, merge.num_key_value_heads)
    return heads.in_order(merge.num_key_value_heads)


def _gram_without_text(measurements: Measurements, source: Source, layer: int) -> Tensor:
    import torch

    if isinstance(measurements, LayerStatistics):
        return measurements.gram(layer)
    return torch.eye(source.shape.hidden_size + 1, dtype=torch.float64)


def _gram_name(layer: int) -> str:
    return f"layers.{layer}.gram"


def merge_record(merge: HeadMerge, hardware: Hardware) -> dict[str, Any]:
    """How heads were merged, for the manifest."""
    return {
        "num_key_value_heads": merge.num_key_value_heads,
        **({} if merge.head_dim is None else {"head_dim": merge.head_dim}),
        "kv_source_layers": None if merge.layers is None else list(merge.layers.sources),
        "grouping": merge.grouping,
        "refit": merge.refit,
        "refit_ridge": merge.refit_ridge,
        **(merge.fit.record if merge.refit else {"fit_steps": 0}),
        "precision": hardware.precision,
        "device": hardware.device,
    }
