"""Settings that several methods have, and the check of their values."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Annotated, Literal

from typing_extensions import Doc

from ..errors import UnsupportedError

__all__ = ["FitSteps", "Grouping", "require_choice", "require_fit", "require_ridge", "text_of_fit"]

Grouping = Literal["similarity", "contiguous"]
"""Which heads form a group: those that lose least together, or neighbours."""


FitSteps = Annotated[
    int | None,
    Doc(
        "Gradient steps that fit each layer's attention to the original's on the text, of about 512 tokens each. 0: "
        "none. Default: one pass over the text."
    ),
]
"""How long a layer's attention is fitted, beyond what has a closed form."""


def require_choice(what: str, value: str, known: Sequence[str]) -> None:
    """Raise UnsupportedError for a value that is not among the known ones."""
    if value not in known:
        raise UnsupportedError(f"unknown {what} {value!r}", hint=f"{what}s: {', '.join(known)}")


def require_fit(steps: int | None, *, refit: bool) -> None:
    """Raise UnsupportedError for a number of gradient steps below 0, and for steps where nothing is to be fitted."""
    if steps is not None and steps < 0:
        raise UnsupportedError(f"fit_steps = {steps}, expected a number from 0 on")
    if steps and not refit:
        raise UnsupportedError(
            f"fit_steps = {steps}, and nothing is to be fitted to the text",
            hint="ask for one of the two",
            settings=("refit", "fit_steps"),
        )


def text_of_fit(steps: int | None) -> str | None:
    """Why such a fit needs a text, and statistics of one do not do, for an error; None where they do."""
    return "gradient steps are taken on a text" if steps else None


def require_ridge(refit_ridge: float) -> None:
    """Raise UnsupportedError for a pull of the refit that is negative, infinite or not a number."""
    if not (refit_ridge >= 0 and math.isfinite(refit_ridge)):
        raise UnsupportedError(f"refit_ridge = {refit_ridge}, expected a number from 0 on")
