"""Whether a checkpoint computes with a cache, token by token, what it computes without one.

Generation depends on it, and the interfaces of transformers change between versions: a class that overlooks the cache
it is given computes without it, and generates nonsense without an error.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .architectures.table import known_architecture
from .checkpoint.loading import auto_class, quiet_transformers
from .checkpoint.manifest import renew_entries
from .checkpoint.opening import open_checkpoint
from .checkpoint.output import disk_errors
from .checkpoint.runtime_code import BesideState, CodeBeside, code_beside, replace_code
from .checkpoint.tensors import Checkpoint
from .errors import CheckpointError, OutputError, UnsupportedError, in_one_line, is_out_of_memory
from .runtime import RUNTIME_CLASSES

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["MAX_WHOLE_PARAMETERS", "CacheCheck", "check_cache", "check_runtime", "refresh"]

MAX_WHOLE_PARAMETERS = 20_000_000  # 80 MB in float32

_CHUNKS = (3, 1, 1, 2, 1)  # tokens of a prompt, of steps, of a step over two guessed tokens
_NUM_TOKENS = sum(_CHUNKS)
_NUM_ENCODED = 4
# Sums in another order differ by about 1e-6 of the scale in float32; a cache that is not read differs by its own size.
_TOLERANCE = 1e-3

Forward = Callable[..., Any]  # (tokens from, to, use_cache=…, and the cache under its name) → outputs of the class


@dataclass(frozen=True)
class CacheCheck:
    """The result of a check that passed.

    `layers` are those that ran. Outputs with and without a cache differ by at most `difference`, where the largest
    absolute output is `scale`.
    """

    layers: tuple[int, ...]
    difference: float
    scale: float


def check_cache(directory: Path, *, name: str | None = None, beside: CodeBeside | None = None) -> CacheCheck:
    """Run a few tokens through the checkpoint's class twice, all at once without a cache and part by part with one.

    A model of up to MAX_WHOLE_PARAMETERS parameters runs whole, and its logits are compared. Of a larger one only the
    first layer of each kind runs, in float32 on random embeddings, with the decoder's modules around it, and the hidden
    states after it are compared: embeddings and head, often the largest tensors, are not read.

    With `beside`, the class is that of the code beside the weights instead of the installed one. Raises
    CheckpointError, with `name` in place of the directory, where the outputs differ or the class cannot run. An error
    of memory that ran out is raised as it is.
    """
    import torch

    with open_checkpoint(directory) as checkpoint:
        checkpoint.allow_nonfinite = True  # which values are right is not this check's concern
        name = name or checkpoint.name
        class_name = str((checkpoint.config.get("architectures") or ["its class"])[0])
        try:
            with quiet_transformers(), torch.inference_mode():
                layers, forward = _open(checkpoint, beside)
                alone, stepwise = _run(forward)
        except Exception as error:  # what a class and a version make of each other has no words of its own
            if is_out_of_memory(error):
                error.add_note(f"while a few tokens ran through {name}")
                raise
            reason = in_one_line(error, max_characters=300)
            message = f"{name}: {class_name} cannot run a few tokens ({reason}; {_versions(beside)})"
            raise CheckpointError(message, hint=_hint(name, beside)) from error
    difference = (alone - stepwise).nan_to_num(0.0).abs().max().item()
    scale = alone.nan_to_num(0.0).abs().max().item()
    if difference > _TOLERANCE * scale or not torch.equal(alone.isfinite(), stepwise.isfinite()):
        raise CheckpointError(
            f"{name}: with a cache, {class_name} computes something else than without: outputs differ by "
            f"{difference:.3g} at a scale of {scale:.3g} ({_versions(beside)})",
            hint=_hint(name, beside),
        )
    return CacheCheck(layers, difference, scale)


def check_runtime(model: str | Path) -> CacheCheck | None:
    """Check the cache of a checkpoint in one of kvconvert's classes, and return None for one in any other class.

    model: a directory or a hub id. The code beside the weights runs where an earlier kvconvert wrote it or the user
    allowed it, otherwise the installed class. Raises CheckpointError as `check_cache` does.
    """
    beside = _code_of(model)
    if beside is None:
        return None
    return check_cache(beside.directory, name=str(model), beside=beside if beside.may_run else None)


def refresh(directory: Path, *, force: bool = False) -> tuple[str, ...]:
    """Replace the code beside the weights by the installed code, and return the names of the files that changed.

    The installed class is first checked on the weights (`check_cache`). Each file is replaced whole or not at all, and
    no other file changes. Code that no version of kvconvert wrote, since somebody changed it, is replaced only with
    `force`. Raises UnsupportedError for a checkpoint without such code, CheckpointError where the installed class does
    not work with this version of transformers, and OutputError where the files cannot be written.
    """
    if not directory.is_dir():
        raise CheckpointError(f"{directory}: no such directory", hint="refresh renews a directory on this machine")
    beside = _code_of(directory)
    if beside is None or beside.state is BesideState.NONE:
        raise UnsupportedError(f"{directory}: no code of kvconvert lies beside its weights, so there is none to renew")
    if beside.state is BesideState.OTHER and not force:
        raise OutputError(
            f"{directory}: the code beside its weights is none that this kvconvert knows; it may have been changed",
            hint="keep a copy if you need it, and allow it to be replaced",
            settings=("force",),
        )
    check_cache(directory)
    with disk_errors(directory):
        replaced = replace_code(beside)
        renew_entries(directory, replaced)
    return replaced


def _code_of(model: str | Path) -> CodeBeside | None:
    with open_checkpoint(model) as checkpoint:
        entry = RUNTIME_CLASSES.get(str(checkpoint.config.get("model_type")))
        return None if entry is None else code_beside(checkpoint.directory, entry)


def _run(forward: Forward) -> tuple[Tensor, Tensor]:
    """Outputs, (tokens, …), of all tokens at once without a cache, and part by part with one."""
    import torch

    from .runtime.transformers_interface import CACHE_NAME, cache_of

    alone = _result(forward(0, _NUM_TOKENS, use_cache=False))
    parts: list[Tensor] = []
    named: dict[str, Any] = {}
    for begin, size in zip((sum(_CHUNKS[:part]) for part in range(len(_CHUNKS))), _CHUNKS, strict=True):
        outputs = forward(begin, begin + size, use_cache=True, **named)
        named = {CACHE_NAME: cache_of(outputs)}
        parts.append(_result(outputs))
    return alone, torch.cat(parts)


def _result(outputs: Any) -> Tensor:
    logits: Tensor | None = getattr(outputs, "logits", None)
    result: Tensor = outputs.last_hidden_state if logits is None else logits
    return result[0].float()


def _open(checkpoint: Checkpoint, beside: CodeBeside | None) -> tuple[tuple[int, ...], Forward]:
    """Which layers run, and a function that runs them."""
    import torch
    from transformers import AutoConfig

    directory = checkpoint.directory
    auto = auto_class(directory)
    if beside is None:
        config = AutoConfig.from_pretrained(directory)
        load, build = auto.from_pretrained, auto.from_config
    else:
        config = beside.load("AutoConfig").from_pretrained(directory)
        model_class = beside.load(auto.__name__)
        load, build = model_class.from_pretrained, model_class._from_config
    if checkpoint.num_parameters <= MAX_WHOLE_PARAMETERS:
        model = load(directory, dtype=torch.float32).eval()
        return tuple(range(_num_layers(checkpoint))), _whole(model)
    layers = _first_of_each_kind(config, _num_layers(checkpoint))
    return layers, _decoder(_first_layers(checkpoint, config, layers, build))


def _whole(model: Any) -> Forward:
    """Runs tokens, those of the decoder where there is an encoder, whose output is random."""
    import torch

    ids = torch.arange(3, 3 + _NUM_TOKENS)[None] % model.config.get_text_config().vocab_size
    if not model.config.is_encoder_decoder:
        return lambda begin, end, **named: model(input_ids=ids[:, begin:end], **named)
    from transformers.modeling_outputs import BaseModelOutput

    encoded = BaseModelOutput(_random(_NUM_ENCODED, model.config.hidden_size))
    return lambda begin, end, **named: model(encoder_outputs=encoded, decoder_input_ids=ids[:, begin:end], **named)


def _decoder(model: Any) -> Forward:
    """Runs random embeddings through the decoder."""
    decoder = model.get_decoder()
    width = decoder.get_input_embeddings().embedding_dim
    # small beside what a layer adds: a wrong attention is not lost in them
    embedded = 0.02 * _random(_NUM_TOKENS, width)
    extra = {"encoder_hidden_states": _random(_NUM_ENCODED, width)} if model.config.is_encoder_decoder else {}
    return lambda begin, end, **named: decoder(inputs_embeds=embedded[:, begin:end], **extra, **named)


def _random(num_tokens: int, width: int) -> Tensor:
    import torch

    return torch.randn(1, num_tokens, width, generator=torch.Generator().manual_seed(0))


def _num_layers(checkpoint: Checkpoint) -> int:
    architecture = known_architecture(checkpoint.config.get("model_type"))
    name = architecture.config_name("num_hidden_layers") if architecture else "num_hidden_layers"
    return checkpoint.config_int(name)


def _first_of_each_kind(config: Any, num_layers: int) -> tuple[int, ...]:
    """The first layer of each kind, and of a kind that reads another's keys and values also that one."""
    kinds = getattr(config, "layer_types", None) or [None] * num_layers
    sources = getattr(config, "kv_source_layers", None) or list(range(num_layers))
    first: dict[object, int] = {}
    for layer in range(num_layers):
        first.setdefault((kinds[layer], sources[layer] == layer), layer)
    return tuple(sorted({layer for found in first.values() for layer in (sources[found], found)}))


def _first_layers(checkpoint: Checkpoint, config: Any, layers: tuple[int, ...], build: Callable[..., Any]) -> Any:
    """A model of only these layers, with the decoder's weights but for the embeddings of tokens; the rest is empty."""
    import torch
    from accelerate import init_empty_weights
    from accelerate.utils import set_module_tensor_to_device

    architecture = known_architecture(config.model_type)
    if architecture is None:
        raise UnsupportedError(f"kvconvert does not know {config.model_type}")
    kept: dict[str, Any] = {architecture.config_name("num_hidden_layers"): len(layers)}
    for name in ("layer_types", "mlp_layer_types"):
        if isinstance(values := getattr(config, name, None), list):
            kept[name] = [values[layer] for layer in layers]
    if sources := getattr(config, "kv_source_layers", None):
        kept["kv_source_layers"] = [layers.index(sources[layer]) for layer in layers]
    shortened = type(config).from_dict({**config.to_dict(), **kept})
    shortened._attn_implementation = copy.copy(config._attn_implementation)
    with init_empty_weights(include_buffers=False):
        model = build(shortened, dtype=torch.float32).eval()

    path = architecture.attention.partition("{layer}")[0]  # model.layers.
    embeddings = model.get_decoder().get_input_embeddings().weight
    decoder = {id(parameter) for parameter in model.get_decoder().parameters()}
    for name, parameter in list(model.named_parameters()):
        if id(parameter) not in decoder or parameter is embeddings:
            continue
        saved = name
        if name.startswith(path):
            layer, _, rest = name.removeprefix(path).partition(".")
            saved = f"{path}{layers[int(layer)]}.{rest}"
        if saved not in checkpoint.tensors:  # saved by a base class
            saved = saved.removeprefix(f"{model.base_model_prefix}.")
        set_module_tensor_to_device(model, name, "cpu", value=checkpoint.read(saved).float())
    return model


def _versions(beside: CodeBeside | None) -> str:
    import transformers

    from .runtime.transformers_interface import TESTED_VERSIONS

    works_with = " to ".join(TESTED_VERSIONS) if beside is None else beside.works_with
    tested = f"its code works with {works_with}" if works_with else "its code does not say with which it works"
    return f"transformers {transformers.__version__}; {tested}"


def _hint(name: str, beside: CodeBeside | None) -> str:
    if beside is None:
        return "install a version of transformers that it was tested with, or a newer kvconvert"
    return f"`refresh` renews the code beside the weights of {name}"
