"""Classes without grouped attention, and the native classes that hold the same function."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from ..architectures import ARCHITECTURES
from ..checkpoint import Checkpoint
from ..translation import TranslatedCheckpoint, Translation
from .gpt_neox import GPT_NEOX
from .gptj import CODEGEN, GPTJ
from .learned_positions import GPT2, GPT_BIGCODE, GPT_NEO, OPT

__all__ = ["TRANSLATIONS", "as_native"]

_ENTRIES = (CODEGEN, GPT2, GPT_BIGCODE, GPT_NEO, GPT_NEOX, GPTJ, OPT)

TRANSLATIONS: Mapping[str, tuple[Translation, ...]] = MappingProxyType(
    {entries[0].model_type: entries for entries in _ENTRIES}
)


def as_native(checkpoint: Checkpoint) -> Checkpoint:
    """The checkpoint itself if its class has grouped attention, else a view of it as a class that has.

    Where several classes could hold it, the first that does. Raises UnsupportedError if none would compute the same
    function. Architectures that kvconvert does not know are returned as they are.
    """
    model_type = str(checkpoint.config.get("model_type"))
    translations = TRANSLATIONS.get(model_type, ())
    for translation in translations:
        if translation.refusal(checkpoint) is None:
            return TranslatedCheckpoint.of(checkpoint, translation)
    if translations and model_type not in ARCHITECTURES:
        return TranslatedCheckpoint.of(checkpoint, translations[-1])
    return checkpoint
