"""A text on its way through a model, layer by layer: what is measured of it, and what is fitted to it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..algebra.refit import refitted
from ..architectures.source import Source
from .layerwise import LayerwiseModel
from .moments import layer_moments, second_moment
from .text import CalibrationText

if TYPE_CHECKING:
    from torch import Tensor
    from torch.nn import Module

    from .layerwise import SharedStates

__all__ = ["CPU", "Hardware", "Stream"]


@dataclass(frozen=True)
class Hardware:
    """Where a text is run: a device as torch names it, in "fp32", or in "bf16" under autocast."""

    device: str = "cpu"
    precision: str = "fp32"


CPU = Hardware()


class Stream:
    """The hidden states of a text that are about to enter the next layer of a model.

    A stream begins before layer 0; `advance` and `refit` move it one layer on.
    """

    def __init__(self, model: LayerwiseModel, states: Iterable[Tensor], device: str) -> None:
        self.model = model
        self._device = device
        self._states = list(states)
        # of each batch, the keys and values of layers that others read
        self._shared: list[SharedStates | None] = [None] * len(self._states)

    @classmethod
    def of(cls, source: Source, text: CalibrationText, hardware: Hardware) -> Stream:
        """The text, embedded by the model."""
        import torch

        model = LayerwiseModel(source, device=hardware.device, precision=hardware.precision)
        with torch.inference_mode():
            states = [model.embed(batch) for batch in text.batches]
        model.release_embeddings()
        return cls(model, states, hardware.device)

    def fork(self) -> Stream:
        """A second stream from here on, for a model of the same class with other weights in its layers."""
        return Stream(self.model, self._states, self._device)

    def states(self, num_batches: int | None = None) -> list[Tensor]:
        """The hidden states of the first batches, or of all, each (sequences, sequence_length, hidden_size)."""
        return self._states[:num_batches]

    @property
    def num_tokens(self) -> int:
        return sum(states.shape[0] * states.shape[1] for states in self._states)

    def moments(
        self,
        layers: Sequence[int],
        visit: Callable[[Tensor, int], object] = lambda inputs, sequence_length: None,
    ) -> tuple[list[Tensor], list[Tensor | None]]:
        """`layer_moments` of these layers, the first of which the stream stands before; it stays there."""
        return layer_moments(self.model, tuple(layers), self._states, self._device, visit)

    def advance(self, layer: int, head_outputs: list[Tensor] | None = None) -> None:
        """Take the hidden states through a layer with the model's own weights.

        What its output projection read, (tokens, num_attention_heads · head_dim), is appended to `head_outputs`.
        """
        import torch

        with torch.inference_mode(), self.model.layer(layer) as module:
            self._states = [self.model.run(module, layer, states, head_outputs) for states in self._states]

    def output_moments(
        self, module: Module, layer: int, wanted: Sequence[Tensor], num_batches: int | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return E[z z'ᵀ] and E[z' z'ᵀ] of what output projections read: z the original's, z' this stream's.

        `wanted` holds z, (tokens, H) for each batch; z' are (tokens, H'), where H' is larger if heads are padded. Their
        moments are (H, H') and (H', H'), over the first batches or over all. `module` is the layer, loaded with the
        weights that give z'.
        """
        batches = list(zip(self._states, self._shared, strict=True))[:num_batches]
        found = [self.model.attention_outputs(module, layer, states, shared) for states, shared in batches]
        cross = second_moment(zip(wanted, found, strict=num_batches is None), self._device)
        normal = second_moment(((states, states) for states in found), self._device)
        for moments in (cross, normal):
            self.model.require_finite(moments, layer)
        return cross, normal

    def refit(
        self,
        layer: int,
        tensors: dict[str, Tensor],
        o_proj: str,
        original: Tensor,
        wanted: list[Tensor],
        *,
        ridge: float,
        kv_source_layers: Sequence[int] | None = None,
    ) -> None:
        """Fit tensors[o_proj] to the original's attention output, then take the hidden states through the layer.

        The fit is that of `refitted`, with z' of this stream. `tensors` are the layer's new weights, among which the
        fitted one is put. `original` is the original's o_proj, (hidden_size, H) in float64, and `wanted` what it read,
        (tokens, H) for each batch; the list is cleared. `ridge` is that of `refitted`. `kv_source_layers` names for
        each layer the layer whose keys and values it reads, in a class with cross-layer attention.
        """
        import torch

        kv_source_layer = None
        if kv_source_layers is not None:
            kv_source_layer = kv_source_layers[layer]
            if kv_source_layer == layer:  # what the layers before have computed is not read again
                is_read = kv_source_layers.count(layer) > 1
                self._shared = [{} if is_read else None for _ in self._states]
        with torch.inference_mode(), self.model.layer(layer, tensors, kv_source_layer) as module:
            cross, normal = self.output_moments(module, layer, wanted)
            wanted.clear()  # gigabytes of a large model, and of no use any more
            tensors[o_proj] = refitted(original, tensors[o_proj], cross, normal, ridge)
            module.get_parameter(self.model.local_name(o_proj, layer)).copy_(tensors[o_proj])
            self._states = [
                self.model.run(module, layer, states, shared=shared)
                for states, shared in zip(self._states, self._shared, strict=True)
            ]
