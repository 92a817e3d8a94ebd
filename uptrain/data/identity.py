"""Whether two runs read the same text."""

from __future__ import annotations

from hashlib import sha256
from pathlib import Path
from typing import Any

from ...convert.text.sources import TextSource

__all__ = ["content_digest"]

_WHOLE_BYTES = 2**30  # up to which a text is read whole: at 1.4 GB/s that is less than a second in every process
_SAMPLES = 16
_SAMPLE_BYTES = 2**14


def content_digest(text: TextSource) -> str | None:
    """Return a digest of a file, or of the files below a directory, that has nothing of their place; None of a dataset.

    It is of names below the directory, sizes, and all bytes: text that was moved or copied has the same, and text that
    was changed has another. Of text above 1 GiB it is of 16 samples of each file in place of all bytes, which do not
    see every change that leaves the length as it was.
    """
    place = text.path
    if not place.exists():
        return None
    digest = sha256()
    files = sorted(path for path in place.rglob("*") if path.is_file()) if place.is_dir() else [place]
    whole = sum(path.stat().st_size for path in files) <= _WHOLE_BYTES
    for path in files:
        name = path.relative_to(place).as_posix() if place.is_dir() else ""
        digest.update(f"{name} {path.stat().st_size} ".encode(errors="surrogateescape"))
        _update(digest, path, whole=whole)
    return digest.hexdigest()


def _update(digest: Any, path: Path, *, whole: bool) -> None:
    size = path.stat().st_size
    with path.open("rb") as file:
        if whole or size <= _SAMPLES * _SAMPLE_BYTES:
            while chunk := file.read(2**20):
                digest.update(chunk)
            return
        for number in range(_SAMPLES):
            file.seek((size - _SAMPLE_BYTES) * number // (_SAMPLES - 1))
            digest.update(file.read(_SAMPLE_BYTES))
