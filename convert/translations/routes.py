"""For every `model_type`, the classes with grouped attention that can compute its function, and the way to each."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from types import MappingProxyType

from ..architectures.source import Source
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

__all__ = [
    "CROSS_LAYER",
    "ROUTES",
    "TRANSLATIONS",
    "Route",
    "as_cross_layer",
    "as_latent_source",
    "as_target",
    "routes_of",
    "targets",
    "translated",
]

Route = tuple[Translation, ...]
"""Translations that are applied one after the other; an empty route keeps the checkpoint's class."""

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
"""For a `model_type`, its routes to classes with grouped attention, the best first. Any other keeps its class."""


TRANSLATIONS: Mapping[tuple[str, str], Translation] = MappingProxyType(
    {
        (translation.model_type, translation.target): translation
        for translation in (
            *(step for routes in ROUTES.values() for route in routes for step in route),
            *CROSS_LAYER.values(),
        )
    }
)
"""Every translation, by the `model_type` that it starts from and the one that it leads to."""


def routes_of(model_type: object) -> tuple[Route, ...]:
    """Return the routes of a `model_type`, the best first: the entry of `ROUTES`, or the one that keeps the class."""
    return ROUTES.get(str(model_type), (_OWN_CLASS,))


def translated(checkpoint: Checkpoint, route: Iterable[str]) -> Checkpoint:
    """Return the checkpoint after the translations to each `model_type` of `route`, one after the other.

    Raises UnsupportedError where there is no such translation, or where it would not be exact.
    """
    for target in route:
        model_type = str(checkpoint.config.get("model_type"))
        if (model_type, target) not in TRANSLATIONS:
            raise UnsupportedError(f"{checkpoint.name}: no translation leads from {model_type} to {target}")
        checkpoint = TranslatedCheckpoint.of(checkpoint, TRANSLATIONS[model_type, target])
    return checkpoint


def targets(checkpoint: Checkpoint) -> Iterator[Source | UnsupportedError]:
    """Yield for each route, in the order of `ROUTES`, the translated checkpoint, or the error that forbids it.

    Raises UnsupportedError for an architecture that kvconvert does not know.
    """
    for route in routes_of(checkpoint.config.get("model_type")):
        try:
            view = translated(checkpoint, [translation.target for translation in route])
        except UnsupportedError as error:
            yield error
        else:
            yield Source.of(view)


def as_target(checkpoint: Checkpoint, num_key_value_heads: int, head_dim: int | None = None) -> Source:
    """Return the checkpoint in the first class of `ROUTES` that computes its function and can have so many K/V heads.

    With `head_dim`, these can have that size too.

    That is its own class if that one can. Raises UnsupportedError, with the reason of the last class, where none can,
    and for an architecture that kvconvert does not know.
    """
    refusal, sized = UnsupportedError(f"{checkpoint.name}: no class holds it"), None
    for target in targets(checkpoint):
        if isinstance(target, UnsupportedError):
            refusal = target
            continue
        reason = target.architecture.heads_refusal(target.checkpoint.full_config, num_key_value_heads)
        if reason is None and not target.architecture.sets_head_dim and head_dim not in (None, target.shape.head_dim):
            model_type = target.architecture.model_type
            sized = sized or UnsupportedError(
                f"{checkpoint.name}: {model_type} takes the size of its heads from other entries of its config",
                hint="leave head_dim out",
                settings=("head_dim",),
            )
            continue
        if reason is None:
            return target
        refusal = UnsupportedError(f"{checkpoint.name}: {reason}")
    raise sized or refusal


def as_cross_layer(checkpoint: Checkpoint) -> Source:
    """Return the checkpoint as CrossLayerDecoder, in which layers can share keys and values and do not yet.

    Raises UnsupportedError for an architecture that CrossLayerDecoder does not cover, and for a checkpoint in which
    layers share already.
    """
    refusal: UnsupportedError | None = None
    for target in targets(checkpoint):
        if isinstance(target, UnsupportedError):
            refusal = refusal or target
            continue
        model_type = target.architecture.model_type
        if model_type in CROSS_LAYER:
            return Source.of(TranslatedCheckpoint.of(target.checkpoint, CROSS_LAYER[model_type]))
        if model_type == CROSS_LAYER_DECODER:
            if target.shape.layer_grouping is not None:
                raise UnsupportedError(
                    f"{checkpoint.name}: its layers share keys and values already",
                    hint="convert the original, with more layers in a group",
                    settings=("share",),
                )
            return target
        refusal = UnsupportedError(
            f"{checkpoint.name}: no class lets layers of {checkpoint.config['model_type']} share keys and values",
            hint=f"these can: {', '.join(CROSS_LAYER)}",
        )
    raise refusal or UnsupportedError(f"{checkpoint.name}: no class holds it")


def as_latent_source(checkpoint: Checkpoint) -> Source:
    """Return the checkpoint as CrossLayerDecoder, from which a conversion to multi-head latent attention starts.

    Raises UnsupportedError for an architecture whose function DeepSeek-V3's class cannot compute, with a hint at what
    would shrink its cache.
    """
    for target in targets(checkpoint):
        if not isinstance(target, UnsupportedError):
            architecture = target.architecture
            if architecture.latent:
                raise UnsupportedError(f"{checkpoint.name}: its cache holds a latent already")
            if architecture.model_type not in (*CROSS_LAYER, CROSS_LAYER_DECODER):
                normalised = architecture.approximation(target.checkpoint)
                raise UnsupportedError(
                    f"{checkpoint.name}: deepseek_v3 does not hold {checkpoint.config['model_type']}"
                    + (f": {normalised}" if normalised else ""),
                    hint=f"GQA and MQA can shrink its cache; MLA takes {', '.join(LATENT_SOURCES)}",
                )
    return as_cross_layer(checkpoint)
