"""Writing safetensors files tensor by tensor, so that none of them has to be in memory."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from .files import replaced_file, write_text
from .tensors import CONFIG_NAME, DTYPE_BYTES, INDEX_NAME, WEIGHTS_NAME
from .weights_file import BLOCK_BYTES, WeightsFile

__all__ = ["Shard", "TensorSpec", "plan_shards", "write_config", "write_index", "write_safetensors"]


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


@dataclass(frozen=True)
class Shard:
    """One file of weights: its name, and the tensors in it, in order.

    Wider dtypes come first, as the safetensors library writes them, so that every tensor is aligned.
    """

    name: str
    specs: tuple[TensorSpec, ...]

    def write_tensors(self, file: IO[bytes] | WeightsFile, *, data_begin: int = 0) -> Iterator[TensorSpec]:
        """Write the file as `write_safetensors` does: yield each spec whose bytes the caller then appends."""
        return write_safetensors(file, self.specs, {"format": "pt"}, data_begin=data_begin)


def plan_shards(specs: Sequence[TensorSpec], *, max_shard_bytes: int) -> tuple[Shard, ...]:
    """Share out tensors, in order, among files of up to `max_shard_bytes`; a larger tensor gets one of its own."""
    groups: list[list[TensorSpec]] = [[]]
    size = 0
    for spec in specs:
        if groups[-1] and size + spec.num_bytes > max_shard_bytes:
            groups.append([])
            size = 0
        groups[-1].append(spec)
        size += spec.num_bytes
    names = [f"model-{index + 1:05d}-of-{len(groups):05d}.safetensors" for index in range(len(groups))]
    return tuple(
        Shard(
            name if len(groups) > 1 else WEIGHTS_NAME, tuple(sorted(group, key=lambda spec: -DTYPE_BYTES[spec.dtype]))
        )
        for name, group in zip(names, groups, strict=True)
    )


def write_index(directory: Path, shards: Sequence[Shard]) -> None:
    """Write the index of the weights into their directory, if there is more than one file of them."""
    if len(shards) == 1:
        return
    specs = [spec for shard in shards for spec in shard.specs]
    metadata = {
        "total_parameters": sum(spec.num_bytes // DTYPE_BYTES[spec.dtype] for spec in specs),
        "total_size": sum(spec.num_bytes for spec in specs),
    }
    weight_map = {spec.name: shard.name for shard in shards for spec in shard.specs}
    index = {"metadata": metadata, "weight_map": dict(sorted(weight_map.items()))}
    write_text(directory / INDEX_NAME, json.dumps(index, indent=2) + "\n")


def write_config(config: Mapping[str, Any], directory: Path, *, source: Path) -> None:
    """Write config.json into a directory, byte for byte that of the directory `source` where it says the same."""
    original = source / CONFIG_NAME
    if json.loads(original.read_bytes()) == config:
        with replaced_file(directory / CONFIG_NAME) as file:
            file.write(original.read_bytes())
    else:
        write_text(directory / CONFIG_NAME, json.dumps(dict(config), indent=2, ensure_ascii=False) + "\n")


def write_safetensors(
    file: IO[bytes] | WeightsFile, specs: Sequence[TensorSpec], metadata: Mapping[str, str], *, data_begin: int = 0
) -> Iterator[TensorSpec]:
    """Write a safetensors file from its beginning: yield each spec, in order, whose bytes the caller then appends.

    With `data_begin`, tensors begin at that position or whole blocks of 4096 bytes after it, so that blocks of another
    file may be blocks of this one; it has to be a multiple of 8. Raises AssertionError where the caller appends another
    number of bytes than the spec says.
    """
    file.write(_header(specs, metadata, data_begin))
    for spec in specs:
        expected = file.tell() + spec.num_bytes
        yield spec
        if file.tell() != expected:
            raise AssertionError(f"{spec.name}: {expected - file.tell()} bytes missing")


def _header(shard: Sequence[TensorSpec], metadata: Mapping[str, str], data_begin: int) -> bytes:
    """The safetensors header: its length (8 bytes, little endian), then JSON padded with spaces."""
    entries: dict[str, Any] = {"__metadata__": dict(metadata)}
    offset = 0
    for spec in shard:
        end = offset + spec.num_bytes
        entries[spec.name] = {"dtype": spec.dtype, "shape": list(spec.shape), "data_offsets": [offset, end]}
        offset = end
    header = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    header += b" " * ((data_begin - 8 - len(header)) % (BLOCK_BYTES if data_begin else 8))
    return len(header).to_bytes(8, "little") + header
