"""The result of an uptraining run: a whole checkpoint in the source's dtypes."""

from __future__ import annotations

import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig

from ...convert.checkpoint.companions import copy_companions, find_companions
from ...convert.checkpoint.files import copy_file
from ...convert.checkpoint.loading import check_opens, quiet_transformers
from ...convert.checkpoint.manifest import read_provenance, write_manifest
from ...convert.checkpoint.runtime_code import copy_runtime_code
from ...convert.checkpoint.source_files import digest_weights
from ...convert.checkpoint.staging import staged_directory
from ...convert.checkpoint.tensors import torch_dtype
from ...convert.checkpoint.writer import write_config
from ...convert.describe.card import write_card
from ...convert.errors import DivergedError
from ...convert.execute import DEFAULT_MAX_SHARD_BYTES
from ..job import UptrainJob
from .record import METRICS_NAME
from .start import read_start
from .status import STATUS_NAME, RunStatus, write_status
from .trials import SWEEP_NAME, sweep_that_chose

__all__ = ["TRACKS_NAME", "publish", "write_weights"]


TRACKS_NAME = "runs"  # where transformers' users look for tensorboard's files
_OF_THE_RUN = (METRICS_NAME, TRACKS_NAME, STATUS_NAME, SWEEP_NAME)  # which say when, where and how fast


def write_weights(
    model: Any, weights: dict[str, torch.Tensor], folder: Path, dtypes: dict[str, torch.dtype] | None = None
) -> None:
    """Save a model's config and weights, each in the dtype that `dtypes` has for its name, if any.

    Raises DivergedError for weights that are finite and beyond the range of that dtype.
    """
    for tied, original in model.all_tied_weights_keys.items():  # which are two tensors where they were gathered
        if original in weights:
            weights.pop(tied, None)
    for name in weights:
        weights[name] = weights[name].to((dtypes or {}).get(name, weights[name].dtype))
        if not weights[name].isfinite().all():
            kind = str(weights[name].dtype).removeprefix("torch.")
            raise DivergedError(
                f"{name}: trained to values that are beyond the range of {kind}, the source's dtype",
                hint="use a smaller --lr, and --force to start over, or convert a copy of the source in float32",
            )
    own = model.generation_config, getattr(model.config, "distributed_config", None)
    model.generation_config = GenerationConfig()  # the source's own may be invalid; it is copied where it is wanted
    model.config.distributed_config = None  # the weights are whole
    try:
        with quiet_transformers():
            model.save_pretrained(folder, state_dict=weights, max_shard_size=DEFAULT_MAX_SHARD_BYTES)
    finally:
        model.generation_config, model.config.distributed_config = own
    (folder / "generation_config.json").unlink(missing_ok=True)


def publish(
    job: UptrainJob,
    model: Any,
    weights: dict[str, torch.Tensor],
    *,
    passes: float | None,
    kept_step: int | None,
    status: RunStatus,
    force: bool,
) -> None:
    """Write weights in the source's dtypes, config and companions of the source, metrics and status.

    `kept_step` is the step that the weights are of, None where they are the last step's.
    """
    source = job.checkpoint
    # of what conversion made of each tensor nothing is true any more
    untrue = ("files", "tensors", "operations", "route")
    provenance = {key: value for key, value in read_provenance(source.directory).items() if key not in untrue}
    start = read_start(job.work)
    tokens = job.settings.steps * job.settings.tokens_per_step
    teacher = job.inputs.teacher
    provenance["uptraining"] = job.record | {
        "model_files": [file.to_json() for file in digest_weights(source)],
        "teacher_files": None if teacher is None else [file.to_json() for file in digest_weights(teacher)],
        "tokens": tokens,
        "passes": passes,
        "kept_step": kept_step,
        "start": None if start is None else asdict(start),
    }
    default = torch_dtype(source.dtype)
    dtypes = {name: torch_dtype(source.tensors[name].dtype) if name in source.tensors else default for name in weights}
    with staged_directory(job.output, force=force, inputs=job.places_read) as staging:
        write_weights(model, weights, staging, dtypes)
        copy_companions(find_companions(source, same_attention=True), staging)
        copy_runtime_code(str(source.config.get("model_type")), staging)
        write_config(source.config, staging, source=source.directory)
        copy_file(job.work / METRICS_NAME, staging / METRICS_NAME)
        if (job.work / TRACKS_NAME).exists():
            shutil.copytree(job.work / TRACKS_NAME, staging / TRACKS_NAME)
        write_status(staging, status)
        sweep = sweep_that_chose(job)
        if sweep is not None:
            copy_file(sweep / SWEEP_NAME, staging / SWEEP_NAME)
        write_card(source.directory, staging, provenance)
        write_manifest(staging, provenance, of_the_run=_OF_THE_RUN)
        check_opens(staging)
