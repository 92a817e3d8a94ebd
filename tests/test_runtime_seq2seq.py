"""Grouped T5, BART and Whisper against the stock classes, whose K/V heads are equal inside each group."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import HEAD_DIM, HIDDEN_SIZE, NUM_HEADS, VOCAB_SIZE
from kvconvert.convert.runtime.configuration_grouped_seq2seq import (
    GroupedBartConfig,
    GroupedT5Config,
    GroupedWhisperConfig,
)
from kvconvert.convert.runtime.modeling_grouped_seq2seq import (
    GroupedBartForConditionalGeneration,
    GroupedT5ForConditionalGeneration,
    GroupedWhisperForConditionalGeneration,
)
from kvconvert.convert.runtime.transformers_interface import cache_of, checkpoint_activations
from torch import Tensor
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    T5Config,
    T5ForConditionalGeneration,
    WhisperConfig,
    WhisperForConditionalGeneration,
)

NUM_LAYERS = 2
NUM_SOURCE_TOKENS = 10
NUM_TOKENS = 7
DECODER_KEY_VALUE = re.compile(r"decoder\..*\.(k|v|k_proj|v_proj)\.(weight|bias)$")


@dataclass(frozen=True)
class Family:
    stock_config: Any
    stock_model: Any
    grouped_config: Any
    grouped_model: Any
    settings: dict[str, Any]

    def config(self, **settings: Any) -> Any:
        return self.grouped_config(**self.settings, **settings)


T5 = (T5Config, T5ForConditionalGeneration, GroupedT5Config, GroupedT5ForConditionalGeneration)
T5_SETTINGS = {
    "vocab_size": VOCAB_SIZE,
    "d_model": HIDDEN_SIZE,
    "d_kv": HEAD_DIM,
    "d_ff": 48,
    "num_heads": NUM_HEADS,
    "num_layers": NUM_LAYERS,
    "dropout_rate": 0.0,
    "decoder_start_token_id": 0,
}
# half as many heads in the encoder: only the decoder's count
BART_SETTINGS = {
    "vocab_size": VOCAB_SIZE,
    "d_model": HIDDEN_SIZE,
    "encoder_attention_heads": NUM_HEADS // 2,
    "decoder_attention_heads": NUM_HEADS,
    "encoder_layers": NUM_LAYERS,
    "decoder_layers": NUM_LAYERS,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "dropout": 0.0,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 2,
}
WHISPER_SETTINGS = BART_SETTINGS | {
    "num_mel_bins": 6,
    "max_source_positions": NUM_SOURCE_TOKENS,
    "max_target_positions": 64,
    "decoder_start_token_id": 3,
    "begin_suppress_tokens": None,
}
FAMILIES = {
    "t5": Family(*T5, T5_SETTINGS),
    "t5-gated": Family(*T5, T5_SETTINGS | {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}),
    "bart": Family(
        BartConfig,
        BartForConditionalGeneration,
        GroupedBartConfig,
        GroupedBartForConditionalGeneration,
        BART_SETTINGS | {"max_position_embeddings": 64, "forced_eos_token_id": None},
    ),
    "whisper": Family(
        WhisperConfig,
        WhisperForConditionalGeneration,
        GroupedWhisperConfig,
        GroupedWhisperForConditionalGeneration,
        WHISPER_SETTINGS,
    ),
}
each_family = pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)


@dataclass(frozen=True)
class Pair:
    stock: Any
    grouped: Any
    num_key_value_heads: int


def build_pair(family: Family, num_key_value_heads: int, *, tied: bool = True) -> Pair:
    """A stock model, and the grouped one that has the first K/V head of each of its groups."""
    generator = torch.Generator().manual_seed(0)
    stock = family.stock_model(family.stock_config(**family.settings)).eval()
    weights = {}
    with torch.no_grad():
        for name, parameter in stock.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if "norm" in name:
                parameter.add_(0.1 * noise)
            elif "embed" in name or "shared" in name:  # the tied output projection: logits of a scale above 1
                parameter.copy_(noise)
            elif parameter.dim() == 1:
                parameter.copy_(0.5 * noise)
            else:
                parameter.copy_(noise * 1.5 / parameter.shape[-1] ** 0.5)
        for name, tensor in stock.state_dict().items():  # tensors that share the model's memory
            weights[name] = tensor
            if DECODER_KEY_VALUE.search(name):
                heads = tensor.view(num_key_value_heads, -1, HEAD_DIM, *tensor.shape[1:])  # (K, H / K, D, …)
                if tied:
                    heads[:, 1:] = heads[:, :1]
                weights[name] = heads[:, 0].flatten(0, 1)
    grouped = family.grouped_model(family.config(num_key_value_heads=num_key_value_heads)).eval()
    grouped.load_state_dict(weights)
    return Pair(stock, grouped, num_key_value_heads)


@pytest.fixture(
    scope="module",
    params=[(family, heads) for family in FAMILIES for heads in (1, 2, 4)],
    ids=lambda case: f"{case[0]}-{case[1]}",
)
def pair(request: pytest.FixtureRequest) -> Pair:
    family, num_key_value_heads = request.param
    return build_pair(FAMILIES[family], num_key_value_heads)


def source(model: Any) -> dict[str, Tensor]:
    """What the encoder reads: features, or tokens of which the second sequence has three of padding on its left."""
    generator = torch.Generator().manual_seed(1)
    if model.main_input_name == "input_features":
        return {"input_features": torch.randn(2, 6, 2 * NUM_SOURCE_TOKENS, generator=generator)}
    input_ids = torch.randint(3, VOCAB_SIZE, (2, NUM_SOURCE_TOKENS), generator=generator)
    attention_mask = torch.ones_like(input_ids)
    attention_mask[1, :3] = 0
    return {"input_ids": input_ids * attention_mask, "attention_mask": attention_mask}


def forward(model: Any, implementation: str = "sdpa", **arguments: Any) -> Any:
    """The model's output for tokens of which the second sequence has two of padding on its left."""
    for part in (model, model.get_decoder()):  # until 5.22, T5's decoder keeps a config of its own
        part.set_attn_implementation(implementation)
    tokens = torch.randint(3, VOCAB_SIZE, (2, NUM_TOKENS), generator=torch.Generator().manual_seed(2))
    mask = torch.ones_like(tokens)
    mask[1, :2] = 0
    with torch.inference_mode():
        return model(**source(model), decoder_input_ids=tokens, decoder_attention_mask=mask, **arguments)


def assert_close(found: Tensor, expected: Tensor) -> None:
    """Equal but for the order of float32 sums: 1e-5 of the scale."""
    scale = expected.abs().max().item()
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5 * scale)


def generate(model: Any, **arguments: Any) -> list[list[int]]:
    """Tokens that all differ, or a small random model would repeat one."""
    model.set_attn_implementation("sdpa")
    length = {"min_new_tokens": 6, "max_new_tokens": 6}
    found = model.generate(**source(model), **length, do_sample=False, no_repeat_ngram_size=1, **arguments).tolist()
    assert all(len(set(tokens)) == len(tokens) for tokens in found)
    return found  # type: ignore[no-any-return]


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_logits_are_those_of_the_stock_model(pair: Pair, implementation: str) -> None:
    expected = forward(pair.stock, "eager").logits
    assert expected.abs().max() > 1
    found = forward(pair.grouped, implementation).logits
    assert_close(found[0], expected[0])
    assert_close(found[1, 2:], expected[1, 2:])


def test_weights_of_attention_are_recorded(pair: Pair) -> None:
    expected, found = (forward(model, "eager", output_attentions=True) for model in (pair.stock, pair.grouped))
    for kind, num_keys in (("decoder_attentions", NUM_TOKENS), ("cross_attentions", NUM_SOURCE_TOKENS)):
        assert len(found[kind]) == NUM_LAYERS
        for layer, stock_layer in zip(found[kind], expected[kind], strict=True):
            assert layer.shape == (2, NUM_HEADS, NUM_TOKENS, num_keys)
            assert_close(layer[0], stock_layer[0])
            assert_close(layer[1, :, 2:], stock_layer[1, :, 2:])


@pytest.mark.parametrize(
    "arguments",
    [{}, {"use_cache": False}, {"num_beams": 3, "num_return_sequences": 3}, {"cache_implementation": "static"}],
    ids=["greedy", "no cache", "beams", "static cache"],
)
def test_generated_tokens_are_those_of_the_stock_model(pair: Pair, arguments: dict[str, Any]) -> None:
    beams = {key: value for key, value in arguments.items() if key.startswith("num_")}
    assert generate(pair.grouped, **arguments) == generate(pair.stock, **beams)


def test_caches_hold_the_fewer_heads(pair: Pair) -> None:
    cache = cache_of(forward(pair.grouped, use_cache=True))
    for part, num_tokens in (
        (cache.self_attention_cache, NUM_TOKENS),
        (cache.cross_attention_cache, NUM_SOURCE_TOKENS),
    ):
        assert len(part.layers) == NUM_LAYERS
        for layer in part.layers:
            assert layer.keys.shape == layer.values.shape == (2, pair.num_key_value_heads, num_tokens, HEAD_DIM)


@each_family
def test_gradients_reach_every_parameter(family: Family) -> None:
    model = build_pair(family, 2).grouped.train()
    labels = torch.arange(3, 3 + 2 * NUM_TOKENS).view(2, -1)
    gradients = []
    for checkpointing in (False, True):
        if checkpointing:
            checkpoint_activations(model)
        model.zero_grad()
        model(**source(model), labels=labels, use_cache=False).loss.backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.requires_grad})
    for name, gradient in gradients[0].items():
        assert gradient is not None, name
        # softmax does not see what is added to all keys, so the bias of keys is left without a gradient
        assert gradient.abs().max() > 0 or name.endswith("k_proj.bias"), name
        torch.testing.assert_close(gradients[1][name], gradient, msg=name)


@each_family
def test_a_saved_model_is_read_back_bit_for_bit(family: Family, tmp_path: Path) -> None:
    model = build_pair(family, 2).grouped
    model.save_pretrained(tmp_path)
    loaded = family.grouped_model.from_pretrained(tmp_path)
    assert loaded.config.model_type.startswith("grouped_")
    assert loaded.config.num_key_value_heads == 2
    expected, found = model.state_dict(), loaded.state_dict()
    assert list(found) == list(expected)
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert torch.equal(forward(loaded).logits, forward(model).logits)


@each_family
def test_heads_that_differ_inside_a_group_change_the_logits(family: Family) -> None:
    pair = build_pair(family, 2, tied=False)
    expected = forward(pair.stock).logits
    assert (forward(pair.grouped).logits - expected).abs().max() > 1e-2 * expected.abs().max()


@each_family
def test_new_weights_are_drawn_as_the_stock_model_draws_them(family: Family) -> None:
    grouped, default = (family.grouped_model(family.config(**heads)) for heads in ({"num_key_value_heads": 4}, {}))
    stock = family.stock_model(family.stock_config(**family.settings)).state_dict()
    assert default.config.num_key_value_heads == NUM_HEADS
    shapes = [{name: tensor.shape for name, tensor in weights.items()} for weights in (default.state_dict(), stock)]
    assert shapes[0] == shapes[1]
    for name, tensor in grouped.state_dict().items():
        # 256 numbers or more, so a standard error of 5 % at most
        assert tensor.std().item() == pytest.approx(stock[name].std().item(), rel=0.25), name


@each_family
@pytest.mark.parametrize("num_key_value_heads", [0, 3, 16])
def test_heads_that_do_not_divide_are_refused(family: Family, num_key_value_heads: int) -> None:
    message = f"num_key_value_heads = {num_key_value_heads} does not divide the 8 query heads of the decoder"
    with pytest.raises(ValueError, match=message):
        family.config(num_key_value_heads=num_key_value_heads)
