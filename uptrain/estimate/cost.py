"""What a run costs, said before it begins: FLOPs, GPU hours, memory, disk, passes over the text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ...convert.errors import InputError
from ..data.sources import SourceSize
from ..recipe import LossWeights, Stage
from ..settings import Sharding
from .budget import Batch, Budget
from .disk import disk_bytes, packed_tokens
from .flops import flops_per_token
from .gpu import H100_PEAK_FLOPS, gpu_hours, peak_flops
from .memory import memory_bytes
from .size import ModelSize

__all__ = ["MAX_PASSES", "RunCost", "passes_over", "require_consent", "run_cost", "warn_of_passes"]


MAX_PASSES = 4
"""More passes over the same text teach less and overfit, which a warning says."""

_MAX_HOURS = 1000.0  # H100 hours that a run of a chosen length may take without --yes
_MAX_DEFAULT_HOURS = 100.0  # the same, where nobody chose the length


def passes_over(tokens: int, sources: Sequence[SourceSize]) -> float | None:
    """How often the source that is read most often is read in a run of so many tokens; None if a size is not known."""
    passes = [tokens * source.share / source.num_tokens for source in sources if source.num_tokens]
    return max(passes) if passes and len(passes) == len(sources) else None


@dataclass(frozen=True)
class RunCost:
    """What a dry run prints. `flops` are those of all GPUs; hours are at 40 % of a GPU's dense bf16 peak.

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
        """What a user should know before starting, or None."""
        return None if self.passes is None else warn_of_passes(self.passes)


def warn_of_passes(passes: float) -> str | None:
    """What to say of a run that reads its text so often, or None."""
    if passes <= MAX_PASSES:
        return None
    return f"the run reads the text {passes:.1f} times; beyond {MAX_PASSES} it learns it by heart: use more text"


def run_cost(
    budget: Budget,
    batch: Batch,
    stages: Sequence[Stage],
    student: ModelSize,
    teacher: ModelSize | None = None,
    *,
    weights: LossWeights,
    sources: Sequence[SourceSize],
    window_tokens: int | None = None,
    teacher_copy_bytes: int = 0,
    shares: bool = False,
    gpu_name: str | None = None,
    sharding: Sharding = "none",
    bf16: bool = True,
    activation_checkpointing: bool = False,
) -> RunCost:
    """The cost of a run in these stages, towards the teacher where a stage uses one.

    `sources` and `window_tokens` are as in `packed_tokens`, `shares` as in `weight_bytes`. Memory is that of the stage
    that needs the most.
    """
    length = batch.sequence_length
    teachers = [teacher if stage.uses_teacher(weights) else None for stage in stages]
    flops = sum(
        stage.steps * batch.tokens_per_step * flops_per_token(student, used, stage.objective, stage.trained, length)
        for stage, used in zip(stages, teachers, strict=True)
    )
    peak = None if gpu_name is None else peak_flops(gpu_name)
    return RunCost(
        tokens=budget.tokens,
        steps=budget.steps,
        passes=passes_over(budget.tokens, sources),
        flops=flops,
        gpu_name=gpu_name,
        gpu_hours=None if peak is None else gpu_hours(flops, peak),
        h100_hours=gpu_hours(flops, H100_PEAK_FLOPS),
        memory_bytes=max(
            memory_bytes(
                student,
                used,
                trained=stage.trained,
                objective=stage.objective,
                shares=shares,
                micro_batch=batch.micro_batch,
                sequence_length=length,
                num_processes=batch.num_processes,
                sharding=sharding,
                bf16=bf16,
                activation_checkpointing=activation_checkpointing,
            )
            for stage, used in zip(stages, teachers, strict=True)
        ),
        disk_bytes=disk_bytes(
            student,
            trained=stages[-1].trained,
            num_packed_tokens=packed_tokens(budget.tokens, sources, window_tokens=window_tokens),
            shares=shares,
            bf16=bf16,
            after_stage=stages[-1].first_step > 0,
            teacher_copy_bytes=teacher_copy_bytes,
        ),
    )


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
