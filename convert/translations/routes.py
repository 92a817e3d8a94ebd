"""For every source, the classes that hold its function and have grouped attention, and the way to each."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from types import MappingProxyType

from ..architectures.attention import read_attention
from ..architectures.table import find_architecture
from ..checkpoint.tensors import Checkpoint
from ..errors import UnsupportedError
from .alibi import BLOOM_TO_DECODER, FALCON_TO_DECODER, MPT_TO_DECODER
from .cross_layer import CROSS_LAYER, CROSS_LAYER_DECODER, LATENT_SOURCES
from .decoder import TO_GPT_BIGCODE, TO_NEMOTRON
from .gpt_neox import GPT_NEOX_TO_DECODER, GPT_NEOX_TO_PHI
from .gptj import CODEGEN_TO_PHI, GPTJ_TO_PHI
from .learned_positions import (
    BIOGPT_TO_DECODER,
    GPT2_TO_DECODER,
    GPT_BIGCODE_TO_DECODER,
    GPT_NEO_TO_DECODER,
    OPT_TO_DECODER,
    XGLM_TO_DECODER,
)
from .persimmon import PERSIMMON_TO_DECODER
from .qwen import QWEN_TO_QWEN2
from .seq2seq import BART_TO_GROUPED, MT5_TO_GROUPED, T5_TO_GROUPED, WHISPER_TO_GROUPED
from .translation import TranslatedCheckpoint, Translation

__all__ = ["CROSS_LAYER", "ROUTES", "Route", "as_cross_layer", "as_latent_source", "as_target", "routes_of", "targets"]

Route = tuple[Translation, ...]
"""Translations one after the other; an empty one is the checkpoint's own class."""

_OWN_CLASS: Route = ()

ROUTES: Mapping[str, tuple[Route, ...]] = MappingProxyType(
    {
        "bart": ((BART_TO_GROUPED,),),
        "biogpt": ((BIOGPT_TO_DECODER, TO_GPT_BIGCODE), (BIOGPT_TO_DECODER,)),
        "bloom": ((BLOOM_TO_DECODER,),),
        "codegen": ((CODEGEN_TO_PHI,),),
        "falcon": (_OWN_CLASS, (FALCON_TO_DECODER, TO_NEMOTRON), (FALCON_TO_DECODER,)),
        "gpt2": ((GPT2_TO_DECODER, TO_GPT_BIGCODE), (GPT2_TO_DECODER,)),
        "gpt_bigcode": (_OWN_CLASS, (GPT_BIGCODE_TO_DECODER,)),
        "gpt_neo": ((GPT_NEO_TO_DECODER, TO_GPT_BIGCODE), (GPT_NEO_TO_DECODER,)),
        "gpt_neox": ((GPT_NEOX_TO_PHI,), (GPT_NEOX_TO_DECODER, TO_NEMOTRON)),
        "gptj": ((GPTJ_TO_PHI,),),
        "mpt": ((MPT_TO_DECODER,),),
        "mt5": ((MT5_TO_GROUPED,),),
        "opt": ((OPT_TO_DECODER, TO_GPT_BIGCODE), (OPT_TO_DECODER,)),
        "persimmon": ((PERSIMMON_TO_DECODER, TO_NEMOTRON), (PERSIMMON_TO_DECODER,)),
        "qwen": ((QWEN_TO_QWEN2,),),
        "t5": ((T5_TO_GROUPED,),),
        "whisper": ((WHISPER_TO_GROUPED,),),
        "xglm": ((XGLM_TO_DECODER, TO_GPT_BIGCODE), (XGLM_TO_DECODER,)),
    }
)
"""For a `model_type`, the ways to a class with grouped attention, the best first; any other keeps its own class."""


def routes_of(model_type: object) -> tuple[Route, ...]:
    """The ways of a class to one with grouped attention, the best first; one that is not in the table keeps its own."""
    return ROUTES.get(str(model_type), (_OWN_CLASS,))


def targets(checkpoint: Checkpoint) -> Iterator[Checkpoint | UnsupportedError]:
    """The checkpoint as each class that may hold it, or why that one cannot, in the order of `ROUTES`."""
    for route in routes_of(checkpoint.config.get("model_type")):
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
        reason = find_architecture(target).heads_refusal(target.config, num_key_value_heads)
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
