"""What a run costs, said before it begins: FLOPs, GPU hours, memory, disk, passes over the text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ...convert.errors import InputError
from ..data.sources import SourceSize
from ..recipe import Stage
from .budget import Budget
from .disk import disk_bytes, packed_tokens
from .flops import total_flops
from .gpu import H100_PEAK_FLOPS, gpu_hours, peak_flops
from .memory import memory_bytes
from .shape import RunShape

__all__ = ["MAX_PASSES", "RunCost", "passes_over", "require_consent", "run_cost", "warn_of_passes"]

MAX_PASSES = 4
"""More passes over the same text teach less and overfit, which a warning says."""

_MAX_HOURS = 1000.0  # H100 hours that a run of a chosen length may take without --yes
_MAX_DEFAULT_HOURS = 100.0  # the same, where nobody chose the length


@dataclass(frozen=True)
class RunCost:
    """What a run costs. `flops` are those of all GPUs; hours are at 40 % of a GPU's dense bf16 peak.

    `passes` over the text is None where its size is not known, `gpu_hours` where the GPU's peak is not known.
    `memory_bytes` is an estimate per process.
    """

    tokens: int
    steps: int
    passes: float | None
    flops: float
    gpu_name: str | None
    gpu_hours: float | None
    h100_hours: float
    memory_bytes: int
    disk_bytes: int

    @property
    def warning(self) -> str | None:
        """The sentence that a user should read before starting, or None."""
        return None if self.passes is None else warn_of_passes(self.passes)


def run_cost(
    shape: RunShape,
    budget: Budget,
    *,
    sources: Sequence[SourceSize],
    trials: Sequence[Stage] = (),
    gpu_name: str | None = None,
) -> RunCost:
    """Compute the cost of a run and of the stages of its `trials`, which add FLOPs and leave nothing on the disk.

    Memory is that of the stage that needs the most.
    """
    flops = total_flops(shape, (*trials, *shape.stages))
    peak = None if gpu_name is None else peak_flops(gpu_name)
    return RunCost(
        tokens=budget.tokens,
        steps=budget.steps,
        passes=passes_over(budget.tokens, sources),
        flops=flops,
        gpu_name=gpu_name,
        gpu_hours=None if peak is None else gpu_hours(flops, peak),
        h100_hours=gpu_hours(flops, H100_PEAK_FLOPS),
        memory_bytes=max(memory_bytes(shape, stage) for stage in shape.stages),
        disk_bytes=disk_bytes(shape, packed_tokens(budget.tokens, sources)),
    )


def passes_over(tokens: int, sources: Sequence[SourceSize]) -> float | None:
    """Tell how often a run of `tokens` reads the source that it reads most often; None if a size is not known."""
    passes = [tokens * source.share / source.num_tokens for source in sources if source.num_tokens]
    return max(passes) if passes and len(passes) == len(sources) else None


def warn_of_passes(passes: float) -> str | None:
    """Write the warning for a run that reads its text so often, or return None where that is fine."""
    if passes <= MAX_PASSES:
        return None
    return f"the run reads the text {passes:.1f} times; beyond {MAX_PASSES} it learns it by heart: use more text"


def require_consent(cost: RunCost, explicit: bool, yes: bool) -> None:
    """Raise InputError for a run of more than 1000 H100 hours, or 100 if nobody chose its length, unless `yes`."""
    limit = _MAX_HOURS if explicit else _MAX_DEFAULT_HOURS
    if yes or cost.h100_hours <= limit:
        return
    chosen = "" if explicit else " by default"
    raise InputError(
        f"this run{chosen} is {cost.tokens / 1e9:.4g}B tokens, {cost.flops:.2e} FLOPs, about {cost.h100_hours:,.0f} "
        f"hours of an H100",
        hint="pass --yes if you mean it; published conversions recover with 0.3 to 10B tokens, so try --tokens 1B",
    )
