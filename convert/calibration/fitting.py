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
_ROWS = 64  # of a matrix that are orthogonalised together
_HELD_OUT = 16  # of so many parts of the text one is not fitted to

Part = TypeVar("Part")


@dataclass(frozen=True)
class Fit:
    """How many gradient steps, and how far one goes at most: `learning_rate`, in parts of a tensor's rms.

    Without `steps` the fit goes over the text once. The rate rises in the first twentieth of the steps, and falls to
    zero along a cosine, from less where it turns out too high.
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

    Steps that did not lower it are undone: `loss_after` is `loss_before` then.
    """

    steps: int
    loss_before: float
    loss_after: float


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
    held_out, training = parts[::_HELD_OUT], [part for place, part in enumerate(parts) if place % _HELD_OUT]
    if not training or not fit.num_steps(len(training)):
        return None
    before = _mean(loss, held_out)
    return FitOutcome(fit.num_steps(len(training)), before, _descend(parameters, loss, training, held_out, before, fit))


def _mean(loss: Callable[[Part], Tensor], parts: Sequence[Part]) -> float:
    import torch

    with torch.no_grad():
        return sum(loss(part).item() for part in parts) / len(parts)


def _descend(
    parameters: Sequence[Parameter],
    loss: Callable[[Part], Tensor],
    training: Sequence[Part],
    held_out: Sequence[Part],
    before: float,
    fit: Fit,
) -> float:
    """Take the steps, leave the parameters where the loss on `held_out`, `before` at first, was least, and return that.

    It is looked at after each eighth of the steps. Where it has risen from its least by half of what was gained, and by
    a twentieth of `before`, which a high rate makes up for as it falls, the parameters go back, and the rate falls to a
    third for good: what is a small step for one layer is far too large for another.
    """
    import torch

    generator = torch.Generator().manual_seed(fit.seed)
    momenta = [_Momentum(parameter) for parameter in parameters]
    least, at_least = before, [parameter.detach().clone() for parameter in parameters]
    steps, peak, order = fit.num_steps(len(training)), fit.learning_rate, list[int]()
    looks = {math.ceil(steps * eighth / 8) for eighth in range(1, 9)}
    for step in range(steps):
        order = order or torch.randperm(len(training), generator=generator).tolist()
        for parameter in parameters:
            parameter.requires_grad_().grad = None
        with torch.enable_grad():
            loss(training[order.pop()]).backward()
        with torch.no_grad():
            for momentum in momenta:
                momentum.step(peak * _schedule(step, steps))
        if step + 1 not in looks:
            continue
        found = _mean(loss, held_out)
        if found < least:
            least, at_least = found, [parameter.detach().clone() for parameter in parameters]
        elif not found - least <= max((before - least) / 2, before / 20):  # also where it is not a number
            _put_back(parameters, at_least)
            momenta = [momentum.afresh() for momentum in momenta]
            peak /= 3
    _put_back(parameters, at_least)
    for parameter in parameters:
        parameter.requires_grad_(False).grad = None
    return least


def _put_back(parameters: Sequence[Parameter], values: Sequence[Tensor]) -> None:
    import torch

    with torch.no_grad():
        for parameter, value in zip(parameters, values, strict=True):
            parameter.copy_(value)


class _Momentum:
    """A parameter on its way, with the running means of its gradient.

    Matrices take the steps of Muon, along their orthogonalised momentum (Jordan et al. 2024), and vectors those of Adam
    (Kingma and Ba 2015, arXiv 1412.6980). Both have rms 1, times the rate, times the parameter's own rms.
    """

    def __init__(self, parameter: Parameter, size: float | None = None) -> None:
        import torch

        self._parameter = parameter
        self._size = parameter.detach().square().mean().sqrt().item() if size is None else size
        self._zero = parameter.detach() == 0
        self._mean = torch.zeros_like(parameter, requires_grad=False)
        self._square = torch.zeros_like(parameter, requires_grad=False) if parameter.dim() == 1 else None
        self._steps = 0

    def afresh(self) -> _Momentum:
        """The same without a past."""
        return _Momentum(self._parameter, self._size)

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
    another. Of a matrix with more than 64 rows each 64 are taken apart, since the cost grows with the square of the
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
