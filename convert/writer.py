"""Writes a checkpoint as safetensors shards that appear only when whole."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from .checkpoint import CONFIG_NAME, DTYPE_BYTES, INDEX_NAME, WEIGHTS_NAME
from .errors import OutputError

__all__ = ["CheckpointWriter", "TensorSpec", "check_free_space", "check_output", "staged_directory"]

_INDEX_SPARE_BYTES = 64 * 2**20  # tokenizer, configs, index and file-system overhead


@dataclass(frozen=True)
class TensorSpec:
    """A tensor to be written: its bytes follow in the order of the specs."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        count = DTYPE_BYTES[self.dtype]
        for size in self.shape:
            count *= size
        return count


class CheckpointWriter:
    """Streams tensors into the shards of a directory, one after the other, holding none of them.

    `specs` are all tensors, in any order. Shards are filled in that order up to `max_shard_bytes`; within a shard
    wider dtypes come first, as the safetensors library writes them, so that every tensor is aligned. `order` is the
    sequence in which `open_tensor` must be called.
    """

    def __init__(self, directory: Path, specs: Sequence[TensorSpec], *, max_shard_bytes: int) -> None:
        self.directory = directory
        self._shards = _assign_shards(specs, max_shard_bytes)
        self._total_bytes = sum(spec.num_bytes for spec in specs)
        self._total_parameters = sum(spec.num_bytes // DTYPE_BYTES[spec.dtype] for spec in specs)

    @property
    def order(self) -> list[str]:
        return [spec.name for shard in self._shards for spec in shard]

    def shard_name(self, index: int) -> str:
        count = len(self._shards)
        return WEIGHTS_NAME if count == 1 else f"model-{index + 1:05d}-of-{count:05d}.safetensors"

    def write_tensors(self) -> Iterator[tuple[TensorSpec, IO[bytes]]]:
        """Yield each tensor in `order` with the file that its bytes must be appended to; the index is written last."""
        for index, shard in enumerate(self._shards):
            path = self.directory / self.shard_name(index)
            with path.open("wb") as file:
                file.write(_header(shard))
                for spec in shard:
                    expected = file.tell() + spec.num_bytes
                    yield spec, file
                    if file.tell() != expected:
                        raise AssertionError(f"{spec.name}: {expected - file.tell()} bytes missing in {path.name}")
                _flush_to_disk(file)
        if len(self._shards) > 1:
            weight_map = {
                spec.name: self.shard_name(index) for index, shard in enumerate(self._shards) for spec in shard
            }
            metadata = {"total_parameters": self._total_parameters, "total_size": self._total_bytes}
            index_json = {"metadata": metadata, "weight_map": dict(sorted(weight_map.items()))}
            self.write_text(INDEX_NAME, json.dumps(index_json, indent=2) + "\n")

    def write_config(self, config: dict[str, Any]) -> None:
        self.write_text(CONFIG_NAME, json.dumps(config, indent=2, ensure_ascii=False) + "\n")

    def write_text(self, name: str, text: str) -> None:
        with (self.directory / name).open("w", encoding="utf-8") as file:
            file.write(text)
            _flush_to_disk(file)


def check_output(output: Path, *, force: bool, source: Path | None = None) -> None:
    """Raise OutputError if `output` exists (without `force`), is the source, or cannot be created."""
    if source is not None and output.resolve() == source.resolve():
        raise OutputError(f"{output} is the source itself", hint="choose another place with --output")
    if output.exists() and not force:
        raise OutputError(f"{output} already exists", hint="choose another place with --output, or pass --force")
    if output.exists() and not output.is_dir():
        raise OutputError(f"{output} is a file, not a directory", hint="choose another place with --output")
    parent = _existing_parent(output)
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise OutputError(f"{output} cannot be created: {parent} is not a writable directory")


def check_free_space(output: Path, num_bytes: int) -> None:
    """Raise OutputError if the file system of `output` cannot hold `num_bytes` more."""
    free = shutil.disk_usage(_existing_parent(output)).free
    needed = num_bytes + _INDEX_SPARE_BYTES
    if free < needed:
        raise OutputError(
            f"{output}: needs {needed / 1e9:.2f} GB, but its disk has {free / 1e9:.2f} GB free",
            hint="free some space, or choose another disk with --output",
        )


@contextmanager
def staged_directory(output: Path, *, force: bool = False) -> Iterator[Path]:
    """A directory beside `output` that is renamed to it on success and removed on any failure.

    With `force`, an existing `output` is replaced only at the very end. Raises OutputError when the disk is full or
    the place cannot be written.
    """
    staging = output.with_name(f".{output.name}.partial-{os.getpid()}")
    first_created = _existing_parent(output)
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(staging, ignore_errors=True)
        staging.mkdir()
        yield staging
        _publish(staging, output, force=force)
    except BaseException as error:
        shutil.rmtree(staging, ignore_errors=True)
        _remove_empty_parents(output.parent, first_created)
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise OutputError(
                f"{output}: the disk is full ({error.strerror})", hint="free some space, or choose another --output"
            ) from error
        if isinstance(error, PermissionError | FileExistsError | NotADirectoryError):
            raise OutputError(f"{output}: cannot be written ({error.strerror})") from error
        raise


def _publish(staging: Path, output: Path, *, force: bool) -> None:
    if output.exists() and not force:
        raise OutputError(f"{output} appeared while it was being written", hint="choose another --output")
    replaced = output.with_name(f".{output.name}.replaced-{os.getpid()}")
    if output.exists():
        output.rename(replaced)
    staging.rename(output)
    shutil.rmtree(replaced, ignore_errors=True)


def _remove_empty_parents(directory: Path, keep: Path) -> None:
    with suppress(OSError):
        while directory != keep and keep in directory.parents:
            directory.rmdir()
            directory = directory.parent


def _existing_parent(path: Path) -> Path:
    for parent in path.absolute().parents:
        if parent.exists():
            return parent
    return Path(path.anchor or ".")


def _assign_shards(specs: Sequence[TensorSpec], max_shard_bytes: int) -> list[list[TensorSpec]]:
    shards: list[list[TensorSpec]] = [[]]
    size = 0
    for spec in specs:
        if shards[-1] and size + spec.num_bytes > max_shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(spec)
        size += spec.num_bytes
    return [sorted(shard, key=lambda spec: -DTYPE_BYTES[spec.dtype]) for shard in shards]


def _header(shard: Sequence[TensorSpec]) -> bytes:
    """The safetensors header: its length (8 bytes, little endian), then JSON padded with spaces to 8 bytes."""
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for spec in shard:
        end = offset + spec.num_bytes
        entries[spec.name] = {"dtype": spec.dtype, "shape": list(spec.shape), "data_offsets": [offset, end]}
        offset = end
    header = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    header += b" " * (-len(header) % 8)
    return len(header).to_bytes(8, "little") + header


def _flush_to_disk(file: IO[Any]) -> None:
    file.flush()
    os.fsync(file.fileno())
