"""The attention of one layer, fitted to the original's by gradient steps on a text (docs/merging.md)."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from torch import Tensor
    from torch.nn import Parameter

__all__ = ["DEFAULT_FIT", "STEP_TOKENS", "Fit", "FitOutcome", "fit_parameters", "orthogonalised", "relative_error"]

STEP_TOKENS = 512
"""Tokens of a step, in whole sequences: one, where a sequence is longer."""
_PASSES = 1  # over the text, where the number of steps is not given
_WARM_UP = 0.05  # of the steps
_BETAS = (0.9, 0.99)
_ROWS = 256  # of a matrix that are orthogonalised together
_HELD_OUT = 16  # of so many parts of the text one is not fitted to

Part = TypeVar("Part")


@dataclass(frozen=True)
class Fit:
    """How many gradient steps, and how far one goes at most: `learning_rate`, in parts of a tensor's rms.

    Without `steps` the fit goes over the text once. The rate rises in the first twentieth of the steps, and falls to
    zero along a cosine.
    """

    steps: int | None = None
    learning_rate: float = 0.02
    seed: int = 0

    def num_steps(self, num_parts: int) -> int:
        """The steps over a text of so many parts, of which each step reads one."""
        return _PASSES * num_parts if self.steps is None else self.steps

    @property
    def record(self) -> dict[str, int | float | None]:
        """The settings, for the manifest."""
        return {
            "fit_steps": self.steps,
            "fit_step_tokens": STEP_TOKENS,
            "fit_learning_rate": self.learning_rate,
            "fit_seed": self.seed,
        }


DEFAULT_FIT = Fit()


@dataclass(frozen=True)
class FitOutcome:
    """What gradient steps did to the mean loss on the parts of the text that were kept aside.

    Steps that did not lower it are undone: `kept` is False then.
    """

    steps: int
    loss_before: float
    loss_after: float
    kept: bool


def fit_parameters(
    parameters: Sequence[Parameter],
    loss: Callable[[Part], Tensor],
    parts: Sequence[Part],
    fit: Fit,
) -> FitOutcome | None:
    """Lower the mean of `loss` over the parts of a text, in place; return what that did, if it was done.

    Each step takes one part; all are taken in a new random order, again and again. A tensor's rate is in proportion to
    its rms, so that all change alike whatever their scale. An element that is zero stays zero: it pads a head, or
    belongs to one that nothing reads. One part in sixteen is kept aside: where its loss does not fall the parameters
    are put back, so that a text too short to fit to does no harm. Of fewer than two parts nothing is fitted.
    """
    import torch

    held_out, training = parts[::_HELD_OUT], [part for place, part in enumerate(parts) if place % _HELD_OUT]
    if not training or not fit.num_steps(len(training)):
        return None
    before, start = _mean(loss, held_out), [parameter.detach().clone() for parameter in parameters]
    _descend(parameters, loss, training, fit)
    after = _mean(loss, held_out)
    outcome = FitOutcome(fit.num_steps(len(training)), before, after, kept=after < before)
    if not outcome.kept:
        with torch.no_grad():
            for parameter, value in zip(parameters, start, strict=True):
                parameter.copy_(value)
    return outcome


def _mean(loss: Callable[[Part], Tensor], parts: Sequence[Part]) -> float:
    import torch

    with torch.no_grad():
        return sum(loss(part).item() for part in parts) / len(parts)


def _descend(parameters: Sequence[Parameter], loss: Callable[[Part], Tensor], parts: Sequence[Part], fit: Fit) -> None:
    import torch

    generator = torch.Generator().manual_seed(fit.seed)
    momenta = [_Momentum(parameter) for parameter in parameters]
    steps, order = fit.num_steps(len(parts)), list[int]()
    for step in range(steps):
        order = order or torch.randperm(len(parts), generator=generator).tolist()
        rate = fit.learning_rate * _schedule(step, steps)
        for parameter in parameters:
            parameter.requires_grad_().grad = None
        with torch.enable_grad():
            loss(parts[order.pop()]).backward()
        with torch.no_grad():
            for momentum in momenta:
                momentum.step(rate)
    for parameter in parameters:
        parameter.requires_grad_(False).grad = None


class _Momentum:
    """A parameter on its way, with the running means of its gradient.

    Matrices take the steps of Muon, along their orthogonalised momentum (Jordan et al. 2024), and vectors those of Adam
    (Kingma and Ba 2015, arXiv 1412.6980). Both have rms 1, times the rate, times the parameter's own rms.
    """

    def __init__(self, parameter: Parameter) -> None:
        import torch

        self._parameter = parameter
        self._size = parameter.detach().square().mean().sqrt().item()
        self._zero = parameter.detach() == 0
        self._mean = torch.zeros_like(parameter, requires_grad=False)
        self._square = torch.zeros_like(parameter, requires_grad=False) if parameter.dim() == 1 else None
        self._steps = 0

    def step(self, rate: float) -> None:
        """One step against the gradient of the parameter, if it has one."""
        if self._parameter.grad is None:
            return
        gradient = self._parameter.grad.masked_fill_(self._zero, 0)
        self._steps += 1
        self._mean.lerp_(gradient, 1 - _BETAS[0])
        if self._square is None:
            direction = orthogonalised(gradient.lerp(self._mean, _BETAS[0]))  # Nesterov's momentum
        else:
            self._square.lerp_(gradient.square(), 1 - _BETAS[1])
            power = self._square / (1 - _BETAS[1] ** self._steps)
            direction = self._mean / (1 - _BETAS[0] ** self._steps) / (power.sqrt() + 1e-12)
        self._parameter.sub_(direction.masked_fill_(self._zero, 0), alpha=rate * self._size)


def orthogonalised(matrix: Tensor) -> Tensor:
    """Return the orthogonal matrix about nearest to a matrix, times a factor that makes its rms 1.

    Of U Σ Vᵀ it is U Vᵀ, by five Newton-Schulz iterations (Jordan et al. 2024), after which no singular value is twice
    another. Of a matrix with more than 256 rows each 256 are taken apart, since the cost grows with the square of the
    smaller side. Zero stays zero.
    """
    import torch

    return torch.cat([_orthogonalised(rows) for rows in matrix.split(_ROWS)])


def _orthogonalised(rows: Tensor) -> Tensor:
    is_tall = rows.shape[0] > rows.shape[1]
    x = rows.T if is_tall else rows
    x = x / x.norm().clamp(min=1e-30)
    for _ in range(5):
        gram = x @ x.T
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    x = x / x.square().mean().sqrt().clamp(min=1e-30)
    result: Tensor = x.T if is_tall else x
    return result


def relative_error(found: Tensor, wanted: Tensor) -> Tensor:
    """The mean over tokens of ‖found − wanted‖² / ‖wanted‖², both (tokens, hidden_size).

    Each token counts alike, as it does after the norm that reads it: the few whose hidden states are huge do not
    outweigh all others.
    """
    power = wanted.square().sum(-1).clamp(min=1e-30)
    return ((found - wanted).square().sum(-1) / power).mean()


def _schedule(step: int, steps: int) -> float:
    rising = min((step + 1) / max(_WARM_UP * steps, 1), 1.0)
    return rising * 0.5 * (1 + math.cos(math.pi * step / steps))
