"""What a run of a recipe would do and cost, stage by stage, said before any of it begins."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from ..convert.architectures.source import Source
from ..convert.methods.method import Method
from .recipe_file import read_recipe
from .run_records import RunStatus
from .run_stages import RunJob
from .running import check_done_before, stage_names, why_again

__all__ = ["RunPlan", "StagePlan", "plan_run"]


@dataclass(frozen=True)
class StagePlan:
    """A stage as it would be carried out: whether it is done before, and what it costs, as far as that is known.

    `disk_bytes` is the most that it leaves or needs on the disk.
    """

    name: str
    done_before: bool
    why: str
    facts: Mapping[str, Any]
    disk_bytes: int


@dataclass(frozen=True)
class RunPlan:
    """What a run would do, and where."""

    recipe: Path
    output: Path
    stages: tuple[StagePlan, ...]

    @property
    def disk_bytes(self) -> int:
        """The most that all stages leave or need on the disk."""
        return sum(stage.disk_bytes for stage in self.stages if not stage.done_before)

    def to_json(self) -> dict[str, Any]:
        """The plan as an object for JSON."""
        return {
            "recipe": str(self.recipe),
            "output": str(self.output),
            "dry_run": True,
            "disk_bytes": self.disk_bytes,
            "stages": [asdict(stage) for stage in self.stages],
        }


def plan_run(
    recipe: str | Path,
    *,
    overrides: Sequence[str] = (),
    output: str | Path | None = None,
    first: str | None = None,
    last: str | None = None,
    remark: Callable[[str], object] = lambda text: None,
) -> RunPlan:
    """Say what `run` would do with the same arguments; nothing is written, and no weight is read.

    What a conversion measures is not measured, so that its plan is of sizes alone. Raises InputError for whatever `run`
    would refuse before any work.
    """
    job = RunJob.of(read_recipe(recipe, overrides), output=output, headers_only=True, remark=remark)
    status = RunStatus.read(job.place) if job.place.is_dir() else None
    if status is not None:
        job.pin()
    job.check()
    names = stage_names(job, first, last)
    check_done_before(status, names, first)
    if status is not None and first is not None:
        kept = names[: names.index(first)]
        status.stages = {name: record for name, record in status.stages.items() if name in kept}
    facts = {"convert": _conversion, "uptrain": _uptraining, "evaluate": _evaluation, "benchmark": _benchmark}
    plans: list[StagePlan] = []
    for stage in job.stages:
        why = why_again(job, stage, status)
        if why is None and any(not before.done_before for before in plans[:2]):
            why = "it depends on what is made before it"
        what, disk = facts[stage.name](job, made_again=why is not None and first is not None)
        plans.append(StagePlan(stage.name, why is None, why or "", what, disk))
    plans.append(StagePlan("report", False, "always written", {}, 0))
    if job.file.recipe.push is not None:
        section = job.file.recipe.push
        plans.append(StagePlan("push", False, "once all gates are passed", {"repository": section.repo}, 0))
    if last in (None, "push"):
        job.check_push()
    chosen = plans if last is None else plans[: names.index(last) + 1]
    return RunPlan(job.file.path, job.place, tuple(chosen))


def _conversion(job: RunJob, *, made_again: bool) -> tuple[dict[str, Any], int]:
    assert job.original is not None
    assert job.method is not None
    with ExitStack() as stack:
        source = stack.enter_context(job.method.source(job.original))
        size = sum(info.num_bytes for info in job.original.tensors.values())
        section = job.file.recipe.convert
        facts = {"target": section.target, "method": getattr(job.method, "merge", "latent"), "weight_bytes": size}
        facts |= _cache(job.method, source)
        if job.method.needs_measurements:
            facts["calibration"] = section.calibration or "the text that ships with kvconvert"
            facts["calibration_tokens"] = section.calibration_tokens
        return facts, size + size * job.method.needs_measurements  # what is made of layers is kept until the end


def _cache(method: Method, source: Source) -> dict[str, Any]:
    """Bytes of cache per token before and after, where no layer has to be chosen on a text first."""
    if method.needs_choice:
        return {"cache_bytes_per_token": None}
    before, after = method.resolve(source).plan(source).cache_bytes_per_token
    return {"cache_bytes_per_token": {"source": before, "result": after}}


def _uptraining(job: RunJob, *, made_again: bool) -> tuple[dict[str, Any], int]:
    if job.why_no_sketch is not None:
        return {"cost": job.why_no_sketch}, 0
    with job.sketched() as model:
        plan = job.uptraining_plan(replace(job.uptraining_request(), model=model, force=made_again))
    cost = asdict(plan.cost)
    names = ("tokens", "flops", "h100_hours", "gpu_name", "gpu_hours", "memory_bytes")
    facts = {"objective": plan.job.objective, "steps": plan.budget.steps, **{name: cost[name] for name in names}}
    return facts, int(cost["disk_bytes"])


def _evaluation(job: RunJob, *, made_again: bool) -> tuple[dict[str, Any], int]:
    section, gates = job.file.recipe.evaluate, job.file.recipe.gates
    limits = {} if gates is None else gates.model_dump(mode="json", exclude_none=True)
    windows = section.max_windows or "all"
    return {"data": section.data, "windows": windows, "tasks": list(section.tasks), "gates": limits}, 0


def _benchmark(job: RunJob, *, made_again: bool) -> tuple[dict[str, Any], int]:
    section = job.file.recipe.benchmark
    return {"batch": list(section.batch), "context": list(section.context), "repeats": section.repeats}, 0
