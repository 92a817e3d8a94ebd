"""A text on its way through a model, layer by layer: what is measured of it, and what is fitted to it."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from ..algebra.refit import refitted
from ..architectures.source import Source
from ..errors import DataError
from .fitting import STEP_TOKENS, Fit, FitOutcome, fit_parameters, relative_error
from .layerwise import LayerwiseModel
from .moments import layer_moments, second_moment
from .text import CalibrationText

if TYPE_CHECKING:
    from torch import Tensor
    from torch.nn import Module

    from .layerwise import SharedStates

__all__ = ["CPU", "Hardware", "NewLayer", "OriginalAttention", "Stream"]


@dataclass(frozen=True)
class Hardware:
    """Where a text is run: a device as torch names it, in "fp32", or in "bf16" under autocast."""

    device: str = "cpu"
    precision: str = "fp32"


CPU = Hardware()


@dataclass
class OriginalAttention:
    """What the attention of a layer of the original read and gave on a text, for another to be fitted to.

    o_proj: (hidden_size, H), float64, with H = num_attention_heads · head_dim. Of each batch, `entered` holds the
    hidden states before the layer, (sequences, sequence_length, hidden_size), and `head_outputs` what o_proj read,
    (tokens, H).
    """

    o_proj: Tensor
    entered: list[Tensor]
    head_outputs: list[Tensor]


@dataclass
class NewLayer:
    """A layer of the converted model: its new tensors by name, `o_proj` among them, and what they are fitted to."""

    index: int
    tensors: dict[str, Tensor]
    o_proj: str
    original: OriginalAttention

    def local_name(self, name: str) -> str:
        """The name of a tensor inside the layer."""
        return name.partition(f".{self.index}.")[2]


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
        with torch.no_grad():  # and not in inference mode, whose tensors nothing can be fitted on
            states = [model.embed(batch) for batch in text.batches]
            model.learn_calls(text.token_ids[: max(STEP_TOKENS // text.token_ids.shape[1], 1)])
        model.release_embeddings()
        return cls(model, states, hardware.device)

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

    def advance(
        self,
        layer: int,
        head_outputs: list[Tensor] | None = None,
        *,
        tensors: Mapping[str, Tensor] | None = None,
        is_read: bool = False,
    ) -> None:
        """Take the hidden states through a layer with the model's own weights, or with `tensors` in their place.

        What its output projection read, (tokens, num_attention_heads · head_dim), is appended to `head_outputs`.
        `is_read` says that layers that follow read the keys and values of this one. With tensors that `refit` made this
        gives the hidden states that it gave.
        """
        import torch

        if is_read:
            self._shared = [{} for _ in self._states]
        with torch.no_grad(), self.model.layer(layer, tensors) as module:
            self._go_through(module, layer, head_outputs)

    def _go_through(self, module: Module, layer: int, head_outputs: list[Tensor] | None = None) -> None:
        self._states = [
            self.model.run(module, layer, states, head_outputs, shared)
            for states, shared in zip(self._states, self._shared, strict=True)
        ]

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
        layer: NewLayer,
        *,
        ridge: float,
        fit: Fit,
        fixed: Collection[str] = (),
        readers: Sequence[NewLayer] = (),
    ) -> FitOutcome | None:
        """Fit a layer's new weights to the original's attention, then take the hidden states through the layer.

        What the gradient steps did is returned, if there were any.

        First its o_proj is fitted in closed form, as `refitted` says, with z' of this stream and with `ridge`; then all
        of its tensors but for `fixed`, by the gradient steps of `fit`, so that hidden states are the original's once
        attention is added. Fitted tensors are put back into `layer.tensors`, in the dtype of each. The lists of
        `layer.original` are cleared. Where attention is not added as it is (`adds_outputs`), the steps aim at what the
        original's o_proj gives.

        `readers` are layers that follow and read the keys and values of this one. Keys and values are fitted to what
        they need as well: the steps lower the sum of the errors of all, and their tensors are fitted too. They read
        what the original's attention reads there, since what they will read is not known yet: each is to be refitted in
        its turn.
        """
        import torch

        if readers:
            self._shared = [{} for _ in self._states]
        with torch.no_grad(), self.model.layer(layer.index, layer.tensors) as module:
            cross, normal = self.output_moments(module, layer.index, layer.original.head_outputs)
            layer.tensors[layer.o_proj] = refitted(
                layer.original.o_proj, layer.tensors[layer.o_proj], cross, normal, ridge
            )
            module.get_parameter(layer.local_name(layer.o_proj)).copy_(layer.tensors[layer.o_proj])
            with ExitStack() as stack:
                modules = [module]
                modules += [
                    stack.enter_context(self.model.layer(reader.index, reader.tensors, without_mlp=True))
                    for reader in readers
                ]
                outcome = self._fit(modules, (layer, *readers), fit, fixed)
            layer.original.entered.clear()  # gigabytes of a large model, and of no use any more
            layer.original.head_outputs.clear()
            self._go_through(module, layer.index)
        return outcome

    def _fit(
        self, modules: Sequence[Module], layers: Sequence[NewLayer], fit: Fit, fixed: Collection[str]
    ) -> FitOutcome | None:
        """The gradient steps of `refit`, on weights of `modules`, and then in the tensors of `layers`."""
        parts = self._parts()
        if fit.steps and len(parts) < 2:
            raise DataError(
                f"{fit.steps} gradient steps were asked for, and the text has no part to judge them by: it gives "
                f"{len(parts)} of the parts of about {STEP_TOKENS} tokens that they read, and 2 are needed",
                hint="take more text, shorter sequences, or no steps",
                settings=("num_tokens", "sequence_length", "fit_steps"),
            )
        if len(parts) < 2 or not fit.num_steps(len(parts)):
            return None
        fitted = [
            (layer.tensors, name, module.get_parameter(layer.local_name(name)))
            for module, layer in zip(modules, layers, strict=True)
            for name in layer.tensors
            if name not in fixed
        ]
        error = self._error(modules, layers, parts[0])
        outcome = fit_parameters([parameter for _, _, parameter in fitted], error, parts, fit)
        for tensors, name, parameter in fitted:
            tensors[name] = parameter.detach().to(tensors[name].dtype).cpu()
            parameter.copy_(tensors[name])
        return outcome

    def _error(self, modules: Sequence[Module], layers: Sequence[NewLayer], some: _Part) -> Callable[[_Part], Tensor]:
        """How far the attention of the layers is from the original's on a part of the text, summed over them.

        The first layer reads this stream, the others what the original's read. `some` is any part.
        """
        model, device, first = self.model, self._device, layers[0]
        adds = model.adds_outputs(modules[0], first.index, self._entering(some), self._kept(some))
        weights = [layer.original.o_proj.float().to(device) for layer in layers]
        biases = [model.output_bias(module) for module in modules]

        def error(part: _Part) -> Tensor:
            shared = self._kept(part)
            errors: list[Tensor] = []
            for module, layer, weight, bias in zip(modules, layers, weights, biases, strict=True):
                original = layer.original
                wanted = original.head_outputs[part.batch][part.tokens].to(device) @ weight.T
                if bias is not None:
                    wanted = wanted + bias
                entered = original.entered[part.batch][part.sequences]
                entering = self._entering(part) if layer is first else entered
                found = model.projected_outputs(module, layer.index, entering, shared)
                if adds:
                    before, beside = (states.flatten(0, 1).to(device) for states in (entered, entering))
                    found, wanted = beside + found, before + wanted
                errors.append(relative_error(found, wanted))
            return sum(errors[1:], errors[0])

        return error

    def _entering(self, part: _Part) -> Tensor:
        return self._states[part.batch][part.sequences]

    def _kept(self, part: _Part) -> SharedStates | None:
        """The keys and values of other layers that a layer may read, of these sequences."""
        shared = self._shared[part.batch]
        return None if shared is None else {layer: part.of(states) for layer, states in shared.items()}

    def _parts(self) -> list[_Part]:
        """The text in parts of one step, of equally many sequences; what is left over of a batch is in none."""
        length = self._states[0].shape[1]
        size = min(max(STEP_TOKENS // length, 1), len(self._states[0]))
        return [
            _Part(batch, first, size, length)
            for batch, states in enumerate(self._states)
            for first in range(0, len(states) - size + 1, size)
        ]


class _Part(NamedTuple):
    """Some sequences of a batch."""

    batch: int
    first: int
    size: int
    length: int

    @property
    def sequences(self) -> slice:
        return slice(self.first, self.first + self.size)

    @property
    def tokens(self) -> slice:
        return slice(self.first * self.length, (self.first + self.size) * self.length)

    def of(self, states: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """Of the keys and values of a batch those of these sequences."""
        keys, values = states
        return keys[self.sequences], values[self.sequences]
