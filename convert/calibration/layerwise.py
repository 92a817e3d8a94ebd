"""A decoder run layer by layer over calibration text, with the weights of one layer in memory at a time."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any

from ..architectures.source import Source
from ..architectures.table import known_architecture
from ..checkpoint.finite import count_nonfinite
from ..checkpoint.loading import load_model
from ..checkpoint.tensors import TORCH_DTYPES
from ..errors import UnsupportedError

if TYPE_CHECKING:
    from torch import Tensor
    from torch.nn import Module

    SharedStates = dict[int, tuple[Tensor, Tensor]]

__all__ = [
    "LayerwiseModel",
]


_SAME = 0.02  # relative: bfloat16 has three digits


class _EnoughError(Exception):
    """Ends a forward pass once what was wanted of it is known."""


class LayerwiseModel:
    """The decoder of a checkpoint, its layers on the meta device until they are loaded.

    Weights are float32 on `device`; with `precision` "bf16" they compute under autocast. Hidden states that it takes
    and gives are on the CPU.
    """

    def __init__(self, source: Source, *, device: str = "cpu", precision: str = "fp32") -> None:
        import torch
        from accelerate.utils import set_module_tensor_to_device

        architecture = source.architecture
        self._checkpoint = source.checkpoint
        self._device = torch.device(device)
        self._bf16 = precision == "bf16" and architecture.autocasts
        self._whole: Any = None
        self._model = model = copy.deepcopy(source.empty_model)
        in_class = known_architecture(architecture.model_type) or architecture
        self._path = in_class.attention.partition(".{layer}")[0]
        located = architecture.attention.partition(".{layer}")[0]
        # the first part of the decoder's names is another, or absent, where another class saved the checkpoint
        first, _, rest = self._path.partition(".")
        self._first, self._saved_first = f"{first}.", located.removesuffix(rest)
        self._attention = architecture.attention.partition("{layer}.")[2]
        self._inputs = f"{self._attention}.{architecture.qkv_proj or architecture.q_proj}"
        self._outputs = f"{self._attention}.{architecture.o_proj}"
        self._calls: dict[int, list[tuple[tuple[Any, ...], dict[str, Any]]]] = {}
        base = model.base_model_prefix
        outside = [name for name, _ in model.named_parameters() if not name.startswith(f"{self._path}.")]
        self._fill(model, "", [name for name in outside if name.startswith(f"{base}.")])
        for name, _ in list(model.named_buffers()):
            set_module_tensor_to_device(model, name, self._device)

    def release_embeddings(self) -> None:
        """Drop the weights outside the layers, once everything is embedded."""
        self._drop(self._model, [name for name, parameter in self._model.named_parameters() if not parameter.is_meta])

    def embed(self, token_ids: Tensor) -> Tensor:
        """The hidden states that enter the first layer, (batch, length, hidden_size)."""
        hidden_states, calls = self._record(token_ids.to(self._device))
        self._calls.setdefault(len(token_ids), calls)
        return hidden_states.cpu()

    def learn_calls(self, token_ids: Tensor) -> None:
        """Learn how layers are called for batches as large as this one, (batch, length), where that is not known."""
        if len(token_ids) not in self._calls:
            self.embed(token_ids)

    @contextmanager
    def layer(
        self,
        index: int,
        replaced: Mapping[str, Tensor] | None = None,
        kv_source_layer: int | None = None,
        *,
        without_mlp: bool = False,
    ) -> Iterator[Module]:
        """The layer with its weights; `replaced` are weights, by their names in the checkpoint, to take instead.

        In a class with cross-layer attention it reads the keys and values of `kv_source_layer`, if that is given.
        Without its MLP, which is most of it, it runs as far as its output projection (`projected_outputs`).
        """
        module: Any = self._model.get_submodule(f"{self._path}.{index}")
        attention = module.get_submodule(self._attention)
        names = [name for name, _ in module.named_parameters() if not (without_mlp and name.startswith("mlp."))]
        prefix = f"{self._path}.{index}."
        self._fill(module, prefix, names, replaced or {})
        if kv_source_layer is not None:
            attention.kv_source_layer = kv_source_layer
        try:
            yield module
        finally:
            self._drop(module, names)
            if kv_source_layer is not None:
                attention.kv_source_layer = index

    def run(
        self,
        module: Module,
        index: int,
        hidden_states: Tensor,
        head_outputs: list[Tensor] | None = None,
        shared: SharedStates | None = None,
    ) -> Tensor:
        """What the layer makes of the hidden states; what its output projection read is appended to `head_outputs`.

        `shared` holds the keys and values that layers of a class with cross-layer attention have computed of the same
        sequences, and takes those of this one, even where a hook ends the pass early.
        """
        import torch

        arguments, named = self._calls[len(hidden_states)][index]
        states: SharedStates = {}
        if "shared_kv_states" in named:  # not the recorded one, which would keep those of every layer
            for layer, (keys, values) in (shared or {}).items():
                states[layer] = keys.to(self._device), values.to(self._device)
            named = named | {"shared_kv_states": states}
        try:
            with (
                self._noting(module, self._outputs, head_outputs),
                torch.autocast(self._device.type, dtype=torch.bfloat16, enabled=self._bf16),
            ):
                outputs: Any = module(hidden_states.to(self._device), *arguments, **named)
        finally:
            if shared is not None:
                for layer, (keys, values) in states.items():
                    shared[layer] = keys.cpu(), values.cpu()
        leaving: Tensor = outputs[0] if isinstance(outputs, tuple) else outputs
        return leaving.float().cpu()

    def attention_inputs(self, module: Module, index: int, hidden_states: Tensor) -> Tensor:
        """What the projections of queries, keys and values read, (tokens, hidden_size)."""
        return self._peek(module, self._inputs, index, hidden_states)

    def attention_outputs(
        self, module: Module, index: int, hidden_states: Tensor, shared: SharedStates | None = None
    ) -> Tensor:
        """What the output projection reads, (tokens, num_attention_heads · head_dim); `shared` stays as it is."""
        return self._peek(module, self._outputs, index, hidden_states, None if shared is None else dict(shared))

    def projected_outputs(
        self, module: Module, index: int, hidden_states: Tensor, shared: SharedStates | None = None
    ) -> Tensor:
        """What the output projection gives, (tokens, hidden_size), on `device`; gradients reach the module's weights.

        `shared` is that of `run`; through the keys and values that it takes, gradients reach the weights they are of.
        """
        given: list[Tensor] = []

        def note(_: Module, __: tuple[Tensor, ...], output: Tensor) -> None:
            given.append(output.flatten(0, -2))
            raise _EnoughError

        hook = module.get_submodule(self._outputs).register_forward_hook(note)
        try:
            with suppress(_EnoughError):
                self.run(module, index, hidden_states, shared=shared)
        finally:
            hook.remove()
        return given[0].float()

    def adds_outputs(
        self, module: Module, index: int, hidden_states: Tensor, shared: SharedStates | None = None
    ) -> bool:
        """Whether the residual stream gets what the output projection gives, as it is; `shared` stays as it is.

        It does not where a norm or a factor comes between (Gemma 2, OLMo 2, Granite). That shows in the layer itself:
        where it does, some module reads the sum of both, or gives what leaves the layer beyond that sum.
        """
        read: list[Tensor] = []
        given: list[Tensor] = []
        outputs: list[Tensor] = []

        def note(part: Module, arguments: tuple[Any, ...], output: Any) -> None:
            states = output[0] if isinstance(output, tuple) else output
            # copies, since a layer may change in place what a part has given
            (outputs if part is projection else given).append(states.float().cpu().clone())
            read.extend(states.float().cpu().clone() for states in arguments[:1])

        projection = module.get_submodule(self._outputs)
        hooks = [part.register_forward_hook(note) for part in module.modules() if part is not module]
        try:
            leaving = self.run(module, index, hidden_states, shared=None if shared is None else dict(shared))
        finally:
            for hook in hooks:
                hook.remove()
        output, entering = outputs[0].flatten(), hidden_states.float().flatten()
        rest = leaving.flatten() - entering
        sums = [states.flatten() - entering for states in read if states.numel() == output.numel()]
        sums += [rest - states.flatten() for states in given if states.numel() == output.numel()]
        return any(bool((found - output).norm() <= _SAME * output.norm()) for found in sums)

    def output_bias(self, module: Module) -> Tensor | None:
        """A copy of the bias of the layer's output projection, (hidden_size,), if it has one."""
        bias = getattr(module.get_submodule(self._outputs), "bias", None)
        return None if bias is None else bias.detach().clone()

    def require_finite(self, moments: Tensor, index: int) -> None:
        """Raise UnsupportedError, with the cause, where moments of what a layer computed of a text are not finite."""
        if not count_nonfinite(moments):
            return
        name, nonfinite = self._checkpoint.name, self._checkpoint.original.nonfinite
        if nonfinite:
            raise UnsupportedError(
                f"{name}: layer {index} computes values of a text that are not finite, since weights are not: "
                f"{next(iter(nonfinite))} has {next(iter(nonfinite.values()))} such values",
                hint="only a method that measures nothing on a text, such as the mean, can keep such weights",
            )
        raise UnsupportedError(
            f"{name}: layer {index} computes values of the text that are not finite{' in bf16' if self._bf16 else ''}, "
            "though its weights are",
            hint="run the text in fp32"
            if self._bf16
            else "the model does not work; a method without a text converts it",
            settings=("precision",) if self._bf16 else (),
        )

    def _peek(
        self, module: Module, name: str, index: int, hidden_states: Tensor, shared: SharedStates | None = None
    ) -> Tensor:
        """What a module of the layer reads; what comes after it is not computed."""
        seen: list[Tensor] = []
        with self._noting(module, name, seen, stop=True), suppress(_EnoughError):
            self.run(module, index, hidden_states, shared=shared)
        return seen[0]

    @contextmanager
    def _noting(self, module: Module, name: str, seen: list[Tensor] | None, *, stop: bool = False) -> Iterator[None]:
        if seen is None:
            yield
            return

        def note(_: Module, arguments: tuple[Tensor, ...]) -> None:
            seen.append(arguments[0].flatten(0, -2).cpu())
            if stop:
                raise _EnoughError

        hook = module.get_submodule(name).register_forward_pre_hook(note)
        try:
            yield
        finally:
            hook.remove()

    def _record(self, token_ids: Tensor) -> tuple[Tensor, list[tuple[tuple[Any, ...], dict[str, Any]]]]:
        """A forward pass through layers that only note how they are called."""
        import torch

        calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
        entering: list[Tensor] = []
        layers = list(self._model.get_submodule(self._path))
        last_error: Exception | None = None
        for as_tuple in (False, True):  # some classes expect a tuple of their layers
            calls.clear()

            def note(*arguments: Any, as_tuple: bool = as_tuple, **named: Any) -> Any:
                hidden_states = arguments[0] if arguments else named.pop("hidden_states")
                calls.append((arguments[1:], named))
                entering.append(hidden_states)
                return (hidden_states,) if as_tuple else hidden_states

            try:
                for layer in layers:
                    layer.forward = note
                self._model.base_model(input_ids=token_ids, use_cache=False)
            except torch.OutOfMemoryError:
                raise
            except (IndexError, RuntimeError, TypeError, ValueError) as error:
                last_error = error
            finally:
                for layer in layers:
                    del layer.forward
            if len(calls) == len(layers):
                return entering[0], calls
        raise UnsupportedError(f"{type(self._model).__name__} cannot be run layer by layer ({last_error})")

    def _fill(self, module: Any, prefix: str, names: list[str], replaced: Mapping[str, Tensor] | None = None) -> None:
        from accelerate.utils import set_module_tensor_to_device

        for name in names:
            value = self._tensor(prefix + name, replaced or {}).float()
            set_module_tensor_to_device(module, name, self._device, value=value)

    def _drop(self, module: Any, names: list[str]) -> None:
        from accelerate.utils import set_module_tensor_to_device

        for name in names:
            set_module_tensor_to_device(module, name, "meta")

    def _tensor(self, name: str, replaced: Mapping[str, Tensor]) -> Tensor:
        saved = name
        if name not in self._checkpoint.tensors and name.startswith(self._first):
            saved = self._saved_first + name.removeprefix(self._first)
        if saved in replaced:
            return replaced[saved]
        if saved in self._checkpoint.tensors:
            return self._checkpoint.read(saved)
        if self._whole is None:  # a class that transformers renames on loading, experts for one, is loaded whole
            import torch

            self._whole = load_model(self._checkpoint.directory, dtype=torch.float32, device="cpu")
        tensor: Tensor = self._whole.get_parameter(name).detach()
        if count_nonfinite(tensor):
            for saved, info in self._checkpoint.tensors.items():
                if info.dtype in TORCH_DTYPES:
                    self._checkpoint.read(saved)  # raises, for one that holds such values
        return tensor
