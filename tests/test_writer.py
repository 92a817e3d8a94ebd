from __future__ import annotations

import errno
import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from kvconvert.convert.checkpoint.opening import open_checkpoint
from kvconvert.convert.checkpoint.output import (
    check_free_space,
    check_output,
    disk_errors,
    staged_directory,
    write_text,
)
from kvconvert.convert.checkpoint.writer import CheckpointWriter, TensorSpec, write_config
from kvconvert.convert.errors import CheckpointError, InputError, KvConvertError, OutputError
from safetensors.torch import load_file, save_file

TENSORS = {
    "a": torch.arange(6, dtype=torch.bfloat16).reshape(2, 3),
    "b": torch.arange(5, dtype=torch.float32),
    "c": torch.ones(3, dtype=torch.bfloat16),
}
NAMES = {torch.bfloat16: "BF16", torch.float32: "F32"}


def write(directory: Path, *, max_shard_bytes: int) -> CheckpointWriter:
    specs = [TensorSpec(name, NAMES[t.dtype], tuple(t.shape)) for name, t in TENSORS.items()]
    writer = CheckpointWriter(directory, specs, max_shard_bytes=max_shard_bytes)
    for spec, file in writer.write_tensors():
        file.write(TENSORS[spec.name].view(torch.uint8).numpy().tobytes())
    return writer


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
    writer = CheckpointWriter(tmp_path, [TensorSpec("a", "F32", (2,))], max_shard_bytes=100)
    with pytest.raises(AssertionError, match="a: 5 bytes missing"):
        for _, file in writer.write_tensors():
            file.write(b"abc")


def test_output_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    output = tmp_path / "deep" / "out"
    with pytest.raises(RuntimeError, match="boom"), staged_directory(output) as staging:
        (staging / "file").write_text("half")
        raise RuntimeError("boom")
    assert list(tmp_path.iterdir()) == []
    with staged_directory(output) as staging:
        (staging / "file").write_text("whole")
        assert not output.exists()
    assert (output / "file").read_text() == "whole"
    assert [path.name for path in output.parent.iterdir()] == ["out"]


def test_force_replaces_at_the_end_only(tmp_path: Path) -> None:
    output = tmp_path / "out"
    output.mkdir()
    (output / "old").touch()
    with pytest.raises(RuntimeError), staged_directory(output, force=True):
        raise RuntimeError
    assert (output / "old").exists()
    with staged_directory(output, force=True) as staging:
        (staging / "new").touch()
    assert [path.name for path in output.iterdir()] == ["new"]


def test_places_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "exists").mkdir()
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to(tmp_path / "exists")
    with pytest.raises(OutputError, match="exists already exists") as raised:
        check_output(tmp_path / "exists", force=False)
    assert raised.value.hint == "choose another output, or let it be replaced"
    assert raised.value.settings == ("output", "force")
    with pytest.raises(OutputError, match="is a file, not a directory"):
        check_output(tmp_path / "file", force=True)
    with pytest.raises(OutputError, match="is a symbolic link"):
        check_output(tmp_path / "link", force=True)
    with pytest.raises(OutputError, match="is not a writable directory"):
        check_output(tmp_path / "file" / "below", force=False)
    check_output(tmp_path / "new" / "deeper", force=False)


def test_force_spares_what_is_read_and_what_is_not_ours(tmp_path: Path) -> None:
    model = tmp_path / "models" / "model"
    model.mkdir(parents=True)
    for output, what in ((model, "is"), (model.parent, "holds")):
        with pytest.raises(OutputError, match=f"{output} {what} {model}, which is read"):
            check_output(output, force=True, inputs=[model])
    check_output(model, force=True)  # empty
    (model / "precious").touch()
    with pytest.raises(OutputError, match="was not written by kvconvert"):
        check_output(model, force=True)
    (model / "kvconvert.json").touch()
    check_output(model, force=True)


def test_a_relative_output_that_fails_leaves_no_parents(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(RuntimeError), staged_directory(Path("new/deep/out")):
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []


def test_a_text_is_replaced_whole(tmp_path: Path) -> None:
    write_text(tmp_path / "a.json", "one")
    write_text(tmp_path / "a.json", "two")
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"a.json": "two"}


def test_too_little_space_is_seen_before_writing(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match=r"needs 1000000\.\d\d GB, but its disk has \d+\.\d\d GB free"):
        check_free_space(tmp_path / "out", 10**15)


def test_a_disk_that_fills_up_leaves_nothing(tmp_path: Path) -> None:
    """RLIMIT_FSIZE makes the operating system refuse the write, as a full disk does."""
    program = f"""
import resource, signal
from pathlib import Path
from kvconvert.convert.checkpoint.output import staged_directory
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
with staged_directory(Path({str(tmp_path / "out")!r})) as staging, (staging / "big").open("wb") as file:
    file.write(bytes(5000))
"""
    outcome = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert "OutputError" in outcome.stderr
    assert "the disk is full" in outcome.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (
            lambda place: OSError(errno.ENOSPC, "No space left on device", f"{place}/a"),
            "{}: the disk is full (No space ",
        ),
        (lambda place: RuntimeError(f"{place}/a: PytorchStreamWriter failed"), "{0}: the disk is full ({0}/a: Pytorch"),
        (lambda place: PermissionError(13, "Permission denied", f"{place}/a"), "{}: cannot be written (Permission den"),
        (lambda place: CheckpointError(f"{place}: LlamaModel does not accept"), "{}: LlamaModel does not accept"),
    ],
)
def test_errors_name_the_output_and_not_where_it_is_made(
    make: Callable[[Path], Exception], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for output in (Path("out"), tmp_path / "out"):
        with pytest.raises(KvConvertError) as raised, staged_directory(output) as staging:
            raise make(staging)
        assert str(raised.value).startswith(said.format(output))
        assert "partial" not in str(raised.value)


@pytest.mark.parametrize("error", [PermissionError(13, "Permission denied"), NotADirectoryError(20, "Not a directory")])
def test_a_file_that_is_read_is_not_taken_for_the_output(error: OSError, tmp_path: Path) -> None:
    """The source lies beside the output; only what belongs to the output is blamed on it."""
    output, shard = tmp_path / "model-gqa2", tmp_path / "model" / "model-00001-of-00002.safetensors"
    said = f"{shard}: cannot be opened ({error.strerror})"
    with pytest.raises(InputError, match=re.escape(said)) as raised, staged_directory(output):
        raise type(error)(error.errno, error.strerror, str(shard))
    assert not isinstance(raised.value, OutputError)
    assert raised.value.hint == "check the file and its permissions"
    assert list(tmp_path.iterdir()) == []


def test_a_place_that_cannot_be_written_is_the_outputs(tmp_path: Path) -> None:
    output = tmp_path / "deep" / "out"
    for place in (output, output / "config.json", output.parent, output.with_name(".out.partial-7") / "model", None):
        with pytest.raises(OutputError, match=re.escape(f"{output}: cannot be written (")), disk_errors(output):
            raise PermissionError(13, "Permission denied", *([str(place)] if place else []))


def test_a_source_that_may_not_be_read_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As open() says it to people who are not root."""
    source = tmp_path / "model"
    source.mkdir()
    (source / "config.json").touch()
    opened = Path.open

    def refuse(path: Path, *arguments: Any, **options: Any) -> Any:
        if path.parent == source:
            raise PermissionError(13, "Permission denied", str(path))
        return opened(path, *arguments, **options)

    monkeypatch.setattr(Path, "open", refuse)
    with (
        pytest.raises(InputError, match=re.escape(f"{source / 'config.json'}: cannot be opened (Permission denied)")),
        staged_directory(tmp_path / "out") as staging,
        (source / "config.json").open("rb") as file,
    ):
        (staging / "config.json").write_bytes(file.read())


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
