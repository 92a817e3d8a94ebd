"""Classes without grouped attention, and the classes that hold the same function and have it."""

from __future__ import annotations

import pkgutil
from collections.abc import Iterator
from importlib import import_module
from types import MappingProxyType

from ..architecture import read_attention
from ..architectures import ARCHITECTURES, find_architecture
from ..checkpoint import Checkpoint
from ..errors import UnsupportedError
from ..translation import Route, Routes, TranslatedCheckpoint
from .cross_layer import CROSS_LAYER, CROSS_LAYER_DECODER, LATENT_SOURCES

__all__ = ["CROSS_LAYER", "ROUTES", "as_cross_layer", "as_latent_source", "as_target", "targets"]

_OWN_CLASS: tuple[Route, ...] = ((),)


def _collect() -> Routes:
    """What the files beside this one declare as ROUTES."""
    routes: dict[str, tuple[Route, ...]] = dict.fromkeys(ARCHITECTURES, _OWN_CLASS)
    for module in pkgutil.iter_modules(__path__):
        routes.update(getattr(import_module(f"{__name__}.{module.name}"), "ROUTES", {}))
    return routes


ROUTES: Routes = MappingProxyType(_collect())


def targets(checkpoint: Checkpoint) -> Iterator[Checkpoint | UnsupportedError]:
    """The checkpoint as each class that may hold it, or why that one cannot, in the order of `ROUTES`."""
    for route in ROUTES.get(str(checkpoint.config.get("model_type")), _OWN_CLASS):
        try:
            view = checkpoint
            for translation in route:
                view = TranslatedCheckpoint.of(view, translation)
        except UnsupportedError as error:
            yield error
        else:
            yield view


def as_target(checkpoint: Checkpoint, num_key_value_heads: int) -> Checkpoint:
    """The checkpoint as the first class of `ROUTES` that computes the same function and can have so many K/V heads.

    That is the checkpoint itself if its own class can. Raises UnsupportedError, with the reason of the last class, if
    none does, and for an architecture that kvconvert does not know.
    """
    refusal = UnsupportedError(f"{checkpoint.name}: no class holds it")
    for target in targets(checkpoint):
        if isinstance(target, UnsupportedError):
            refusal = target
            continue
        reason = find_architecture(target).refuse_heads(target.config, num_key_value_heads)
        if reason is None:
            return target
        refusal = UnsupportedError(f"{checkpoint.name}: {reason}")
    raise refusal


def as_cross_layer(checkpoint: Checkpoint) -> Checkpoint:
    """The checkpoint as CrossLayerDecoder, every layer with keys and values of its own.

    Raises UnsupportedError for a class that it does not hold, and where layers share already.
    """
    refusal: UnsupportedError | None = None
    for view in targets(checkpoint):
        if isinstance(view, UnsupportedError):
            refusal = refusal or view
            continue
        architecture = find_architecture(view)
        if architecture.model_type in CROSS_LAYER:
            return TranslatedCheckpoint.of(view, CROSS_LAYER[architecture.model_type])
        if architecture.model_type == CROSS_LAYER_DECODER:
            if read_attention(view, architecture).layer_grouping is not None:
                raise UnsupportedError(
                    f"{checkpoint.name}: its layers share keys and values already",
                    hint="convert the original, with a larger --share",
                )
            return view
        refusal = UnsupportedError(
            f"{checkpoint.name}: no class lets layers of {checkpoint.config['model_type']} share keys and values",
            hint=f"these can: {', '.join(CROSS_LAYER)}",
        )
    raise refusal or UnsupportedError(f"{checkpoint.name}: no class holds it")


def as_latent_source(checkpoint: Checkpoint) -> Checkpoint:
    """The checkpoint in a class whose function multi-head latent attention can hold: that of `as_cross_layer`.

    Raises UnsupportedError for any other, with what would shrink its cache.
    """
    for view in targets(checkpoint):
        if not isinstance(view, UnsupportedError):
            architecture = find_architecture(view)
            if architecture.latent:
                raise UnsupportedError(f"{checkpoint.name}: its cache holds a latent already")
            if architecture.model_type not in (*CROSS_LAYER, CROSS_LAYER_DECODER):
                normalised = architecture.approximation(view)
                raise UnsupportedError(
                    f"{checkpoint.name}: deepseek_v3 does not hold {checkpoint.config['model_type']}"
                    + (f": {normalised}" if normalised else ""),
                    hint=f"mha2gqa and mha2mqa can shrink its cache; mha2mla takes {', '.join(LATENT_SOURCES)}",
                )
    return as_cross_layer(checkpoint)
