"""Files that others made: pipes, devices and links in the place of a checkpoint's files."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import CheckpointFactory
from kvconvert.convert import Gqa, convert, open_checkpoint
from kvconvert.convert.checkpoint.companions import find_companions
from kvconvert.convert.checkpoint.input_files import NotRegularError, is_file, leads_outside, open_regular
from kvconvert.convert.checkpoint.tokenizer import open_tokenizer
from kvconvert.convert.errors import CheckpointError, DataError

OUTSIDE = "a link that leads out of the checkpoint"


def make_socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(path))


KINDS: dict[str, Callable[[Path], object]] = {
    "a named pipe": os.mkfifo,
    "a device": lambda path: path.symlink_to("/dev/zero"),
    "a directory": Path.mkdir,
    "a socket": make_socket,
}


@pytest.mark.parametrize("kind", KINDS)
def test_only_regular_files_are_opened(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # the name of a socket is short
    KINDS[kind](Path("x"))
    with pytest.raises(NotRegularError, match=f"{kind}, not a regular file"):
        open_regular(Path("x"))
    assert not is_file(Path("x"))


def test_a_regular_file_is_opened(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"abc")
    (tmp_path / "b").symlink_to("a")
    with open_regular(tmp_path / "b") as file:
        assert file.read() == b"abc"
    assert is_file(tmp_path / "b")


@pytest.mark.parametrize("name", ["a" * 300, "a/" * 3000, "a\0b", ""])
def test_names_that_no_file_has(name: str, tmp_path: Path) -> None:
    assert not is_file(tmp_path / name)
    with pytest.raises(OSError, match=r".+"):
        open_regular(tmp_path / name)


def test_where_links_lead(tmp_path: Path) -> None:
    model, blobs = tmp_path / "model", tmp_path / "hub/models--org--name/blobs"
    for folder in (model / "sub", blobs):
        folder.mkdir(parents=True)
    (blobs / "0123").touch()
    (tmp_path / "secret").touch()
    (model / "a").touch()
    for name, target in {"in": "a", "out": "../secret", "cache": str(blobs / "0123"), "up": ".."}.items():
        (model / name).symlink_to(target)
    (tmp_path / "linked").symlink_to(model)
    for directory in (model, tmp_path / "linked"):
        assert [leads_outside(directory / name, directory) for name in ("a", "in", "cache", "sub")] == [None] * 4
        assert leads_outside(directory / "out", directory) == tmp_path / "secret"
        assert leads_outside(directory / "up" / "secret", directory) == tmp_path / "secret"


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json", "generation_config.json"])
def test_a_file_of_the_model_that_is_a_link_to_elsewhere(
    name: str, make_checkpoint: CheckpointFactory, tmp_path: Path
) -> None:
    source = make_checkpoint(with_tokenizer=True)
    (source / name).rename(tmp_path / "elsewhere")
    (source / name).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(CheckpointError, match=f"{name}: a link to {tmp_path / 'elsewhere'}, outside of the checkpoint"):
        open_checkpoint(source)


def test_a_directory_that_is_a_link_and_links_within_it(make_checkpoint: CheckpointFactory, tmp_path: Path) -> None:
    source = make_checkpoint()
    (source / "model.safetensors").rename(source / "blob")
    (source / "model.safetensors").symlink_to("blob")
    (tmp_path / "link").symlink_to(source)
    assert convert(tmp_path / "link", Gqa(2), tmp_path / "out").output == tmp_path / "out"


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json", "generation_config.json"])
def test_a_named_pipe_in_the_place_of_a_file(name: str, make_checkpoint: CheckpointFactory) -> None:
    source = make_checkpoint(with_tokenizer=True)
    (source / name).unlink()
    os.mkfifo(source / name)
    with pytest.raises(CheckpointError, match=f"{name}: cannot be read \\(a named pipe, not a regular file\\)"):
        open_checkpoint(source)


def test_a_tokenizer_is_not_waited_for(make_checkpoint: CheckpointFactory) -> None:
    source = make_checkpoint(with_tokenizer=True)
    (source / "tokenizer_config.json").unlink()
    os.mkfifo(source / "tokenizer_config.json")
    with pytest.raises(DataError, match=r"tokenizer_config\.json: a named pipe, not a regular file"):
        open_tokenizer(source)


@pytest.mark.parametrize("place", ["vocab", "added_tokens"])
def test_a_token_id_that_would_take_all_memory(place: str, make_checkpoint: CheckpointFactory) -> None:
    """The tokenizers library makes a list of 2 147 483 649 tokens, 8 GB, for one."""
    path = make_checkpoint(with_tokenizer=True) / "tokenizer.json"
    content = json.loads(path.read_text())
    if place == "vocab":
        content["model"]["vocab"]["x"] = 2**31
    else:
        content["added_tokens"][0]["id"] = 2**31
    path.write_text(json.dumps(content))
    with pytest.raises(DataError, match=r"tokenizer\.json: has the token id 2147483648, expected at most 16777216"):
        open_tokenizer(path.parent)


def test_nothing_from_elsewhere_comes_into_a_result(make_checkpoint: CheckpointFactory, tmp_path: Path) -> None:
    source = make_checkpoint()
    (tmp_path / "token").write_text("hf_secret")
    (source / "LICENSE").symlink_to(tmp_path / "token")
    (source / "NOTICE").symlink_to("/proc/self/environ")
    (source / "additional_chat_templates").mkdir()
    (source / "additional_chat_templates/a.jinja").symlink_to(tmp_path / "token")
    (source / "custom_generate").symlink_to(tmp_path)
    (source / "1_Pooling").mkdir()
    (source / "1_Pooling/loop").symlink_to("..")
    modules = [{"path": "1_Pooling", "type": "sentence_transformers.models.Pooling"}]
    (source / "modules.json").write_text(json.dumps(modules))
    (source / "USE_POLICY.md").write_text("kept")
    result = convert(source, Gqa(2), tmp_path / "out")
    assert result.left_behind == {
        "LICENSE": OUTSIDE,
        "NOTICE": OUTSIDE,
        "additional_chat_templates/": f"holds a.jinja, {OUTSIDE}",
        "custom_generate/": OUTSIDE,
        "1_Pooling/": "holds loop, a link to a directory",
    }
    assert (result.output / "USE_POLICY.md").read_text() == "kept"
    assert not any("hf_secret" in path.read_text(errors="replace") for path in result.output.iterdir())


@pytest.mark.parametrize(
    ("named", "shown"),
    [("../x.safetensors", "'../x.safetensors'"), ("/etc/passwd", "'/etc/passwd'"), (3, "3"), ([], r"\[\]"), ("", "''")],
)
@pytest.mark.parametrize("index", ["model.safetensors.index.json", "pytorch_model.bin.index.json"])
def test_an_index_names_files_of_its_directory(
    named: object, shown: str, index: str, make_checkpoint: CheckpointFactory
) -> None:
    source = make_checkpoint()
    (source / "model.safetensors").unlink()
    (source / index).write_text(json.dumps({"weight_map": {"a": named}}))
    with pytest.raises(CheckpointError, match=f"weight_map has 'a' in {shown}, expected the name of a file"):
        open_checkpoint(source)


@pytest.mark.parametrize(
    ("weight_map", "shown"), [(3, r" \(3\)"), (["a"], r" \(\['a'\]\)"), (None, "$"), ({}, r" \({}\)")]
)
def test_an_index_without_a_map(weight_map: object, shown: str, make_checkpoint: CheckpointFactory) -> None:
    source = make_checkpoint()
    (source / "model.safetensors").rename(source / "other.safetensors")
    (source / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(CheckpointError, match=f"weight_map is missing or empty{shown}"):
        open_checkpoint(source)


def test_a_file_that_is_called_too_long_is_missing(make_checkpoint: CheckpointFactory) -> None:
    source = make_checkpoint()
    (source / "model.safetensors").unlink()
    (source / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "a" * 5000}}))
    with pytest.raises(CheckpointError, match=r"shard a+ is missing"):
        open_checkpoint(source)
    with pytest.raises(CheckpointError, match="no such directory"):
        open_checkpoint("/" + "a" * 5000)


def test_companions_that_are_read_are_text_of_any_kind(make_checkpoint: CheckpointFactory) -> None:
    """White space that a pattern could search for ever, bytes that are no UTF-8, JSON that is none."""
    source = make_checkpoint()
    (source / "a.yaml").write_bytes(b"\n" * 2**19 + b"\xff")
    (source / "modeling_a.py").write_bytes(b"\xff" + b"\n" * 2**19)
    (source / "b.json").write_bytes(b"[" * 10**5)
    with open_checkpoint(source) as checkpoint:
        companions = find_companions(checkpoint)
    assert set(companions.copied) == {"a.yaml", "b.json", "generation_config.json"}
