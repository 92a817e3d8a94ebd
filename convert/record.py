"""What kvconvert.json says of a conversion: source, method, every option, and what each tensor was made of."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict
from hashlib import sha256
from importlib.metadata import version
from pathlib import Path
from typing import Any

from .checkpoint.companions import find_companions
from .checkpoint.foreign import cached_repository
from .checkpoint.manifest import FileDigest, digest_file
from .checkpoint.source_files import digest_weights
from .checkpoint.tensors import Checkpoint
from .plan import ConversionPlan, Step
from .text.sources import TextSource

__all__ = ["conversion_record", "job_record", "place_name", "text_record"]

_LIBRARIES = ("torch", "transformers", "safetensors", "tokenizers")


def conversion_record(
    plan: ConversionPlan,
    source: Checkpoint,
    source_files: Sequence[FileDigest],
    *,
    options: Mapping[str, Any],
    calibration: Mapping[str, Any] | None,
) -> dict[str, Any]:
    """Return the record, from which `verify` can compute the result anew where the method is exact.

    `tensors` maps each tensor of the result to what it is: "copied" bytes of the source's tensor of that name, those of
    another (`copied_from`), or what one of the `operations` made of tensors of the source (`computed_from`), or what
    the method prepared (`prepared`). Where the source was translated, these are tensors of the last class of `route`.
    Nothing in it says where or when the conversion was run.
    """
    place = Path(source.name)
    repository, commit = cached_repository(source.path) or (None, None) if source.path else (None, None)
    name = repository or (place.resolve().name if place.is_dir() else source.name)
    before, after = plan.cache_bytes_per_token
    operations: list[dict[str, Any]] = []
    tensors = {step.writes.name: _tensor(step, operations) for step in plan.steps}
    return {
        "kvconvert_version": version("kvconvert"),
        "versions": {library: version(library) for library in _LIBRARIES},
        "source": name,
        **({} if commit is None else {"source_revision": commit}),
        "source_files": [file.to_json() for file in source_files],
        "target": plan.target,
        "method": plan.method,
        "options": dict(options),
        **({} if calibration is None else {"calibration": dict(calibration)}),
        "cache_bytes_per_token": {"source": before, "result": after},
        "num_key_value_heads": {"source": plan.source.num_key_value_heads, "result": plan.result.num_key_value_heads},
        **({"head_dim": plan.head_dims} if plan.resizes_heads else {}),
        "num_key_value_layers": {
            "source": plan.source.num_key_value_layers,
            "result": plan.result.num_key_value_layers,
        },
        "kv_source_layers": list(plan.result.layer_grouping.sources) if plan.result.layer_grouping else None,
        "latent": asdict(plan.result.latent) if plan.result.latent else None,
        **({"nonfinite_values": nonfinite} if (nonfinite := source.original.nonfinite) else {}),
        "route": list(plan.route),
        "operations": operations,
        "tensors": tensors,
    }


def job_record(
    source: Checkpoint,
    *,
    conversion: str,
    settings: Mapping[str, Any],
    device: str,
    precision: str,
    progress: Callable[[int], object] = lambda num_files: None,
) -> dict[str, Any]:
    """Return all that the tensors which a method prepares of a source depend on, but for the text itself.

    `source` is translated already; its files are read, whole, and `progress` is called with 1 after each that holds
    weights. Sums in floating point depend on the machine too: on the kind of device, and on how many threads a CPU has,
    and with what instructions.
    """
    import torch

    original = source.original
    companions = find_companions(original)
    code = [name for name in companions.left_behind if name.endswith(".py")]
    others = sorted(name for name in (*companions.copied, *code) if (companions.source / name).is_file())
    return {
        "conversion": conversion,
        **settings,
        "precision": precision,
        "device": _device_name(device),
        "threads": torch.get_num_threads(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "source": {
            "route": list(source.route),
            "weights": _digest_of(digest_weights(original, progress)),
            "other_files": _digest_of(digest_file(companions.source, name) for name in others),
        },
        "kvconvert_version": version("kvconvert"),
        "versions": {library: version(library) for library in _LIBRARIES},
    }


def _device_name(device: str) -> str:
    import torch

    kind = torch.device(device).type
    return torch.cuda.get_device_name(device) if kind == "cuda" else kind


def _digest_of(files: Iterable[FileDigest]) -> str:
    """A digest of the digests of files, short enough to be shown."""
    return sha256(json.dumps([file.to_json() for file in files]).encode()).hexdigest()[:16]


def text_record(source: TextSource, files: Iterable[Path]) -> dict[str, Any]:
    """Return what identifies the text that a model was measured on: the digests of its files, or a dataset's commit.

    `files` are those that were opened, which are read again, whole. The commit is None where the hub did not tell it.
    """
    place = source.path
    if not place.exists():
        return {"data": source.location, "data_revision": source.revision}
    directory = place if place.is_dir() else place.parent
    names = sorted({file.relative_to(directory).as_posix() for file in files})
    return {
        "data": place_name(source.location),
        "data_files": [digest_file(directory, name).to_json() for name in names],
    }


def place_name(location: str) -> str:
    """Return the name of a file or directory that is here, or of which the absolute path is given; else the location.

    So the record says the same wherever it lies, and a dataset keeps its owner.
    """
    path = TextSource(location).path
    return Path(os.path.abspath(path)).name if path.is_absolute() or path.exists() else location


def _tensor(step: Step, operations: list[dict[str, Any]]) -> Any:
    """What a tensor is made of; its operation is added to the list of them if it is not in there."""
    if step.overlay:
        return {"prepared": list(step.reads)}
    operation = step.operation_json()
    if operation is None:
        return "copied" if step.reads[0] == step.writes.name else {"copied_from": step.reads[0]}
    if operation not in operations:
        operations.append(operation)
    return {"operation": operations.index(operation), "computed_from": list(step.reads)}
