"""Writing safetensors files tensor by tensor, so that none of them has to be in memory."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from .output import write_text
from .tensors import CONFIG_NAME, DTYPE_BYTES, INDEX_NAME, WEIGHTS_NAME

__all__ = ["CheckpointWriter", "TensorSpec", "write_config", "write_safetensors"]


@dataclass(frozen=True)
class TensorSpec:
    """The name, dtype (by safetensors' name) and shape of a tensor that is to be written."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        """The size of the tensor in bytes."""
        count = DTYPE_BYTES[self.dtype]
        for size in self.shape:
            count *= size
        return count


class CheckpointWriter:
    """Writes the weights and their index of a checkpoint into a directory, one tensor after the other.

    Shards are filled in the order of `specs` up to `max_shard_bytes`; a larger tensor gets a shard of its own. Within a
    shard wider dtypes come first, as the safetensors library writes them, so that every tensor is aligned.
    """

    def __init__(self, directory: Path, specs: Sequence[TensorSpec], *, max_shard_bytes: int) -> None:
        self.directory = directory
        self._shards = _assign_shards(specs, max_shard_bytes)
        self._total_bytes = sum(spec.num_bytes for spec in specs)
        self._total_parameters = sum(spec.num_bytes // DTYPE_BYTES[spec.dtype] for spec in specs)

    def shard_name(self, index: int) -> str:
        """Return the file name of a shard: model.safetensors where there is only one."""
        count = len(self._shards)
        return WEIGHTS_NAME if count == 1 else f"model-{index + 1:05d}-of-{count:05d}.safetensors"

    def write_tensors(self) -> Iterator[tuple[TensorSpec, IO[bytes]]]:
        """Yield each spec with the file that the caller appends the tensor's bytes to; the index is written last."""
        for index, shard in enumerate(self._shards):
            yield from write_safetensors(self.directory / self.shard_name(index), shard, {"format": "pt"})
        if len(self._shards) > 1:
            weight_map = {
                spec.name: self.shard_name(index) for index, shard in enumerate(self._shards) for spec in shard
            }
            metadata = {"total_parameters": self._total_parameters, "total_size": self._total_bytes}
            index_json = {"metadata": metadata, "weight_map": dict(sorted(weight_map.items()))}
            write_text(self.directory / INDEX_NAME, json.dumps(index_json, indent=2) + "\n")


def write_config(config: Mapping[str, Any], directory: Path, *, source: Path) -> None:
    """Write config.json into a directory, byte for byte that of the directory `source` where it says the same."""
    original = source / CONFIG_NAME
    if json.loads(original.read_bytes()) == config:
        shutil.copyfile(original, directory / CONFIG_NAME)
    else:
        write_text(directory / CONFIG_NAME, json.dumps(dict(config), indent=2, ensure_ascii=False) + "\n")


def write_safetensors(
    path: Path, specs: Sequence[TensorSpec], metadata: Mapping[str, str]
) -> Iterator[tuple[TensorSpec, IO[bytes]]]:
    """Write one safetensors file: yield each spec, in order, with the file that its bytes are appended to.

    Raises AssertionError where the caller appends another number of bytes than the spec says.
    """
    with path.open("wb") as file:
        file.write(_header(specs, metadata))
        for spec in specs:
            expected = file.tell() + spec.num_bytes
            yield spec, file
            if file.tell() != expected:
                raise AssertionError(f"{spec.name}: {expected - file.tell()} bytes missing in {path.name}")
        file.flush()
        os.fsync(file.fileno())


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


def _header(shard: Sequence[TensorSpec], metadata: Mapping[str, str]) -> bytes:
    """The safetensors header: its length (8 bytes, little endian), then JSON padded with spaces to 8 bytes."""
    entries: dict[str, Any] = {"__metadata__": dict(metadata)}
    offset = 0
    for spec in shard:
        end = offset + spec.num_bytes
        entries[spec.name] = {"dtype": spec.dtype, "shape": list(spec.shape), "data_offsets": [offset, end]}
        offset = end
    header = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    header += b" " * (-len(header) % 8)
    return len(header).to_bytes(8, "little") + header
