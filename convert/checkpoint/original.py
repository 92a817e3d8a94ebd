"""The original that a converted checkpoint's manifest names, where it still is."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..errors import CheckpointError, InputError
from .manifest import read_provenance
from .opening import open_checkpoint
from .source_files import digest_source_file, weight_files
from .tensors import Checkpoint

__all__ = ["find_original"]


def find_original(directory: str | Path) -> Checkpoint | None:
    """Open the checkpoint that the one in a directory was converted from, or return None where that is not known.

    The manifest names it, and has the SHA-256 of each of its files. A directory is looked for beside the converted one,
    and in the current directory, a hub id in the hub's cache, at the commit that was converted: nothing is downloaded.
    Raises InputError where it is gone, or its weights are not those that were converted.
    """
    place = Path(directory).expanduser()
    record = read_provenance(place) if place.is_dir() else {}
    name, files = record.get("source"), record.get("source_files")
    if not isinstance(name, str) or not isinstance(files, list):
        return None
    parents = dict.fromkeys(each.absolute() for each in (place.absolute().parent, Path()))
    candidates = [parent / name for parent in parents if (parent / name).is_dir()]
    for candidate in candidates:
        other = None if candidate.resolve() == place.resolve() else _opened(candidate)
        if other is not None and not _differing(other, files):
            return other
    if "/" in name and not candidates:
        snapshot = _snapshot(name, record.get("source_revision"))
        found = None if snapshot is None else _opened(snapshot)
        if found is None:
            raise InputError(f"{name}, which {place} was converted from, is not in the hub's cache of this machine")
        if not _differing(found, files):
            return found
        candidates = [found.directory]
    if candidates:
        raise InputError(f"{candidates[0]}: its weights are not those that {place} was converted from")
    raise InputError(f"{name}, which {place} was converted from, is neither beside it nor in the current directory")


def _snapshot(name: str, revision: object) -> Path | None:
    """Where the hub's cache has a model at a commit, None where it has not."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name, revision=str(revision) if revision else None, local_files_only=True))
    except (LocalEntryNotFoundError, HFValidationError, OSError):
        return None


def _opened(directory: Path) -> Checkpoint | None:
    try:
        return open_checkpoint(directory)
    except CheckpointError:
        return None


def _differing(checkpoint: Checkpoint, files: Sequence[dict[str, Any]]) -> list[str]:
    """The weights, index and config of a checkpoint that are not as they are listed."""
    listed = {each.get("name"): each for each in files}
    names = weight_files(checkpoint)
    sizes = [name for name in names if (checkpoint.directory / name).stat().st_size != listed.get(name, {}).get("size")]
    if sizes:
        return sizes
    return [
        name for name in names if digest_source_file(checkpoint.directory, name).digest != listed[name].get("digest")
    ]
