"""Each layer's attention is fitted to the teacher's, reading the hidden states that the teacher has there.

The first stage of RADLADS (arXiv 2505.03005) and of block-wise local distillation: every layer gets a signal of its
own, and errors do not add up from layer to layer.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from ...convert.architectures.architecture import Architecture
from ...convert.errors import UnsupportedError

__all__ = ["AttentionRegression", "decoder_layers", "require_same_size"]


_FEED_FORWARDS = ("mlp", "ffn")


def decoder_layers(model: Any, architecture: Architecture) -> list[Any]:
    """Return the decoder layers of a model, in order."""
    return list(model.get_submodule(architecture.attention.partition(".{layer}")[0]))


def require_same_size(student: Any, teacher: Any) -> None:
    """Raise UnsupportedError unless the layers of two models correspond, by their configs."""
    sizes = [(config.num_hidden_layers, config.hidden_size) for config in (student, teacher)]
    if sizes[0] != sizes[1]:
        raise UnsupportedError(
            "attention can be fitted layer by layer only to a teacher of the same size: the student has "
            f"{sizes[0][0]} layers of {sizes[0][1]}, the teacher {sizes[1][0]} of {sizes[1][1]}",
            hint="leave the layer-wise stage out with --layerwise-fraction 0",
        )


class AttentionRegression:
    """The sum over tokens of the mean over layers of ‖student's attention output − teacher's‖² / E‖teacher's‖².

    An output is that of o_proj, whatever a class does with it next. E‖teacher's‖² per token comes from a sample that is
    the same throughout a run (`measure_scales`, or `scales` of a run to go on with), so that how a batch is cut into
    micro-batches changes nothing. The two have to be of the same size.
    """

    def __init__(
        self,
        student: Any,
        teacher: Any,
        student_architecture: Architecture,
        teacher_architecture: Architecture,
        *,
        scales: Iterable[float] = (),
    ) -> None:
        self._teacher = teacher
        self._active = False
        self._hidden_states: dict[int, Tensor] = {}
        self._targets: dict[int, Tensor] = {}
        self._attended: dict[int, Tensor] = {}
        self._outputs: dict[int, Tensor] = {}
        self.scales = list(scales)
        for index, layer in enumerate(decoder_layers(teacher, teacher_architecture)):
            layer.register_forward_pre_hook(self._keep_hidden_states(index), with_kwargs=True)
            _output_projection(layer, teacher_architecture).register_forward_hook(self._keep(self._targets, index))
        self._layers = decoder_layers(student, student_architecture)
        for index, layer in enumerate(self._layers):
            layer.register_forward_pre_hook(self._replace_hidden_states(index), with_kwargs=True)
            _output_projection(layer, student_architecture).register_forward_hook(self._keep(self._attended, index))
            # around FSDP2's own hook, which has to see what the loss is made of: it frees the other weights
            layer.register_forward_hook(self._replace_output(index), prepend=True)
            layer.register_forward_hook(self._keep_output(index))

    def measure_scales(self, feeds: Iterable[dict[str, Tensor]]) -> list[float]:
        """Set and return `scales`: for each layer, ‖teacher's attention output‖² per token over `feeds`."""
        totals, num_tokens = [0.0] * len(self._layers), 0
        for feed in feeds:
            self._run_teacher(feed)
            num_tokens += feed["input_ids"].numel()
            totals = [total + _energy(self._targets[index]).item() for index, total in enumerate(totals)]
        self.scales = [total / num_tokens for total in totals]
        return self.scales

    def __call__(self, model: Any, feed: dict[str, Tensor], labels: Tensor) -> Tensor:
        """Compute the loss, a float32 scalar, of `model`: the student or what wraps it. `labels` are not used."""
        self._run_both(model, feed)
        losses = [
            # an attention that adds nothing, as in layers that were stacked in between, has no scale
            _energy(self._outputs.pop(index) - self._targets.pop(index)) / (scale or 1.0)
            for index, scale in enumerate(self.scales)
        ]
        self._hidden_states.clear()
        return torch.stack(losses).mean()

    @torch.no_grad()
    def are_finite(self, model: Any, feed: dict[str, Tensor]) -> tuple[bool, bool]:
        """Tell whether the attention outputs of student and teacher are finite on a micro-batch."""
        self._run_both(model, feed)
        student, teacher = (
            all(bool(tensor.isfinite().all()) for tensor in place.values()) for place in (self._outputs, self._targets)
        )
        for place in (self._hidden_states, self._outputs, self._targets):
            place.clear()
        return student, teacher

    def _run_both(self, model: Any, feed: dict[str, Tensor]) -> None:
        """Fill the targets with the teacher's attention outputs, and the outputs with the student's."""
        self._run_teacher(feed)
        with self._attention_only():
            model(**feed, use_cache=False, logits_to_keep=1)

    def _run_teacher(self, feed: dict[str, Tensor]) -> None:
        self._active = True
        with torch.no_grad():
            self._teacher(**feed, use_cache=False, logits_to_keep=1)
        self._active = False

    @contextmanager
    def _attention_only(self) -> Iterator[None]:
        """Student layers hand on their attention's output, and leave their feed-forward out where it has a name."""
        skipped = [
            module for layer in self._layers for name, module in layer.named_children() if name in _FEED_FORWARDS
        ]
        for module in skipped:
            module.forward = torch.zeros_like
        self._active = True
        try:
            yield
        finally:
            self._active = False
            for module in skipped:
                del module.forward

    def _keep_hidden_states(self, index: int) -> Any:
        def hook(layer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if self._active:
                self._hidden_states[index] = args[0] if args else kwargs["hidden_states"]

        return hook

    def _replace_hidden_states(self, index: int) -> Any:
        def hook(layer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            if not self._active:
                return None
            hidden_states = self._hidden_states[index].to(next(layer.parameters()).dtype)
            return (hidden_states, *args[1:]), {
                name: value for name, value in kwargs.items() if name != "hidden_states"
            }

        return hook

    def _replace_output(self, index: int) -> Any:
        def hook(layer: Any, args: tuple[Any, ...], output: Any) -> Any:
            if not self._active:
                return None
            attended = self._attended.pop(index)
            return (attended, *output[1:]) if isinstance(output, tuple) else attended

        return hook

    def _keep(self, place: dict[int, Tensor], index: int) -> Any:
        def hook(module: Any, args: tuple[Any, ...], output: Tensor) -> None:
            if self._active:
                place[index] = output

        return hook

    def _keep_output(self, index: int) -> Any:
        def hook(layer: Any, args: tuple[Any, ...], output: Any) -> None:
            if self._active:
                self._outputs[index] = output[0] if isinstance(output, tuple) else output

        return hook


def _output_projection(layer: Any, architecture: Architecture) -> Any:
    return layer.get_submodule(f"{architecture.attention.partition('{layer}.')[2]}.{architecture.o_proj}")


def _energy(tensor: Tensor) -> Tensor:
    return tensor.float().square().sum()
