"""Encoder-decoder checkpoints: the decoder's attention is grouped, the encoder stays."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Command
from kvconvert.configs import DEMO
from kvconvert.convert import Gqa, as_target, execute, open_checkpoint
from kvconvert.convert.checkpoint.loading import load_model
from kvconvert.convert.describe.inspection import inspect_checkpoint
from kvconvert.convert.errors import UnsupportedError
from kvconvert.convert.runtime.transformers_interface import cache_of
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForSeq2SeqLM, AutoModelForSpeechSeq2Seq

COMMON: dict[str, Any] = {"d_model": 64, "vocab_size": 96, "pad_token_id": 0, "eos_token_id": 2, "bos_token_id": 1}
T5: dict[str, Any] = {"num_layers": 2, "num_heads": 8, "d_kv": 8, "d_ff": 48, "decoder_start_token_id": 0}
T5_V11: dict[str, Any] = {
    **T5,
    "num_layers": 3,
    "num_decoder_layers": 2,
    "feed_forward_proj": "gated-gelu",
    "tie_word_embeddings": False,
}
BART: dict[str, Any] = {
    **{
        f"{side}_{name}": value
        for side in ("encoder", "decoder")
        for name, value in {"layers": 2, "ffn_dim": 48}.items()
    },
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 8,
    "decoder_start_token_id": 2,
    "forced_eos_token_id": None,
}
WHISPER: dict[str, Any] = {
    **BART,
    "num_mel_bins": 8,
    "max_source_positions": 12,
    "max_target_positions": 32,
    "suppress_tokens": None,
    "begin_suppress_tokens": None,
}
ROWS: list[tuple[str, dict[str, Any], str]] = [
    ("t5", T5, "grouped_t5"),
    ("t5", T5_V11, "grouped_t5"),
    ("mt5", T5, "grouped_t5"),
    ("bart", BART, "grouped_bart"),
    ("whisper", WHISPER, "grouped_whisper"),
]
IDS = ["t5", "t5-v1.1", "mt5", "bart", "whisper"]
each_row = pytest.mark.parametrize(("model_type", "overrides", "target"), ROWS, ids=IDS)


def attention_modules(model: Any) -> list[Any]:
    """The decoder's attention modules, self and cross, layer by layer."""
    names = ("SelfAttention", "EncDecAttention", "self_attn", "encoder_attn")
    return [module for name, module in model.get_decoder().named_modules() if name.rpartition(".")[2] in names]


def key_value_parameters(model: Any) -> list[torch.Tensor]:
    """Their k and v weights and biases as (heads, head_dim, …) views."""
    projections = [
        getattr(m, n) for m in attention_modules(model) for n in ("k", "v", "k_proj", "v_proj") if hasattr(m, n)
    ]
    return [parameter.unflatten(0, (-1, 8)) for projection in projections for parameter in projection.parameters()]


def make(
    directory: Path, model_type: str, overrides: dict[str, Any], *, tie_groups: int | None = None, seed: int = 0
) -> Path:
    config = AutoConfig.for_model(model_type, **{**COMMON, **overrides})
    auto: Any = AutoModelForSpeechSeq2Seq if model_type == "whisper" else AutoModelForSeq2SeqLM
    model = auto.from_config(config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if "norm" in name:
                parameter.add_(0.1 * noise)
            elif name == "shared.weight":  # T5 divides what it multiplies by this by √d_model
                parameter.copy_(noise)
            else:
                parameter.copy_(noise * (0.5 if parameter.dim() == 1 else 1.5 / parameter[0].numel() ** 0.5))
        if tie_groups is not None:
            for heads in key_value_parameters(model):
                heads.copy_(heads[:: 8 // tie_groups].repeat_interleave(8 // tie_groups, 0))
    model.save_pretrained(directory, max_shard_size="60KB")
    return directory


def load(directory: Path) -> Any:
    whisper = "whisper" in json.loads((directory / "config.json").read_text())["model_type"]
    auto: Any = AutoModelForSpeechSeq2Seq if whisper else AutoModelForSeq2SeqLM
    return auto.from_pretrained(directory, dtype=torch.float32).eval()


def convert(source: Path, groups: int, output: Path) -> Path:
    with as_target(open_checkpoint(source), groups) as view:
        plan = Gqa(groups).plan(view)
        execute(plan, view.checkpoint, output, max_shard_bytes=60_000)
    return output


def inputs_of(model: Any) -> dict[str, torch.Tensor]:
    """Two sources, the first of them padded where the model takes a mask."""
    generator = torch.Generator().manual_seed(0)
    if "input_features" in model.main_input_name:
        return {"input_features": torch.randn(2, 8, 24, generator=generator)}
    input_ids = torch.randint(3, 96, (2, 10), generator=generator)
    mask = torch.ones(2, 10, dtype=torch.long)
    mask[0, 7:] = 0
    return {"input_ids": input_ids * mask, "attention_mask": mask}


def logits(model: Any, **more: Any) -> Any:
    decoder_input_ids = torch.randint(3, 96, (2, 6), generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        return model(**inputs_of(model), decoder_input_ids=decoder_input_ids, **more)


@pytest.mark.parametrize("groups", [1, 2, 4])
@each_row
def test_pooling_equal_heads_changes_nothing(
    model_type: str, overrides: dict[str, Any], target: str, groups: int, tmp_path: Path
) -> None:
    source = make(tmp_path / "model", model_type, overrides, tie_groups=groups, seed=groups)
    original, converted = load(source), load(convert(source, groups, tmp_path / "out"))
    assert converted.config.model_type == target
    expected, found = logits(original).logits, logits(converted).logits
    scale = expected.abs().max().item()
    assert scale > 1
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5 * scale)
    options = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
    tokens = [
        model.generate(**inputs_of(model), use_cache=use_cache, **options)
        for model, use_cache in ((converted, True), (converted, False), (original, True))
    ]
    assert torch.equal(tokens[0], tokens[1])
    assert torch.equal(tokens[0], tokens[2])
    cache = cache_of(logits(converted, use_cache=True))
    for layer in (*cache.self_attention_cache.layers[:2], *cache.cross_attention_cache.layers[:2]):
        assert layer.keys.shape[1] == layer.values.shape[1] == groups


@each_row
def test_each_head_is_the_float64_mean_of_its_group(
    model_type: str, overrides: dict[str, Any], target: str, tmp_path: Path
) -> None:
    source = make(tmp_path / "model", model_type, overrides)
    original, converted = load(source), load(convert(source, 2, tmp_path / "out"))
    pairs = list(zip(key_value_parameters(original), key_value_parameters(converted), strict=True))
    assert len(pairs) >= 8
    for heads, pooled in pairs:
        mean = torch.stack([heads[4 * group : 4 * group + 4].double().sum(0) / 4 for group in range(2)])
        assert torch.equal(pooled, mean.float())
    grouped = {id(parameter) for module in attention_modules(converted) for parameter in module.parameters()}
    before = dict(original.named_parameters())
    for name, parameter in converted.named_parameters():
        if id(parameter) not in grouped:
            assert torch.equal(parameter, before[name]), name


@each_row
def test_gradients_reach_every_parameter(
    model_type: str, overrides: dict[str, Any], target: str, tmp_path: Path
) -> None:
    model = load(convert(make(tmp_path / "model", model_type, overrides), 2, tmp_path / "out"))
    labels = torch.randint(3, 96, (2, 6), generator=torch.Generator().manual_seed(1))
    model(**inputs_of(model), labels=labels).loss.backward()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None, name
            # a key's bias adds the same to every logit of a query, to which the softmax is blind
            assert (parameter.grad.abs().max() > 1e-6) != name.endswith("k_proj.bias"), name


def test_a_result_opens_in_a_process_without_kvconvert(tmp_path: Path, run_without_kvconvert: Any) -> None:
    source = make(tmp_path / "model", "t5", T5, tie_groups=2)
    output = convert(source, 2, tmp_path / "out")
    printed = run_without_kvconvert(
        f"""
        import torch
        from transformers import AutoModelForSeq2SeqLM
        model = AutoModelForSeq2SeqLM.from_pretrained({str(output)!r}, trust_remote_code=True).eval()
        ids = torch.arange(3, 13)[None]
        torch.save(model(input_ids=ids, decoder_input_ids=ids).logits.detach(), {str(tmp_path / "logits.pt")!r})
        print(type(model).__name__)
        """
    )
    ids = torch.arange(3, 13)[None]
    expected = load(source)(input_ids=ids, decoder_input_ids=ids).logits
    assert printed.strip() == "GroupedT5ForConditionalGeneration"
    torch.testing.assert_close(torch.load(tmp_path / "logits.pt"), expected, rtol=1e-4, atol=1e-4)


def test_inspect_counts_the_cache_of_a_decoder_token(tmp_path: Path) -> None:
    with open_checkpoint(make(tmp_path / "model", "t5", T5)) as checkpoint:
        inspection = inspect_checkpoint(checkpoint)
    assert (inspection.num_hidden_layers, inspection.num_key_value_heads, inspection.head_dim) == (2, 8, 8)
    assert inspection.cache_bytes_per_token == 2 * 2 * 8 * 8 * 2
    assert inspection.cross_attention


def test_inspect_speaks_of_a_text_only_where_one_is_read(invoke: Command, tmp_path: Path) -> None:
    assert "calibration" not in invoke("inspect", make(tmp_path / "model", "t5", T5)).stdout
    assert "calibration" in invoke("inspect", DEMO / "model").stdout


def test_the_encoder_is_copied_byte_for_byte(tmp_path: Path) -> None:
    source = make(tmp_path / "model", "bart", BART)
    output = convert(source, 1, tmp_path / "out")
    before, after = (
        {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}
        for folder in (source, output)
    )
    encoder = [name for name in after if ".encoder." in name]
    assert len(encoder) > 20
    assert all(torch.equal(before[name], after[name]) for name in encoder)


def test_other_heads_of_a_model_type_are_refused(tmp_path: Path) -> None:
    source = make(tmp_path / "model", "bart", BART)
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | {"architectures": ["BartForSequenceClassification"]}))
    with pytest.raises(UnsupportedError, match="it is a BartForSequenceClassification; of this model_type only"):
        as_target(open_checkpoint(source), 2)


def test_only_decoders_are_trained_and_evaluated(tmp_path: Path) -> None:
    output = convert(make(tmp_path / "model", "t5", T5), 2, tmp_path / "out")
    with pytest.raises(UnsupportedError, match="GroupedT5ForConditionalGeneration is an encoder-decoder"):
        load_model(output, dtype=torch.float32, device="cpu")
