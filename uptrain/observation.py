"""What is watched and reported while a run goes on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from .rundir.status import RunStatus

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Observation"]


@dataclass(frozen=True)
class Observation:
    """How often a run is saved, scored and reported, and to whom; none of it changes the result.

    `score(model)` gives held-out nats per token every `eval_steps`. `show` receives each metrics record, `progress`
    the number of steps done since it was last called, `note` each status, in the first process, `remark` what a person
    should know. `deadline` is on time.monotonic()'s clock. `flops_per_token`, by a stage's name, and `peak_flops` of
    one device are there where they are known. `command` is what a person types to go on. `trained` receives the whole
    weights of the last stage, in the dtype that they were trained in, in the first process. Without `keep` no result is
    written: the run is there for its last score, and raises InputError before training where there is no held-out text.
    So does one with `wants_score`, whose user asked for a score.
    """

    save_steps: int = 500
    log_steps: int = 10
    eval_steps: int = 100
    deadline: float | None = None
    score: Callable[[Any], float] | None = None
    progress: Callable[[int], object] = lambda num_steps: None
    show: Callable[[dict[str, Any]], object] = lambda record: None
    note: Callable[[RunStatus], object] = lambda status: None
    remark: Callable[[str], object] = lambda text: None
    flops_per_token: dict[str, float] = field(default_factory=dict)
    peak_flops: float | None = None
    command: str = ""
    trained: Callable[[dict[str, Tensor]], object] = lambda weights: None
    keep: bool = True
    wants_score: bool = False
