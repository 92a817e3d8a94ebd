"""--head-dim: K/V heads of another size, which are exact where there is room, the best otherwise, or refused."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import CheckpointFactory, Command, write_numbers
from kvconvert.convert import ARCHITECTURES, Gqa, execute, open_checkpoint
from kvconvert.convert.algebra.attention_shape import AttentionShape
from kvconvert.convert.algebra.head_merge import FreeTransformations, Heads, LayerInput, SharedHead, merge_layers
from kvconvert.convert.algebra.heads import HeadGrouping
from kvconvert.convert.algebra.projections import Projections
from kvconvert.convert.algebra.rotations import Rotary
from kvconvert.convert.checkpoint.config_classes import class_config
from kvconvert.convert.checkpoint.loading import load_model
from kvconvert.convert.describe.engines import head_kernels, serving
from kvconvert.convert.errors import UnsupportedError
from kvconvert.convert.methods.head_size import spread
from kvconvert.convert.methods.prepared import Preparation
from kvconvert.convert.runtime.transformers_interface import cache_of
from test_svd import IDS, ROWS, TEXT, TOKENS, assert_close, logits, relate_heads

SIZED = [row for row in ROWS if row[0] not in ("falcon", "gpt_bigcode", "helium", "phi3", "phimoe", "stablelm")]


def convert(source: Path, output: Path, num_groups: int = 1, **options: Any) -> Path:
    gqa = Gqa(num_groups, merge="svd", **options)
    with gqa.source(open_checkpoint(source)) as view:
        gqa.check(view)
        scratch = output.with_name(f"{output.name}-scratch")
        scratch.mkdir()
        prepared = gqa.prepare(view, Preparation(scratch, TEXT))
        execute(gqa.plan(view), view.checkpoint, output, prepared.overlay)
    return output


def related(source: Path, num_groups: int, rotary_dims: int, neighbours: bool) -> Path:
    """The checkpoint with as many independent K/V heads as groups; the others are images of those."""
    model = load_model(source, dtype=torch.float32, device="cpu")
    relate_heads(model, num_groups, rotary_dims, neighbours)
    model.save_pretrained(source)
    return source


@pytest.mark.parametrize(
    ("model_type", "overrides", "rotary_dims", "neighbours"),
    SIZED,
    ids=[name for name, row in zip(IDS, ROWS, strict=True) if row in SIZED],
)
def test_one_wide_head_holds_what_two_independent_heads_do(
    model_type: str,
    overrides: dict[str, Any],
    rotary_dims: int,
    neighbours: bool,
    make_checkpoint: CheckpointFactory,
    tmp_path: Path,
) -> None:
    """Each frequency is there twice, in the real class. Two independent heads in one of their size are not exact."""
    source = related(make_checkpoint(model_type, **overrides), 2, rotary_dims, neighbours)
    out = convert(source, tmp_path / "out", head_dim=16, refit=False)
    assert_close(logits(out), logits(source))
    config = class_config(json.loads((out / "config.json").read_text()))
    assert (config.num_key_value_heads, config.head_dim) == (1, 16)


def test_one_head_of_the_same_size_does_not(make_checkpoint: CheckpointFactory, tmp_path: Path) -> None:
    """The first control of the test above."""
    source = related(make_checkpoint(), 2, 8, False)
    expected = logits(source)
    assert (logits(convert(source, tmp_path / "out", refit=False)) - expected).abs().max() > 0.1 * expected.abs().max()


def test_frequencies_of_the_default_kind_do_not(make_checkpoint: CheckpointFactory, tmp_path: Path) -> None:
    """The second control: only every second frequency of the wider head is one of the source's."""
    source = related(make_checkpoint(), 2, 8, False)
    out = convert(source, tmp_path / "out", head_dim=16, refit=False, rope_selection="default")
    expected = logits(source)
    assert (logits(out) - expected).abs().max() > 0.01 * expected.abs().max()
    assert json.loads((out / "config.json").read_text())["rope_parameters"]["rope_type"] == "default"


def test_a_refit_keeps_what_is_exact(make_checkpoint: CheckpointFactory, tmp_path: Path) -> None:
    source = related(make_checkpoint(), 4, 8, False)
    out = convert(source, tmp_path / "out", 2, head_dim=16)
    assert_close(logits(out), logits(source))
    assert json.loads((out / "config.json").read_text())["num_key_value_heads"] == 2


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
        {"rope_type": "linear", "factor": 2.0},
        {"rope_type": "yarn", "factor": 4.0},
    ],
    ids=lambda rope: rope["rope_type"],
)
def test_frequencies_of_a_stretched_rope_are_held(
    rope: dict[str, Any], make_checkpoint: CheckpointFactory, tmp_path: Path
) -> None:
    """Yarn's factor, by which its class multiplies queries and keys, moves to the queries."""
    parameters = {**rope, "rope_theta": 100.0, "original_max_position_embeddings": 64}
    source = related(make_checkpoint(rope_parameters=parameters), 2, 8, False)
    assert_close(logits(convert(source, tmp_path / "out", head_dim=16, refit=False)), logits(source))


def test_each_frequency_is_there_about_as_often() -> None:
    assert spread((4.0, 3.0, 2.0, 1.0), 6) == (4.0, 4.0, 3.0, 2.0, 2.0, 1.0)
    assert spread((4.0, 3.0, 2.0, 1.0), 2) == (4.0, 2.0)
    assert spread((4.0, 3.0), 4) == (4.0, 4.0, 3.0, 3.0)


def test_a_wide_head_is_cached_and_generation_does_not_depend_on_the_cache(
    make_checkpoint: CheckpointFactory, tmp_path: Path
) -> None:
    out = convert(make_checkpoint(num_key_value_heads=4), tmp_path / "out", head_dim=20)
    model = load_model(out, dtype=torch.float32, device="cpu")
    with torch.inference_mode():
        outputs = model(input_ids=TOKENS[:, :10], use_cache=True)
        cached, computed = (
            model.generate(TOKENS[:, :10], max_new_tokens=8, do_sample=False, use_cache=use) for use in (True, False)
        )
    layers = cache_of(outputs).layers
    assert [(tuple(layer.keys.shape), tuple(layer.values.shape)) for layer in layers] == [((6, 1, 10, 20),) * 2] * 2
    assert torch.equal(cached, computed)
    model.save_pretrained(tmp_path / "again")
    assert torch.equal(logits(tmp_path / "again"), logits(out))


def random_layer(seed: int, shape: AttentionShape) -> tuple[Projections, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)

    def rows(*size: int) -> torch.Tensor:
        return torch.randn(size, generator=generator, dtype=torch.float64)

    inputs, dims = shape.hidden_size + 1, shape.head_dim
    layer = Projections(
        rows(shape.num_attention_heads * dims, inputs),
        rows(shape.num_key_value_heads * dims, inputs),
        rows(shape.num_key_value_heads * dims, inputs),
        rows(shape.hidden_size, shape.num_attention_heads * dims),
    )
    factor = rows(inputs, inputs)
    return layer, factor @ factor.T


SHAPE = AttentionShape(12, 4, 2, 4, (None,))


def test_values_of_another_size_keep_what_the_best_map_of_that_rank_does() -> None:
    """Stacked outputs of both heads, as one matrix over white inputs: no map of rank 6 is nearer than its SVD."""
    layer, gram = random_layer(0, SHAPE)
    rotary = Rotary((1.0, 0.1), longest=16)
    shared = SharedHead(6, Rotary((1.0, 1.0, 0.1), longest=16))
    heads = Heads([LayerInput(layer, gram)], SHAPE, FreeTransformations(rotary), shared=shared)
    merged = merge_layers(heads, HeadGrouping(((0, 1),)))
    root = torch.linalg.cholesky(gram)
    outputs = layer.o.unflatten(1, (4, 4)).transpose(0, 1)  # (H, E, D)
    values = layer.v.unflatten(0, (2, 4)).repeat_interleave(2, dim=0)  # (H, D, E + 1)
    wanted = (outputs @ values @ root).flatten(0, 1)
    found_outputs = merged.projections[0].o.unflatten(1, (4, 6)).transpose(0, 1)
    found = (found_outputs @ merged.projections[0].v @ root).flatten(0, 1)
    singular = torch.linalg.svdvals(wanted).square()
    torch.testing.assert_close((wanted - found).square().sum(), singular[6:].sum())
    assert merged.values_retained[0] == pytest.approx(float(singular[:6].sum() / singular.sum()))


def rotation(frequencies: Sequence[float], distance: int) -> torch.Tensor:
    """The real matrix of a half-split rotation by a distance, (2 F, 2 F)."""
    angles = torch.tensor(frequencies, dtype=torch.float64) * distance
    cos, sin = torch.diag(angles.cos()), torch.diag(angles.sin())
    return torch.cat([torch.cat([cos, sin], 1), torch.cat([-sin, cos], 1)])


def test_keys_of_another_size_lose_what_they_say_over_distances() -> None:
    """The squared error of scores of two independent tokens, over all distances, as a plain loop."""
    layer, gram = random_layer(1, SHAPE)
    rotary, wide = Rotary((1.0, 0.1), longest=16), Rotary((1.0, 0.5, 0.1), longest=16)
    shared = SharedHead(6, wide, query_scale=3.0)
    heads = Heads([LayerInput(layer, gram)], SHAPE, FreeTransformations(rotary), shared=shared)
    merged = merge_layers(heads, HeadGrouping(((0, 1),)))
    after = merged.projections[0]
    root = torch.linalg.cholesky(gram)
    total = error = torch.zeros((), dtype=torch.float64)
    for distance in range(16):
        for head in range(4):
            query, key = layer.q[4 * head : 4 * head + 4], layer.k[4 * (head // 2) : 4 * (head // 2) + 4]
            wanted = root.T @ query.T @ rotation(rotary.frequencies, distance) @ key @ root
            scored = after.q[6 * head : 6 * head + 6].T @ rotation(wide.frequencies, distance) @ after.k
            total = total + wanted.square().sum() / (distance + 1)
            error = error + (wanted - root.T @ scored @ root / 3).square().sum() / (distance + 1)
    assert merged.keys_retained[0] == pytest.approx(float(1 - error / total), abs=1e-6)
    assert 0.5 < merged.keys_retained[0] < 0.999


def test_keys_that_nothing_asks_for_become_their_mean() -> None:
    layer, gram = random_layer(2, SHAPE)
    silent = Projections(torch.zeros_like(layer.q), layer.k, layer.v, layer.o)
    shared = SharedHead(6, Rotary((1.0, 1.0, 0.1), longest=16))
    free = FreeTransformations(Rotary((1.0, 0.1), longest=16))
    merged = merge_layers(Heads([LayerInput(silent, gram)], SHAPE, free, shared=shared), HeadGrouping(((0, 1),)))
    mean = layer.k.unflatten(0, (2, 4)).mean(0)
    expected = torch.stack([mean[0], torch.zeros(13), mean[1], mean[2], torch.zeros(13), mean[3]])
    torch.testing.assert_close(merged.projections[0].k, expected.double())
    assert not merged.projections[0].q.any()
    assert merged.keys_retained == (1.0,)


@pytest.mark.parametrize(
    ("model_type", "overrides", "options", "message"),
    [
        ("llama", {}, {"head_dim": 15}, r"head_dim = 15: heads of an odd size fit no engine"),
        ("llama", {}, {"head_dim": 64}, r"1 K/V heads of 64 are 64 numbers .* 8 of 8 .* are 64: the cache would not"),
        ("llama", {}, {"head_dim": 0}, r"head_dim = 0"),
        ("llama", {}, {"head_dim": -2}, r"head_dim = -2"),
        ("qwen3", {}, {"head_dim": 16}, r"keys are normalised .* so that heads keep their size"),
        ("bitnet", {}, {"head_dim": 16}, r"bitnet computes more of values than sums, so that heads keep their size"),
        ("stablelm", {}, {"head_dim": 16}, r"stablelm takes the size of its heads from other entries"),
        ("falcon", {"multi_query": False}, {"head_dim": 16}, r"falcon takes the size of its heads from"),
        ("phi3", {}, {"head_dim": 16}, r"phi3 takes no frequencies one by one"),
        ("phimoe", {}, {"head_dim": 16}, r"phimoe takes no frequencies one by one"),
        (
            "llama",
            {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 99.0, "factor": 2.0}},
            {"head_dim": 16},
            r"its RoPE is of type dynamic",
        ),
        (
            "phi",
            {"rope_parameters": {"rope_type": "default", "rope_theta": 99.0, "partial_rotary_factor": 0.5}},
            {"head_dim": 18},
            r"partial_rotary_factor = 0.5 its rotary dims would be 9",
        ),
    ],
)
def test_what_no_class_or_rotary_pair_fits_is_refused(
    model_type: str,
    overrides: dict[str, Any],
    options: dict[str, Any],
    message: str,
    make_checkpoint: CheckpointFactory,
) -> None:
    source = make_checkpoint(model_type, **overrides)
    gqa = Gqa(1, merge="svd", **options)
    with pytest.raises(UnsupportedError, match=message):
        gqa.plan(gqa.source(open_checkpoint(source)))


def test_only_svd_resizes_heads() -> None:
    with pytest.raises(UnsupportedError, match="head_dim = 16, and mean keeps the size of heads"):
        Gqa(1, head_dim=16)


@pytest.mark.parametrize("model_type", [name for name, entry in ARCHITECTURES.items() if entry.sets_head_dim])
def test_a_class_that_sets_head_dim_has_it(model_type: str) -> None:
    from conftest import OVERRIDES, build_model

    model = build_model(model_type, **{**OVERRIDES.get(model_type, {}), "head_dim": 16})
    sizes = {tuple(p.shape) for name, p in model.named_parameters() if name.endswith(("o_proj.weight", "dense.weight"))}
    assert (64, 8 * 16) in sizes


@pytest.mark.parametrize(("head_dim", "has"), [(8, True), (96, True), (256, True), (20, False), (264, False)])
def test_sizes_of_heads_with_fast_kernels(head_dim: int, has: bool) -> None:
    assert (head_kernels(head_dim) is None) == has


def test_engines_depend_on_the_frequencies() -> None:
    one_by_one = {"rope_parameters": {"rope_type": "longrope"}}
    engines = {entry.engine: entry for entry in serving("llama", one_by_one)}
    assert [engines[name].works for name in ("transformers", "vLLM", "SGLang", "llama.cpp")] == [
        True,
        True,
        True,
        False,
    ]
    assert (engines["vLLM"].evidence, engines["vLLM"].how) == ("read", "")
    assert {entry.engine: entry for entry in serving("llama", {"rope_parameters": {}})}["vLLM"].evidence == "run"
    assert "--model-impl transformers" in {entry.engine: entry for entry in serving("cohere", one_by_one)}["SGLang"].how


def test_a_size_without_fast_kernels_is_remarked_on(
    make_checkpoint: CheckpointFactory, invoke: Command, tmp_path: Path
) -> None:
    options = ["--method", "svd", "--no-calibration", "--output", tmp_path / "out"]
    outcome = invoke("mha2mqa", make_checkpoint(), *options, "--head-dim", 12)
    assert (outcome.returncode, "heads of 12: FlashAttention takes multiples of 8 up to 256" in outcome.stderr) == (
        0,
        True,
    )
    assert "8 of 8 → 1 of 12 K/V heads" in outcome.stdout
    assert "8 K/V heads of 8 in each layer became 1 of 12" in (tmp_path / "out" / "README.md").read_text()


def test_the_command_end_to_end(make_checkpoint: CheckpointFactory, invoke: Command, tmp_path: Path) -> None:
    source = make_checkpoint(with_tokenizer=True)
    text = write_numbers(tmp_path / "text.jsonl", TOKENS.tolist())
    options = ["--head-dim", 16, "--calibration", text, "--calibration-sequence-length", 32, "--json"]
    printed = invoke("mha2gqa", source, "--groups", 2, "--method", "svd", *options).printed
    assert Path(printed["output"]).name == "model-gqa2x16"
    assert printed["cache_bytes_per_token"] == {"source": 2 * 2 * 64 * 2, "result": 2 * 2 * 32 * 2}
    assert printed["calibration"]["head_dim"] == 16
    inspected = invoke("inspect", printed["output"], "--json").printed
    assert (inspected["num_key_value_heads"], inspected["head_dim"], inspected["cache_bytes_per_token"]) == (2, 16, 256)
    assert invoke("verify", printed["output"]).returncode == 0


def test_the_command_refuses_what_does_nothing(
    make_checkpoint: CheckpointFactory, invoke: Command, tmp_path: Path
) -> None:
    source = make_checkpoint()
    mean = invoke("mha2mqa", source, "--head-dim", 16)
    assert (mean.returncode, mean.stdout) == (2, "")
    assert "--head-dim" in mean.stderr
    assert "--method svd" in mean.stderr
    alone = invoke("mha2mqa", source, "--method", "svd", "--rope-selection", "default", "--no-calibration")
    assert (alone.returncode, alone.stdout) == (2, "")
    assert "--rope-selection" in alone.stderr
    assert "--head-dim" in alone.stderr
    options = ["--method", "svd", "--head-dim", 8, "--rope-selection", "default", "--no-calibration"]
    same = invoke("mha2mqa", source, *options)
    assert (same.returncode, same.stdout) == (2, "")
    assert "heads stay at head_dim = 8" in same.stderr
    assert "--rope-selection" in same.stderr
