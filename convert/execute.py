"""Carries out a plan: streams one tensor at a time from the checkpoint to a staged directory."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path

from .cache_check import check_cache
from .checkpoint.companions import Companions, copy_companions, find_companions, link_companions
from .checkpoint.finite import check_computed
from .checkpoint.foreign import cached_repository
from .checkpoint.loading import check_accepts, check_opens, check_source, knows_class
from .checkpoint.output import PROVENANCE_NAME, check_free_space, check_output, staged_directory, write_text
from .checkpoint.overlay import Overlay
from .checkpoint.runtime_code import copy_runtime_code
from .checkpoint.tensors import Checkpoint, tensor_bytes
from .checkpoint.tokenizer_transfer import transfer_tokenizer
from .checkpoint.writer import CheckpointWriter, write_config
from .describe.card import write_card
from .errors import CheckpointError
from .plan import ConversionPlan
from .runtime import RUNTIME_CLASSES
from .translations.routes import translated

__all__ = ["DEFAULT_MAX_SHARD_BYTES", "ExecutionResult", "check_preparation", "execute", "rehearse"]

DEFAULT_MAX_SHARD_BYTES = 5_000_000_000


@dataclass(frozen=True)
class ExecutionResult:
    """A checkpoint that was written to `output`, and opened in its class, whose name is `opened_as`.

    `left_behind` maps what lies beside the source's weights, and is not true of the result or not known to belong to
    it, to the reason, in words. `unchecked_tokenizer` says why the tokenizer of a result in another class could not be
    compared with the source's, if it could not.
    """

    output: Path
    opened_as: str
    left_behind: Mapping[str, str]
    unchecked_tokenizer: str | None = None


def execute(
    plan: ConversionPlan,
    source: Checkpoint,
    output: Path,
    overlay: Overlay | None = None,
    *,
    max_shard_bytes: int = DEFAULT_MAX_SHARD_BYTES,
    force: bool = False,
    calibration: Mapping[str, object] | None = None,
    progress: Callable[[int], object] = lambda num_bytes: None,
) -> ExecutionResult:
    """Write the converted checkpoint to `output`, which appears only when whole and checked.

    `source` is the checkpoint that the plan was made for, as it is or translated already; `overlay` holds the tensors
    that a method prepared. So another process can carry out a plan that was written as JSON. `calibration` is noted in
    kvconvert.json. `progress` is called with the number of bytes written since the last call. Raises OutputError for a
    place that exists or cannot hold the result, CheckpointError if the stock class does not accept the source or the
    result, if a tensor that the plan reads is not there, or if one has values that are not finite and the source does
    not allow them (`Checkpoint.allow_nonfinite`), and UnsupportedError if a computed tensor has such values.
    """
    checkpoint = source if source.route == plan.route else translated(source, plan.route)
    companions = find_companions(checkpoint.original)
    _check(plan, checkpoint, output, overlay, companions, force=force)
    source_type = checkpoint.original.config.get("model_type")
    steps = {step.writes.name: step for step in plan.steps}
    with staged_directory(output, force=force) as staging:
        writer = CheckpointWriter(staging, [step.writes for step in plan.steps], max_shard_bytes=max_shard_bytes)
        # 1. what may be refused, before the weights, which take long
        copy_companions(companions, staging)
        unchecked = _complete_companions(plan, checkpoint, staging, output)
        # 2. the weights
        for spec, file in writer.write_tensors():
            step = steps[spec.name]
            if step.overlay and overlay is not None:
                made = overlay.read(step.reads[0])
                check_computed(spec.name, made)
                file.write(tensor_bytes(made))
            elif step.op is None:
                checkpoint.copy_bytes(step.reads[0], file)
            else:
                tensors = [checkpoint.read(name) for name in step.reads]
                made = step.op(*tensors)
                check_computed(spec.name, made, tensors)
                file.write(tensor_bytes(made))
            progress(spec.num_bytes)
        # 3. what made it, and whether it opens
        provenance = _provenance(plan, checkpoint)
        if calibration is not None:
            provenance["calibration"] = calibration
        write_text(staging / PROVENANCE_NAME, json.dumps(provenance, indent=2) + "\n")
        write_card(checkpoint.directory, staging, provenance)
        opened_as = check_opens(staging)
        if plan.model_type != source_type or plan.model_type in RUNTIME_CLASSES:
            check_cache(staging, name=str(output))
    return ExecutionResult(output, opened_as, companions.left_behind, unchecked)


def rehearse(
    plan: ConversionPlan, source: Checkpoint, output: Path, overlay: Overlay | None = None, *, force: bool = False
) -> tuple[Mapping[str, str], str | None] | None:
    """Make the checks of `execute` that need no weight; return its result's `left_behind` and `unchecked_tokenizer`.

    `source` is translated already. What goes beside the weights is made in a temporary directory, of links to the
    source's files, since these can be large. Returns None where only headers were fetched, so that there is nothing to
    make it of. Raises what `execute` raises, but for values of weights.
    """
    companions = None if source.original.path is None else find_companions(source.original)
    _check(plan, source, output, overlay, companions, force=force)
    return _rehearse_companions(plan, source, companions, output)


def check_preparation(plan: ConversionPlan, source: Checkpoint, output: Path) -> None:
    """Raise what `execute` would raise for classes and for what goes beside the weights, before tensors are prepared.

    Preparing them takes hours for a large model.
    """
    _check_classes(plan, source, output)
    companions = None if source.original.path is None else find_companions(source.original)
    _rehearse_companions(plan, source, companions, output)


def _rehearse_companions(
    plan: ConversionPlan, source: Checkpoint, companions: Companions | None, output: Path
) -> tuple[Mapping[str, str], str | None] | None:
    """Make what goes beside the weights in a temporary directory, as `rehearse` says."""
    if companions is None:
        return None
    with tempfile.TemporaryDirectory() as folder:
        link_companions(companions, Path(folder))
        return companions.left_behind, _complete_companions(plan, source, Path(folder), output)


def _complete_companions(plan: ConversionPlan, checkpoint: Checkpoint, directory: Path, output: Path) -> str | None:
    """Write into a directory what goes beside the weights of `output` and is not the source's.

    Returns why a tokenizer was not compared with the source's, if it was not.
    """
    copy_runtime_code(plan.model_type, directory)
    write_config(plan.config, directory, source=checkpoint.directory)
    if plan.model_type == checkpoint.original.config.get("model_type"):
        return None
    return transfer_tokenizer(checkpoint.directory, directory, name=str(output))


def _check(
    plan: ConversionPlan,
    source: Checkpoint,
    output: Path,
    overlay: Overlay | None,
    companions: Companions | None,
    *,
    force: bool,
) -> None:
    """Raise an InputError unless a source, translated already, can be converted, by headers alone.

    What is checked is that everything is there that the plan reads, that the place can take the result, and that the
    classes of source and result accept the headers that each has.
    """
    _check_reads(plan, source, overlay)
    plan.check_readable(source)
    check_output(output, force=force, inputs=[source.path] if source.path else [])
    check_free_space(output, plan.bytes_out + (0 if companions is None else companions.num_bytes))
    _check_classes(plan, source, output)


def _check_classes(plan: ConversionPlan, source: Checkpoint, output: Path) -> None:
    """Raise CheckpointError unless the classes of source and result accept the headers that each has."""
    check_source(source)
    if knows_class(plan.model_type):
        check_accepts(plan.config, [step.writes for step in plan.steps], str(output))


def _check_reads(plan: ConversionPlan, checkpoint: Checkpoint, overlay: Overlay | None) -> None:
    """Raise CheckpointError unless everything that the plan reads is there."""
    made = {} if overlay is None else overlay.files
    for step in plan.steps:
        for name in step.reads:
            if name not in (made if step.overlay else checkpoint.tensors):
                place = "what the method prepared" if step.overlay else checkpoint.name
                raise CheckpointError(
                    f"the plan reads {name}, which is not in {place}", hint="the plan was made for another checkpoint"
                )


def _provenance(plan: ConversionPlan, checkpoint: Checkpoint) -> dict[str, object]:
    """What made this directory, so that a result found later explains itself."""
    source = Path(checkpoint.name)
    cached = cached_repository(source)
    cache_before, cache_after = plan.cache_bytes_per_token
    return {
        "kvconvert_version": version("kvconvert"),
        "source": cached[0] if cached else source.resolve().name if source.is_dir() else checkpoint.name,
        "target": plan.target,
        "method": plan.method,
        "cache_bytes_per_token": {"source": cache_before, "result": cache_after},
        "num_key_value_heads": {
            "source": plan.source.num_key_value_heads,
            "result": plan.result.num_key_value_heads,
        },
        "num_key_value_layers": {
            "source": plan.source.num_key_value_layers,
            "result": plan.result.num_key_value_layers,
        },
        "kv_source_layers": list(plan.result.layer_grouping.sources) if plan.result.layer_grouping else None,
        "latent": asdict(plan.result.latent) if plan.result.latent else None,
        **({"nonfinite_values": nonfinite} if (nonfinite := checkpoint.original.nonfinite) else {}),
    }
