from __future__ import annotations

import errno
import fcntl
import json
import mmap
import os
import struct
from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path

import pytest
import torch
from conftest import CheckpointFactory
from kvconvert.convert import Gqa, convert
from kvconvert.convert.checkpoint.manifest import FileDigest
from kvconvert.convert.checkpoint.opening import open_checkpoint
from kvconvert.convert.checkpoint.weights_file import WeightsFile
from kvconvert.convert.checkpoint.writer import TensorSpec, plan_shards, write_config, write_index
from kvconvert.convert.errors import CheckpointError
from safetensors.torch import load_file, save_file

TENSORS = {
    "a": torch.arange(6, dtype=torch.bfloat16).reshape(2, 3),
    "b": torch.arange(5, dtype=torch.float32),
    "c": torch.ones(3, dtype=torch.bfloat16),
}
NAMES = {torch.bfloat16: "BF16", torch.float32: "F32"}


def write(directory: Path, *, max_shard_bytes: int) -> None:
    specs = [TensorSpec(name, NAMES[t.dtype], tuple(t.shape)) for name, t in TENSORS.items()]
    shards = plan_shards(specs, max_shard_bytes=max_shard_bytes)
    for shard in shards:
        with WeightsFile(directory / shard.name) as file:
            for spec in shard.write_tensors(file):
                file.write(TENSORS[spec.name].view(torch.uint8).numpy().tobytes())
    write_index(directory, shards)


def test_one_shard_has_the_bytes_of_the_safetensors_library(tmp_path: Path) -> None:
    write(tmp_path, max_shard_bytes=10**9)
    save_file(TENSORS, tmp_path / "reference.safetensors", metadata={"format": "pt"})
    assert (tmp_path / "model.safetensors").read_bytes() == (tmp_path / "reference.safetensors").read_bytes()
    assert not (tmp_path / "model.safetensors.index.json").exists()


def test_shards_respect_the_limit_and_the_index_finds_every_tensor(tmp_path: Path) -> None:
    write(tmp_path, max_shard_bytes=26)
    files = sorted(tmp_path.glob("model-*.safetensors"))
    assert [file.name for file in files] == ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"] == {"total_parameters": 14, "total_size": 38}
    for name, file in index["weight_map"].items():
        assert torch.equal(load_file(tmp_path / file)[name], TENSORS[name])


def test_a_tensor_larger_than_the_limit_gets_a_shard_of_its_own(tmp_path: Path) -> None:
    write(tmp_path, max_shard_bytes=1)
    assert len(list(tmp_path.glob("model-*.safetensors"))) == 3


def test_a_wrong_number_of_bytes_is_noticed(tmp_path: Path) -> None:
    (shard,) = plan_shards([TensorSpec("a", "F32", (2,))], max_shard_bytes=100)
    with pytest.raises(AssertionError, match="a: 5 bytes missing"), WeightsFile(tmp_path / "model") as file:
        for _ in shard.write_tensors(file):
            file.write(b"abc")


@pytest.fixture
def source(tmp_path: Path) -> Iterator[tuple[int, mmap.mmap]]:
    """An open file of 3 MB and a bit, and its map."""
    path = tmp_path / "source"
    path.write_bytes(os.urandom(3 * 2**20 + 123))
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
        yield file.fileno(), mapped


# of the source: lying together, empty, apart, and larger than what is moved at once
RANGES = [(100, 90000), (90000, 90001), (90001, 90001), (9000, 2**21), (2**21, 2**21 + 4096), (3, 17)]
RANGES.append((0, 3 * 2**20 + 123))


def copied(path: Path, source: tuple[int, mmap.mmap], header: int) -> WeightsFile:
    """Write a header and the ranges, and check the bytes and their digest."""
    descriptor, mapped = source
    with WeightsFile(path) as file, memoryview(mapped) as view:
        file.write(b"h" * header)
        for begin, end in RANGES:
            with view[begin:end] as data:
                file.copy(descriptor, begin, data)
        file.write(b"end")
    expected = b"h" * header + b"".join(mapped[begin:end] for begin, end in RANGES) + b"end"
    assert path.read_bytes() == expected
    assert file.digest == FileDigest(path.name, len(expected), sha256(expected).hexdigest())
    return file


@pytest.mark.parametrize("refusal", [None, errno.EXDEV, errno.ENOSYS])
def test_bytes_that_are_moved_are_those_of_the_source(
    refusal: int | None, source: tuple[int, mmap.mmap], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the operating system cannot move them, they are read and written."""
    moves: list[tuple[int, ...]] = []
    move = os.copy_file_range

    def moved(one: int, other: int, *where: int) -> int:
        moves.append(where)
        if refusal is not None:
            raise OSError(refusal, os.strerror(refusal))
        return move(one, other, *where)

    monkeypatch.setattr(os, "copy_file_range", moved)
    copied(tmp_path / "model", source, 64)
    if refusal is None:
        assert (90001 - 100, 100, 64) in moves  # what lies together is moved together
    else:
        assert len(moves) == 1


@pytest.mark.parametrize("header", [100, 4096 + 100, 64])
def test_blocks_are_shared_where_the_file_system_can(
    header: int, source: tuple[int, mmap.mmap], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As FICLONERANGE does it on XFS and btrfs: whole blocks, at places that both files have in a block."""
    shared = 0

    def clone(target: int, request: int, what: bytes) -> None:
        nonlocal shared
        assert request == 0x4020940D
        descriptor, begin, count, to = struct.unpack("=qQQQ", what)
        assert begin % 4096 == count % 4096 == to % 4096 == 0
        assert os.pwrite(target, os.pread(descriptor, count, begin), to) == count
        shared += count

    monkeypatch.setattr(fcntl, "ioctl", clone)
    file = copied(tmp_path / "model", source, header)
    assert file.shared_bytes == shared
    assert (shared > 0) == (header % 4096 == 100)


def test_a_conversion_shares_what_it_does_not_change(
    make_checkpoint: CheckpointFactory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The header is as long as it has to be, so that blocks of the result are blocks of the source."""
    source = make_checkpoint(hidden_size=128, intermediate_size=512, vocab_size=2048, max_shard_size="2MB")

    def clone(target: int, request: int, what: bytes) -> None:
        descriptor, begin, count, to = struct.unpack("=qQQQ", what)
        os.pwrite(target, os.pread(descriptor, count, begin), to)

    plain = convert(source, Gqa(2), tmp_path / "plain", max_shard_bytes=2_000_000)
    monkeypatch.setattr(fcntl, "ioctl", clone)
    shared = convert(source, Gqa(2), tmp_path / "shared", max_shard_bytes=2_000_000)
    assert plain.shared_bytes == 0
    assert 0.9 < shared.shared_bytes / shared.plan.bytes_out < 1
    assert {path.name: path.read_bytes() for path in shared.output.iterdir()} == {
        path.name: path.read_bytes() for path in plain.output.iterdir()
    }


def test_a_source_that_becomes_shorter_is_named_and_not_waited_for(tmp_path: Path) -> None:
    with (tmp_path / "source").open("w+b") as source:
        source.write(b"short")
        source.flush()
        with pytest.raises(CheckpointError, match="source became shorter"), WeightsFile(tmp_path / "model") as file:
            file.copy(source.fileno(), 0, memoryview(b"short and more"))


def test_written_shards_open_as_a_checkpoint(tmp_path: Path) -> None:
    write(tmp_path, max_shard_bytes=26)
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with open_checkpoint(tmp_path) as checkpoint:
        assert {name: checkpoint.read(name).tolist() for name in checkpoint.tensors} == {
            name: tensor.tolist() for name, tensor in TENSORS.items()
        }


def test_a_config_that_says_the_same_stays_byte_for_byte(tmp_path: Path) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    source.mkdir()
    target.mkdir()
    (source / "config.json").write_text('{"b":1,  "a":2}')
    write_config({"a": 2, "b": 1}, target, source=source)
    assert (target / "config.json").read_text() == '{"b":1,  "a":2}'
    write_config({"a": 3, "b": 1}, target, source=source)
    assert (target / "config.json").read_text() == '{\n  "a": 3,\n  "b": 1\n}\n'
