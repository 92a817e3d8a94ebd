"""Compressing keys and values into a latent on calibration text, layer by layer (docs/merging.md)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from ..algebra.attention_shape import AttentionShape
from ..algebra.latent import (
    LatentAttention,
    LatentObjective,
    RopePair,
    latent_attention,
    normalised,
    rope_pair_gains,
    without_constant,
)
from ..algebra.projections import Projections
from ..algebra.refit import refitted
from ..algebra.rotations import Rotary
from ..architectures.architecture import Architecture
from ..architectures.attention import read_attention
from ..architectures.projections import read_projections
from ..architectures.rotary import read_rotary
from ..architectures.table import LATENT_ARCHITECTURES
from ..calibration.layerwise import LayerwiseModel
from ..calibration.moments import SecondMoment, second_moment, with_one
from ..calibration.text import CalibrationText
from ..checkpoint.loading import empty_model
from ..checkpoint.tensors import Checkpoint
from ..plan import LayerReport
from .merging import MergedCheckpoint, store
from .mla import Mla, latent_tensors

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["CompressSettings", "compress_checkpoint"]

_OBJECTIVES = tuple(LatentObjective(still, keys) for still in (True, False) for keys in (1.0, 0.1))
_CHOICE_BATCHES = 1  # of the text that these are compared on
_NORM_TOKENS = 16384  # that the latent is fitted to its norm on

Sample = tuple["Tensor", "Tensor"]
"""Attention inputs, (tokens, hidden_size + 1), and what each counts. The first tokens of sequences, which attention
falls back on (arXiv 2309.17453), count as much as all others."""


@dataclass(frozen=True)
class CompressSettings:
    """`refit` fits each o_proj to the original's attention output on the text, as for MergeSettings.

    The text is run on `device`, in `precision`: "fp32", or "bf16" for autocast.
    """

    refit: bool = True
    refit_ridge: float = 0.2
    precision: str = "fp32"
    device: str = "cpu"


def compress_checkpoint(
    checkpoint: Checkpoint,
    architecture: Architecture,
    mla: Mla,
    settings: CompressSettings,
    scratch: Path,
    *,
    text: CalibrationText | None = None,
    progress: Callable[[int], object] = lambda num_layers: None,
) -> MergedCheckpoint:
    """The checkpoint, in a class that `as_latent_source` gives, with multi-head latent attention.

    With text the original runs layer by layer, and beside it the result, to refit outputs; to choose frequencies it
    runs once more before. Without it, inputs count as white but for the gain of the norm before the attention. New
    tensors are kept in files in `scratch`, which the result reads. Raises UnsupportedError, as `Mla.check`.
    """
    shape = read_attention(checkpoint, architecture)
    rotary = read_rotary(checkpoint, architecture, shape)  # the same in all layers of the classes that it takes
    mla.check(checkpoint, architecture, rotary)
    source = _Source(checkpoint, architecture, shape, rotary[0], text, settings)
    rope_pairs = _rope_pairs(source, mla)
    result = MergedCheckpoint(
        checkpoint.name,
        checkpoint.path,
        mla.config(checkpoint, architecture, rotary[0], rope_pairs),
        mla.tensors(checkpoint, architecture),
        checkpoint.size_on_disk_bytes,
        source=checkpoint,
        merged={},
        scratch=scratch,
        reports=(),
    )
    student = _Student(result, architecture, text, settings) if text is not None and settings.refit else None
    scaling = _attention_scaling(checkpoint)
    reports = []
    source.start()
    for index in range(shape.num_hidden_layers):
        gram, sample = source.moments(index)
        candidates = _candidates(source.projections(index), source, gram, mla, rope_pairs)
        made = partial(
            latent_tensors, mla=mla, checkpoint=checkpoint, architecture=architecture, index=index, scaling=scaling
        )
        wanted: list[Tensor] = []
        if student is None:
            source.advance(index)
            layer = next(candidates)
        else:
            source.advance(index, wanted)
            layer = min(candidates, key=partial(student.error, index, made, wanted))
        if sample is not None and not mla.constant:
            layer = normalised(layer, *sample)
        tensors = made(layer)
        if student is not None:
            student.advance(index, tensors, wanted, layer.o)
        result.merged.update(store(tensors, scratch / f"layer-{index:05d}.safetensors"))
        reports.append(_report(index, shape, layer))
        del candidates, wanted, layer, tensors  # gigabytes of a large model, which would lie beside the next layer's
        progress(1)
    result.reports = tuple(reports)
    return result


def _report(index: int, shape: AttentionShape, layer: LatentAttention) -> LayerReport:
    heads = tuple(range(shape.num_key_value_heads))
    return LayerReport((index,), (heads,), (layer.keys_retained,), (layer.values_retained,))


def _candidates(
    projections: Projections, source: _Source, gram: Tensor, mla: Mla, rope_pairs: Sequence[RopePair]
) -> Iterator[LatentAttention]:
    """The layer with each objective, made when it is asked for: of a large model it takes gigabytes."""
    if not mla.constant:
        projections = without_constant(projections, gram)
    for objective in _OBJECTIVES:
        yield latent_attention(
            projections,
            source.shape,
            source.rotary,
            gram,
            rope_pairs=rope_pairs,
            kv_lora_rank=mla.kv_lora_rank,
            constant=mla.constant,
            objective=objective,
        )


def _rope_pairs(source: _Source, mla: Mla) -> list[RopePair]:
    """The frequencies of the rotary key, one or more times each, the fastest first: the same in all layers."""
    import torch

    if mla.rope_selection == "high":
        return [(frequency, 0) for frequency in range(mla.num_rope_pairs)]
    gains = torch.zeros(len(source.rotary.frequencies), source.shape.num_key_value_heads, dtype=torch.float64)
    source.start()
    for index in range(source.shape.num_hidden_layers):
        gram, _ = source.moments(index)
        gains += rope_pair_gains(source.projections(index), source.shape, source.rotary, gram)
        source.advance(index)
    chosen = gains.flatten().argsort(descending=True, stable=True)[: mla.num_rope_pairs].tolist()
    return sorted(divmod(pair, gains.shape[1]) for pair in chosen)


def _attention_scaling(checkpoint: Checkpoint) -> float:
    """What RoPE multiplies scores by besides turning: yarn's factor, of queries and of keys."""
    for module in empty_model(checkpoint.config).modules():
        if hasattr(module, "attention_scaling"):
            return float(module.attention_scaling) ** 2
    return 1.0


class _Source:
    """The original, and its hidden states at the entrance of a layer."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        architecture: Architecture,
        shape: AttentionShape,
        rotary: Rotary,
        text: CalibrationText | None,
        settings: CompressSettings,
    ) -> None:
        self.shape, self.rotary = shape, rotary
        self._checkpoint, self._architecture = checkpoint, architecture
        self._text, self._settings = text, settings
        self._model: LayerwiseModel | None = None
        self._states: list[Tensor] = []

    def start(self) -> None:
        """Go to the entrance of the first layer."""
        self._states = []  # not beside the new ones
        if self._text is not None:
            self._model, self._states = _embedded(self._checkpoint, self._architecture, self._text, self._settings)

    def projections(self, layer: int) -> Projections:
        return read_projections(self._checkpoint, self._architecture, self.shape, layer)

    def moments(self, layer: int) -> tuple[Tensor, Sample | None]:
        """E[x xᵀ] of the attention's inputs with a 1 appended, and some of them."""
        import torch

        if self._model is None:
            return self._without_text(layer), None
        gram, first, others = SecondMoment(self._settings.device), [], []
        every = max(sum(states.shape[0] * states.shape[1] for states in self._states) // _NORM_TOKENS, 1)
        with torch.inference_mode(), self._model.layer(layer) as module:
            for states in self._states:
                inputs = with_one(self._model.attention_inputs(module, layer, states))
                gram.add(inputs, inputs)
                first.append(inputs[:: states.shape[1]])
                others.append(inputs[::every])
        tokens = [torch.cat(first), torch.cat(others)]
        weights = [torch.full((len(part),), 0.5 / len(part)) for part in tokens]
        return gram.value, (torch.cat(tokens).to(self._settings.device), torch.cat(weights))

    def advance(self, layer: int, head_outputs: list[Tensor] | None = None) -> None:
        """Take the hidden states through the layer.

        What its output projection read, (tokens, heads · head_dim), is appended to `head_outputs`.
        """
        import torch

        if self._model is not None:
            with torch.inference_mode(), self._model.layer(layer) as module:
                self._states = [self._model.run(module, layer, states, head_outputs) for states in self._states]

    def _without_text(self, layer: int) -> Tensor:
        import torch

        name = self._architecture.input_norm_name(layer)
        gram = torch.eye(self.shape.hidden_size + 1, dtype=torch.float64)
        if name in self._checkpoint.tensors:
            gram[:-1, :-1] *= self._checkpoint.read(name).double().square()
        return gram


class _Student:
    """The result so far, and its hidden states at the entrance of a layer."""

    def __init__(
        self, result: MergedCheckpoint, architecture: Architecture, text: CalibrationText, settings: CompressSettings
    ) -> None:
        self._architecture = replace(LATENT_ARCHITECTURES["deepseek_v3"], attention=architecture.attention)
        self._settings = settings
        self._model, self._states = _embedded(result, self._architecture, text, settings)

    def error(
        self,
        layer: int,
        made: Callable[[LatentAttention], dict[str, Tensor]],
        wanted: Sequence[Tensor],
        candidate: LatentAttention,
    ) -> float:
        """E‖W_o z − W z'‖² on some of the text, with the fitted W, but for what it shares with every candidate.

        `made` gives a candidate's tensors, and `wanted` is what the original's output projection read. The norm of the
        latent, which is met later, is left out.
        """
        import torch

        model, device = self._model, self._settings.device
        name, original, tensors = self._architecture.tensor_name(layer, "o_proj"), candidate.o, made(candidate)
        with torch.inference_mode(), model.layer(layer, tensors) as module:
            norm = module.get_submodule("self_attn.kv_a_layernorm")
            # no candidate is fitted to the norm yet: it shall not divide. Its gains, relative to an ordinary channel's,
            # are 1, but for a constant channel, which they bring from what the bias holds it at to 1
            hook = norm.register_forward_hook(lambda norm, inputs, _: norm.weight / norm.weight[0] * inputs[0])
            found = [model.attention_outputs(module, layer, states) for states in self._states[:_CHOICE_BATCHES]]
            hook.remove()
        cross = second_moment(zip(wanted, found, strict=False), device)
        normal = second_moment(((states, states) for states in found), device)
        fitted = self._refitted(original, tensors[name], cross, normal).double()
        return float(((fitted @ normal - 2 * original.double() @ cross) * fitted).sum())

    def _refitted(self, original: Tensor, closed_form: Tensor, cross: Tensor, normal: Tensor) -> Tensor:
        """`refitted`, with a ridge of the same size where values are padded, whose second moments are zero."""
        padded = len(normal) / original.shape[1]
        return refitted(original, closed_form, cross, normal, self._settings.refit_ridge * padded)

    def advance(self, layer: int, tensors: dict[str, Tensor], wanted: Sequence[Tensor], original: Tensor) -> None:
        """Fit the o_proj among `tensors` to what the original's reads, and take the hidden states through the layer."""
        import torch

        model, device = self._model, self._settings.device
        name = self._architecture.tensor_name(layer, "o_proj")
        with torch.inference_mode(), model.layer(layer, tensors) as module:
            found = [model.attention_outputs(module, layer, states) for states in self._states]
            cross = second_moment(zip(wanted, found, strict=True), device)
            normal = second_moment(((states, states) for states in found), device)
            tensors[name] = self._refitted(original, tensors[name], cross, normal)
            module.get_parameter(model.local_name(name, layer)).copy_(tensors[name])
            self._states = [model.run(module, layer, states) for states in self._states]


def _embedded(
    checkpoint: Checkpoint, architecture: Architecture, text: CalibrationText, settings: CompressSettings
) -> tuple[LayerwiseModel, list[Tensor]]:
    """A model to run layer by layer, and what enters its first layer."""
    import torch

    model = LayerwiseModel(checkpoint, architecture, device=settings.device, precision=settings.precision)
    with torch.inference_mode():
        states = [model.embed(batch) for batch in text.batches]
    model.release_embeddings()
    return model, states
