"""Checkpoints as older tools wrote them: pickles, configs of transformers 4, base classes."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import pytest
import torch
from conftest import VOCAB_SIZE, CheckpointFactory, Command, RunHere, build_model, tie_heads
from kvconvert.convert import Gqa, execute, open_checkpoint
from kvconvert.convert.architectures.source import Source
from kvconvert.convert.checkpoint.loading import load_model
from kvconvert.convert.describe.inspection import inspect_checkpoint
from kvconvert.convert.errors import CheckpointError
from safetensors.torch import load_file
from transformers import AutoModel


def convert(source: Path, output: Path) -> Path:
    with open_checkpoint(source) as checkpoint:
        execute(Gqa(2).plan(Source.of(checkpoint)), checkpoint, output)
    return output


def to_pickles(directory: Path, *, shards: int) -> None:
    """Rewrite the weights as `pytorch_model.bin`, or as shards of it with an index."""
    weights = load_file(directory / "model.safetensors")
    (directory / "model.safetensors").unlink()
    if shards == 1:
        torch.save(weights, directory / "pytorch_model.bin")
        return
    names = list(weights)
    weight_map: dict[str, str] = {}
    for shard in range(shards):
        file = f"pytorch_model-{shard + 1:05d}-of-{shards:05d}.bin"
        torch.save({name: weights[name] for name in names[shard::shards]}, directory / file)
        weight_map |= dict.fromkeys(names[shard::shards], file)
    index = {"metadata": {}, "weight_map": weight_map}
    (directory / "pytorch_model.bin.index.json").write_text(json.dumps(index))


@pytest.mark.parametrize("shards", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_pickled_weights_convert_to_the_same_tensors(
    shards: int, dtype: torch.dtype, make_checkpoint: CheckpointFactory, tmp_path: Path
) -> None:
    expected = load_file(convert(make_checkpoint(name="safe", dtype=dtype), tmp_path / "a") / "model.safetensors")
    source = make_checkpoint(name="pickled", dtype=dtype)
    to_pickles(source, shards=shards)
    output = convert(source, tmp_path / "b")
    assert not list(output.glob("*.bin*"))
    found = load_file(output / "model.safetensors")
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_pickles_of_torch_before_1_6(make_checkpoint: CheckpointFactory, tmp_path: Path) -> None:
    source = make_checkpoint()
    expected = load_file(convert(source, tmp_path / "a") / "model.safetensors")
    weights = load_file(source / "model.safetensors")
    (source / "model.safetensors").unlink()
    torch.save(weights, source / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    found = load_file(convert(source, tmp_path / "b") / "model.safetensors")
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


class Bomb:
    """Runs code when it is unpickled by a reader that lets it."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, ...]:
        return (Path.touch, (self.path,))


def test_code_in_a_pickle_is_refused_and_not_run(
    make_checkpoint: CheckpointFactory, invoke: Command, tmp_path: Path
) -> None:
    source = make_checkpoint()
    (source / "model.safetensors").unlink()
    torch.save({"weight": Bomb(tmp_path / "boom")}, source / "pytorch_model.bin")
    outcome = invoke("mha2gqa", source, "--groups", 2)
    assert outcome.returncode == 2
    assert "pytorch_model.bin: calls '__builtin__.getattr', which no file of tensors does\n" in outcome.stderr
    assert not (tmp_path / "boom").exists()
    pickle.loads(pickle.dumps(Bomb(tmp_path / "boom")))  # the control: an ordinary reader runs it
    assert (tmp_path / "boom").exists()


def test_a_pickle_of_something_else(make_checkpoint: CheckpointFactory) -> None:
    source = make_checkpoint()
    (source / "model.safetensors").unlink()
    torch.save({"state_dict": {"weight": torch.ones(2)}}, source / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="holds something else than named tensors"):
        open_checkpoint(source)


def test_a_missing_pickle_shard(make_checkpoint: CheckpointFactory) -> None:
    source = make_checkpoint()
    to_pickles(source, shards=2)
    (source / "pytorch_model-00002-of-00002.bin").unlink()
    with pytest.raises(CheckpointError, match=r"shard pytorch_model-00002-of-00002\.bin is missing"):
        open_checkpoint(source)


def test_a_config_of_transformers_4(make_checkpoint: CheckpointFactory, tmp_path: Path) -> None:
    """torch_dtype, rope_theta and rope_scaling at the top: kept, and meaning the same in the result."""
    scaling = {"rope_type": "linear", "factor": 2.0}
    source = make_checkpoint(tie_groups=2, rope_parameters={**scaling, "rope_theta": 500.0})
    expected = load_model(source, dtype=torch.float32, device="cpu")
    config = json.loads((source / "config.json").read_text())
    for name in ("rope_parameters", "dtype", "head_dim"):
        del config[name]
    config |= {"rope_theta": 500.0, "rope_scaling": scaling, "torch_dtype": "float32"}
    (source / "config.json").write_text(json.dumps(config))
    converted = load_model(convert(source, tmp_path / "out"), dtype=torch.float32, device="cpu")
    tokens = torch.randint(3, VOCAB_SIZE, (1, 40), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        one, other = (model(input_ids=tokens, use_cache=False).logits for model in (expected, converted))
    torch.testing.assert_close(other, one, rtol=0, atol=1e-5 * one.abs().max().item())
    with torch.inference_mode():  # the control: positions matter
        unscaled = build_model()
        tie_heads(unscaled, 2)
        assert (unscaled(input_ids=tokens, use_cache=False).logits - one).abs().max() > 0.01


@pytest.mark.parametrize("model_type", ["llama", "phi3", "stablelm"])
def test_a_base_class_saved_without_its_prefix(model_type: str, tmp_path: Path) -> None:
    flags = {"qk_layernorm": True} if model_type == "stablelm" else {}
    model = build_model(model_type, **flags)
    tie_heads(model, 2)
    model.model.save_pretrained(tmp_path / "base")
    with open_checkpoint(tmp_path / "base") as checkpoint:
        assert all(not name.startswith("model.") for name in checkpoint.tensors)
        assert inspect_checkpoint(checkpoint).num_key_value_heads == 8
    output = convert(tmp_path / "base", tmp_path / "out")
    base = AutoModel.from_pretrained(output, dtype=torch.float32)
    tokens = torch.randint(3, VOCAB_SIZE, (1, 12), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        expected, found = (m(input_ids=tokens, use_cache=False).last_hidden_state for m in (model.model, base))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5 * expected.abs().max().item())
    with pytest.raises(CheckpointError, match="without the head that predicts tokens"):
        load_model(output, dtype=torch.float32, device="cpu")


def test_remote_code_is_not_run(make_checkpoint: CheckpointFactory, run_here: RunHere, tmp_path: Path) -> None:
    source = make_checkpoint()
    config = json.loads((source / "config.json").read_text())
    config["auto_map"] = {"AutoConfig": "custom.Config", "AutoModelForCausalLM": "custom.Model"}
    (source / "config.json").write_text(json.dumps(config))
    (source / "custom.py").write_text(f"from pathlib import Path\nPath({str(tmp_path / 'boom')!r}).touch()\n")
    run_here("mha2gqa", source, "--groups", 2)
    assert not (tmp_path / "boom").exists()
