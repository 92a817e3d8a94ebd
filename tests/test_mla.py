"""mha2mla: keys and values in one latent."""

from __future__ import annotations

import json
import math
import re
import weakref
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import TOKENS, VOCAB_SIZE, CheckpointFactory, Command, build_model, load, logits
from kvconvert.convert import Cla, Gqa, execute, open_checkpoint
from kvconvert.convert.algebra.attention_shape import AttentionShape
from kvconvert.convert.algebra.latent import (
    LatentAttention,
    LatentObjective,
    constant_norm,
    latent_attention,
    latent_attentions,
    normalised,
    rope_pair_gains,
    without_constant,
)
from kvconvert.convert.algebra.merge import ExpectedRotations, Merged, merge_at_distances
from kvconvert.convert.algebra.projections import Projections
from kvconvert.convert.algebra.rotations import Rotary, expected_rotation_between
from kvconvert.convert.calibration.layerwise import LayerwiseModel
from kvconvert.convert.calibration.text import CalibrationText
from kvconvert.convert.describe.engines import latent_kernels, serving
from kvconvert.convert.describe.inspection import inspect_checkpoint
from kvconvert.convert.errors import UnsupportedError
from kvconvert.convert.methods.compression import OBJECTIVES, candidate_error
from kvconvert.convert.methods.mla import Mla
from kvconvert.convert.methods.prepared import Preparation, Prepared
from kvconvert.convert.plan import ConversionPlan
from kvconvert.convert.runtime.transformers_interface import CACHE_NAME
from kvconvert.convert.translations.routes import as_latent_source
from safetensors.torch import load_file
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, DynamicCache

TEXT = CalibrationText(TOKENS, "random")
EXACT = 1e-4  # of the logits' scale
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 99.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
LINEAR = {"rope_type": "linear", "rope_theta": 99.0, "factor": 4.0}
YARN = {"rope_type": "yarn", "rope_theta": 99.0, "factor": 4.0, "original_max_position_embeddings": 32}
PARTIAL = {"rope_type": "default", "rope_theta": 99.0, "partial_rotary_factor": 0.5}
SOURCES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama-biases": ("llama", {"attention_bias": True}),
    "llama-tied": ("llama", {"tie_word_embeddings": True}),
    "llama3-rope": ("llama", {"rope_parameters": LLAMA3}),
    "linear-rope": ("llama", {"rope_parameters": LINEAR}),
    "yarn": ("llama", {"rope_parameters": YARN}),
    "mistral": ("mistral", {"sliding_window": None}),
    "mistral-wide-window": ("mistral", {"sliding_window": 128}),
    "qwen2": ("qwen2", {}),
    "phi3-partial": ("phi3", {"rope_parameters": PARTIAL, "sliding_window": None}),
    "seed_oss": ("seed_oss", {"attention_out_bias": True}),
}
each_source = pytest.mark.parametrize(("model_type", "overrides"), SOURCES.values(), ids=SOURCES)


def convert(
    source: Path, output: Path, mla: Mla, *, text: CalibrationText | None = TEXT, **settings: Any
) -> ConversionPlan:
    return convert_and_report(source, output, mla, text=text, **settings)[0]


def convert_and_report(
    source: Path, output: Path, mla: Mla, *, text: CalibrationText | None = TEXT, **settings: Any
) -> tuple[ConversionPlan, Prepared]:
    with as_latent_source(open_checkpoint(source)) as view:
        scratch = output.with_name(f"{output.name}-scratch")
        scratch.mkdir()
        view_mla = replace(mla, **settings)
        view_mla.check(view)
        resolved = view_mla.resolve(view, text)
        prepared = resolved.prepare(view, Preparation(scratch, text))
        plan = resolved.plan(view)
        execute(plan, view.checkpoint, output, prepared.overlay)
    return plan, prepared


def error_of(source: Path, converted: Path) -> float:
    """The largest difference of logits, of their scale."""
    expected = logits(load(source))
    scale = expected.abs().max().item()
    assert scale > 1
    return (logits(load(converted)) - expected).abs().max().item() / scale


def set_keys_and_values(directory: Path, name: str, rows: torch.Tensor) -> None:
    model = load(directory)
    for layer in model.model.layers:
        getattr(layer.self_attn, name).weight.data.copy_(rows)
    model.save_pretrained(directory)


@pytest.mark.parametrize("interleave", [True, False], ids=["interleaved", "half-split"])
@pytest.mark.parametrize("model_type", ["llama", "mistral", "qwen2"])
def test_mqa_is_mla_with_its_key_and_one_more_channel_than_its_value(
    make_checkpoint: CheckpointFactory, tmp_path: Path, model_type: str, interleave: bool
) -> None:
    overrides = {"sliding_window": None} if model_type == "mistral" else {}
    source = make_checkpoint(model_type, num_key_value_heads=1, **overrides)
    convert(source, tmp_path / "mla", Mla(9, 8, "exact", rope_interleave=interleave))
    config = json.loads((tmp_path / "mla/config.json").read_text())
    assert (config["model_type"], config["rope_interleave"]) == ("deepseek_v3", interleave)
    assert config["rope_parameters"] == {"rope_type": "default", "rope_theta": 10000.0}
    assert error_of(source, tmp_path / "mla") < EXACT


def test_one_channel_less_is_not_exact(make_checkpoint: CheckpointFactory, tmp_path: Path) -> None:
    """So that the test above can fail."""
    source = make_checkpoint(num_key_value_heads=1)
    convert(source, tmp_path / "mla", Mla(8, 8, "exact"))
    assert error_of(source, tmp_path / "mla") > 100 * EXACT


@each_source
def test_every_key_in_the_rotary_part_loses_nothing(
    make_checkpoint: CheckpointFactory, tmp_path: Path, model_type: str, overrides: dict[str, Any]
) -> None:
    """Eight heads' keys as eight keys of each frequency, all values in the latent."""
    source = make_checkpoint(model_type, **overrides)
    rotary_dims = 4 if model_type == "phi3" else 8
    convert(source, tmp_path / "mla", Mla(65, 8 * rotary_dims, "exact", "gain"))
    assert error_of(source, tmp_path / "mla") < EXACT


def test_heads_that_are_built_to_fit_lose_nothing(make_checkpoint: CheckpointFactory, tmp_path: Path) -> None:
    """Keys of one head, each turned and scaled by a complex number per pair; values of 12 directions."""
    source = make_checkpoint()
    generator = torch.Generator().manual_seed(3)
    key = torch.complex(*torch.randn(2, 4, 64, generator=generator)) / 8
    factors = torch.complex(*torch.randn(2, 8, 4, 1, generator=generator))
    keys = factors * key
    set_keys_and_values(source, "k_proj", torch.cat([keys.real, keys.imag], dim=1).flatten(0, 1))
    values = torch.randn(64, 12, generator=generator) @ torch.randn(12, 64, generator=generator) / 20
    set_keys_and_values(source, "v_proj", values)
    _, prepared = convert_and_report(source, tmp_path / "mla", Mla(13, 8, "exact"))
    assert error_of(source, tmp_path / "mla") < EXACT
    assert len(prepared.reports) == 2
    assert all(min(*report.keys_retained, *report.values_retained) > 1 - 1e-9 for report in prepared.reports)


def test_the_latent_is_cached_and_generation_does_not_depend_on_the_cache(
    make_checkpoint: CheckpointFactory, tmp_path: Path
) -> None:
    source = make_checkpoint(num_key_value_heads=4)
    for norm in ("exact", "calibrated"):
        plan = convert(source, tmp_path / norm, Mla(20, 6, norm))
        model = load(tmp_path / norm)
        cache = DynamicCache(config=model.config)
        with torch.inference_mode():
            model(TOKENS, use_cache=True, **{CACHE_NAME: cache})
        layers: list[Any] = cache.layers
        shapes = [(layer.keys.shape, layer.values.shape) for layer in layers]
        assert shapes == [((6, 1, 32, 20), (6, 1, 32, 6))] * 2
        held = sum(layer.keys[0].numel() + layer.values[0].numel() for layer in layers)
        assert plan.cache_bytes_per_token == (2 * 2 * 4 * 8 * 2, 2 * held // 32)

        padded = torch.cat([torch.zeros(2, 3, dtype=torch.long), TOKENS[:2, :12]], dim=1)
        mask = (torch.arange(15) >= torch.tensor([[3], [3]])).long()
        cached, recomputed = (
            model.generate(padded, attention_mask=mask, max_new_tokens=8, do_sample=False, use_cache=use_cache)
            for use_cache in (True, False)
        )
        assert torch.equal(cached, recomputed)


@pytest.mark.parametrize("model_type", ["llama", "qwen2"])
def test_calibrated_writes_no_bias(make_checkpoint: CheckpointFactory, tmp_path: Path, model_type: str) -> None:
    source = make_checkpoint(model_type)
    convert(source, tmp_path / "mla", Mla(64, 8, "calibrated"))
    tensors = load_file(tmp_path / "mla/model.safetensors")
    assert not [name for name in tensors if name.endswith(".bias")]
    config = json.loads((tmp_path / "mla/config.json").read_text())
    assert config["attention_bias"] is False
    assert config["q_lora_rank"] is None


def test_a_latent_of_all_that_the_norm_before_it_gives_is_nearly_exact_without_biases(
    make_checkpoint: CheckpointFactory, tmp_path: Path
) -> None:
    """x / gain has the same norm for every token, so that a latent that holds all of x can have an rms of 1."""
    source = make_checkpoint()
    tokens = torch.randint(3, VOCAB_SIZE, (512, 32), generator=torch.Generator().manual_seed(5))
    text = CalibrationText(tokens, "random")
    convert(source, tmp_path / "exact", Mla(65, 8, "exact"), text=text, refit=False)
    convert(source, tmp_path / "calibrated", Mla(64, 8), text=text, refit=False)
    exact, calibrated = (logits(load(tmp_path / name)) for name in ("exact", "calibrated"))
    assert (calibrated - exact).square().mean().sqrt() < 0.01 * exact.std()


def test_a_norm_that_is_not_met_costs_more(make_checkpoint: CheckpointFactory, tmp_path: Path) -> None:
    """What the fit to the norm is for: the same weights, with a latent as it comes."""
    source = make_checkpoint(num_key_value_heads=4)
    tokens = torch.randint(3, VOCAB_SIZE, (512, 32), generator=torch.Generator().manual_seed(5))
    text = CalibrationText(tokens, "random")
    lossless = Mla(64, 32, rope_selection="gain")
    convert(source, tmp_path / "fitted", lossless, text=text, refit=False)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("kvconvert.convert.methods.compression.normalised", lambda layer, *sample: layer)
        convert(source, tmp_path / "as-it-is", lossless, text=text, refit=False)
    expected = logits(load(source))
    fitted, as_it_is = ((logits(load(tmp_path / name)) - expected).square().mean() for name in ("fitted", "as-it-is"))
    assert fitted < 0.5 * as_it_is


def test_queries_and_keys_of_an_engine_that_pairs_neighbours(
    make_checkpoint: CheckpointFactory, tmp_path: Path
) -> None:
    """Both layouts of pairs are the same function."""
    source = make_checkpoint(num_key_value_heads=4)
    for interleave in (True, False):
        convert(source, tmp_path / str(interleave), Mla(24, 8, "exact", rope_interleave=interleave))
    assert error_of(tmp_path / "True", tmp_path / "False") < 1e-5


def test_frequencies_of_the_rotary_key_are_those_of_the_source(
    make_checkpoint: CheckpointFactory, tmp_path: Path
) -> None:
    source = make_checkpoint(num_key_value_heads=4)
    theirs = load(source).model.rotary_emb.inv_freq  # 1, 1/10, 1/100, 1/1000
    convert(source, tmp_path / "high", Mla(24, 4))
    assert json.loads((tmp_path / "high/config.json").read_text())["rope_parameters"]["rope_type"] == "default"
    torch.testing.assert_close(load(tmp_path / "high").model.rotary_emb.inv_freq, theirs[:2])
    convert(source, tmp_path / "gain", Mla(24, 12, rope_selection="gain"))
    found = load(tmp_path / "gain").model.rotary_emb.inv_freq
    distances = (found[:, None] / theirs - 1).abs()
    assert distances.min(1).values.max() < 1e-6
    assert len(found) == 6
    assert (distances.argmin(1).bincount(minlength=4) <= 4).all()
    assert (found[1:] < found[:-1] * 1.001).all()


def test_first_tokens_of_sequences_count_half_in_the_fit_to_the_norm(
    make_checkpoint: CheckpointFactory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = make_checkpoint()
    samples: list[tuple[torch.Tensor, torch.Tensor]] = []

    def recorded(layer: LatentAttention, *sample: torch.Tensor) -> LatentAttention:
        samples.append((sample[0], sample[1]))
        return layer

    monkeypatch.setattr("kvconvert.convert.methods.compression.normalised", recorded)
    monkeypatch.setattr(
        "kvconvert.convert.calibration.text._TOKENS_PER_PASS", 64
    )  # two sequences in each of three batches
    convert(source, tmp_path / "mla", Mla(24, 8))
    decoder = load(source).model
    with torch.inference_mode():
        states = decoder.layers[0].input_layernorm(decoder.embed_tokens(TOKENS))
    inputs, weights = samples[0]
    torch.testing.assert_close(inputs[:, :-1], torch.cat([states[:, 0], states.flatten(0, 1)]))
    assert torch.equal(inputs[:, -1], torch.ones(6 + 6 * 32))
    torch.testing.assert_close(weights, torch.tensor([0.5 / 6] * 6 + [0.5 / 192] * 192))


def attention_error(source: Path, converted: Path) -> float:
    """The mean squared difference of what the first layer's attention gives, on TOKENS."""
    outputs = []
    for directory in (source, converted):
        model = load(directory)
        seen: list[torch.Tensor] = []
        model.model.layers[0].self_attn.o_proj.register_forward_hook(
            lambda _, inputs, output, seen=seen: seen.append(output)
        )
        logits(model)
        outputs.append(seen[0])
    return float((outputs[0] - outputs[1]).square().mean())


@pytest.mark.parametrize(("sizes", "best"), [((40, 8), 0), ((14, 4), 1), ((3, 8), 3)], ids=str)
def test_the_weighting_whose_attention_is_nearest_to_the_original_is_taken(
    make_checkpoint: CheckpointFactory,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    sizes: tuple[int, int],
    best: int,
) -> None:
    """Each objective alone, measured in its checkpoint; the constant channel keeps the norm out of it."""
    source = make_checkpoint(num_hidden_layers=1)
    mla = Mla(*sizes, "exact")
    convert(source, tmp_path / "chosen", mla)
    errors = []
    for index, objective in enumerate(OBJECTIVES):
        monkeypatch.setattr("kvconvert.convert.methods.compression.OBJECTIVES", (objective,))
        convert(source, tmp_path / str(index), mla)
        errors.append(attention_error(source, tmp_path / str(index)))
    assert errors.index(min(errors)) == best
    assert error_of(tmp_path / str(best), tmp_path / "chosen") == 0


def test_gain_takes_a_frequency_as_often_as_it_has_different_keys(
    make_checkpoint: CheckpointFactory, tmp_path: Path
) -> None:
    """Eight keys that have nothing in common, all of the fastest frequency."""
    source = make_checkpoint()
    keys = torch.randn(8, 2, 4, 64, generator=torch.Generator().manual_seed(4)) / 4
    keys[:, :, 1:] = 0
    set_keys_and_values(source, "k_proj", keys.flatten(0, 2))
    convert(source, tmp_path / "mla", Mla(65, 16, "exact", "gain"))
    parameters = json.loads((tmp_path / "mla/config.json").read_text())["rope_parameters"]
    assert parameters["rope_type"] == "longrope"
    assert load(tmp_path / "mla").model.rotary_emb.inv_freq.tolist() == pytest.approx([1.0] * 8)
    assert error_of(source, tmp_path / "mla") < EXACT


@pytest.mark.parametrize("refit", [True, False])
def test_one_candidate_is_held_beside_the_best_and_head_outputs_only_for_the_refit(
    make_checkpoint: CheckpointFactory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refit: bool
) -> None:
    """Each is gigabytes of a large model."""
    alive: weakref.WeakSet[LatentAttention] = weakref.WeakSet()
    before: list[int] = []
    collected: list[bool] = []
    run = LayerwiseModel.run

    def counted(*arguments: Any, **named: Any) -> Iterator[LatentAttention]:
        candidates = latent_attentions(*arguments, **named)
        while True:
            held = len(alive)
            made = [*islice(candidates, 1)]
            if not made:
                return
            before.append(held)
            alive.add(made[0])
            yield made.pop()

    def noted(*arguments: Any, **named: Any) -> torch.Tensor:
        collected.append(len(arguments) > 4 and arguments[4] is not None)
        return run(*arguments, **named)

    monkeypatch.setattr("kvconvert.convert.methods.compression.latent_attentions", counted)
    monkeypatch.setattr(LayerwiseModel, "run", noted)
    convert(make_checkpoint(), tmp_path / "mla", Mla(24, 8, rope_selection="gain"), refit=refit)
    assert before == ([0, 1, 1, 1] * 2 if refit else [0, 0])
    assert any(collected) is refit


def test_a_layer_is_refitted_to_what_the_refitted_layers_before_it_give(
    make_checkpoint: CheckpointFactory, tmp_path: Path
) -> None:
    """With hardly a ridge the error of the second layer's output has nothing in common with what o_proj reads there."""
    source = make_checkpoint()
    convert(source, tmp_path / "mla", Mla(24, 8, "exact"), refit_ridge=1e-6)
    read, given = [], []
    for directory in (source, tmp_path / "mla"):
        model = load(directory)
        seen: list[torch.Tensor] = []
        o_proj = model.model.layers[1].self_attn.o_proj
        o_proj.register_forward_pre_hook(lambda _, inputs, seen=seen: seen.append(inputs[0].flatten(0, 1).double()))
        logits(model)
        read.append(seen[0])
        given.append(seen[0] @ o_proj.weight.detach().double().T)
    moment, scale = (part.T @ read[1] for part in (given[0] - given[1], given[0]))
    assert moment.abs().max() < 1e-3 * scale.abs().max()


def test_without_text_the_gain_before_the_attention_is_as_good_as_one_in_its_weights(
    make_checkpoint: CheckpointFactory, tmp_path: Path
) -> None:
    source = make_checkpoint()
    model = load(source)
    for layer in model.model.layers:
        layer.input_layernorm.weight.data.mul_(torch.linspace(0.3, 3, 64))
    model.save_pretrained(source)
    for layer in model.model.layers:
        for projection in (layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj):
            projection.weight.data.mul_(layer.input_layernorm.weight.data)
        layer.input_layernorm.weight.data.fill_(1)
    model.save_pretrained(tmp_path / "folded")
    for directory in (source, tmp_path / "folded"):
        convert(directory, tmp_path / f"{directory.name}-mla", Mla(24, 8, "exact"), text=None)
    assert error_of(tmp_path / "model-mla", tmp_path / "folded-mla") < EXACT


def test_candidates_are_compared_without_the_norm_of_their_latents(
    make_checkpoint: CheckpointFactory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Channels of other sizes, which the norm would mix otherwise, are the same layer."""
    source, mla = make_checkpoint(num_hidden_layers=1), Mla(24, 8)
    errors: dict[str, list[float]] = {"as-it-is": [], "resized": []}
    error = candidate_error

    def resized(*arguments: Any, **named: Any) -> Iterator[LatentAttention]:
        sizes = torch.logspace(0, 1, 24, dtype=torch.float64)
        for layer in latent_attentions(*arguments, **named):
            latent = sizes[:, None] * layer.latent
            yield replace(layer, latent=latent, key_up=layer.key_up / sizes, value_up=layer.value_up / sizes)

    for name, found in errors.items():

        def recorded(*arguments: Any, found: list[float] = found) -> float:
            found.append(error(*arguments))
            return found[-1]

        monkeypatch.setattr("kvconvert.convert.methods.compression.candidate_error", recorded)
        convert(source, tmp_path / name, mla)
        monkeypatch.setattr("kvconvert.convert.methods.compression.latent_attentions", resized)
    assert len(set(errors["as-it-is"])) == 4
    assert errors["resized"] == pytest.approx(errors["as-it-is"], rel=1e-4)


def test_gains_are_those_of_all_layers(make_checkpoint: CheckpointFactory, tmp_path: Path) -> None:
    """One key of the fastest frequency in the first layer, eight of the next one in the second."""
    source = make_checkpoint()
    model = load(source)
    generator = torch.Generator().manual_seed(13)
    keys = torch.zeros(2, 8, 2, 4, 64)
    keys[0, :, :, 0] = torch.randn(2, 64, generator=generator)
    keys[1, :, :, 1] = torch.randn(8, 2, 64, generator=generator)
    for layer, rows in zip(model.model.layers, keys, strict=True):
        layer.self_attn.k_proj.weight.data.copy_(rows.flatten(0, 2))
    model.save_pretrained(source)
    convert(source, tmp_path / "mla", Mla(24, 4, rope_selection="gain"))
    assert load(tmp_path / "mla").model.rotary_emb.inv_freq.tolist() == pytest.approx([1.0, 0.1])


def test_the_config_says_what_the_source_s_says_beside_the_attention(
    make_checkpoint: CheckpointFactory, tmp_path: Path
) -> None:
    settings = {
        "bos_token_id": 5,
        "eos_token_id": 6,
        "pad_token_id": 7,
        "hidden_act": "gelu",
        "attention_dropout": 0.25,
        "initializer_range": 0.5,
        "rms_norm_eps": 0.125,
        "max_position_embeddings": 96,
    }
    source = make_checkpoint(**settings)
    plan = convert(source, tmp_path / "mla", Mla(24, 12, rope_selection="gain"))
    config = json.loads((tmp_path / "mla/config.json").read_text())
    assert {name: config[name] for name in settings} == settings
    assert config["first_k_dense_replace"] == 2
    assert config["rope_scaling"] | {"rope_theta": config["rope_theta"]} == config["rope_parameters"]
    assert plan.bytes_in == sum(tensor.nbytes for tensor in load_file(source / "model.safetensors").values())


def test_values_padded_for_a_kernel_change_nothing(make_checkpoint: CheckpointFactory, tmp_path: Path) -> None:
    source = make_checkpoint(num_key_value_heads=4)
    for v_head_dim in (None, 16):
        convert(source, tmp_path / str(v_head_dim), Mla(24, 8, "exact", v_head_dim=v_head_dim))
    assert load(tmp_path / "16").config.v_head_dim == 16
    assert error_of(tmp_path / "None", tmp_path / "16") < 1e-5


def test_shards_and_dtype(make_checkpoint: CheckpointFactory, tmp_path: Path) -> None:
    whole = make_checkpoint(num_key_value_heads=4)
    parts = make_checkpoint(num_key_value_heads=4, name="parts", max_shard_size="100KB")
    assert len(list(parts.glob("*.safetensors"))) > 1
    for source in (whole, parts):
        convert(source, tmp_path / f"{source.name}-mla", Mla(24, 8))
    assert error_of(tmp_path / "model-mla", tmp_path / "parts-mla") == 0
    half = make_checkpoint(name="half", dtype=torch.bfloat16, num_key_value_heads=1)
    convert(half, tmp_path / "half-mla", Mla(9, 8, "exact"))
    assert {tensor.dtype for tensor in load_file(tmp_path / "half-mla/model.safetensors").values()} == {torch.bfloat16}
    assert error_of(half, tmp_path / "half-mla") < 0.05  # weights rounded to 8 bits


def test_a_base_model_becomes_a_base_model(make_checkpoint: CheckpointFactory, tmp_path: Path) -> None:
    source = make_checkpoint(num_key_value_heads=1)
    load(source).model.save_pretrained(tmp_path / "base")
    convert(tmp_path / "base", tmp_path / "mla", Mla(9, 8, "exact"))
    assert json.loads((tmp_path / "mla/config.json").read_text())["architectures"] == ["DeepseekV3Model"]
    whole, base = load(source), AutoModelForCausalLM.from_pretrained(tmp_path / "mla").model
    with torch.inference_mode():
        expected, found = (model(input_ids=TOKENS).last_hidden_state for model in (whole.model, base))
    assert (found - expected).abs().max() < EXACT * expected.abs().max()


@pytest.mark.parametrize(
    ("model_type", "overrides", "mla", "says"),
    [
        ("llama", {}, Mla(66, 8, "exact"), "use 2 to 65"),
        ("llama", {"num_key_value_heads": 1}, Mla(17, 8), "use 1 to 16"),
        ("llama", {}, Mla(16, 7), "use an even number, for example 6"),
        ("llama", {}, Mla(16, 10), "use up to 8, or 64 with a selection of gain"),
        ("llama", {}, Mla(16, 8, v_head_dim=4), "use 8 or more"),
        ("qwen3", {}, Mla(16, 8), "GQA, MQA and CLA can shrink its cache"),
        ("gemma3_text", {}, Mla(16, 8), "GQA and MQA can shrink its cache"),
        ("stablelm", {}, Mla(16, 8), "MLA takes llama, mistral"),
        ("llama", {"mlp_bias": True}, Mla(16, 8), "MLP has biases"),
        ("llama", {"attention_bias": True}, Mla(16, 8), "latent_norm is exact"),
        ("mistral", {"sliding_window": 4}, Mla(16, 8), "set sliding_window to null"),
        (
            "llama",
            {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 99.0, "factor": 2.0}},
            Mla(16, 8),
            "its RoPE (dynamic) is none of those known to turn alike at every length",
        ),
        (
            "llama",
            {"rope_parameters": {"rope_type": "proportional", "rope_theta": 99.0}},
            Mla(16, 8),
            "its RoPE (proportional) is none of those",
        ),
    ],
)
def test_what_a_latent_cannot_hold_is_refused_with_what_would_work(
    make_checkpoint: CheckpointFactory, tmp_path: Path, model_type: str, overrides: dict[str, Any], mla: Mla, says: str
) -> None:
    source = make_checkpoint(model_type, **overrides)
    with pytest.raises(UnsupportedError) as caught:
        convert(source, tmp_path / "mla", mla)
    assert says in f"{caught.value} {caught.value.hint}"


@pytest.mark.parametrize(
    ("model_type", "overrides", "possible"),
    [
        ("llama", {}, True),
        ("llama", {"attention_bias": True}, True),  # with --latent-norm exact
        ("llama", {"mlp_bias": True}, False),
        ("mistral", {"sliding_window": 4}, False),
        ("qwen3", {}, False),
        ("stablelm", {}, False),
    ],
)
def test_inspect_gives_the_reason_of_the_command(
    make_checkpoint: CheckpointFactory, tmp_path: Path, model_type: str, overrides: dict[str, Any], possible: bool
) -> None:
    source = make_checkpoint(model_type, **overrides)
    with open_checkpoint(source, headers_only=True) as checkpoint:
        (target,) = (target for target in inspect_checkpoint(checkpoint).targets if target.command == "mha2mla")
    assert target.possible is possible
    assert target.latent_norm == ("exact" if overrides.get("attention_bias") else None)
    if not possible:
        with pytest.raises(UnsupportedError, match=re.escape(f"model: {target.reason}")):
            convert(source, tmp_path / "mla", Mla(16, 8))


def test_unknown_choices_are_refused() -> None:
    with pytest.raises(UnsupportedError, match="unknown latent norm"):
        Mla(16, 8, "none")  # type: ignore[arg-type]
    with pytest.raises(UnsupportedError, match="unknown RoPE selection"):
        Mla(16, 8, rope_selection="low")  # type: ignore[arg-type]


@pytest.mark.parametrize("ridge", [-1.0, math.inf, math.nan])
def test_a_refit_is_not_pulled_by_less_than_nothing(ridge: float) -> None:
    for method in (partial(Mla, 16, 8), partial(Cla, share=2), partial(Gqa, 2)):
        with pytest.raises(UnsupportedError, match=f"refit_ridge = {ridge}, expected a number from 0 on"):
            method(refit_ridge=ridge)


SHAPE = AttentionShape(24, 4, 2, 6, (None,))
ROTARY = Rotary((1.0, 0.2), longest=64)


def random_layer(seed: int = 0) -> tuple[Projections, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)

    def normal(*size: int) -> torch.Tensor:
        return torch.randn(size, generator=generator, dtype=torch.float64)

    inputs = normal(500, 24) @ normal(24, 24)
    inputs = torch.cat([inputs, torch.ones(500, 1, dtype=torch.float64)], dim=1)
    projections = Projections(normal(24, 25), normal(12, 25), normal(12, 25), normal(24, 24))
    return projections, inputs


def scores_and_outputs(
    queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, o: torch.Tensor, frequencies: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """By the definition of RoPE, pair by pair: (4 heads, n, n) scores, (4 heads, n, 24) outputs of each value."""
    num_tokens, num_pairs = queries.shape[0], len(frequencies)
    phases = torch.exp(1j * torch.arange(num_tokens)[:, None] * frequencies)

    def turned(heads: torch.Tensor) -> torch.Tensor:
        pairs = torch.complex(heads[..., :num_pairs], heads[..., num_pairs : 2 * num_pairs]) * phases[:, None]
        return torch.cat([pairs.real, pairs.imag, heads[..., 2 * num_pairs :]], dim=-1)

    scores = torch.einsum("thd,jhd->htj", turned(queries), turned(keys))
    return scores, torch.einsum("Dhd,jhd->hjD", o.unflatten(1, (4, -1)), values)


def test_a_compressed_layer_has_the_scores_and_outputs_of_its_source() -> None:
    """With room for everything: every pair in the rotary key, and values and unturned keys in the latent.

    Scores are equal up to what they all have in common for a query, which a softmax does not see.
    """
    projections, inputs = random_layer()
    rope_pairs = [(0, 0), (0, 1), (1, 0), (1, 1)]
    layer = latent_attention(
        projections, SHAPE, ROTARY, inputs.T @ inputs / 500, rope_pairs=rope_pairs, kv_lora_rank=17, constant=True
    )
    x = inputs[:20]
    queries, keys, values = (
        (x @ rows.T).unflatten(1, (-1, 6)) for rows in (projections.q, projections.k, projections.v)
    )
    keys, values = (part.repeat_interleave(2, dim=1) for part in (keys, values))
    frequencies = torch.tensor(ROTARY.frequencies, dtype=torch.float64)
    expected = scores_and_outputs(queries, keys, values, projections.o, frequencies)

    latent = x @ layer.latent.T
    assert torch.equal(latent[:, -1], torch.ones(20, dtype=torch.float64))
    queries = torch.einsum("hrD,tD->thr", layer.q, x) / ((6 + 8) / 6) ** 0.5
    keys = torch.einsum("gdR,tR->tgd", layer.key_up, latent).repeat_interleave(2, dim=1)
    values = torch.einsum("gdR,tR->tgd", layer.value_up, latent).repeat_interleave(2, dim=1)
    rope_key = (x @ layer.rope_key.T)[:, None].expand(-1, 4, -1)
    found, outputs = scores_and_outputs(
        torch.cat([queries[..., 6:], queries[..., :6]], dim=-1),
        torch.cat([rope_key, keys], dim=-1),
        values,
        layer.o,
        torch.tensor([1.0, 1.0, 0.2, 0.2], dtype=torch.float64),
    )
    found, scores = (part - part.mean(-1, keepdim=True) for part in (found, expected[0]))
    torch.testing.assert_close(found, scores, rtol=1e-8, atol=1e-8 * float(scores.abs().max()))
    torch.testing.assert_close(outputs, expected[1], rtol=1e-8, atol=1e-8 * float(expected[1].abs().max()))
    assert layer.values_retained == pytest.approx(1)


@pytest.mark.parametrize("still", [True, False], ids=["beside-a-still-key", "alone"])
def test_a_shared_key_of_other_frequencies_is_a_least_squares_over_distances(still: bool) -> None:
    """By brute force: rotations position by position, and no small change of the key or of a reader does better."""
    projections, inputs = random_layer(5)
    gram = inputs.T @ inputs / 500
    frequencies, shared_frequencies = (1.0, 0.2), (0.2, 1.0, 1.0)
    shared_rotary = Rotary(shared_frequencies, longest=32)
    rotary = Rotary(frequencies, longest=32)
    heads = list(projections.k.split(6))
    generator = torch.Generator().manual_seed(6)
    roots = torch.randn(2, 6, 6, generator=generator, dtype=torch.float64)
    weights = list(roots @ roots.mT)
    rotations = ExpectedRotations(
        expected_rotation_between(shared_rotary, 6, shared_rotary, 6, centred=still),
        expected_rotation_between(shared_rotary, 6, rotary, 6, centred=still),
        expected_rotation_between(rotary, 6, rotary, 6, centred=still),
    )
    start = Merged(torch.randn(6, 12, generator=generator, dtype=torch.float64), torch.zeros(2, 6, 6), 0.0, 0.0)
    stacked = torch.stack(heads)
    covariances = torch.einsum("gax,xy,hby->ghab", stacked, gram, stacked)
    merged = merge_at_distances(start, covariances, torch.stack(weights), rotations).over(stacked)

    def rotation(angles: tuple[float, ...], distance: int) -> torch.Tensor:
        turn = torch.eye(6, dtype=torch.float64)
        for pair, angle in enumerate(angles):
            c, s = math.cos(-angle * distance), math.sin(-angle * distance)
            other = pair + len(angles)
            turn[pair, pair], turn[pair, other], turn[other, pair], turn[other, other] = c, -s, s, c
        return turn

    likely = [1 / (distance + 1) for distance in range(32)]
    likely = [value / sum(likely) for value in likely]

    def error(shared: torch.Tensor, readers: torch.Tensor) -> float:
        total = 0.0
        for head, reader, weight in zip(heads, readers, weights, strict=True):
            differences = [
                rotation(frequencies, distance) @ head - reader @ rotation(shared_frequencies, distance) @ shared
                for distance in range(32)
            ]
            if still:  # a key without position takes their mean
                mean = sum(value * part for value, part in zip(likely, differences, strict=True))
                differences = [part - mean for part in differences]
            for value, part in zip(likely, differences, strict=True):
                total += value * float(((part @ gram @ part.T) * weight).sum())
        return total

    least = error(merged.shared, merged.readers)
    assert least == pytest.approx(merged.total - merged.kept, rel=1e-6)
    assert least < 0.9 * merged.total
    for attempt in range(10):
        noise = torch.Generator().manual_seed(attempt)
        change = 0.01 * torch.randn(2, 6, 6, generator=noise, dtype=torch.float64)
        assert error(merged.shared, merged.readers * (1 + change)) > least
        rows = sum(part @ head for part, head in zip(change, heads, strict=True))
        assert error(merged.shared + 0.1 * rows, merged.readers) > least * (1 - 1e-3)


@pytest.mark.parametrize("still", [True, False])
@pytest.mark.parametrize("constant", [True, False])
@pytest.mark.parametrize("rope_pairs", [[(0, 0)], [(1, 0), (0, 0), (0, 1)]], ids=["one-pair", "three-pairs"])
def test_what_is_kept_of_keys_is_that_of_scores_over_distances(
    rope_pairs: list[tuple[int, int]], constant: bool, still: bool
) -> None:
    """By brute force, score by score: of each query with each key at each distance, heads counted by their outputs.

    What all keys add to a query's scores is no error. The last dims do not turn.
    """
    projections, inputs = random_layer(9)
    inputs = inputs[:40]
    gram = inputs.T @ inputs / 40
    rotary = Rotary((1.0, 0.2), longest=16)
    layer = latent_attention(
        projections,
        SHAPE,
        rotary,
        gram,
        rope_pairs=rope_pairs,
        kv_lora_rank=7,
        constant=constant,
        objective=LatentObjective(still),
    )
    distances = torch.arange(16, dtype=torch.float64)
    likely = 1 / (distances + 1)
    likely /= likely.sum()

    def scores(queries: torch.Tensor, keys: torch.Tensor, frequencies: list[float]) -> torch.Tensor:
        """(heads, queries, keys, distances) of (heads, n, dims); dims beyond the frequencies' do not turn."""
        pairs, num_pairs = [], len(frequencies)
        for heads in (queries, keys):
            pairs.append(torch.complex(heads[..., :num_pairs], heads[..., num_pairs : 2 * num_pairs]))
        turns = torch.exp(-1j * torch.tensor(frequencies, dtype=torch.float64)[:, None] * distances)
        turned = torch.einsum("hqf,hkf,fn->hqkn", pairs[0].conj(), pairs[1], turns).real
        still = torch.einsum("hqd,hkd->hqk", queries[..., 2 * num_pairs :], keys[..., 2 * num_pairs :])
        return turned + still[..., None]

    queries, keys, values = (
        (rows @ inputs.T).unflatten(0, (-1, 6)).mT for rows in (projections.q, projections.k, projections.v)
    )
    keys, values = (part.repeat_interleave(2, dim=0) for part in (keys, values))
    expected = scores(queries, keys, [1.0, 0.2])
    queries = layer.q @ inputs.T / ((6 + 2 * len(rope_pairs)) / 6) ** 0.5
    still_keys = (layer.key_up @ layer.latent @ inputs.T).repeat_interleave(2, dim=0)
    rope_keys = (layer.rope_key @ inputs.T).expand(4, -1, -1)
    found = scores(
        torch.cat([queries[:, 6:], queries[:, :6]], dim=1).mT,
        torch.cat([rope_keys, still_keys], dim=1).mT,
        [rotary.frequencies[frequency] for frequency, _ in rope_pairs],
    )

    outputs = torch.einsum("Dhd,hkd->hkD", projections.o.unflatten(1, (4, 6)), values)
    powers = outputs.square().sum(2).mean(1)[:, None, None]
    errors = found - expected
    errors = errors - (errors * likely).sum(3, keepdim=True).mean(2, keepdim=True)
    lost, energy = (float((powers * (part.square() * likely).sum(3)).sum()) for part in (errors, expected))
    assert layer.keys_retained == pytest.approx(1 - lost / energy, abs=1e-9)
    assert 0.1 < layer.keys_retained < 0.99


def test_values_alone_keep_what_the_best_low_rank_map_keeps() -> None:
    """Without keys that count, against the singular values of W_o W_v C^½, stacked over the query heads."""
    projections, inputs = random_layer(1)
    gram = inputs.T @ inputs / 500
    still = without_constant(replace(projections, k=torch.zeros_like(projections.k)), gram)
    layer = latent_attention(still, SHAPE, ROTARY, gram, rope_pairs=[(0, 0)], kv_lora_rank=5, constant=False)
    values, vectors = torch.linalg.eigh(gram)
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T
    outputs = projections.o.unflatten(1, (4, 6)).transpose(0, 1)
    stacked = torch.cat([outputs[head] @ still.v[6 * (head // 2) :][:6] @ root for head in range(4)])
    energies = torch.linalg.svdvals(stacked).square()
    assert layer.values_retained == pytest.approx(float(energies[:5].sum() / energies.sum()), abs=1e-9)


def test_a_latent_does_not_depend_on_the_side_that_it_is_computed_from() -> None:
    """More rows than inputs, and the same layer with inputs that nothing reads, so that there are fewer rows."""
    projections, inputs = random_layer(8)  # 24 rows of keys and values
    x = inputs[:, :12]
    few = replace(projections, **{side: getattr(projections, side)[:, :12] for side in "qkv"})
    unread = torch.zeros(1, 28, dtype=torch.float64)

    def widened(rows: torch.Tensor) -> torch.Tensor:
        return torch.cat([rows[:, :11], unread.expand(len(rows), -1), rows[:, 11:]], dim=1)

    noise = torch.randn(len(x), 28, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    wide = replace(few, **{side: widened(getattr(few, side)) for side in "qkv"})
    x = torch.cat([x[:, :11], torch.ones(len(x), 1, dtype=torch.float64)], dim=1)
    beside = torch.cat([x[:, :11], noise, x[:, 11:]], dim=1)
    made = [
        latent_attention(
            projections, SHAPE, ROTARY, x.T @ x / len(x), rope_pairs=[(0, 0)], kv_lora_rank=5, constant=True
        )
        for projections, x in ((few, x), (wide, beside))
    ]
    found, expected = (layer.latent for layer in made)
    assert not expected[:, 11:-1].abs().max() > 1e-9
    expected = torch.cat([expected[:, :11], expected[:, -1:]], dim=1)
    signs = (found * expected).sum(1).sign()
    torch.testing.assert_close(signs[:, None] * found, expected)
    channels = x @ found.T
    expected = torch.diag(torch.tensor([1.0, 1, 1, 1, 0], dtype=torch.float64))  # the last channel is constant
    torch.testing.assert_close(channels.T.cov(correction=0), expected)


def test_gain_of_a_pair_is_what_a_key_without_position_would_lose() -> None:
    """One head, one frequency: the mean rotation is the best constant, by least squares over the distances."""
    projections, inputs = random_layer(2)
    shape = AttentionShape(24, 4, 1, 6, (None,))
    one = replace(projections, k=projections.k[:6], v=projections.v[:6])
    rotary = Rotary((1.0, 0.2, 0.01), longest=64)
    gains = rope_pair_gains(one, shape, rotary, inputs.T @ inputs / 500)
    distances = torch.arange(64, dtype=torch.float64)
    likely = 1 / (distances + 1)
    likely /= likely.sum()
    lost = []
    for frequency in rotary.frequencies:
        turns = torch.polar(torch.ones_like(distances), frequency * distances)
        best = (likely * turns).sum()
        lost.append(float((likely * (turns - best).abs().square()).sum()))
    energies = gains[:, 0] / torch.tensor(lost, dtype=torch.float64)
    assert float(energies.sum()) == pytest.approx(1)
    assert gains.shape == (3, 1)


def test_without_constant_is_the_best_map_of_the_input_alone() -> None:
    projections, inputs = random_layer(3)
    found = without_constant(projections, inputs.T @ inputs / 500)
    wanted = inputs @ projections.k.T
    expected = torch.linalg.lstsq(inputs[:, :-1], wanted).solution.T
    torch.testing.assert_close(found.k[:, :-1], expected, rtol=1e-7, atol=1e-7)
    assert not torch.cat([found.q, found.k, found.v])[:, -1].any()
    assert torch.equal(found.o, projections.o)


def test_a_normalised_latent_gives_nearly_the_keys_and_values_that_it_gave_before() -> None:
    projections, inputs = random_layer(4)
    projections = without_constant(projections, inputs.T @ inputs / 500)
    inputs[:, :-1] = F.rms_norm(inputs[:, :-1], (24,))
    layer = latent_attention(
        projections, SHAPE, ROTARY, inputs.T @ inputs / 500, rope_pairs=[(0, 0)], kv_lora_rank=24, constant=False
    )
    shaped = normalised(layer, inputs, torch.full((len(inputs),), 1 / len(inputs)))
    tokens = inputs @ shaped.latent.T
    spread = tokens.square().mean(1).sqrt()
    assert float(spread.std() / spread.mean()) < 1e-3
    assert float(spread.mean()) == pytest.approx(1, abs=1e-3)
    before = inputs @ (layer.value_up[0] @ layer.latent).T
    after = (tokens / spread[:, None]) @ shaped.value_up[0].T
    assert (after - before).square().mean() < 1e-4 * before.square().mean()


def test_what_all_keys_have_in_common_needs_neither_latent_nor_rotary_key() -> None:
    """It adds the same to all scores of a query. The last dims do not turn, and so the rotary key is the same."""
    projections, inputs = random_layer(10)
    gram = inputs.T @ inputs / 500
    rows = torch.zeros(2, 6, dtype=torch.float64)
    rows[:, 4:] = 50
    common = replace(projections, k=projections.k.clone())
    common.k[:, -1] += rows.flatten()
    latents = [
        latent_attention(part, SHAPE, ROTARY, gram, rope_pairs=[(0, 0)], kv_lora_rank=5, constant=False).latent
        for part in (projections, common)
    ]
    torch.testing.assert_close(*latents)
    turned = replace(projections, k=projections.k.clone())
    turned.k[:, -1] += 50
    torch.testing.assert_close(*(rope_pair_gains(part, SHAPE, ROTARY, gram) for part in (projections, turned)))


def test_what_reads_a_normalised_latent_is_a_weighted_least_squares() -> None:
    """Its error has nothing in common with the latent, as the weights count tokens."""
    projections, inputs = random_layer(11)
    projections = without_constant(projections, inputs.T @ inputs / 500)
    layer = latent_attention(
        projections, SHAPE, ROTARY, inputs.T @ inputs / 500, rope_pairs=[(0, 0)], kv_lora_rank=6, constant=False
    )
    weights = torch.cat([torch.full((50,), 0.9 / 50), torch.full((450,), 0.1 / 450)])
    shaped = normalised(layer, inputs, weights)
    tokens = inputs @ shaped.latent.T
    tokens = tokens / tokens.square().mean(1, keepdim=True).sqrt()
    before, after = inputs @ (layer.value_up[0] @ layer.latent).T, tokens @ shaped.value_up[0].T
    moment, scale = (part.T @ (weights.double()[:, None] * tokens) for part in (after - before, before))
    assert (after - before).square().mean() > 1e-3 * before.square().mean()
    assert moment.abs().max() < 1e-6 * scale.abs().max()


def test_a_fit_to_the_norm_ends_where_tokens_that_are_left_out_do_not_gain() -> None:
    """Of few tokens in many channels the norm is learnt by heart."""
    tokens = torch.randn(64, 16, generator=torch.Generator().manual_seed(12), dtype=torch.float64)
    start = torch.eye(16, dtype=torch.float64)

    def spread(fitted: torch.Tensor) -> float:
        return float((tokens[::8] @ fitted).square().mean(1).log().square().mean())

    found = constant_norm(tokens, torch.full((64,), 1 / 64, dtype=torch.float64), start)
    assert spread(found) <= spread(start)


@pytest.mark.parametrize(
    ("mla", "shape", "reason"),
    [
        (Mla(512, 64), (128,), None),
        (Mla(512, 64, v_head_dim=128), (64,), None),
        (Mla(448, 64), (128,), None),
        (Mla(96, 32), (128,), "96 + 32 = 128 cached numbers"),
        (Mla(512, 64), (64,), "set v_head_dim = 128"),
        (Mla(512, 64), (80,), "a head_dim of 80"),
    ],
)
def test_sizes_with_fast_kernels(mla: Mla, shape: tuple[int], reason: str | None) -> None:
    found = latent_kernels(mla.latent_sizes(AttentionShape(4096, 32, 32, shape[0], (None,))))
    assert (found is None) if reason is None else (found is not None and reason in found)


LARGE = {"kv_lora_rank": 512, "qk_rope_head_dim": 64, "qk_nope_head_dim": 128, "v_head_dim": 128}
PLAIN = LARGE | {"attention_bias": False, "rope_parameters": {"rope_type": "default"}, "rope_interleave": True}
SMALL, LOW_RANK = PLAIN | {"kv_lora_rank": 96}, PLAIN | {"q_lora_rank": 1536}
ALL_HEADS = "only with VLLM_MLA_DISABLE=1, which caches all heads' keys and values"


@pytest.mark.parametrize(
    ("config", "vllm", "sglang", "llama_cpp"),
    [
        (PLAIN, ("read", ""), True, False),
        (PLAIN | {"attention_bias": True}, ("run", "with --model-impl transformers"), False, False),
        (PLAIN | {"rope_parameters": {"rope_type": "longrope"}}, ("run", "with --model-impl"), False, False),
        (PLAIN | {"rope_interleave": False}, ("run", "with --model-impl transformers"), False, False),
        (SMALL, ("read", ALL_HEADS), None, False),
        (PLAIN | {"v_head_dim": 64}, ("read", ALL_HEADS), None, False),
        (SMALL | {"attention_bias": True}, ("read", ALL_HEADS), False, False),
        (LOW_RANK, ("read", ""), True, True),
        (LOW_RANK | {"attention_bias": True}, ("run", "with --model-impl transformers"), False, False),
    ],
)
def test_engines_depend_on_sizes_biases_and_rope(
    config: dict[str, Any], vllm: tuple[str, str], sglang: bool | None, llama_cpp: bool
) -> None:
    engines = {engine.engine: engine for engine in serving("deepseek_v3", config)}
    found, (evidence, how) = engines["vLLM"], vllm
    assert (found.works, found.evidence) == (True, evidence)
    assert found.how.startswith(how) if how else not found.how
    assert ("--model-impl transformers" in found.how) is (sglang is False)
    assert engines["SGLang"].works is sglang
    assert engines["llama.cpp"].works is llama_cpp


def test_the_command_end_to_end(
    make_checkpoint: CheckpointFactory, invoke: Command, prose_file: Path, tmp_path: Path
) -> None:
    """After mha2gqa; then inspect, evaluate, uptrain, the card, and what a second conversion says."""
    source = make_checkpoint(with_tokenizer=True)
    grouped, result = tmp_path / "grouped", tmp_path / "mla"
    assert invoke("mha2gqa", source, "--groups", 4, "--output", grouped).returncode == 0
    outcome = invoke(
        "mha2mla", "--kv-lora-rank", 20, "--qk-rope-head-dim", 4, grouped, "--calibration", prose_file,
        "--calibration-tokens", 2048, "--output", result, "--json",
    )  # fmt: skip
    assert outcome.returncode == 0, outcome.stderr
    summary = json.loads(outcome.stdout)
    assert summary["opened_as"] == "DeepseekV3ForCausalLM"
    assert summary["cache_bytes_per_token"] == {"source": 2 * 64 * 2, "result": 2 * 24 * 2}
    assert summary["fast_kernels"] is False
    assert "no engine has a fast kernel" in outcome.stderr
    assert "the cache gets larger" not in outcome.stderr
    provenance = json.loads((result / "kvconvert.json").read_text())
    assert provenance["latent"]["kv_lora_rank"] == 20
    assert provenance["calibration"]["latent_norm"] == "calibrated"
    card = (result / "README.md").read_text()
    assert "a latent of 20 numbers and a rotary key of 4" in card
    assert f"vLLM (by its source, untested: {ALL_HEADS}: no kernel for these sizes)." in card
    assert "SGLang" not in card

    inspected = json.loads(invoke("inspect", result, "--json").stdout)
    assert (inspected["attention"], inspected["cache_bytes_per_token"]) == ("MLA", 96)
    assert not any(target["possible"] for target in inspected["targets"])
    printed = invoke("inspect", result).stdout
    assert "20, and a rotary key of 4; no fast kernels: 20 + 4 = 24 cached numbers" in printed
    evaluated = invoke("evaluate", result, "--data", prose_file, "--window", 64, "--against", grouped, "--json")
    assert json.loads(evaluated.stdout)["num_tokens"] > 100
    trained = invoke(
        "uptrain", result, "--data", prose_file, "--steps", 2, "--sequence-length", 32, "--global-batch-tokens", 64,
        "--teacher", grouped, "--output", tmp_path / "trained",
    )  # fmt: skip
    assert trained.returncode == 0, trained.stderr
    assert load(tmp_path / "trained").config.model_type == "deepseek_v3"

    again = invoke("mha2mla", result, "--kv-lora-rank", 8, "--qk-rope-head-dim", 4)
    assert again.returncode == 2
    assert "its cache holds a latent already" in again.stderr
    grouping = invoke("mha2gqa", result, "--groups", 2)
    assert grouping.returncode == 2
    assert "its cache holds a latent, not keys and values" in grouping.stderr


def test_the_command_without_text_and_its_errors(
    make_checkpoint: CheckpointFactory, invoke: Command, tmp_path: Path
) -> None:
    source = make_checkpoint(num_key_value_heads=1)
    sizes = ("--kv-lora-rank", 9, "--qk-rope-head-dim", 8, "--latent-norm", "exact", "--no-calibration")
    dry = invoke("mha2mla", source, *sizes, "--dry-run", "--output", tmp_path / "mla")
    assert dry.returncode == 0, dry.stderr
    assert "a latent of 9 and a rotary key of 8" in dry.stdout
    assert "the cache gets larger" in dry.stderr
    assert not (tmp_path / "mla").exists()
    assert invoke("mha2mla", source, *sizes, "--output", tmp_path / "mla").returncode == 0
    assert error_of(source, tmp_path / "mla") < EXACT
    for options, says in (
        (
            (*sizes, "--calibration", "text.jsonl"),
            "--calibration is about a calibration text, and --no-calib",
        ),
        (("--kv-lora-rank", 99, *sizes[2:]), "use 2 to 17"),
        ((*sizes[:3], 7, *sizes[4:]), "use an even number"),
    ):
        refused = invoke("mha2mla", source, *options, "--output", tmp_path / "other")
        assert refused.returncode == 2
        assert says in refused.stderr
        assert "Traceback" not in refused.stderr
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_dir()) == ["cwd", "mla", "model"]


def test_inspect_says_which_sizes_have_fast_kernels(
    make_checkpoint: CheckpointFactory, invoke: Command, tmp_path: Path
) -> None:
    build_model(hidden_size=1024, num_attention_heads=8, num_key_value_heads=8, head_dim=128).save_pretrained(
        tmp_path / "large"
    )
    printed = invoke("inspect", tmp_path / "large").stdout
    assert "fast kernels for 512 + 64 or 448 + 64 or 256 + 64" in printed
    small = invoke("inspect", make_checkpoint()).stdout
    assert "every size with fast kernels has a larger cache" in small
