"""Compressing keys and values into a latent, layer by layer (docs/merging.md)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING

from ..algebra.latent import (
    LatentAttention,
    LatentObjective,
    latent_attentions,
    normalised,
    rope_pair_gains,
    without_constant,
)
from ..algebra.merge import RopePair
from ..algebra.projections import Projections
from ..algebra.refit import refitted
from ..architectures.projections import read_finite, read_projections
from ..architectures.rotary import rotary_scaling
from ..architectures.source import Source
from ..architectures.table import LATENT_ARCHITECTURES
from ..calibration.fitting import DEFAULT_FIT, Fit, FitOutcome
from ..calibration.streams import NewLayer, OriginalAttention, Stream
from ..calibration.text import CalibrationText
from ..checkpoint.overlay import Overlay
from .deepseek import LatentLayout, fixed_tensors, latent_tensors, result_config
from .finished import finished_layers, layer_file, note_finished
from .prepared import Hardware, LayerReport, Measurements, Preparation, Prepared

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["OBJECTIVES", "Compression", "candidate_error", "choose_rope_pairs", "compress_layers"]

OBJECTIVES = tuple(LatentObjective(still, keys) for still in (True, False) for keys in (1.0, 0.1))
"""The latents that are tried on the text for every layer; the first is taken where there is no text to try them on."""
_CHOICE_BATCHES = 1  # of the text that these are compared on
_NORM_TOKENS = 16384  # that the latent is fitted to its norm on

Sample = tuple["Tensor", "Tensor"]
"""Attention inputs, (tokens, hidden_size + 1), and what each counts. The first tokens of sequences, which attention
falls back on (arXiv 2309.17453), count as much as all others."""


@dataclass(frozen=True)
class Compression:
    """The latent that is made of a layer, the pairs of its rotary key, and whether it is fitted to a text after it.

    `refit_ridge` and `fit` are those of `Stream.refit`.
    """

    layout: LatentLayout
    rope_pairs: tuple[RopePair, ...]
    refit: bool = True
    refit_ridge: float = 0.2
    fit: Fit = DEFAULT_FIT


def compress_layers(
    source: Source,
    compression: Compression,
    preparation: Preparation,
) -> Prepared:
    """The attention of every layer over a latent, in the tensors of DeepSeek's class, kept in the preparation's files.

    `source` is one that `as_latent_source` gives. With text the original runs layer by layer, and beside it the result,
    to be fitted to it. Without it, inputs count as white but for the gain of the norm before the attention. Layers that
    an earlier run has finished are run, and neither compressed nor fitted again.
    """
    layout, hardware = compression.layout, preparation.hardware
    layers = [(index,) for index in range(source.shape.num_hidden_layers)]
    overlay, reports = Overlay(preparation.scratch), finished_layers(preparation, layers)
    original, student = None, None
    if len(reports) < len(layers):
        original, student = _streams(source, compression, preparation)
    scaling = rotary_scaling(source.empty_model) ** 2  # of queries and of keys
    for (index,) in layers[: len(reports)]:
        overlay.adopt(layer_file(index))
        if original is not None:
            original.advance(index)
        if student is not None:
            student.advance(index, tensors=overlay.read_file(layer_file(index)))
        preparation.progress(1)
    for (index,) in layers[len(reports) :]:
        # 1. what the layer's attention reads, and the latents that might do
        gram, sample = _moments(source, original, index, hardware)
        candidates = _candidates(read_projections(source, index), source, gram, compression)
        made = partial(latent_tensors, layout=layout, source=source, index=index, scaling=scaling)
        entered, head_outputs = [] if original is None else original.states(), list["Tensor"]()
        if original is not None:
            original.advance(index, None if student is None else head_outputs)
        # 2. the best of them
        o_proj = source.architecture.tensor_name(index, "o_proj")
        if student is None:
            layer = next(candidates)
        else:
            error = partial(candidate_error, student, index, made, o_proj, head_outputs, compression.refit_ridge)
            layer = min(candidates, key=error)
        if sample is not None and not layout.constant:
            layer = normalised(layer, *sample)
        # 3. the refit, and the way to the next layer
        tensors, outcome = made(layer), None
        if student is not None:
            outcome = student.refit(
                NewLayer(index, tensors, o_proj, OriginalAttention(layer.o, entered, head_outputs)),
                ridge=compression.refit_ridge,
                fit=compression.fit,
                fixed=[f"{o_proj.removesuffix('o_proj.weight')}{name}" for name in fixed_tensors(layout)],
            )
        overlay.store(tensors, layer_file(index))
        reports.append(_report(index, source, layer, outcome))
        note_finished(preparation, reports[-1])
        del candidates, entered, head_outputs, layer, tensors  # gigabytes of a large model, beside the next layer's
        preparation.progress(1)
    return Prepared(overlay, tuple(reports))


def _streams(source: Source, compression: Compression, preparation: Preparation) -> tuple[Stream | None, Stream | None]:
    """The text before the first layer: of the original, and of the result, where that is fitted to it."""
    text, hardware = preparation.measurements, preparation.hardware
    if not isinstance(text, CalibrationText):
        return None, None
    original = Stream.of(source, text, hardware)
    if not compression.refit:
        return original, None
    config = result_config(source, compression.layout, compression.rope_pairs)
    architecture = replace(LATENT_ARCHITECTURES["deepseek_v3"], attention=source.architecture.attention)
    result = Source(replace(source.checkpoint, config=config), architecture)
    return original, Stream.of(result, text, hardware)


def choose_rope_pairs(
    source: Source,
    num_rope_pairs: int,
    measurements: Measurements,
    hardware: Hardware,
    progress: Callable[[int], object] = lambda num_layers: None,
) -> tuple[RopePair, ...]:
    """The pairs of the rotary key that gain most, summed over all layers, the fastest first.

    A frequency may be there several times, for different keys. With text the model runs over it once.
    """
    import torch

    rotary, shape = source.rotary[0], source.shape
    text = measurements if isinstance(measurements, CalibrationText) else None
    original = None if text is None else Stream.of(source, text, hardware)
    gains = torch.zeros(len(rotary.frequencies), shape.num_key_value_heads, dtype=torch.float64)
    for index in range(shape.num_hidden_layers):
        gram, _ = _moments(source, original, index, hardware)
        gains += rope_pair_gains(read_projections(source, index), shape, rotary, gram)
        if original is not None:
            original.advance(index)
        progress(1)
    chosen = gains.flatten().argsort(descending=True, stable=True)[:num_rope_pairs].tolist()
    return tuple(sorted(divmod(pair, gains.shape[1]) for pair in chosen))


def _report(index: int, source: Source, layer: LatentAttention, outcome: FitOutcome | None) -> LayerReport:
    heads = tuple(range(source.shape.num_key_value_heads))
    fits = () if outcome is None else (outcome,)
    return LayerReport((index,), (heads,), (layer.keys_retained,), (layer.values_retained,), fits)


def _candidates(
    projections: Projections, source: Source, gram: Tensor, compression: Compression
) -> Iterator[LatentAttention]:
    """The layer with each objective, made when it is asked for."""
    layout = compression.layout
    if not layout.constant:
        projections = without_constant(projections, gram)
    return latent_attentions(
        projections,
        source.shape,
        source.rotary[0],  # the same in all layers of the classes that a latent holds
        gram,
        rope_pairs=compression.rope_pairs,
        kv_lora_rank=layout.sizes.kv_lora_rank,
        constant=layout.constant,
        objectives=OBJECTIVES,
    )


def _moments(source: Source, original: Stream | None, layer: int, hardware: Hardware) -> tuple[Tensor, Sample | None]:
    """E[x xᵀ] of the attention's inputs with a 1 appended, and some of them."""
    import torch

    if original is None:
        return _gram_without_text(source, layer), None
    first: list[Tensor] = []
    others: list[Tensor] = []
    every = max(original.num_tokens // _NORM_TOKENS, 1)

    def visit(inputs: Tensor, sequence_length: int) -> None:
        first.append(inputs[::sequence_length])
        others.append(inputs[::every])

    (gram,), _ = original.moments((layer,), visit)
    tokens = [torch.cat(first), torch.cat(others)]
    weights = [torch.full((len(part),), 0.5 / len(part)) for part in tokens]
    return gram, (torch.cat(tokens).to(hardware.device), torch.cat(weights))


def _gram_without_text(source: Source, layer: int) -> Tensor:
    import torch

    name = source.architecture.input_norm_name(layer)
    gram = torch.eye(source.shape.hidden_size + 1, dtype=torch.float64)
    if name in source.checkpoint.tensors:
        gram[:-1, :-1] *= read_finite(source, name).square()
    return gram


def candidate_error(
    student: Stream,
    layer: int,
    made: Callable[[LatentAttention], dict[str, Tensor]],
    o_proj: str,
    wanted: Sequence[Tensor],
    ridge: float,
    candidate: LatentAttention,
) -> float:
    """Return E‖W_o z − W z'‖² on some of the text, with the fitted W, but for what it shares with every candidate.

    `made` gives a candidate's tensors, and `wanted` is what the original's output projection read. The norm of the
    latent, which is met later, is left out.
    """
    import torch

    original, tensors = candidate.o, made(candidate)
    with torch.no_grad(), student.model.layer(layer, tensors) as module:
        norm = module.get_submodule("self_attn.kv_a_layernorm")
        # no candidate is fitted to the norm yet: it shall not divide. Its gains, relative to an ordinary channel's,
        # are 1, but for a constant channel, which they bring from what the bias holds it at to 1
        hook = norm.register_forward_hook(lambda norm, inputs, _: norm.weight / norm.weight[0] * inputs[0])
        cross, normal = student.output_moments(module, layer, wanted, _CHOICE_BATCHES)
        hook.remove()
    fitted = refitted(original, tensors[o_proj], cross, normal, ridge).float()
    misfit = fitted @ normal.float() - 2 * original.float() @ cross.float()
    return float((misfit.double() * fitted).sum())
