"""Results of evaluations as files: all of one as JSON, and scores of tasks as the hub reads them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from ..convert.checkpoint.files import create_file
from ..convert.errors import OutputError
from ..convert.printable import jsonable
from .tasks import TaskScore, hub_results

if TYPE_CHECKING:
    from .evaluation import EvaluationSettings
    from .gates import Gate
    from .perplexity import Evaluation

__all__ = ["evaluation_summary", "make_directory", "write_evaluation", "write_hub_results"]


def evaluation_summary(
    model: str,
    data: Sequence[str],
    settings: EvaluationSettings,
    evaluation: Evaluation,
    gates: Sequence[Gate],
) -> dict[str, Any]:
    """All that an evaluation says, as an object for JSON: what `evaluate --json` prints and a run of a recipe keeps."""
    about = {"model": model, "data": list(data), "dtype": settings.precision}
    return about | asdict(evaluation) | {"gates": [asdict(gate) for gate in gates]}


def make_directory(directory: Path) -> None:
    """Make a directory for results, unless there is one. Raises OutputError where that is not possible."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"{directory}: cannot be made ({error.strerror})", hint="name another directory") from error


def write_evaluation(directory: Path, content: Mapping[str, Any]) -> Path:
    """Write `content` as `evaluation_<date>.json`, and return where; no file is ever replaced."""
    now = datetime.now(UTC).strftime("%Y-%m-%dT%H-%M-%S.%f")
    return _write(directory / f"evaluation_{now}.json", json.dumps(jsonable(dict(content)), indent=2, allow_nan=False))


def write_hub_results(directory: Path, scores: Sequence[TaskScore]) -> list[Path]:
    """Write `.eval_results/<task>.yaml` of each task whose dataset is one of the hub's, and return where.

    Such files are replaced: they hold the last score. Raises OutputError where none of the tasks is of the hub.
    """
    entries = hub_results(scores, date=datetime.now(UTC).date().isoformat())
    if not entries:
        raise OutputError(
            f"none of the tasks {', '.join(score.task for score in scores)} is on a dataset of the hub, which shows "
            "results of such alone",
            hint="leave --hub-results out",
        )
    make_directory(directory / ".eval_results")
    paths = [directory / ".eval_results" / name for name in entries]
    for path, entry in zip(paths, entries.values(), strict=True):
        path.unlink(missing_ok=True)
        _write(path, yaml.safe_dump(entry, sort_keys=False))
    return paths


def _write(path: Path, text: str) -> Path:
    try:
        with create_file(path) as file:
            file.write(f"{text.rstrip()}\n".encode())
    except OSError as error:
        raise OutputError(f"{path}: cannot be written ({error.strerror})", hint="name another directory") from error
    return path
