"""Every architecture, on its real class: what pooling must preserve, and what it must save."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from conftest import HEAD_DIM, VOCAB_SIZE, CheckpointFactory
from kvconvert.convert.architectures import ARCHITECTURES, find_architecture
from kvconvert.convert.checkpoint import open_checkpoint
from kvconvert.convert.errors import UnsupportedError
from kvconvert.convert.execute import execute
from kvconvert.convert.gqa import Gqa
from kvconvert.convert.loading import load_model
from transformers import DynamicCache

# settings with which a row's checkpoints have the tensors that matter: biases, every optional projection
OVERRIDES: dict[str, dict[str, object]] = {
    "llama": {"attention_bias": True, "mlp_bias": True},
    "olmo": {"clip_qkv": 1.5},
    "stablelm": {"use_qkv_bias": True},
    "nemotron": {"attention_bias": True},
    "glm": {"attention_bias": True},
    "cohere": {"logit_scale": 1.0},
    "cohere2": {"logit_scale": 1.0},
}


def convert(source: Path, num_key_value_heads: int, output: Path) -> Path:
    with open_checkpoint(source) as checkpoint:
        plan = Gqa(num_key_value_heads).plan(checkpoint, find_architecture(checkpoint))
        execute(plan, checkpoint, output)
    return output


def logits(model: torch.nn.Module, input_ids: torch.Tensor) -> torch.Tensor:
    with torch.inference_mode():
        output: torch.Tensor = model(input_ids=input_ids, use_cache=False).logits
    return output


@pytest.fixture
def input_ids() -> torch.Tensor:
    return torch.randint(3, VOCAB_SIZE, (2, 12), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_pooling_equal_heads_changes_nothing(
    model_type: str, groups: int, make_checkpoint: CheckpointFactory, tmp_path: Path, input_ids: torch.Tensor
) -> None:
    source = make_checkpoint(
        model_type, seed=groups, tie_groups=groups, max_shard_size="60KB", **OVERRIDES.get(model_type, {})
    )
    original = load_model(source, dtype=torch.float32, device="cpu")
    converted = load_model(convert(source, groups, tmp_path / "out"), dtype=torch.float32, device="cpu")
    assert type(converted) is type(original)
    expected, found = logits(original, input_ids), logits(converted, input_ids)
    scale = expected.abs().max().item()
    assert scale > 1
    # float32 sums in another order: 1e-5 of the scale
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5 * scale)

    # generation with the cache, left padding included, gives the tokens that it gives without
    padded = torch.cat([torch.zeros(2, 3, dtype=torch.long), input_ids], dim=1)
    mask = (torch.arange(padded.shape[1]) >= torch.tensor([[3], [3]])).long()
    generated = [
        model.generate(padded, attention_mask=mask, max_new_tokens=6, do_sample=False, use_cache=use_cache)
        for model, use_cache in ((converted, True), (converted, False), (original, True))
    ]
    assert torch.equal(generated[0], generated[1])
    assert torch.equal(generated[0], generated[2])

    cache = converted(input_ids, use_cache=True, past_key_values=DynamicCache(config=converted.config)).past_key_values
    for layer in cache.layers:
        assert layer.keys.shape == layer.values.shape == (2, groups, input_ids.shape[1], HEAD_DIM)


def test_pooling_different_heads_changes_the_logits(
    make_checkpoint: CheckpointFactory, tmp_path: Path, input_ids: torch.Tensor
) -> None:
    """The control of the test above: its assertion rejects a source whose heads differ."""
    source = make_checkpoint()
    expected = logits(load_model(source, dtype=torch.float32, device="cpu"), input_ids)
    found = logits(load_model(convert(source, 2, tmp_path / "out"), dtype=torch.float32, device="cpu"), input_ids)
    assert (found - expected).abs().max() > 0.1 * expected.abs().max()


@pytest.mark.parametrize(
    ("model_type", "flags", "bias"),
    [
        ("llama", {}, False),
        ("llama", {"attention_bias": True}, True),
        ("stablelm", {}, False),
        ("stablelm", {"use_qkv_bias": True}, True),
        ("phi", {}, True),
    ],
)
def test_each_head_is_the_float64_mean_of_its_group(
    model_type: str, flags: dict[str, object], bias: bool, make_checkpoint: CheckpointFactory, tmp_path: Path
) -> None:
    source = make_checkpoint(model_type, seed=3, dtype=torch.bfloat16, **flags)
    before = load_model(source, dtype="auto", device="cpu").state_dict()
    after = load_model(convert(source, 2, tmp_path / "out"), dtype="auto", device="cpu").state_dict()
    num_pooled = 0
    for name, tensor in before.items():
        if ".k_proj." not in name and ".v_proj." not in name:
            assert torch.equal(after[name], tensor), name
            continue
        num_pooled += 1
        for group in range(2):
            total = sum(
                tensor[head * HEAD_DIM : (head + 1) * HEAD_DIM].double() for head in range(4 * group, 4 * group + 4)
            )
            expected = (total / 4).to(torch.bfloat16)
            assert torch.equal(after[name][group * HEAD_DIM : (group + 1) * HEAD_DIM], expected), (name, group)
    assert num_pooled == 2 * 2 * (2 if bias else 1)


@pytest.mark.parametrize(
    ("model_type", "flag"), [("phi", "qk_layernorm"), ("stablelm", "qk_layernorm"), ("cohere", "use_qk_norm")]
)
def test_keys_normalised_per_head_are_refused(model_type: str, flag: str, make_checkpoint: CheckpointFactory) -> None:
    with open_checkpoint(make_checkpoint(model_type, **{flag: True})) as checkpoint:
        with pytest.raises(UnsupportedError, match="keys are normalised per head"):
            Gqa(2).plan(checkpoint, find_architecture(checkpoint))


def test_an_unknown_architecture_lists_the_known_ones(make_checkpoint: CheckpointFactory) -> None:
    with open_checkpoint(make_checkpoint("gpt2", n_head=8, n_embd=64)) as checkpoint:
        with pytest.raises(UnsupportedError, match="model_type 'gpt2' is not supported") as raised:
            find_architecture(checkpoint)
    assert "llama" in str(raised.value.hint)


def test_quantised_checkpoints_are_refused(make_checkpoint: CheckpointFactory) -> None:
    with open_checkpoint(make_checkpoint()) as checkpoint:
        checkpoint.config["quantization_config"] = {"quant_method": "bitsandbytes"}
        with pytest.raises(UnsupportedError, match="the checkpoint is quantised"):
            Gqa(2).plan(checkpoint, find_architecture(checkpoint))
