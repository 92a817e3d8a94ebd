"""Scores on tasks of lm-evaluation-harness, which `kvconvert[eval]` installs."""

from __future__ import annotations

import contextlib
import difflib
import logging
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any

from typing_extensions import Doc

from ..convert.errors import DataError, InputError, KvConvertError, first_line, is_out_of_memory

__all__ = ["TaskScore", "TaskSettings", "hub_results", "load_tasks", "run_tasks", "task_scores"]

_MAIN_METRICS = ("acc_norm", "acc", "exact_match", "f1", "word_perplexity")
"""What a task is summed up by: the first of these that it has, else the first that it reports."""
_HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")


@dataclass(frozen=True)
class TaskSettings:
    """Which tasks of lm-evaluation-harness are run, and on how much. Raises InputError for sizes that cannot be."""

    tasks: Annotated[Sequence[str], Doc("Tasks, or groups of tasks, of lm-evaluation-harness, such as hellaswag.")] = ()
    task_directory: Annotated[Path | None, Doc("Directory of YAML files that describe tasks of one's own.")] = None
    task_limit: Annotated[
        int | None, Doc("Run the first so many examples of each task only; such scores are for trying.")
    ] = None
    num_fewshot: Annotated[int | None, Doc("Examples before each question. Default: the task's own number.")] = None

    def __post_init__(self) -> None:
        for name, least in (("task_limit", 1), ("num_fewshot", 0)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise InputError(f"{name} is {value}, expected {least} or more", settings=(name,))
        if not self.tasks:
            given = [
                name for name in ("task_directory", "task_limit", "num_fewshot") if getattr(self, name) is not None
            ]
            if given:
                raise InputError(
                    f"{given[0]} is about tasks, and none is named", hint="name tasks", settings=("tasks", given[0])
                )


@dataclass(frozen=True)
class TaskScore:
    """A task's scores, by the names of its metrics, with standard errors where the harness gives them.

    `metric` is the one that sums the task up, and `original_metrics` those of the original, if there is one. `version`
    is that of the task, `num_samples` how many examples were run, `num_fewshot` how many stood before each, and
    `dataset` and its configuration where they are from, as datasets calls them; None of a group of tasks.
    """

    task: str
    metric: str
    higher_is_better: bool
    metrics: Mapping[str, float]
    standard_errors: Mapping[str, float]
    num_samples: int
    num_fewshot: int
    version: str
    dataset: str | None = None
    dataset_config: str | None = None
    original_metrics: Mapping[str, float] = field(default_factory=dict)

    @property
    def value(self) -> float:
        """The score that sums the task up."""
        return self.metrics[self.metric]

    @property
    def kept(self) -> float | None:
        """The score over the original's, or the original's over the score where less is better; None without one."""
        original = self.original_metrics.get(self.metric)
        if original is None:
            return None
        above, below = (self.value, original) if self.higher_is_better else (original, self.value)
        return above / below if below else float("nan")


def load_tasks(settings: TaskSettings) -> Any:
    """The harness's index of tasks, in which these are.

    Raises InputError where the harness is not installed, and for tasks that it does not have.
    """
    if find_spec("lm_eval") is None:
        raise InputError(
            "tasks are run by lm-evaluation-harness, which is not installed",
            hint="pip install 'kvconvert[eval]'",
            settings=("tasks",),
        )
    if settings.task_directory is not None and not settings.task_directory.is_dir():
        raise InputError(f"{settings.task_directory}: no such directory", settings=("task_directory",))
    from lm_eval.tasks import TaskManager

    with _silence():
        directory = settings.task_directory
        manager = TaskManager(include_path=None if directory is None else str(directory))
    known = manager.all_tasks
    for task in settings.tasks:
        if task not in known:
            near = difflib.get_close_matches(task, known, 3)
            raise InputError(
                f"lm-evaluation-harness has no task {task!r}",
                hint=f"did you mean {' or '.join(near)}?" if near else "lm_eval ls tasks lists them",
                settings=("tasks",),
            )
    return manager


def run_tasks(
    model: Any,
    tokenizer: Any,
    settings: TaskSettings,
    manager: Any,
    *,
    name: str,
    batch_size: int = 8,
    output: Path | None = None,
) -> dict[str, Any]:
    """Run the tasks with a causal model of transformers that is loaded, and return what the harness returns of them.

    `manager` is what `load_tasks` gave. `output` is a directory for what the harness itself writes:
    `<name>/results_<date>.json`, with a hash of each task's examples. Raises DataError where the data of a task cannot
    be had.
    """
    from lm_eval import simple_evaluate
    from lm_eval.loggers import EvaluationTracker
    from lm_eval.models.huggingface import HFLM

    with _silence():
        try:
            found: dict[str, Any] = simple_evaluate(
                model=HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size),
                tasks=list(settings.tasks),
                num_fewshot=settings.num_fewshot,
                limit=settings.task_limit,
                task_manager=manager,
            )
        except KvConvertError:
            raise
        except Exception as error:
            if is_out_of_memory(error):
                raise
            raise DataError(
                f"the tasks {', '.join(settings.tasks)} ended with {type(error).__name__}: {first_line(error)}",
                hint="a task of the hub needs the network, or its dataset in the local cache",
            ) from error
        if output is not None:
            tracker = EvaluationTracker(output_path=str(output))
            tracker.general_config_tracker.log_experiment_args("hf", f"pretrained={name}", "", "", False)
            tracker.save_results_aggregated(results=dict(found), samples=found["samples"])
    return found


def task_scores(found: Mapping[str, Any], original: Mapping[str, Any] | None = None) -> tuple[TaskScore, ...]:
    """What `run_tasks` returned as scores, beside those of the original; groups and tasks alike, in their order."""
    return tuple(_task_score(task, found, original) for task in found["results"] if _metrics(found, task))


def hub_results(scores: Sequence[TaskScore], *, date: str) -> dict[str, list[dict[str, Any]]]:
    """Entries for `.eval_results/*.yaml` of a model on the hub, by the file's name, for tasks on datasets of the hub.

    Shares of 1 become percent there. https://huggingface.co/docs/hub/eval-results has the format; `task_id` is the
    configuration of the dataset, or "default": the dataset's own eval.yaml, which is not read, may call it otherwise.
    """
    files: dict[str, list[dict[str, Any]]] = {}
    for score in scores:
        if score.dataset is None or not _HUB_ID.fullmatch(score.dataset):
            continue
        is_share = score.higher_is_better and 0 <= score.value <= 1
        entry: dict[str, Any] = {"dataset": {"id": score.dataset, "task_id": score.dataset_config or "default"}}
        entry["value"] = round(score.value * 100, 2) if is_share else round(score.value, 4)
        entry["date"] = date
        entry["notes"] = f"{score.metric}, {score.num_fewshot}-shot, lm-evaluation-harness {score.task} {score.version}"
        files[f"{score.task}.yaml"] = [entry]
    return files


def _task_score(task: str, found: Mapping[str, Any], original: Mapping[str, Any] | None) -> TaskScore:
    metrics = _metrics(found, task)
    main = next((name for name in _MAIN_METRICS if name in metrics), next(iter(metrics)))
    sizes, config = found.get("n-samples", {}).get(task, {}), found.get("configs", {}).get(task, {})
    return TaskScore(
        task=task,
        metric=main,
        higher_is_better=found.get("higher_is_better", {}).get(task, {}).get(main) is not False,
        metrics=metrics,
        standard_errors=_metrics(found, task, "_stderr"),
        num_samples=int(sizes.get("effective", 0)),
        num_fewshot=int(found.get("n-shot", {}).get(task) or 0),
        version=str(found.get("versions", {}).get(task)),
        dataset=config.get("dataset_path"),
        dataset_config=config.get("dataset_name"),
        original_metrics={} if original is None else _metrics(original, task),
    )


def _metrics(found: Mapping[str, Any], task: str, ending: str = "") -> dict[str, float]:
    """A task's numbers; the harness calls them "acc,none" and "acc_stderr,none", with the filter behind the comma."""
    numbers: dict[str, float] = {}
    for key, value in found["results"].get(task, {}).items():
        name, _, kind = key.partition(",")
        if not kind or isinstance(value, str) or name.endswith("_stderr") != bool(ending):
            continue
        name = name.removesuffix(ending) if ending else name
        numbers.setdefault(name if kind == "none" else f"{name},{kind}", float(value))
    return numbers


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    """Keep the harness, and the git that it asks for its own version, from writing to the terminal."""
    logger = logging.getLogger("lm_eval")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    errors = os.dup(2)
    try:
        with (
            Path(os.devnull).open("w") as nowhere,
            contextlib.redirect_stderr(nowhere),
            contextlib.redirect_stdout(nowhere),
        ):
            os.dup2(nowhere.fileno(), 2)
            yield
    finally:
        os.dup2(errors, 2)
        os.close(errors)
        logger.setLevel(level)
