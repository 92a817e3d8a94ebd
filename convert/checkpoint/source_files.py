"""The files that a checkpoint is read from: their digests, and whether these are what they should be."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from hashlib import sha1
from pathlib import Path

from ..errors import CheckpointError
from .manifest import FileDigest, digest_file, listed_files, read_provenance
from .tensors import CONFIG_NAME, INDEX_NAME, PICKLE_INDEX_NAME, Checkpoint

__all__ = ["check_manifest", "digest_source_file", "digest_weights", "weight_files"]


def weight_files(checkpoint: Checkpoint) -> list[str]:
    """The names of the files of a checkpoint that hold its tensors, in order, its index, and its config."""
    names = dict.fromkeys(info.file for info in checkpoint.tensors.values())
    beside = [
        name for name in (INDEX_NAME, PICKLE_INDEX_NAME) if len(names) > 1 and (checkpoint.directory / name).exists()
    ]
    return [*names, *beside, CONFIG_NAME]


def digest_weights(
    checkpoint: Checkpoint, progress: Callable[[int], object] = lambda num_files: None
) -> list[FileDigest]:
    """Read the files of a checkpoint's weights, and return their digests; `progress` is called with 1 after each.

    Raises CheckpointError where a file has other bytes than the hub has, or than kvconvert wrote.
    """
    found = []
    for name in weight_files(checkpoint):
        found.append(digest_source_file(checkpoint.directory, name))
        progress(1)
    check_manifest(checkpoint.directory, found)
    return found


def digest_source_file(directory: Path, name: str, *, see: Callable[[], object] = lambda: None) -> FileDigest:
    """Read a file of a checkpoint and return its digest; `see` is called for each part of it.

    Raises CheckpointError where that is not the digest that the hub's cache calls the file by.
    """
    found = digest_file(directory, name, see=see)
    blob = (directory / name).resolve()
    if blob.parent.name == "blobs":
        _compare(directory / name, found, blob)
    return found


def check_manifest(directory: Path, found: Iterable[FileDigest]) -> None:
    """Raise CheckpointError where weights of a checkpoint that kvconvert wrote have other bytes than were written."""
    listed = {file.name: file for file in listed_files(read_provenance(directory)) or ()}
    for file in found:
        expected = listed.get(file.name)
        if expected is not None and file.name.endswith(".safetensors") and expected.digest != file.digest:
            raise CheckpointError(
                f"{directory / file.name}: has other bytes than kvconvert wrote: its SHA-256 is {file.digest[:12]}…, "
                f"and kvconvert.json has {expected.digest[:12]}…",
                hint="make it again, or take another copy",
            )


def _compare(path: Path, found: FileDigest, blob: Path) -> None:
    """Compare a file with its name in the hub's cache: SHA-256 of a large file, Git's SHA-1 of a small one."""
    if re.fullmatch(r"[0-9a-f]{64}", blob.name):
        actual = found.digest
    elif re.fullmatch(r"[0-9a-f]{40}", blob.name):
        digest = sha1(f"blob {found.size}\0".encode(), usedforsecurity=False)
        digest.update(blob.read_bytes())
        actual = digest.hexdigest()
    else:
        return
    if actual != blob.name:
        raise CheckpointError(
            f"{path}: was damaged in the download or on the disk: its digest is {actual[:12]}…, and the hub has "
            f"{blob.name[:12]}…",
            hint=f"remove {blob} and download the model again",
        )
