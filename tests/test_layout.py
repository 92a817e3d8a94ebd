"""Which files are the weights: what transformers would open, and nothing else, is what is read."""

from __future__ import annotations

import json
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import CheckpointFactory, load, weights
from kvconvert.convert import Gqa, convert, inspect, open_checkpoint
from kvconvert.convert.checkpoint.layout import Listing, choose_weights, goes_with_weights, read_config
from kvconvert.convert.errors import CheckpointError
from safetensors.torch import load_file, save_file
from transformers.modeling_utils import _get_resolved_checkpoint_files

SHARDS = {
    "model.safetensors.index.json": ["model-00002-of-00002.safetensors", "model-00001-of-00002.safetensors"],
    "pytorch_model.bin.index.json": ["pytorch_model-00001-of-00001.bin"],
    "other.safetensors.index.json": ["sub/a.safetensors"],
}
USUAL = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
SETS = [names for size in range(1, 5) for names in combinations(USUAL, size)]


def listing(directory: Path) -> Listing:
    names = frozenset(path.name for path in directory.iterdir() if path.is_file())
    return Listing(
        str(directory),
        names,
        lambda name: (directory / name).is_file(),
        lambda name: dict(json.loads((directory / name).read_text())),
    )


def write(directory: Path, names: tuple[str, ...]) -> None:
    (directory / "sub").mkdir()
    for name in names:
        shards = SHARDS.get(name)
        text = json.dumps({"metadata": {}, "weight_map": {file: file for file in shards}}) if shards else ""
        (directory / name).write_text(text)
        for shard in shards or ():
            (directory / shard).touch()


@pytest.mark.parametrize("names", SETS, ids=lambda names: "+".join(names))
@pytest.mark.parametrize("named", [None, "consolidated.safetensors", "other.safetensors.index.json"])
def test_the_same_files_as_transformers(names: tuple[str, ...], named: str | None, tmp_path: Path) -> None:
    write(tmp_path, (*names, "consolidated.safetensors", "other.safetensors.index.json"))
    config = {} if named is None else {"transformers_weights": named}
    chosen = choose_weights(listing(tmp_path), config)
    assert chosen is not None
    files, _ = _get_resolved_checkpoint_files(
        tmp_path, None, None, None, None, is_remote_code=False, transformers_explicit_filename=named
    )
    assert files is not None
    assert [str(tmp_path / name) for name in chosen.files] == files
    assert len(chosen.unread) == len(names) - (named is None)


def test_an_index_of_the_file_itself_is_no_other_set(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").touch()
    index = {"weight_map": {"a": "model.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    chosen = choose_weights(listing(tmp_path), {})
    assert chosen is not None
    assert (chosen.files, chosen.unread) == (("model.safetensors",), ())


@pytest.mark.parametrize(
    ("named", "message"),
    [
        ("absent.safetensors", "and there is no such file"),
        ("pytorch_model.bin", "which is no safetensors file and no index"),
        (3, "which is no safetensors file and no index"),
        ("../model.safetensors", "which is not in that directory"),
    ],
)
def test_weights_that_config_names_and_transformers_would_not_take(named: object, message: str, tmp_path: Path) -> None:
    write(tmp_path, USUAL)
    with pytest.raises(CheckpointError, match=rf"config.json has transformers_weights = .*{message}"):
        choose_weights(listing(tmp_path), {"transformers_weights": named})


def test_a_distributed_checkpoint_is_refused(tmp_path: Path) -> None:
    write(tmp_path, ("model.safetensors", "shard-00000-model-00001-of-00002.safetensors"))
    with pytest.raises(CheckpointError, match="is part of a distributed checkpoint, which transformers opens first"):
        choose_weights(listing(tmp_path), {})


def test_a_config_that_names_another_for_this_version(tmp_path: Path) -> None:
    versions = ["config.4.0.0.json", "config.999.0.0.json"]
    (tmp_path / "config.json").write_text(json.dumps({"a": 1, "configuration_files": versions}))
    with pytest.raises(CheckpointError, match=r"config\.4\.0\.0\.json is missing"):
        read_config(listing(tmp_path))
    (tmp_path / "config.4.0.0.json").write_text(json.dumps({"a": 2}))
    assert read_config(listing(tmp_path)) == {"a": 2}
    (tmp_path / "config.json").write_text(json.dumps({"a": 1, "configuration_files": versions[1:]}))
    assert read_config(listing(tmp_path)) == {"a": 1}


def heads(directory: Path) -> torch.Tensor:
    tensor: torch.Tensor = load(directory).model.layers[0].self_attn.k_proj.weight.detach()
    return tensor


def test_what_transformers_opens_is_converted(make_checkpoint: CheckpointFactory, tmp_path: Path) -> None:
    """A later model.safetensors beside the index and shards of an earlier save."""
    source = make_checkpoint(max_shard_size="60KB")
    other = make_checkpoint(name="other", seed=1)
    (other / "model.safetensors").rename(source / "model.safetensors")
    remarks: list[str] = []
    convert(source, Gqa(4), tmp_path / "out", remark=remarks.append)
    pooled = heads(source).unflatten(0, (4, 2, -1)).mean(1).flatten(0, 1)
    assert torch.equal(heads(tmp_path / "out"), pooled)
    note = f"model.safetensors.index.json in {source}: not read, since transformers opens model.safetensors"
    assert remarks == [note]
    assert inspect(source).notes == (note,)


def test_the_weights_that_config_names_are_converted(make_checkpoint: CheckpointFactory, tmp_path: Path) -> None:
    source = make_checkpoint()
    other = make_checkpoint(name="other", seed=1)
    (source / "sub").mkdir()
    (other / "model.safetensors").rename(source / "sub" / "ours.safetensors")
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | {"transformers_weights": "sub/ours.safetensors"}))
    convert(source, Gqa(8, allow_same=True), tmp_path / "out")
    assert torch.equal(heads(tmp_path / "out"), heads(source))
    assert not torch.equal(heads(tmp_path / "out"), load_file(source / "model.safetensors")[KEYS])
    assert "transformers_weights" not in json.loads((tmp_path / "out" / "config.json").read_text())


KEYS = "model.layers.0.self_attn.k_proj.weight"


def edit_index(source: Path, **entries: str) -> None:
    path = source / "model.safetensors.index.json"
    index: dict[str, Any] = json.loads(path.read_text())
    index["weight_map"] |= {name.replace("__", "."): file for name, file in entries.items()}
    path.write_text(json.dumps(index))


def test_an_index_that_names_a_tied_head_which_no_shard_holds(
    make_checkpoint: CheckpointFactory, tmp_path: Path
) -> None:
    source = make_checkpoint(max_shard_size="60KB", tie_word_embeddings=True)
    before = convert(source, Gqa(2), tmp_path / "before")
    edit_index(source, lm_head__weight=min(path.name for path in source.glob("*.safetensors")))
    load(source)
    after = convert(source, Gqa(2), tmp_path / "after")
    assert weights(before.output).keys() == weights(after.output).keys()
    assert all(torch.equal(weights(before.output)[name], tensor) for name, tensor in weights(after.output).items())


def test_an_index_that_names_the_wrong_shard(make_checkpoint: CheckpointFactory) -> None:
    """transformers reads every shard whole, and so does kvconvert, with a note."""
    source = make_checkpoint(max_shard_size="60KB")
    with open_checkpoint(source) as checkpoint:
        expected = checkpoint.read(KEYS)
        right = checkpoint.tensors[KEYS].file
    wrong = next(path.name for path in sorted(source.glob("*.safetensors")) if path.name != right)
    edit_index(source, **{KEYS.replace(".", "__"): wrong})
    with open_checkpoint(source) as checkpoint:
        assert torch.equal(checkpoint.read(KEYS), expected)
        assert checkpoint.notes == (
            f"model.safetensors.index.json says that {KEYS} is in {wrong}; it is read from {right}",
        )


def test_a_tensor_in_two_shards(make_checkpoint: CheckpointFactory) -> None:
    source = make_checkpoint(max_shard_size="60KB")
    first, second, *_ = sorted(source.glob("*.safetensors"))
    tensors = load_file(first)
    name = sorted(tensors)[0]
    save_file(load_file(second) | {name: tensors[name]}, second)
    with pytest.raises(CheckpointError, match=f"{name} is in both {first.name} and {second.name}"):
        open_checkpoint(source)


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        ("tokenizer.model", True),
        ("additional_chat_templates/tool_use.jinja", True),
        ("2_Dense/model.safetensors", True),
        ("2_Dense/pytorch_model.bin", True),
        ("1_Pooling/config.json", True),
        ("consolidated.safetensors", False),
        ("pytorch_model.bin", False),
        ("original/params.json", False),
        ("onnx/config.json", False),
        ("model-q4.gguf", False),
        ("optimizer.pt", False),
    ],
)
def test_what_is_downloaded_beside_the_weights(name: str, wanted: bool) -> None:
    assert goes_with_weights(name) is wanted
