"""What a run trains, in which stages, towards what."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum
from fractions import Fraction

from ..convert.architectures.architecture import Architecture
from ..convert.errors import UnsupportedError

__all__ = ["LossWeights", "Objective", "Recipe", "Stage", "Trained", "attention_names", "stages", "trained_names"]

_LATENT_KEY_VALUES = frozenset({"kv_a_proj_with_mqa", "kv_a_layernorm", "kv_b_proj"})


class Recipe(StrEnum):
    """What is minimised, and which parameters learn it.

    - distill: the divergence from a teacher, by all parameters, after an optional stage of attention regression.
    - pretraining: cross-entropy, by all parameters, as the original was trained; so do Ainslie et al. (2023) uptrain.
    - light: the divergence, by attention parameters only; all others are shared with the teacher.
    - layerwise: attention regression only.
    """

    distill = "distill"
    pretraining = "pretraining"
    light = "light"
    layerwise = "layerwise"

    @property
    def needs_teacher(self) -> bool:
        """Whether it compares with a teacher, unless the loss weights say otherwise."""
        return self is not Recipe.pretraining


class Trained(StrEnum):
    """Which parameters are trained: all, those of the attention modules, or those that make keys and values.

    A projection that makes queries too counts whole.
    """

    all = "all"
    attention = "attention"
    kv = "kv"


class Objective(StrEnum):
    """What a stage minimises: a loss on predictions, or the error of each layer's attention output."""

    prediction = "prediction"
    attention_regression = "attention regression"


@dataclass(frozen=True)
class LossWeights:
    """How much forward KL and cross-entropy count, and the softmax temperature of teacher and student in KL.

    KL is multiplied by the temperature squared, so that its gradient keeps its size (Hinton et al. 2015, §2).
    """

    kl: float = 1.0
    cross_entropy: float = 0.0
    temperature: float = 1.0

    def __post_init__(self) -> None:
        for name in ("kl", "cross_entropy"):
            if not 0 <= getattr(self, name) < math.inf:
                raise UnsupportedError(f"{name} weight is {getattr(self, name)}, expected 0 or more")
        if self.kl == self.cross_entropy == 0:
            raise UnsupportedError("the weights of KL and cross-entropy are both 0, so nothing is left to minimise")
        if not 0 < self.temperature < math.inf:
            raise UnsupportedError(f"temperature is {self.temperature}, expected a positive number")


@dataclass(frozen=True)
class Stage:
    """A part of a run with an optimizer and a schedule of its own; it begins after `first_step` steps of the run."""

    name: str
    objective: Objective
    trained: Trained
    steps: int
    first_step: int
    learning_rate: float

    @property
    def last_step(self) -> int:
        """The step of the run at which the stage is finished."""
        return self.first_step + self.steps

    def uses_teacher(self, weights: LossWeights) -> bool:
        """Tell whether what is minimised compares with a teacher; otherwise none is loaded."""
        return self.objective is Objective.attention_regression or weights.kl > 0


def stages(
    recipe: Recipe,
    *,
    steps: int,
    learning_rate: float,
    layerwise_fraction: float,
    layerwise_learning_rate: float,
    trained: Trained,
) -> tuple[Stage, ...]:
    """Make the stages of a run of `steps`; `layerwise_fraction` of them, rounded up, fit attention first.

    At least one step is left for what follows. Raises UnsupportedError for a fraction where the recipe has one stage.
    """
    if not 0 <= layerwise_fraction < 1:
        raise UnsupportedError(f"layer-wise fraction is {layerwise_fraction}, expected at least 0 and below 1")
    if layerwise_fraction and recipe in (Recipe.pretraining, Recipe.layerwise):
        raise UnsupportedError(
            f"layer-wise fraction is {layerwise_fraction}, but recipe {recipe} has one stage only",
            hint="leave it out, or use --recipe distill",
        )
    if recipe is Recipe.layerwise:
        only = trained if trained is not Trained.all else Trained.attention
        return (Stage("layerwise", Objective.attention_regression, only, steps, 0, layerwise_learning_rate),)
    # exact: 0.07 · 100 in floats is a little above 7
    first = min(math.ceil(Fraction(str(layerwise_fraction)) * steps), steps - 1)
    if recipe is Recipe.light and trained is Trained.all:
        trained = Trained.attention
    plan = []
    if first:
        only = trained if trained is not Trained.all else Trained.attention
        plan.append(Stage("layerwise", Objective.attention_regression, only, first, 0, layerwise_learning_rate))
    return (*plan, Stage("main", Objective.prediction, trained, steps - first, first, learning_rate))


def attention_names(names: Iterable[str], architecture: Architecture) -> frozenset[str]:
    """Choose the parameters of a decoder that belong to the attention of its layers."""
    return frozenset(_within_attention(names, architecture))


def trained_names(names: Iterable[str], architecture: Architecture, trained: Trained) -> frozenset[str]:
    """Choose the parameters of a decoder that are trained."""
    if trained is Trained.all:
        return frozenset(names)
    found = _within_attention(names, architecture)
    if trained is Trained.attention:
        return frozenset(found)
    modules = {architecture.k_proj, architecture.v_proj, architecture.qkv_proj, *_LATENT_KEY_VALUES}
    modules.add((architecture.key_norm or architecture.k_proj).split(".")[0])
    return frozenset(name for name, rest in found.items() if rest.split(".")[0] in modules)


def _within_attention(names: Iterable[str], architecture: Architecture) -> dict[str, str]:
    """Names of the attention's parameters, each with its part after the attention module's."""
    inside = re.compile(re.escape(architecture.attention).replace(r"\{layer\}", r"\d+") + r"\.(.+)")
    return {name: match[1] for name in names if (match := inside.fullmatch(name))}
