"""Classes without grouped attention, and the classes that hold the same function and have it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from types import MappingProxyType

from ..architectures import ARCHITECTURES, find_architecture
from ..checkpoint import Checkpoint
from ..errors import UnsupportedError
from ..translation import Route, TranslatedCheckpoint
from .alibi import BLOOM, FALCON, MPT
from .gpt_neox import GPT_NEOX
from .gptj import CODEGEN, GPTJ
from .learned_positions import BIOGPT, GPT2, GPT_BIGCODE, GPT_NEO, OPT, XGLM
from .persimmon import PERSIMMON
from .qwen import QWEN
from .seq2seq import BART, MT5, T5, WHISPER

__all__ = ["ROUTES", "as_target", "targets"]

_OWN_CLASS: tuple[Route, ...] = ((),)

ROUTES: Mapping[str, tuple[Route, ...]] = MappingProxyType(
    dict.fromkeys(ARCHITECTURES, _OWN_CLASS)
    | {
        "bart": BART,
        "biogpt": BIOGPT,
        "bloom": BLOOM,
        "codegen": CODEGEN,
        "falcon": FALCON,
        "gpt2": GPT2,
        "gpt_bigcode": GPT_BIGCODE,
        "gpt_neo": GPT_NEO,
        "gpt_neox": GPT_NEOX,
        "gptj": GPTJ,
        "mpt": MPT,
        "mt5": MT5,
        "opt": OPT,
        "persimmon": PERSIMMON,
        "qwen": QWEN,
        "t5": T5,
        "whisper": WHISPER,
        "xglm": XGLM,
    }
)
"""For each `model_type`, how its checkpoints become one of a class with grouped attention, the best way first."""


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
