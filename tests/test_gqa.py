from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Literal

import pytest
import torch
from conftest import CheckpointFactory
from kvconvert.convert import ConversionPlan, Gqa, execute, open_checkpoint
from kvconvert.convert.architectures.source import Source
from kvconvert.convert.checkpoint.loading import check_opens, load_model
from kvconvert.convert.errors import CheckpointError, OutputError, UnsupportedError
from kvconvert.convert.runtime.transformers_interface import cache_of
from safetensors.torch import load_file, save_file


def convert(source: Path, settings: Gqa, output: Path, **options: object) -> Path:
    with open_checkpoint(source) as checkpoint:
        plan = settings.plan(Source.of(checkpoint))
        execute(plan, checkpoint, output, **options)  # type: ignore[arg-type]
    return output


def tensors(directory: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in directory.glob("*.safetensors") for name, tensor in load_file(file).items()}


def files(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


@pytest.mark.parametrize("method", ["mean", "first", "random"])
def test_two_runs_write_the_same_bytes(
    method: Literal["mean", "first", "random"], make_checkpoint: CheckpointFactory, tmp_path: Path
) -> None:
    source = make_checkpoint()
    one = convert(source, Gqa(2, merge=method, seed=7), tmp_path / "one")
    other = convert(source, Gqa(2, merge=method, seed=7), tmp_path / "other")
    assert files(one) == files(other)


def test_a_sharded_source_gives_the_same_tensors(make_checkpoint: CheckpointFactory, tmp_path: Path) -> None:
    whole = make_checkpoint(name="whole")
    sharded = make_checkpoint(name="sharded", max_shard_size="100KB")
    assert len(list(sharded.glob("*.safetensors"))) > 1
    one = tensors(convert(whole, Gqa(2), tmp_path / "one"))
    other = tensors(convert(sharded, Gqa(2), tmp_path / "other", max_shard_bytes=50_000))
    assert len(list((tmp_path / "other").glob("*.safetensors"))) > 1
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_config_changes_in_the_heads_only(make_checkpoint: CheckpointFactory, tmp_path: Path) -> None:
    source = make_checkpoint("starcoder2")
    before = json.loads((source / "config.json").read_text())
    after = json.loads((convert(source, Gqa(2), tmp_path / "out") / "config.json").read_text())
    assert after == before | {"num_key_value_heads": 2, "head_dim": 8}


def test_the_source_code_of_a_checkpoint_is_not_asked_for(make_checkpoint: CheckpointFactory, tmp_path: Path) -> None:
    source = make_checkpoint()
    config = json.loads((source / "config.json").read_text()) | {"auto_map": {"AutoModelForCausalLM": "m.Model"}}
    (source / "config.json").write_text(json.dumps(config))
    assert "auto_map" not in json.loads((convert(source, Gqa(2), tmp_path / "out") / "config.json").read_text())


def test_a_gqa_checkpoint_is_reduced_further(make_checkpoint: CheckpointFactory, tmp_path: Path) -> None:
    """8 → 4 → 2 in two steps is 8 → 2 in one: means of means of equal groups. float32, one rounding apart."""
    source = make_checkpoint()
    halfway = convert(source, Gqa(4), tmp_path / "gqa4")
    two_steps = tensors(convert(halfway, Gqa(2), tmp_path / "two-steps"))
    one_step = tensors(convert(source, Gqa(2), tmp_path / "one-step"))
    for name, tensor in one_step.items():
        torch.testing.assert_close(two_steps[name], tensor, rtol=1e-6, atol=1e-7)


def test_companions_are_copied_byte_for_byte(make_checkpoint: CheckpointFactory, tmp_path: Path) -> None:
    source = make_checkpoint(with_tokenizer=True)
    for name in ("LICENSE", "chat_template.jinja", "generation_config.json"):
        (source / name).write_text(f"the {name}")
    for name in ("README.md", "pytorch_model.bin", ".gitattributes", "modeling_mine.py", "configuration_mine.py"):
        (source / name).write_text("stays behind")
    (source / "additional_chat_templates").mkdir()
    (source / "additional_chat_templates" / "tool.jinja").write_text("tool")
    output = convert(source, Gqa(2), tmp_path / "out")
    for name in ("tokenizer.json", "tokenizer_config.json", "LICENSE", "chat_template.jinja", "generation_config.json"):
        assert (output / name).read_bytes() == (source / name).read_bytes()
    assert (output / "additional_chat_templates" / "tool.jinja").read_text() == "tool"
    left = {"pytorch_model.bin", ".gitattributes", "modeling_mine.py", "configuration_mine.py"}
    assert not left & {path.name for path in output.iterdir()}
    assert "stays behind" not in (output / "README.md").read_text()


def test_the_same_number_of_heads_has_to_be_allowed_and_keeps_every_bit(
    make_checkpoint: CheckpointFactory, tmp_path: Path
) -> None:
    source = make_checkpoint(num_key_value_heads=4)
    with pytest.raises(UnsupportedError, match="already has 4 K/V heads") as raised:
        convert(source, Gqa(4), tmp_path / "out")
    assert raised.value.settings == ("num_key_value_heads", "allow_same")
    output = convert(source, Gqa(4, allow_same=True), tmp_path / "out")
    for name in ("model.safetensors", "config.json"):
        assert (output / name).read_bytes() == (source / name).read_bytes()


def test_a_plan_goes_to_json_and_back(make_checkpoint: CheckpointFactory) -> None:
    with open_checkpoint(make_checkpoint()) as checkpoint:
        for settings in (Gqa(2), Gqa(1, merge="random", seed=5)):
            plan = settings.plan(Source.of(checkpoint))
            assert ConversionPlan.from_json(json.loads(json.dumps(plan.to_json()))) == plan


def test_the_plan_states_the_bytes_that_are_written(make_checkpoint: CheckpointFactory, tmp_path: Path) -> None:
    source = make_checkpoint(dtype=torch.bfloat16)
    output = convert(source, Gqa(2), tmp_path / "out")
    with open_checkpoint(source) as checkpoint:
        plan = Gqa(2).plan(Source.of(checkpoint))
    assert plan.bytes_out == sum(tensor.nbytes for tensor in tensors(output).values())
    assert plan.bytes_in == sum(tensor.nbytes for tensor in tensors(source).values())

    model = load_model(output, dtype=torch.bfloat16, device="cpu")
    cache = cache_of(model(torch.ones(1, 10, dtype=torch.long), use_cache=True))
    live_bytes = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    assert plan.cache_bytes_per_token[1] == live_bytes // 10
    assert plan.cache_bytes_per_token[0] == 4 * plan.cache_bytes_per_token[1]


def test_random_heads_have_the_initializer_range(make_checkpoint: CheckpointFactory, tmp_path: Path) -> None:
    source = make_checkpoint(initializer_range=0.05)
    output = tensors(convert(source, Gqa(4, merge="random"), tmp_path / "out"))
    for layer in range(2):
        keys = output[f"model.layers.{layer}.self_attn.k_proj.weight"]
        assert keys.std().item() == pytest.approx(0.05, rel=0.1)
    first, second = (output[f"model.layers.{layer}.self_attn.k_proj.weight"] for layer in range(2))
    assert not torch.equal(first, second)


def test_a_key_that_the_class_does_not_know_is_refused(make_checkpoint: CheckpointFactory, tmp_path: Path) -> None:
    source = make_checkpoint()
    save_file(load_file(source / "model.safetensors") | {"stray.weight": torch.ones(2)}, source / "model.safetensors")
    message = r"LlamaForCausalLM does not accept its weights: 1 unexpected keys, first stray\.weight"
    with pytest.raises(CheckpointError, match=message):
        convert(source, Gqa(2), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_wrong_result_is_not_published(
    make_checkpoint: CheckpointFactory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A plan that forgets to change the config, as a bug would."""
    source = make_checkpoint()
    with open_checkpoint(source) as checkpoint:
        plan = Gqa(2).plan(Source.of(checkpoint))
        expected = rf"^{re.escape(str(tmp_path / 'out'))}: LlamaForCausalLM does not .* 4 mismatched keys"
        with pytest.raises(CheckpointError, match=expected):
            execute(replace(plan, config=checkpoint.config), checkpoint, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_missing_and_misshapen_keys_are_seen(make_checkpoint: CheckpointFactory) -> None:
    source = make_checkpoint()
    weights = load_file(source / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight"
    save_file({key: value for key, value in weights.items() if key != name}, source / "model.safetensors")
    with pytest.raises(CheckpointError, match=f"1 missing keys, first {name}"):
        check_opens(source)
    with pytest.raises(CheckpointError, match=f"1 missing keys, first {name}"):
        load_model(source, dtype=torch.float32, device="cpu")
    save_file(weights | {name: weights[name][:-1].clone()}, source / "model.safetensors")
    with pytest.raises(CheckpointError, match="1 mismatched keys"):
        check_opens(source)


def test_an_existing_output_is_kept(make_checkpoint: CheckpointFactory, tmp_path: Path) -> None:
    source = make_checkpoint()
    output = convert(source, Gqa(2), tmp_path / "out")
    before = files(output)
    with pytest.raises(OutputError, match="already exists"):
        convert(source, Gqa(1), output)
    assert files(output) == before
    convert(source, Gqa(1), output, force=True)
    assert json.loads((output / "config.json").read_text())["num_key_value_heads"] == 1
