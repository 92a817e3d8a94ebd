"""What a checkpoint may become, in the words of a sweep: gqa:8, mqa, cla2, mqa+cla2, mla:256+64."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from ..convert.errors import InputError
from ..convert.methods.cla import Cla
from ..convert.methods.gqa import Gqa
from ..convert.methods.method import Method
from ..convert.methods.mla import Mla

__all__ = ["GRAMMAR", "Merge", "Target", "parse_target"]

Merge = Literal["svd", "mean"]

GRAMMAR = "gqa:8, gqa:2x128 (two heads of 128), mqa, cla2, mqa+cla2, gqa:4+cla3 or mla:256+64"

_LATENT = re.compile(r"mla:(\d{1,6})\+(\d{1,6})")
_HEADS = re.compile(r"(?:(?P<mqa>mqa)|gqa:(?P<groups>\d{1,6}))(?:x(?P<size>\d{1,6}))?")
_LAYERS = re.compile(r"cla(\d{1,6})")


@dataclass(frozen=True)
class Target:
    """A conversion by the name that it has in a sweep."""

    name: str
    method: Method

    @property
    def folder(self) -> str:
        """The name as one of a file."""
        return re.sub(r"[^a-z0-9]+", "-", self.name)


def parse_target(text: str, *, merge: Merge = "svd") -> Target:
    """Read a target as it is typed; `merge` is how heads and layers are put together. A latent is always calibrated.

    Raises InputError for what is no target, and for one that the merge cannot make.
    """
    name = text.strip().lower()
    latent = _LATENT.fullmatch(name)
    if latent:
        return Target(name, Mla(int(latent[1]), int(latent[2])))
    first, _, second = name.partition("+")
    heads = _HEADS.fullmatch(first)
    layers = _LAYERS.fullmatch(second if heads else first)
    if (not heads and not layers) or (second and not (heads and layers)):
        raise InputError(f"{text!r} is no target", hint=f"write for example {GRAMMAR}", settings=("targets",))
    number = None if heads is None else 1 if heads["mqa"] else int(heads["groups"])
    size = int(heads["size"]) if heads and heads["size"] else None
    if layers is None:
        assert number is not None
        return Target(name, Gqa(number, merge=merge, head_dim=size))
    if size is not None:
        raise InputError(
            f"{text!r}: layers that share keep the size of their heads",
            hint=f"leave x{size} out",
            settings=("targets",),
        )
    return Target(name, Cla(share=int(layers[1]), num_key_value_heads=number, merge=merge))
