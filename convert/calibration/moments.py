"""Second moments of what layers read, over the tokens of a text."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

from ..algebra.linear import symmetric_product
from .layerwise import LayerwiseModel

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["SecondMoment", "layer_moments", "second_moment", "with_one"]


def with_one(states: Tensor) -> Tensor:
    import torch

    return torch.cat([states, states.new_ones(len(states), 1)], dim=1)


class SecondMoment:
    """E[a bᵀ] over tokens, (tokens, …), given in parts: products in float32 on `device`, sums in float64.

    Of parts that are the same tensor twice little more than half is computed, since the result is symmetric.
    """

    def __init__(self, device: str = "cpu") -> None:
        self._device = device
        self._total: Any = 0.0
        self._count = 0

    def add(self, a: Tensor, b: Tensor) -> None:
        left = a.to(self._device).float().T
        product = symmetric_product(left, left) if a is b else left @ b.to(self._device).float()
        self._total += product.cpu().double()
        self._count += len(a)

    @property
    def value(self) -> Tensor:
        moment: Tensor = self._total / self._count
        return moment


def second_moment(pairs: Iterable[tuple[Tensor, Tensor]], device: str = "cpu") -> Tensor:
    """E[a bᵀ] over the tokens of all pairs a, b."""
    moment = SecondMoment(device)
    for a, b in pairs:
        moment.add(a, b)
    return moment.value


def layer_moments(
    model: LayerwiseModel,
    layers: tuple[int, ...],
    batches: Iterable[Tensor],
    device: str = "cpu",
    visit: Callable[[Tensor, int], object] = lambda inputs, sequence_length: None,
) -> tuple[list[Tensor], list[Tensor | None]]:
    """Run consecutive layers, and return second moments of what their attention reads, x with a 1 appended, float64.

    They are E[x xᵀ] of each layer, and for each layer after the first E[x x'ᵀ] with the x' of the first one (None for
    the first), all (hidden_size + 1, hidden_size + 1). `batches` are the hidden states that enter the first layer, each
    (sequences, sequence_length, hidden_size), of batches that the model has embedded. Products are summed on `device`.
    `visit` is called with the inputs of each batch, (tokens, hidden_size + 1), and its sequence_length. The inputs of
    the first layer stay in memory while the others run. Raises UnsupportedError where moments are not finite.
    """
    import torch

    grams: list[Tensor] = []
    crosses: list[Tensor | None] = []
    first: list[Tensor] = []
    states = list(batches)
    with torch.no_grad():
        for layer in layers:
            gram, cross = SecondMoment(device), SecondMoment(device)
            with model.layer(layer) as module:
                for index, batch in enumerate(states):
                    inputs = with_one(model.attention_inputs(module, layer, batch))
                    gram.add(inputs, inputs)
                    visit(inputs, batch.shape[1])
                    if layer != layers[0]:
                        cross.add(inputs, first[index])
                    elif layer != layers[-1]:
                        first.append(inputs)
                    if layer != layers[-1]:
                        states[index] = model.run(module, layer, batch)
            grams.append(gram.value)
            model.require_finite(grams[-1], layer)
            crosses.append(cross.value if layer != layers[0] else None)
    return grams, crosses
