"""What a run of a recipe would do and cost, stage by stage, said before any of it begins."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from ..convert.architectures.source import Source
from ..convert.errors import InputError
from ..convert.execute import sketched
from ..convert.methods.method import Method
from .recipe_file import read_recipe
from .run_records import RunStatus, differences
from .run_stages import RunJob, Stage

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
    remark: Callable[[str], object] = lambda text: None,
) -> RunPlan:
    """Say what `run` would do with the same arguments; nothing is written, and no weight is read.

    What a conversion measures is not measured, so that its plan is of sizes alone. Raises InputError for whatever `run`
    would refuse before any work, and for a cost that is not known before a text has chosen what is converted.
    """
    job = RunJob.of(read_recipe(recipe, overrides), output=output, headers_only=True, remark=remark)
    status = RunStatus.read(job.place) if job.place.is_dir() else None
    if status is not None:
        job.pin()
    job.check()
    facts = {"convert": _conversion, "uptrain": _uptraining, "evaluate": _evaluation, "benchmark": _benchmark}
    plans = []
    for stage in job.stages:
        record = None if status is None else status.stages.get(stage.name)
        found = ["not done yet"] if record is None else differences(record, stage.settings, stage.texts, job.place)
        what, disk = facts[stage.name](job, stage)
        plans.append(StagePlan(stage.name, not found, "; ".join(found[:4]), what, disk))
    plans.append(StagePlan("report", False, "always written", {}, 0))
    return RunPlan(job.file.path, job.place, tuple(plans))


def _conversion(job: RunJob, stage: Stage) -> tuple[dict[str, Any], int]:
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


def _uptraining(job: RunJob, stage: Stage) -> tuple[dict[str, Any], int]:
    request = job.uptraining_request()
    with ExitStack() as stack:
        if not Path(request.model).is_dir():
            request = replace(request, model=stack.enter_context(_converted(job)))
        plan = job.uptraining_plan(request)
    cost = asdict(plan.cost)
    names = ("tokens", "flops", "h100_hours", "gpu_name", "gpu_hours", "memory_bytes")
    facts = {"objective": plan.job.objective, "steps": plan.budget.steps, **{name: cost[name] for name in names}}
    return facts, int(cost["disk_bytes"])


@contextmanager
def _converted(job: RunJob) -> Iterator[Path]:
    """What the conversion would make, as far as headers say it. Raises InputError where that is not known before."""
    assert job.original is not None
    assert job.method is not None
    if not job.original.directory.is_dir():
        raise InputError(f"{job.original.name}: its files are not on this machine, so that no training can be planned")
    if job.method.needs_choice:
        raise InputError(
            f"{job.place} is not converted yet, and which layers share is chosen on a text, so that no training can be "
            "planned",
            hint="convert first: --until convert",
        )
    with ExitStack() as stack:
        source = stack.enter_context(job.method.source(job.original))
        yield stack.enter_context(sketched(job.method.resolve(source).plan(source), source.checkpoint))


def _evaluation(job: RunJob, stage: Stage) -> tuple[dict[str, Any], int]:
    section, gates = job.file.recipe.evaluate, job.file.recipe.gates
    limits = {} if gates is None else gates.model_dump(mode="json", exclude_none=True)
    windows = section.max_windows or "all"
    return {"data": section.data, "windows": windows, "tasks": list(section.tasks), "gates": limits}, 0


def _benchmark(job: RunJob, stage: Stage) -> tuple[dict[str, Any], int]:
    section = job.file.recipe.benchmark
    return {"batch": list(section.batch), "context": list(section.context), "repeats": section.repeats}, 0
