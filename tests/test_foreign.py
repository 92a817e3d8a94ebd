"""What people give in place of a checkpoint: each is recognised, and the hint says what to do."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import huggingface_hub
import pytest
from conftest import CheckpointFactory
from kvconvert.convert import Gqa, convert, inspect, open_checkpoint
from kvconvert.convert.checkpoint.foreign import wrapped_names
from kvconvert.convert.errors import CheckpointError
from safetensors.torch import load_file, save_file

MERGE = "merge the adapter (peft's merge_and_unload)"
ADAPTER = {"adapter_config.json": '{"base_model_name_or_path": "org/base"}', "adapter_model.safetensors": ""}
CONTENTS: dict[str, tuple[dict[str, str], str, str]] = {
    "lora": (ADAPTER, "holds an adapter, as of LoRA for org/base, and no model", MERGE),
    "lora with config": ({**ADAPTER, "config.json": "{}"}, "holds an adapter, as of LoRA for org/base", MERGE),
    "gguf": (
        {"model-q4_k_m.gguf": ""},
        "holds model-q4_k_m.gguf: GGUF, which is for llama.cpp",
        "that it was made from",
    ),
    "original": (
        {"consolidated.00.pth": "", "params.json": "{}"},
        "format of the publisher's own code",
        "convert_*_weights",
    ),
    "consolidated": ({"consolidated.safetensors": "", "config.json": "{}"}, "publisher's own code", "for transformers"),
    "deepspeed": (
        {"zero_to_fp32.py": "", "config.json": "{}"},
        "a checkpoint of DeepSpeed",
        "zero_to_fp32.py (safe_serialization)",
    ),
    "fsdp": ({"__0_0.distcp": ""}, "a distributed checkpoint", "save the model whole"),
    "variant": ({"config.json": "{}", "model.fp16.safetensors": ""}, "weights of a variant", "`variant`"),
    "shards of a variant": (
        {"config.json": "{}", "model.fp16-00001-of-00002.safetensors": ""},
        "weights of a variant",
        "`variant`",
    ),
    "flax": ({"config.json": "{}", "flax_model.msgpack": ""}, "weights for Flax or TensorFlow", "transformers 4"),
    "trainer": (
        {"checkpoint-500/config.json": "{}", "checkpoint-1000/config.json": "{}", "trainer_state.json": "{}"},
        "holds 2 checkpoints of a training run, and no model",
        "model/checkpoint-1000",
    ),
}


@pytest.mark.parametrize(("contents", "message", "hint"), CONTENTS.values(), ids=CONTENTS)
def test_a_directory_of_something_else(contents: dict[str, str], message: str, hint: str, tmp_path: Path) -> None:
    for name, text in contents.items():
        (tmp_path / "model" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "model" / name).write_text(text)
    with pytest.raises(CheckpointError) as raised:
        open_checkpoint(tmp_path / "model")
    assert str(raised.value).startswith(f"{tmp_path / 'model'}: ")
    assert message in str(raised.value)
    assert hint in str(raised.value.hint)


def test_a_file_of_something_else(tmp_path: Path) -> None:
    (tmp_path / "m.gguf").touch()
    with pytest.raises(CheckpointError, match=r"m\.gguf: GGUF, which is for llama\.cpp") as raised:
        open_checkpoint(tmp_path / "m.gguf")
    assert "that it was made from" in str(raised.value.hint)


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "pytorch_model.bin"])
def test_a_pointer_of_git_lfs(name: str, make_checkpoint: CheckpointFactory) -> None:
    source = make_checkpoint()
    if name == "pytorch_model.bin":
        (source / "model.safetensors").unlink()
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9976578928\n"
    (source / name).write_text(pointer)
    with pytest.raises(CheckpointError) as raised:
        open_checkpoint(source)
    assert str(raised.value) == f"{source / name}: a pointer of Git LFS ({len(pointer)} bytes), not the file itself"
    assert f"`git lfs pull` in {source}" in str(raised.value.hint)


@pytest.mark.parametrize(
    ("rename", "message"),
    [
        (lambda name: f"_orig_mod.{name}", "as torch.compile wraps a model, for example _orig_mod."),
        (lambda name: name.replace("layers.1.", "layers.1._orig_mod."), "as torch.compile wraps a model"),
        (lambda name: f"module.{name}", "as DataParallel or DeepSpeed wraps a model"),
        (lambda name: name.replace("q_proj.", "q_proj.base_layer."), "as peft wraps a model"),
        (lambda name: f"base_model.model.{name}", "as peft wraps a model"),
        (lambda name: f"_fsdp_wrapped_module.{name}", "as FSDP wraps a model"),
        (lambda name: f"pretrained_model.{name}", "as TRL wraps a model"),
    ],
)
def test_names_that_training_has_wrapped(
    rename: Callable[[str], str], message: str, make_checkpoint: CheckpointFactory
) -> None:
    source = make_checkpoint()
    tensors = load_file(source / "model.safetensors")
    save_file({rename(name): tensor for name, tensor in tensors.items()}, source / "model.safetensors")
    with pytest.raises(CheckpointError, match=message) as raised:
        inspect(source)
    assert raised.value.hint is not None


def test_usual_names_are_not_wrapped() -> None:
    assert (
        wrapped_names(["model.layers.0.self_attn.q_proj.weight", "transformer.module_norm.weight", "lora.weight"])
        is None
    )


def test_an_adapter_beside_a_whole_model_is_named(make_checkpoint: CheckpointFactory) -> None:
    source = make_checkpoint()
    (source / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA"}))
    (source / "adapter_model.safetensors").touch()
    note = f"adapter_model.safetensors in {source}: an adapter that is not merged, and no part of what is read"
    assert inspect(source).notes == (note,)


def test_a_directory_that_cannot_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: Path) -> None:
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr(Path, "iterdir", refuse)
    with pytest.raises(CheckpointError, match=r"cannot be read \(Permission denied\)"):
        open_checkpoint(tmp_path)


def test_weights_without_a_tensor(make_checkpoint: CheckpointFactory) -> None:
    source = make_checkpoint()
    save_file({}, source / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"no tensor is in model\.safetensors"):
        open_checkpoint(source)


@pytest.fixture
def snapshot(make_checkpoint: CheckpointFactory, tmp_path: Path) -> Path:
    """A checkpoint in the hub's cache."""
    repository = tmp_path / "hub" / "models--org--tiny"
    place = repository / "snapshots" / ("0" * 40)
    place.parent.mkdir(parents=True)
    make_checkpoint().rename(place)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0" * 40)
    return place


@pytest.mark.parametrize("above", [1, 2], ids=["snapshots", "repository"])
def test_a_folder_of_the_cache(above: int, snapshot: Path) -> None:
    folder = snapshot.parents[above - 1]
    with pytest.raises(CheckpointError) as raised:
        open_checkpoint(folder)
    assert str(raised.value) == f"{folder}: a folder of the hub's cache, not a checkpoint"
    assert str(raised.value.hint).startswith("give org/tiny, which comes from the cache with HF_HUB_OFFLINE=1")


def test_the_result_of_a_snapshot_does_not_lie_in_the_cache(
    snapshot: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    remarks: list[str] = []
    result = convert(snapshot, Gqa(2), remark=remarks.append)
    assert result.output == Path("tiny-gqa2")
    assert remarks == [f"{snapshot} lies in the hub's cache: the result is tiny-gqa2 in the current directory"]
    assert [path.name for path in snapshot.parent.iterdir()] == [snapshot.name]
    provenance = json.loads((tmp_path / "here" / "tiny-gqa2" / "kvconvert.json").read_text())
    assert provenance["source"] == "org/tiny"


@pytest.mark.parametrize("headers_only", [True, False])
def test_what_is_in_the_cache_is_used_where_the_hub_cannot_be_reached(
    headers_only: bool, snapshot: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*arguments: object, **named: object) -> None:
        raise ConnectionError("no route")

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(snapshot.parents[2]))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", fail)
    with open_checkpoint("org/tiny", headers_only=headers_only) as checkpoint:
        assert (checkpoint.name, checkpoint.path) == ("org/tiny", snapshot)
    with pytest.raises(CheckpointError, match=r"org/other: the hub cannot be reached \(no route\)"):
        open_checkpoint("org/other", headers_only=headers_only)
