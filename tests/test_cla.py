"""mha2cla: layers that share keys and values."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from conftest import (
    TOKENS,
    CheckpointFactory,
    Command,
    assert_gradients_everywhere,
    assert_same_function,
    load,
    logits,
)
from hypothesis import given
from hypothesis import strategies as st
from kvconvert.convert import Cla, LayerGrouping, as_cross_layer, execute, open_checkpoint
from kvconvert.convert.algebra.attention_shape import AttentionShape
from kvconvert.convert.algebra.head_merge import FreeTransformations, Heads, LayerInput, merge_layers, predicted_input
from kvconvert.convert.algebra.projections import Projections
from kvconvert.convert.algebra.rotations import Rotary
from kvconvert.convert.architectures.projections import read_projections
from kvconvert.convert.architectures.source import Source
from kvconvert.convert.calibration.text import CalibrationText
from kvconvert.convert.checkpoint.loading import class_config
from kvconvert.convert.errors import UnsupportedError
from kvconvert.convert.methods.layer_choice import best_layers, measure_damages, permitted_pairs
from kvconvert.convert.methods.prepared import Preparation
from kvconvert.convert.plan import AverageLayers, ConversionPlan, Step
from kvconvert.convert.runtime.transformers_interface import CACHE_NAME, cache_of
from kvconvert.convert.translations.routes import CROSS_LAYER
from safetensors.torch import load_file
from transformers import DynamicCache

TEXT = CalibrationText(TOKENS, "random")
PAIRS = LayerGrouping((0, 0, 2, 2))
WINDOW = {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 2}
SOURCES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama-tied-gqa": ("llama", {"tie_word_embeddings": True, "num_key_value_heads": 4}),
    "llama-scaled-rope": (
        "llama",
        {
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 99.0,
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 16,
            }
        },
    ),
    "mistral-window": ("mistral", {"sliding_window": 4}),
    "mistral": ("mistral", {"sliding_window": None, "rms_norm_eps": 1e-3}),
    "phi3": ("phi3", {"sliding_window": 6}),
    "phi3-partial": (
        "phi3",
        {"rope_parameters": {"rope_type": "default", "rope_theta": 99.0, "partial_rotary_factor": 0.5}},
    ),
    "qwen2": ("qwen2", {}),
    "qwen2-window": ("qwen2", WINDOW),
    "qwen3": ("qwen3", {"attention_bias": True}),
    "seed_oss": ("seed_oss", {"attention_out_bias": True}),
}
each_source = pytest.mark.parametrize(("model_type", "overrides"), SOURCES.values(), ids=SOURCES)


def convert(source: Path, output: Path, settings: Cla, **options: Any) -> Path:
    with as_cross_layer(open_checkpoint(source)) as view:
        scratch = output.with_name(f"{output.name}-scratch")
        scratch.mkdir()
        cla = replace(settings, **options)
        prepared = cla.prepare(view, Preparation(scratch, TEXT))
        execute(cla.plan(view), view.checkpoint, output, prepared.overlay)
    return output


def assert_close(found: torch.Tensor, expected: torch.Tensor, tolerance: float = 1e-5) -> None:
    scale = expected.abs().max().item()
    assert scale > 1
    torch.testing.assert_close(found, expected, rtol=0, atol=tolerance * scale)


def make_shareable(directory: Path, relate: Callable[[int, bool], torch.Tensor]) -> Any:
    """Let layer 1 read what layer 0 reads, up to the norms' gains, with keys and values that those of layer 0 give.

    `relate(head, is_key)` is the map, (head_dim, head_dim), from a head of layer 0 to the same one of layer 1.
    """
    model = load(directory)
    first, second = model.model.layers[0], model.model.layers[1]
    with torch.no_grad():
        # layer 0 adds hardly anything to the residual stream: nothing at all, and its keys would not count in a merge
        for module, factor in ((first.self_attn.o_proj, 1e-9), (first.mlp.down_proj, 0)):
            module.weight.mul_(factor)
            if module.bias is not None:
                module.bias.zero_()
        ratio = first.input_layernorm.weight / second.input_layernorm.weight
        for name in ("k_proj", "v_proj"):
            source, target = getattr(first.self_attn, name), getattr(second.self_attn, name)
            for head, rows in enumerate(target.weight.unflatten(0, (-1, 8))):
                matrix = relate(head, name == "k_proj")
                rows.copy_(matrix @ source.weight.unflatten(0, (-1, 8))[head] * ratio)
                if source.bias is not None:
                    target.bias.unflatten(0, (-1, 8))[head].copy_(matrix @ source.bias.unflatten(0, (-1, 8))[head])
    model.save_pretrained(directory)
    return model


def free_map(head: int, is_key: bool) -> torch.Tensor:
    """What a merge may undo: any invertible map of values, multiplications by complex numbers of keys' pairs."""
    generator = torch.Generator().manual_seed(2 * head + is_key)
    if not is_key:
        return torch.eye(8) + 0.5 * torch.randn(8, 8, generator=generator)
    real, imaginary = (torch.diag(part) for part in torch.randn(2, 4, generator=generator))
    return torch.cat([torch.cat([real, -imaginary], dim=1), torch.cat([imaginary, real], dim=1)])


@each_source
def test_a_source_is_the_same_function_in_the_class_for_it(
    model_type: str, overrides: dict[str, Any], make_checkpoint: CheckpointFactory, tmp_path: Path
) -> None:
    """Layers 0 and 1 share what both would compute."""
    source = make_checkpoint(model_type, num_hidden_layers=2, **overrides, max_shard_size="40KB")
    original = load(source)
    shared = convert(source, tmp_path / "out", Cla(LayerGrouping((0, 0)), merge="first"))
    model = load(shared)
    with torch.no_grad():  # layer 0 is as it was, whatever layer 1 reads
        for one in (original, model):
            one.model.layers[1].self_attn.o_proj.weight.zero_()
    assert type(model).__name__ == "CrossLayerDecoderForCausalLM"
    assert_close(logits(model), logits(original))


@each_source
def test_the_view_of_a_source_computes_what_the_source_does(
    model_type: str, overrides: dict[str, Any], make_checkpoint: CheckpointFactory, tmp_path: Path
) -> None:
    source = make_checkpoint(model_type, num_hidden_layers=3, **overrides)
    with as_cross_layer(open_checkpoint(source)) as view:
        heads = view.shape.num_key_value_heads
        plan = Cla(LayerGrouping((0, 0, 2)), merge="first").plan(view)
        steps = tuple(Step.copy(info) for info in view.checkpoint.tensors.values())
        execute(
            replace(plan, config=view.checkpoint.config, steps=steps, result=plan.source),
            view.checkpoint,
            tmp_path / "out",
        )
    converted = load(tmp_path / "out")
    assert_same_function(load(source), converted, heads)
    assert_gradients_everywhere(converted)


@pytest.mark.parametrize(
    ("model_type", "older"),
    [
        ("llama", {"rope_theta": 99.0}),
        ("mistral", {"rope_theta": 99.0, "rope_scaling": {"type": "linear", "factor": 2.0}}),
        ("phi3", {"rope_theta": 99.0, "partial_rotary_factor": 0.5}),
        ("qwen3", {"rope_theta": 99.0, "rope_scaling": None}),
    ],
)
def test_rotary_settings_as_version_4_wrote_them(
    model_type: str, older: dict[str, Any], make_checkpoint: CheckpointFactory, tmp_path: Path
) -> None:
    source = make_checkpoint(model_type, num_hidden_layers=4)
    config = json.loads((source / "config.json").read_text())
    del config["rope_parameters"]
    (source / "config.json").write_text(json.dumps(config | older))
    original = make_shareable(source, lambda head, is_key: torch.eye(8)) if model_type in ("llama", "mistral") else None
    (source / "config.json").write_text(json.dumps(config | older))
    if original is None:
        with as_cross_layer(open_checkpoint(source)) as view:
            found, expected = class_config(view.checkpoint.config), class_config(config | older)
        assert expected.rope_parameters.items() <= found.rope_parameters.items()
    else:
        assert_close(
            logits(load(convert(source, tmp_path / "out", Cla(LayerGrouping((0, 0, 2, 3)))))), logits(original)
        )


@pytest.mark.parametrize("model_type", CROSS_LAYER)
def test_what_a_config_leaves_out_is_the_default_of_its_class(
    model_type: str, make_checkpoint: CheckpointFactory
) -> None:
    source = make_checkpoint(model_type)
    needed = "architectures model_type hidden_size num_attention_heads num_hidden_layers num_key_value_heads head_dim"
    config = json.loads((source / "config.json").read_text())
    config = {name: config[name] for name in needed.split() if name in config}
    (source / "config.json").write_text(json.dumps(config))
    expected = class_config(config)
    with as_cross_layer(open_checkpoint(source)) as view:
        found = class_config(view.checkpoint.config)
    names = (
        "vocab_size intermediate_size hidden_act max_position_embeddings rms_norm_eps tie_word_embeddings bos_token_id "
        "eos_token_id pad_token_id attention_dropout initializer_range"
    )
    for name in names.split():
        assert getattr(found, name) == getattr(expected, name), name
    assert found.rope_parameters["rope_theta"] == expected.rope_parameters["rope_theta"]
    assert found.sliding_window == getattr(expected, "sliding_window", None)


@pytest.mark.parametrize("overrides", [{}, {"attention_bias": True}, {"num_key_value_heads": 4}])
def test_the_mean_of_layers_that_agree_is_exact(
    overrides: dict[str, Any], make_checkpoint: CheckpointFactory, tmp_path: Path
) -> None:
    source = make_checkpoint(num_hidden_layers=4, **overrides)
    original = make_shareable(source, lambda head, is_key: torch.eye(8))
    found = load(convert(source, tmp_path / "out", Cla(LayerGrouping((0, 0, 2, 3)))))
    assert_close(logits(found), logits(original))


@pytest.mark.parametrize("overrides", [{}, {"attention_bias": True}, {"num_key_value_heads": 4}])
def test_layers_related_by_what_is_free_are_merged_without_loss(
    overrides: dict[str, Any], make_checkpoint: CheckpointFactory, tmp_path: Path
) -> None:
    source = make_checkpoint(num_hidden_layers=4, **overrides)
    original = make_shareable(source, free_map)
    shared = LayerGrouping((0, 0, 2, 3))
    found = load(convert(source, tmp_path / "svd", Cla(shared, merge="svd"), refit=False))
    assert_close(logits(found), logits(original), tolerance=1e-4)
    mean = load(convert(source, tmp_path / "mean", Cla(shared)))
    assert (logits(mean) - logits(original)).abs().max() > 0.1 * logits(original).abs().max()  # the control


def test_heads_in_another_order_are_found(make_checkpoint: CheckpointFactory, tmp_path: Path) -> None:
    source = make_checkpoint(num_hidden_layers=4)
    model = make_shareable(source, free_map)
    attention, order = model.model.layers[1].self_attn, torch.tensor([3, 1, 0, 2, 7, 4, 6, 5])
    with torch.no_grad():
        for projection in (attention.q_proj, attention.k_proj, attention.v_proj):
            projection.weight.copy_(projection.weight.unflatten(0, (8, 8))[order].flatten(0, 1))
        attention.o_proj.weight.copy_(attention.o_proj.weight.unflatten(1, (8, 8))[:, order].flatten(1))
    model.save_pretrained(source)
    settings = Cla(LayerGrouping((0, 0, 2, 3)), merge="svd")
    found = load(convert(source, tmp_path / "found", settings, refit=False))
    assert_close(logits(found), logits(model), tolerance=1e-4)
    in_order = load(convert(source, tmp_path / "in-order", settings, refit=False, grouping="contiguous"))
    assert (logits(in_order) - logits(model)).abs().max() > 0.1 * logits(model).abs().max()


@pytest.mark.parametrize(("groups", "layers"), [(8, (0, 0, 2, 2)), (2, (0, 0, 0, 3)), (1, (0, 1, 1, 1))])
def test_the_mean_is_that_of_folded_weights(
    groups: int, layers: tuple[int, ...], make_checkpoint: CheckpointFactory, tmp_path: Path
) -> None:
    source = make_checkpoint(num_hidden_layers=4, attention_bias=True)
    before = {name: tensor.double() for name, tensor in load_file(source / "model.safetensors").items()}
    output = convert(source, tmp_path / "out", Cla(LayerGrouping(layers), groups))
    after = load_file(output / "model.safetensors")
    for first in sorted(set(layers)):
        members = [layer for layer in range(4) if layers[layer] == first]
        for projection, kind in product(("k_proj", "v_proj"), ("weight", "bias")):
            folded = []
            for layer in members:
                tensor = before[f"model.layers.{layer}.self_attn.{projection}.{kind}"]
                if kind == "weight":
                    tensor = tensor @ torch.diag(before[f"model.layers.{layer}.input_layernorm.weight"])
                folded.append(tensor)
            total = torch.stack(folded).mean(0)
            if kind == "weight":
                total = total @ torch.diag(1 / before[f"model.layers.{first}.input_layernorm.weight"])
            expected = total.reshape(groups, 8 // groups, 8, -1).mean(1).reshape(groups * 8, -1)
            found = after[f"model.layers.{first}.self_attn.{projection}.{kind}"].double().reshape(groups * 8, -1)
            torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-7)
    assert not [name for name in after if "k_proj" in name and int(name.split(".")[2]) not in layers]


def test_inputs_that_the_first_norm_switches_off_stay_off() -> None:
    weight, gains = torch.ones(2, 3), torch.tensor([0.0, 1.0, 2.0])
    found = AverageLayers(2)(weight, 3 * weight, gains, torch.ones(3))
    torch.testing.assert_close(found, torch.tensor([[0.0, 2.0, 1.25]] * 2) * 1.0)


@given(seed=st.integers(0, 10**6))
def test_keys_of_another_layer_are_predicted_by_least_squares(seed: int) -> None:
    """One group of one head each, so that the shared value spans both: what is lost is the residual of `lstsq`."""
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    shape = AttentionShape(6, 1, 1, 8, (None,))
    x, y = random(40, 7), random(40, 7)
    y = y + x @ random(7, 7)
    layers = [Projections(random(8, 7), random(8, 7), random(8, 7), random(6, 8)) for _ in range(2)]
    inputs = [
        LayerInput(layers[0], x.T @ x / 40),
        LayerInput(layers[1], y.T @ y / 40, y.T @ x / 40),
    ]
    merged = Heads(inputs, shape, FreeTransformations(Rotary(())), prediction_pull=0.0).merged_values((0, 1))
    targets = torch.cat([x @ layers[0].v.T @ layers[0].o.T, y @ layers[1].v.T @ layers[1].o.T], dim=1)
    predicted = x @ torch.linalg.lstsq(x, targets).solution
    residual = (targets - predicted).square().sum().item() / 40
    singular = torch.linalg.svdvals(predicted)  # the best shared value has 8 dims
    lost = residual + singular[8:].square().sum().item() / 40
    assert merged.total == pytest.approx(targets.square().sum().item() / 40)
    assert merged.total - merged.kept == pytest.approx(lost, rel=1e-6)


def test_predictions_are_pulled_towards_multiples_of_what_the_first_layer_reads() -> None:
    """Against least squares with rows for the pull."""
    generator = torch.Generator().manual_seed(0)
    ones = torch.ones(40, 1, dtype=torch.float64)
    x, y = (
        torch.cat([torch.randn(40, 6, generator=generator, dtype=torch.float64) + 1, ones], dim=1) for _ in range(2)
    )
    strength = 0.7 * x.square().mean()
    multiple = torch.diag((x * y).mean(0) / x.square().mean(0))
    pull = strength.sqrt() * torch.eye(7, dtype=torch.float64)
    rows, targets = torch.cat([x / 40**0.5, pull]), torch.cat([y / 40**0.5, pull @ multiple.T])
    expected = torch.linalg.lstsq(rows, targets).solution.T
    torch.testing.assert_close(predicted_input(y.T @ x / 40, x.T @ x / 40, pull=0.7), expected)


def test_a_merge_of_layers_keeps_the_heads_of_each() -> None:
    generator = torch.Generator().manual_seed(0)
    shape = AttentionShape(6, 4, 2, 4, (None, None))
    x = torch.randn(30, 7, generator=generator, dtype=torch.float64)
    gram = x.T @ x / 30
    sizes = ((16, 7), (8, 7), (8, 7), (6, 16))
    layers = [
        Projections(*(torch.randn(*size, generator=generator, dtype=torch.float64) for size in sizes)) for _ in range(2)
    ]
    heads = Heads(
        [LayerInput(layers[0], gram), LayerInput(layers[1], gram, gram)], shape, FreeTransformations(Rotary(()))
    )
    result = merge_layers(heads, heads.in_order(2))
    assert result.grouping.groups == ((0, 2), (1, 3))
    for projections in result.projections:
        assert [tuple(part.shape) for part in (projections.q, projections.k, projections.v, projections.o)] == list(
            sizes
        )
    torch.testing.assert_close(result.projections[0].k, result.projections[1].k)


def test_layers_that_read_the_same_are_merged_as_heads_of_one_layer() -> None:
    """What is kept comes from another formula there."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(60, 20, generator=generator, dtype=torch.float64)
    gram = x.T @ x / 60
    sizes = ((8, 20), (8, 20), (8, 20), (19, 8))
    layers = [
        Projections(*(torch.randn(*size, generator=generator, dtype=torch.float64) for size in sizes)) for _ in range(2)
    ]
    joined = Projections(
        *(torch.cat([getattr(layer, side) for layer in layers], dim=int(side == "o")) for side in ("q", "k", "v", "o"))
    )
    free = FreeTransformations(Rotary((1.0, 0.3, 0.1, 0.01), longest=40))
    one = Heads([LayerInput(joined, gram)], AttentionShape(19, 2, 2, 8, (None,)), free)
    inputs = [LayerInput(layers[0], gram), LayerInput(layers[1], gram, gram)]
    two = Heads(inputs, AttentionShape(19, 1, 1, 8, (None, None)), free)
    pairs = [(heads.merged_keys((0, 1)), heads.merged_values((0, 1))) for heads in (two, one)]
    for found, expected in zip(*pairs, strict=True):
        torch.testing.assert_close(found.shared, expected.shared)
        assert found.retained == pytest.approx(expected.retained)
        assert expected.retained < 0.99


def test_streamed_refit_sees_shared_keys_as_the_class_does(make_checkpoint: CheckpointFactory, tmp_path: Path) -> None:
    """The refit of the last layer against what hooks on the merged model see."""
    source = make_checkpoint(num_hidden_layers=4)
    settings = Cla(PAIRS, merge="svd")
    output = convert(source, tmp_path / "out", settings, refit_ridge=0.1)
    original, merged = load(source), load(output)
    seen: dict[str, torch.Tensor] = {}
    for name, model in (("original", original), ("merged", merged)):

        def note(_: Any, arguments: Any, name: str = name) -> None:
            seen[name] = arguments[0].flatten(0, -2).double()

        model.model.layers[3].self_attn.o_proj.register_forward_pre_hook(note)
        logits(model)
    closed = load(convert(source, tmp_path / "closed", settings, refit=False))
    z, wanted = seen["merged"], seen["original"] @ original.model.layers[3].self_attn.o_proj.weight.detach().double().T
    normal = z.T @ z / len(z)
    strength = 0.1 * normal.diagonal().mean()
    start = closed.model.layers[3].self_attn.o_proj.weight.detach().double()
    expected = torch.linalg.solve(normal + strength * torch.eye(64), (z.T @ wanted / len(z)) + strength * start.T).T
    found = merged.model.layers[3].self_attn.o_proj.weight.detach()
    torch.testing.assert_close(found, expected.float(), rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("settings", "fraction"),
    [
        (Cla(LayerGrouping.uniform(4, 2)), 2),
        (Cla(LayerGrouping.uniform(4, 2), 1, "svd"), 16),
        (Cla(LayerGrouping.uniform(4, 4), 2, "first"), 16),
    ],
)
def test_the_plan_states_the_cache_that_is_allocated(
    settings: Cla, fraction: int, make_checkpoint: CheckpointFactory, tmp_path: Path
) -> None:
    source = make_checkpoint(num_hidden_layers=4)
    with as_cross_layer(open_checkpoint(source)) as view:
        before, after = Cla(settings.layers, settings.num_key_value_heads).plan(view).cache_bytes_per_token
    sizes = []
    for directory in (source, convert(source, tmp_path / "out", settings)):
        model = load(directory).bfloat16()
        cache = cache_of(model(TOKENS, use_cache=True, **{CACHE_NAME: DynamicCache(config=model.config)}))
        tensors = [part for layer in cache.layers for part in (layer.keys, layer.values) if part is not None]
        sizes.append(sum(tensor.nbytes for tensor in tensors) // TOKENS.numel())
    assert sizes == [before, after]
    assert before == fraction * after


def test_a_plan_goes_to_json_and_back(make_checkpoint: CheckpointFactory) -> None:
    with as_cross_layer(open_checkpoint(make_checkpoint("qwen3", num_hidden_layers=4))) as view:
        plan = Cla(PAIRS, 2).plan(view)
    assert any(isinstance(step.op, AverageLayers) for step in plan.steps)
    assert ConversionPlan.from_json(json.loads(json.dumps(plan.to_json()))) == plan


@pytest.mark.parametrize(
    ("arguments", "sources"),
    [
        ((6, 2, 0, 0), (0, 0, 2, 2, 4, 4)),
        ((7, 3, 0, 0), (0, 0, 0, 3, 3, 3, 6)),
        ((6, 2, 2, 0), (0, 1, 2, 2, 4, 4)),
        ((6, 3, 1, 1), (0, 1, 1, 1, 4, 5)),
    ],
)
def test_uniform_patterns(arguments: tuple[int, int, int, int], sources: tuple[int, ...]) -> None:
    number, share, first, last = arguments
    assert LayerGrouping.uniform(number, share, keep_first=first, keep_last=last).sources == sources


@given(data=st.data(), number=st.integers(2, 7))
def test_the_chosen_layers_are_the_best_of_all(data: st.DataObject, number: int) -> None:
    reach = data.draw(st.integers(1, number - 1))
    pairs = [(p, c) for p in range(number) for c in range(p + 1, min(p + reach + 1, number))]
    damages = {pair: data.draw(st.floats(0, 10)) for pair in pairs}
    count = data.draw(st.integers(1, number))

    def total(sizes: tuple[int, ...]) -> float:
        begin, sum_of_damages = 0, 0.0
        for size in sizes:
            sum_of_damages += sum(damages.get((begin, layer), float("inf")) for layer in range(begin + 1, begin + size))
            begin += size
        return sum_of_damages

    possible = [sizes for sizes in product(range(1, number + 1), repeat=count) if sum(sizes) == number]
    least = min(map(total, possible))
    if least == float("inf"):
        with pytest.raises(UnsupportedError, match="cannot share so that"):
            best_layers(number, count, damages)
    else:
        groups = best_layers(number, count, damages).groups
        assert len(groups) == count
        assert total(tuple(map(len, groups))) == pytest.approx(least)


def test_damages_are_what_a_model_with_one_pair_loses(make_checkpoint: CheckpointFactory, tmp_path: Path) -> None:
    source = make_checkpoint(num_hidden_layers=4)
    with as_cross_layer(open_checkpoint(source)) as view:
        pairs = permitted_pairs(view.shape, 2)
        damages = measure_damages(view, TEXT, pairs)
    assert list(damages) == pairs == [(0, 1), (0, 2), (1, 2), (1, 3), (2, 3)]
    original = load(source)
    pair = load(convert(source, tmp_path / "out", Cla(LayerGrouping((0, 1, 1, 3)), merge="svd"), refit=False))
    with torch.inference_mode():
        expected, found = (
            model(input_ids=TOKENS, use_cache=False, output_hidden_states=True).hidden_states[3]
            for model in (original, pair)
        )
    error = ((found - expected).square().sum(-1) / expected.square().sum(-1)).mean().item()
    assert damages[1, 2] == pytest.approx(error, rel=1e-3)


@pytest.mark.parametrize(
    ("model_type", "overrides", "layers", "message"),
    [
        ("gpt_neox", {}, PAIRS, "no class lets layers of gpt_neox share keys and values"),
        ("gemma", {}, PAIRS, "no class lets layers of gemma share keys and values"),
        ("llama", {}, LayerGrouping((0, 0)), "has 4 layers, and 2 were given a source"),
        ("llama", {}, LayerGrouping((0, 1, 2, 3)), "no layer would share"),
        ("llama", {}, LayerGrouping((0, 1, 0, 3)), "layers 0 and 2 share, and one between them does not"),
        (
            "qwen2",
            {**WINDOW, "max_window_layers": 1},
            PAIRS,
            "layers 0 and 1 cannot share .* one sees all, .* 4 tokens",
        ),
        ("cross_layer_decoder", {"kv_source_layers": [0, 0, 2, 2]}, PAIRS, "share keys and values already"),
    ],
)
def test_what_cannot_share_is_refused(
    model_type: str,
    overrides: dict[str, Any],
    layers: LayerGrouping,
    message: str,
    make_checkpoint: CheckpointFactory,
) -> None:
    source = make_checkpoint(model_type, num_hidden_layers=4, **overrides)
    with pytest.raises(UnsupportedError, match=message), as_cross_layer(open_checkpoint(source)) as view:
        Cla(layers).plan(view)


def test_pairs_are_neighbours_that_see_as_much() -> None:
    shape = AttentionShape(8, 1, 1, 8, (None, None, 4, None, 4, None))
    assert permitted_pairs(shape, 2) == [(0, 1), (1, 3), (2, 4), (3, 5)]
    assert permitted_pairs(shape, 5, keep_first=1, keep_last=1) == [(1, 3), (2, 4)]


@pytest.mark.parametrize("method", ["mean", "first", "svd"])
def test_the_gain_of_a_key_norm_moves_to_the_queries(
    method: Literal["mean", "first", "svd"], make_checkpoint: CheckpointFactory, tmp_path: Path
) -> None:
    """Layers with equal keys but for the gains of their norms, which are the same within rotary pairs."""
    source = make_checkpoint("qwen3", num_hidden_layers=4)
    model = make_shareable(source, lambda head, is_key: torch.eye(8))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for layer in (0, 1):
            gain = torch.rand(4, generator=generator) + 0.5
            model.model.layers[layer].self_attn.k_norm.weight.copy_(gain.repeat(2))
    model.save_pretrained(source)
    options = {"refit": False} if method == "svd" else {}
    found = load(convert(source, tmp_path / "out", Cla(LayerGrouping((0, 0, 2, 3)), merge=method), **options))
    assert_close(logits(found), logits(model), tolerance=1e-4)


def test_the_command_writes_what_it_says(
    make_checkpoint: CheckpointFactory, invoke: Command, prose_file: Path, tmp_path: Path
) -> None:
    source = make_checkpoint(num_hidden_layers=4, with_tokenizer=True)
    output = tmp_path / "model-mqa-cla2"
    outcome = invoke(
        *("mha2cla", source, "--share", 2, "--groups", 1, "--method", "svd", "--json"),
        *("--calibration", prose_file, "--calibration-tokens", 512),
    )
    assert outcome.returncode == 0, outcome.stderr
    summary = json.loads(outcome.stdout)
    assert summary["output"] == str(output)
    assert (summary["target"], summary["opened_as"]) == ("mqa+cla", "CrossLayerDecoderForCausalLM")
    assert summary["num_key_value_layers"] == {"source": 4, "result": 2}
    assert summary["calibration"]["kv_source_layers"] == [0, 0, 2, 2]
    config = json.loads((output / "config.json").read_text())
    assert (config["kv_source_layers"], config["num_key_value_heads"]) == ([0, 0, 2, 2], 1)
    assert (output / "modeling_cross_layer_decoder.py").exists()
    card = (output / "README.md").read_text()
    assert "8 K/V heads in each layer became 1 and 4 layers share the keys and values of 2" in card
    shown = invoke("inspect", output).stdout
    assert "cross_layer_decoder (MQA + CLA)" in shown
    assert "4, of which 2 have keys and values" in shown
    assert "64 bytes per token" in shown
    assert "its layers share keys and values already" in shown
    assert invoke("evaluate", output, "--data", prose_file, "--window", 32).returncode == 0


def test_a_result_in_shards_opens_in_a_process_without_kvconvert(
    make_checkpoint: CheckpointFactory, tmp_path: Path, run_without_kvconvert: Callable[[str], str]
) -> None:
    source, output = make_checkpoint(num_hidden_layers=4), tmp_path / "out"
    original = make_shareable(source, lambda head, is_key: torch.eye(8))
    with as_cross_layer(open_checkpoint(source)) as view:
        plan = Cla(LayerGrouping((0, 0, 2, 3))).plan(view)
        execute(plan, view.checkpoint, output, max_shard_bytes=40_000)
    assert len(list(output.glob("*.safetensors"))) > 3
    input_ids = TOKENS[:2, :12]
    expected = original.generate(input_ids, max_new_tokens=6, do_sample=False).tolist()
    printed = run_without_kvconvert(
        f"""
        import torch
        from transformers import AutoModel, AutoModelForCausalLM
        path, ids = {str(output)!r}, torch.tensor({input_ids.tolist()})
        base = AutoModel.from_pretrained(path, trust_remote_code=True)
        model = AutoModelForCausalLM.from_pretrained(path, trust_remote_code=True).eval()
        print([type(base).__name__, type(model).__name__])
        print(model.generate(ids, max_new_tokens=6, do_sample=False).tolist())
        """
    )
    names, tokens = (json.loads(line.replace("'", '"')) for line in printed.splitlines())
    assert names == ["CrossLayerDecoderModel", "CrossLayerDecoderForCausalLM"]
    assert tokens == expected


def test_a_result_is_uptrained_towards_the_original(
    make_checkpoint: CheckpointFactory, invoke: Command, prose_file: Path, tmp_path: Path
) -> None:
    source = make_checkpoint(num_hidden_layers=4, with_tokenizer=True)
    converted, output = tmp_path / "converted", tmp_path / "trained"
    assert invoke("mha2cla", source, "--share", 2, "--output", converted).returncode == 0
    outcome = invoke(
        *(
            "uptrain",
            converted,
            "--steps",
            3,
            "--global-batch-tokens",
            64,
            "--sequence-length",
            32,
            "--data",
            prose_file,
        ),
        *("--teacher", source, "--output", output, "--json"),
    )
    assert outcome.returncode == 0, outcome.stderr
    before, after = (load_file(directory / "model.safetensors") for directory in (converted, output))
    assert set(before) == set(after)
    moved = [name for name in before if "self_attn" in name and not torch.equal(before[name], after[name])]
    assert len(moved) == len([name for name in before if "self_attn" in name])
    assert (output / "modeling_cross_layer_decoder.py").exists()
    assert type(load(output)).__name__ == "CrossLayerDecoderForCausalLM"


def test_the_command_chooses_layers(
    make_checkpoint: CheckpointFactory, invoke: Command, prose_file: Path, tmp_path: Path
) -> None:
    source = make_checkpoint(num_hidden_layers=4, with_tokenizer=True)
    make_shareable(source, free_map)  # layers 0 and 1 can share without loss
    outcome = invoke(
        *("mha2cla", source, "--pairs", "auto", "--kv-layers", 3, "--calibration", prose_file),
        *("--calibration-tokens", 512, "--dry-run", "--json"),
    )
    assert outcome.returncode == 0, outcome.stderr
    assert json.loads(outcome.stdout)["plan"]["config"]["kv_source_layers"] == [0, 0, 2, 3]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "say which layers share"),
        (("--share", 2, "--kv-source-layers", "0,0,2,2"), "say which layers share"),
        (("--share", 1), "greater than or equal to 2"),
        (("--share", 2, "--kv-layers", 3), "--kv-layers belongs to --pairs auto"),
        (("--kv-layers", 4, "--pairs", "auto"), "cannot share so that 4 keep keys and values"),
        (("--share", 2, "--keep-first", 3), "4 layers, 3 kept first and 0 last, cannot share in groups of 2"),
        (("--share", 2, "--groups", 3), "8 K/V heads cannot form 3 equal groups"),
        (("--share", 2, "--no-refit"), "--no-refit belongs to --method svd"),
        (("--share", 2, "--calibration-tokens", 9), "--calibration-tokens belongs to --method svd"),
        (("--kv-source-layers", "0,0,x"), "--kv-source-layers 0,0,x: invalid literal"),
        (("--kv-source-layers", "0,2,2,3"), "layer 1 cannot read keys and values of layer 2"),
        (("--kv-source-layers", "0,0,2,2", "--keep-last", 1), "--keep-last has no part in --kv-source-layers"),
    ],
)
def test_bad_requests_give_one_line(
    arguments: tuple[object, ...], message: str, make_checkpoint: CheckpointFactory, invoke: Command, tmp_path: Path
) -> None:
    source = make_checkpoint(num_hidden_layers=4)
    outcome = invoke("mha2cla", source, *arguments)
    assert outcome.returncode == 2
    assert message in outcome.stderr
    assert "Traceback" not in outcome.stderr
    assert [path.name for path in tmp_path.iterdir()].count("model") == len(
        [path for path in tmp_path.iterdir() if path.name.startswith("model")]
    )


@pytest.mark.parametrize(("method", "exit_code"), [("mean", 0), ("svd", 2)])
def test_heads_of_a_result_can_be_pooled_but_not_merged(
    method: str,
    exit_code: int,
    make_checkpoint: CheckpointFactory,
    invoke: Command,
    tmp_path: Path,
) -> None:
    source = make_checkpoint("cross_layer_decoder", num_hidden_layers=4, kv_source_layers=[0, 0, 2, 2])
    outcome = invoke("mha2mqa", source, "--method", method, "--output", tmp_path / "out", "--json")
    assert outcome.returncode == exit_code, outcome.stderr
    if method == "svd":
        assert "does not merge heads whose keys and values several layers read" in outcome.stderr
    else:
        assert json.loads(outcome.stdout)["cache_bytes_per_token"] == {"source": 512, "result": 64}


def test_read_projections_names_what_is_missing(make_checkpoint: CheckpointFactory) -> None:
    source = make_checkpoint("cross_layer_decoder", num_hidden_layers=2, kv_source_layers=[0, 0])
    with open_checkpoint(source) as checkpoint:
        view = Source.of(checkpoint)
        assert (view.shape.kind, view.shape.num_key_value_layers) == ("MHA + CLA", 1)
        with pytest.raises(KeyError, match=r"layers\.1\.self_attn\.k_proj"):
            read_projections(view, 1)
