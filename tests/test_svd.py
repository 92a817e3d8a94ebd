"""--method svd: what merges recover exactly, that they are the best, and that streaming measures what hooks do."""

from __future__ import annotations

import json
import math
import weakref
from collections.abc import Callable
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import OVERRIDES, VOCAB_SIZE, CheckpointFactory, Command, key_value_heads
from hypothesis import given
from hypothesis import strategies as st
from kvconvert.convert import ARCHITECTURES, Gqa, as_target, execute, open_checkpoint
from kvconvert.convert.algebra.attention_shape import AttentionShape
from kvconvert.convert.algebra.head_merge import FreeTransformations, Heads, LayerInput
from kvconvert.convert.algebra.merge import (
    ExpectedRotations,
    Merged,
    merge_at_distances,
    merge_linear,
    merge_mean,
    merge_rotary,
    pair_losses,
)
from kvconvert.convert.algebra.projections import Projections
from kvconvert.convert.algebra.refit import refitted
from kvconvert.convert.algebra.rotations import Rotary, expected_rotation
from kvconvert.convert.architectures.projections import read_projections
from kvconvert.convert.architectures.source import Source
from kvconvert.convert.architectures.table import find_architecture
from kvconvert.convert.calibration.layerwise import LayerwiseModel
from kvconvert.convert.calibration.moments import second_moment, with_one
from kvconvert.convert.calibration.text import CalibrationText, read_calibration_text
from kvconvert.convert.checkpoint.loading import load_model
from kvconvert.convert.checkpoint.tokenizer import load_tokenizer
from kvconvert.convert.errors import CheckpointError, DataError, UnsupportedError
from kvconvert.convert.methods.merging import HeadMerge, merge_heads
from kvconvert.convert.methods.prepared import Preparation
from kvconvert.convert.text.sources import TextSource
from tokenizers.processors import TemplateProcessing

TOKENS = torch.randint(3, VOCAB_SIZE, (6, 32), generator=torch.Generator().manual_seed(0))
TEXT = CalibrationText(TOKENS, "random")
PARTIAL = {"rope_parameters": {"rope_type": "default", "rope_theta": 99.0, "partial_rotary_factor": 0.5}}
# model_type, overrides, rotary dims of a head of 8, whether pairs are neighbours
ROWS: list[tuple[str, dict[str, Any], int, bool]] = [
    ("llama", {}, 8, False),
    ("llama", {"attention_bias": True, "num_key_value_heads": 4}, 8, False),
    ("qwen2", {}, 8, False),
    ("phi3", {}, 8, False),
    ("falcon", {"ffn_hidden_size": 48, "bias": True, "multi_query": False}, 8, False),
    ("phi", PARTIAL, 4, False),
    ("stablelm", {**PARTIAL, "use_qkv_bias": True}, 4, False),
    ("cohere", {"logit_scale": 1.0, "attention_bias": True}, 8, True),
    ("ernie4_5", {}, 8, True),
    ("helium", {}, 8, True),
    ("glm", {**PARTIAL, "attention_bias": True}, 4, True),
    ("glm4", {**PARTIAL, "attention_bias": True}, 4, True),
    ("gpt_bigcode", OVERRIDES["gpt_bigcode"], 0, False),
    ("gpt2", {"n_embd": 64, "n_head": 8, "n_layer": 2, "n_inner": 48, "n_positions": 128}, 0, False),
    ("bloom", {"n_layer": 2}, 0, False),
    ("gemma2", {}, 8, False),
    ("smollm3", {"no_rope_layers": [1, 1]}, 8, False),
    ("nemotron", {}, 4, False),
    ("olmo", {}, 8, False),
    (
        "cohere2",
        OVERRIDES.get("cohere2", {}) | {"layer_types": ["sliding_attention"] * 2, "sliding_window": 16},
        8,
        True,
    ),
    *(
        (model_type, OVERRIDES.get(model_type, {}), 8, False)
        for model_type in (
            "arcee",
            "gemma",
            "granite",
            "granitemoe",
            "hyperclovax",
            "jais2",
            "mistral",
            "mixtral",
            "phimoe",
            "qwen2_moe",
            "seed_oss",
            "starcoder2",
        )
    ),
]
IDS = [f"{row[0]}-{index}" for index, row in enumerate(ROWS)]


def relate_heads(model: Any, num_groups: int, rotary_dims: int, neighbours: bool) -> None:
    """Make each K/V head of a group the first one's image under a map that its queries and outputs can undo."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, runs in key_value_heads(model).items():
            for run, heads in enumerate(runs):
                size = len(heads) // num_groups
                module = name.split(".")[-2]
                is_key = module == "k_proj" or (module != "v_proj" and run == 0)
                layer = int(next(part for part in name.split(".") if part.isdigit()))
                for head, rows in enumerate(heads):
                    generator.manual_seed(100 * layer + 2 * head + is_key)  # a weight and its bias move alike
                    matrix = torch.eye(8) if head % size == 0 else allowed(is_key, rotary_dims, neighbours, generator)
                    first = heads[head // size * size]
                    is_conv = rows.dim() == 2 and rows.shape[1] == 8 and rows.shape[0] != 8  # GPT-2: (inputs, head_dim)
                    rows.copy_(first @ matrix.T if is_conv else (matrix @ first.reshape(8, -1)).reshape(rows.shape))


def allowed(is_key: bool, rotary_dims: int, neighbours: bool, generator: torch.Generator) -> torch.Tensor:
    """A random map: any invertible one, but multiplications by complex numbers of rotary pairs."""
    matrix = torch.eye(8) + 0.5 * torch.randn(8, 8, generator=generator)
    if is_key and rotary_dims:
        matrix[:rotary_dims] = 0
        matrix[:, :rotary_dims] = 0
        half = rotary_dims // 2
        for pair in range(half):
            i, j = (2 * pair, 2 * pair + 1) if neighbours else (pair, pair + half)
            real, imaginary = torch.randn(2, generator=generator).tolist()
            matrix[i, i] = matrix[j, j] = real
            matrix[i, j], matrix[j, i] = -imaginary, imaginary
    return matrix


def convert(source: Path, num_groups: int, output: Path, **options: Any) -> Path:
    with as_target(open_checkpoint(source), num_groups) as view:
        scratch = output.with_name(f"{output.name}-scratch")
        scratch.mkdir()
        gqa = Gqa(num_groups, merge="svd", **options)
        prepared = gqa.prepare(view, Preparation(scratch, TEXT))
        execute(gqa.plan(view), view.checkpoint, output, prepared.overlay)
    return output


def logits(directory: Path) -> torch.Tensor:
    model = load_model(directory, dtype=torch.float32, device="cpu")
    with torch.inference_mode():
        result: torch.Tensor = model(input_ids=TOKENS, use_cache=False).logits
    return result


def assert_close(found: torch.Tensor, expected: torch.Tensor, tolerance: float = 1e-4) -> None:
    scale = expected.abs().max().item()
    assert scale > 1
    torch.testing.assert_close(found, expected, rtol=0, atol=tolerance * scale)


@pytest.mark.parametrize(
    "options", [{"refit": False, "grouping": "contiguous"}, {"refit": True}], ids=["closed", "refit"]
)
@pytest.mark.parametrize(("model_type", "overrides", "rotary_dims", "neighbours"), ROWS, ids=IDS)
def test_heads_related_by_what_is_free_are_merged_without_loss(
    model_type: str,
    overrides: dict[str, Any],
    rotary_dims: int,
    neighbours: bool,
    options: dict[str, Any],
    make_checkpoint: CheckpointFactory,
    tmp_path: Path,
) -> None:
    source = make_checkpoint(model_type, **overrides)
    model = load_model(source, dtype=torch.float32, device="cpu")
    relate_heads(model, 2, rotary_dims, neighbours)
    model.save_pretrained(source)
    assert_close(logits(convert(source, 2, tmp_path / "out", **options)), logits(source))


def test_the_mean_of_such_heads_is_not_the_same_function(make_checkpoint: CheckpointFactory, tmp_path: Path) -> None:
    """The control of the test above."""
    source = make_checkpoint("llama")
    model = load_model(source, dtype=torch.float32, device="cpu")
    relate_heads(model, 2, 8, False)
    model.save_pretrained(source)
    with open_checkpoint(source) as checkpoint:
        execute(Gqa(2).plan(Source.of(checkpoint)), checkpoint, tmp_path / "mean")
    expected = logits(source)
    assert (logits(tmp_path / "mean") - expected).abs().max() > 0.1 * expected.abs().max()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_loses_no_more_than_its_rounding(
    dtype: torch.dtype, make_checkpoint: CheckpointFactory, tmp_path: Path
) -> None:
    """The result is about as far from the function in float32 as the source is, whose weights are rounded too."""
    source = make_checkpoint("llama")
    model = load_model(source, dtype=torch.float32, device="cpu")
    relate_heads(model, 2, 8, False)
    model.save_pretrained(source)
    expected = logits(source)
    model.to(dtype).save_pretrained(source)
    rounding = (logits(source) - expected).abs().max()
    assert 0 < rounding < 0.05 * expected.abs().max()
    merged = logits(convert(source, 2, tmp_path / "out", refit=False))
    assert (merged - expected).abs().max() < 2 * rounding


@pytest.mark.parametrize("model_type", ["llama", "cohere", "phi", "gpt_bigcode", "falcon"])
def test_as_many_groups_as_heads_change_nothing(
    model_type: str, make_checkpoint: CheckpointFactory, tmp_path: Path
) -> None:
    overrides = {"multi_query": False} if model_type == "falcon" else OVERRIDES.get(model_type, {})
    source = make_checkpoint(model_type, **overrides)
    model = load_model(source, dtype=torch.float32, device="cpu")
    with open_checkpoint(source) as checkpoint:
        prepared = merge_heads(Source.of(checkpoint), HeadMerge(8, refit=False), Preparation(tmp_path, TEXT), {})
    assert prepared.overlay is not None
    for name in prepared.overlay.files:
        model.get_parameter(name).data = prepared.overlay.read(name)
    with torch.inference_mode():
        found = model(input_ids=TOKENS, use_cache=False).logits
    assert_close(found, logits(source), tolerance=1e-5)
    assert len(prepared.overlay.files) >= 4  # the projections of two layers, merged with nothing


def test_the_order_of_heads_in_the_source_changes_nothing(make_checkpoint: CheckpointFactory, tmp_path: Path) -> None:
    source = make_checkpoint("llama", num_key_value_heads=4)
    expected = logits(convert(source, 2, tmp_path / "in-order"))
    model = load_model(source, dtype=torch.float32, device="cpu")
    order = torch.tensor([2, 0, 3, 1])
    with torch.no_grad():
        for layer in model.model.layers:
            attention = layer.self_attn
            for projection, size in ((attention.q_proj, 16), (attention.k_proj, 8), (attention.v_proj, 8)):
                projection.weight.copy_(projection.weight.unflatten(0, (4, size))[order].flatten(0, 1))
            attention.o_proj.weight.copy_(attention.o_proj.weight.unflatten(1, (4, 16))[:, order].flatten(1))
    model.save_pretrained(tmp_path / "permuted")
    assert_close(logits(tmp_path / "permuted"), logits(source), tolerance=1e-5)
    assert_close(logits(convert(tmp_path / "permuted", 2, tmp_path / "out")), expected)


def test_calibration_text_is_drawn_from_every_file_and_document_in_turn(
    make_checkpoint: CheckpointFactory, tmp_path: Path
) -> None:
    """Documents of one letter each, as long as 3, 5, 1 and 2 passages; 1 is BOS."""
    source = make_checkpoint("llama", with_tokenizer=True)
    tokenizer = load_tokenizer(source)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer.save_pretrained(source)
    data = tmp_path / "data"
    data.mkdir()
    first = ["q" * 240, "z" * 400, "j" * 80]
    (data / "1.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in first))
    (data / "2.jsonl").write_text(json.dumps({"text": "x" * 160}))
    letters = {tokenizer(letter, add_special_tokens=False)["input_ids"][0]: letter for letter in "qzjx"}
    with open_checkpoint(source) as checkpoint:
        text = read_calibration_text(checkpoint, TextSource(str(data)), num_tokens=95, sequence_length=10)
        with pytest.raises(DataError, match=r"data: \d+ tokens, fewer than one sequence of 2000"):
            read_calibration_text(checkpoint, TextSource(str(data)), num_tokens=10**6, sequence_length=2000)
        everything = read_calibration_text(checkpoint, TextSource(str(data)), num_tokens=10**6, sequence_length=10)
    assert 880 <= everything.num_tokens < 920  # a token for each letter, BOS and EOS
    rows = text.token_ids.tolist()
    assert all(row[0] == 1 for row in rows)
    assert ["".join(dict.fromkeys(letters[token] for token in row[1:])) for row in rows] == list("qxzxjqzqz")


@pytest.mark.parametrize(("precision", "tolerance"), [("fp32", 1e-5), ("bf16", 0.05)])
@pytest.mark.parametrize("model_type", [name for name, entry in ARCHITECTURES.items() if not entry.cross_attention])
def test_layers_run_one_by_one_measure_what_hooks_do(
    model_type: str, precision: str, tolerance: float, make_checkpoint: CheckpointFactory
) -> None:
    source = make_checkpoint(model_type, **OVERRIDES.get(model_type, {}))
    with open_checkpoint(source) as checkpoint:
        architecture = find_architecture(checkpoint)
        model = LayerwiseModel(Source(checkpoint, architecture), precision=precision)
        with torch.inference_mode():
            states = [model.embed(batch) for batch in TEXT.batches]
            found = []
            for layer in range(2):
                with model.layer(layer) as module:
                    inputs = [with_one(model.attention_inputs(module, layer, batch)) for batch in states]
                    found.append(second_moment(zip(inputs, inputs, strict=True)))
                    states = [model.run(module, layer, batch) for batch in states]
        projections = [
            architecture.tensor_name(layer, "qkv_proj" if architecture.qkv_proj else "q_proj") for layer in (0, 1)
        ]
    whole = load_model(source, dtype=torch.float32, device="cpu")
    seen: dict[int, torch.Tensor] = {}
    for layer, name in enumerate(projections):

        def note(_: Any, arguments: Any, layer: int = layer) -> None:
            seen[layer] = with_one(arguments[0].flatten(0, -2)).double()

        whole.get_submodule(name.removesuffix(".weight")).register_forward_pre_hook(note)
    with torch.inference_mode():
        whole(input_ids=TOKENS, use_cache=False)
    for layer in (0, 1):
        expected = seen[layer].T @ seen[layer] / len(seen[layer])
        torch.testing.assert_close(found[layer], expected, rtol=0, atol=tolerance * expected.abs().max().item())


def random_matrix(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def covariances(heads: list[torch.Tensor], gram: torch.Tensor) -> torch.Tensor:
    return torch.stack([torch.stack([one @ gram @ other.T for other in heads]) for one in heads])


def error(heads: list[torch.Tensor], merged: Any, weights: list[torch.Tensor], gram: torch.Tensor) -> float:
    total = 0.0
    for head, reader, weight in zip(heads, merged.readers, weights, strict=True):
        difference = head - reader @ merged.shared
        total += torch.trace(weight @ difference @ gram @ difference.T).item()
    return total


@given(seed=st.integers(0, 10**6), num_heads=st.integers(2, 4))
def test_no_other_shared_value_loses_less(seed: int, num_heads: int) -> None:
    heads = [random_matrix(seed + i, 4, 7) for i in range(num_heads)]
    roots = [random_matrix(seed + 50 + i, 5, 4) for i in range(num_heads)]
    weights, x = [root.T @ root for root in roots], random_matrix(seed + 99, 30, 7)
    gram = x.T @ x / 30
    merged = merge_linear(covariances(heads, gram), torch.stack(weights), 4).over(torch.stack(heads))
    mean = merge_mean(covariances(heads, gram), torch.stack(weights)).over(torch.stack(heads))
    assert error(heads, mean, weights, gram) == pytest.approx(mean.total - mean.kept, rel=1e-6, abs=1e-9)
    least = error(heads, merged, weights, gram)
    assert least == pytest.approx(merged.total - merged.kept, rel=1e-6, abs=1e-9)
    assert least <= error(heads, mean, weights, gram) + 1e-9
    for attempt in range(5):
        moved = random_matrix(seed + 1000 + attempt, *merged.shared.shape) * 0.01
        changed = type(merged)(merged.shared + moved, merged.readers, 0.0, 0.0)
        assert error(heads, changed, weights, gram) >= least - 1e-9
        readers = merged.readers + 0.01 * random_matrix(seed + 2000 + attempt, *merged.readers.shape)
        assert error(heads, type(merged)(merged.shared, readers, 0.0, 0.0), weights, gram) >= least - 1e-9


@given(seed=st.integers(0, 10**6), num_heads=st.integers(2, 4))
def test_no_other_shared_rotary_key_loses_less(seed: int, num_heads: int) -> None:
    heads = [random_matrix(seed + i, 6, 7) for i in range(num_heads)]
    powers = [random_matrix(seed + 50 + i, 3).abs() + 0.1 for i in range(num_heads)]
    weights, x = [torch.diag(power.repeat(2)) for power in powers], random_matrix(seed + 99, 30, 7)
    gram = x.T @ x / 30
    merged = merge_rotary(covariances(heads, gram), torch.stack(powers)).over(torch.stack(heads))
    least = error(heads, merged, weights, gram)
    assert least == pytest.approx(merged.total - merged.kept, rel=1e-6, abs=1e-9)
    rotation = torch.block_diag(*[torch.tensor([[0.0, -1.0], [1.0, 0.0]], dtype=torch.float64)] * 3)
    order = torch.tensor([0, 3, 1, 4, 2, 5])  # pairs (i, i + 3) side by side
    for reader in merged.readers:
        paired = reader[order][:, order]
        torch.testing.assert_close(paired @ rotation, rotation @ paired)  # it commutes with every rotation
    for attempt in range(5):
        moved = random_matrix(seed + 1000 + attempt, *merged.shared.shape) * 0.01
        changed = type(merged)(merged.shared + moved, merged.readers, 0.0, 0.0)
        assert error(heads, changed, weights, gram) >= least - 1e-9


def rotations(rotary: Rotary, head_dim: int) -> list[torch.Tensor]:
    """The rotation of a half-split head by each distance, as rotary embeddings apply it."""
    half = rotary.dims // 2
    result = []
    for distance in range(rotary.longest):
        matrix = torch.eye(head_dim, dtype=torch.float64)
        for pair, frequency in enumerate(rotary.frequencies):
            cos, sin = math.cos(frequency * distance), math.sin(frequency * distance)
            i, j = pair, pair + half
            matrix[i, i] = matrix[j, j] = cos
            matrix[i, j], matrix[j, i] = sin, -sin  # the key lies before the query
        result.append(matrix)
    return result


ROTARY = Rotary((1.0, 0.01), longest=40)  # a pair that turns, a pair that hardly does, and 2 still dims


def likelihoods(rotary: Rotary) -> list[float]:
    total = sum(1 / (n + 1) for n in range(rotary.longest))
    return [1 / (n + 1) / total for n in range(rotary.longest)]


def error_at_distances(
    heads: list[torch.Tensor], merged: Any, weights: list[torch.Tensor], gram: torch.Tensor, rotary: Rotary
) -> float:
    total = 0.0
    for likelihood, turn in zip(likelihoods(rotary), rotations(rotary, len(heads[0])), strict=True):
        for head, reader, weight in zip(heads, merged.readers, weights, strict=True):
            difference = turn @ head - reader @ turn @ merged.shared
            total += likelihood * torch.trace(weight @ difference @ gram @ difference.T).item()
    return total


def test_an_expected_rotation_is_the_mean_over_rotations() -> None:
    matrix = random_matrix(0, 6, 6)
    pairs = list(zip(likelihoods(ROTARY), rotations(ROTARY, 6), strict=True))
    found = expected_rotation(ROTARY, 6)
    torch.testing.assert_close(found.mean(matrix), sum(p * (turn @ matrix @ turn.T) for p, turn in pairs))
    torch.testing.assert_close(found.mean_back(matrix), sum(p * (turn.T @ matrix @ turn) for p, turn in pairs))


def test_one_layer_is_held_at_a_time(
    make_checkpoint: CheckpointFactory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its projections and what is made of them are gigabytes of a large model."""
    alive: weakref.WeakSet[Projections] = weakref.WeakSet()
    before: list[int] = []

    def counted(*arguments: Any) -> Projections:
        before.append(len(alive))
        projections = read_projections(*arguments)
        alive.add(projections)
        return projections

    monkeypatch.setattr("kvconvert.convert.methods.merging.read_projections", counted)
    text = CalibrationText(torch.arange(64).view(2, 32) % VOCAB_SIZE, "text")
    with open_checkpoint(make_checkpoint(num_hidden_layers=3)) as checkpoint:
        source = Source.of(checkpoint)
        merge_heads(source, HeadMerge(2), Preparation(tmp_path, text), Gqa(2).result_config(source))
    assert before == [0, 0, 0]


def test_a_merge_at_any_angle_says_what_it_keeps_of_rotating_and_of_other_dims() -> None:
    """One of a head's three dims does not rotate; errors are averaged over eight angles, which stand for all."""
    size, dim, num_heads = 5, 3, 2
    q, k, v, o = (random_matrix(seed, num_heads * dim, size + 1) for seed in range(4))
    x = random_matrix(9, 30, size + 1)
    gram, free = x.T @ x / 30, FreeTransformations(Rotary((1.0,), longest=9))
    layer, shape = (
        LayerInput(Projections(q, k, v, o.T), gram),
        AttentionShape(size + 1, num_heads, num_heads, dim, (None,)),
    )
    merged = Heads([layer], shape, free, at_distances=False).merged_keys((0, 1))
    total = lost = 0.0
    for angle in torch.arange(8) * math.pi / 4:
        turn = torch.eye(dim, dtype=torch.float64)
        turn[:2, :2] = torch.tensor([[angle.cos(), -angle.sin()], [angle.sin(), angle.cos()]])
        for query, key, reader in zip(q.split(dim), k.split(dim), merged.readers, strict=True):
            for energy, rows in ((True, turn @ key), (False, turn @ key - reader @ turn @ merged.shared)):
                share = torch.trace(query @ gram @ query.T @ rows @ gram @ rows.T).item() / 8
                total, lost = (total + share, lost) if energy else (total, lost + share)
    assert merged.total == pytest.approx(total)
    assert merged.kept == pytest.approx(total - lost)


def test_frequencies_turn_keys_as_the_class_does(make_checkpoint: CheckpointFactory) -> None:
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    with open_checkpoint(make_checkpoint("llama")) as checkpoint:
        rotary = Source.of(checkpoint).rotary[0]
    query, key = random_matrix(1, 8), random_matrix(2, 8)
    phases = torch.outer(torch.arange(20, dtype=torch.float64), torch.tensor(rotary.frequencies).double()).repeat(1, 2)
    queries, keys = query.expand(1, 1, 20, 8), key.expand(1, 1, 20, 8)
    queries, keys = apply_rotary_pos_emb(queries, keys, phases.cos()[None], phases.sin()[None])
    turns = rotations(replace(rotary, longest=12), 8)
    assert (queries[0, 0, 15] @ keys[0, 0, 4]).item() == pytest.approx((query @ turns[11] @ key).item())


def test_keys_that_rotate_at_an_unknown_speed_are_refused(make_checkpoint: CheckpointFactory) -> None:
    """GPT-BigCode's class has no frequencies, as one whose buffer was renamed would not."""
    with open_checkpoint(make_checkpoint("gpt_bigcode", **OVERRIDES["gpt_bigcode"])) as checkpoint:
        architecture = replace(find_architecture(checkpoint), rotates=lambda config, layer: True)
        with pytest.raises(UnsupportedError, match="GPTBigCodeForCausalLM does not say how fast its keys rotate"):
            _ = Source(checkpoint, architecture).rotary


def merged_at_distances(
    heads: list[torch.Tensor], weights: list[torch.Tensor], gram: torch.Tensor
) -> tuple[Merged, Merged]:
    """The merge, and before it the one that it starts from."""
    parts = covariances(heads, gram), torch.stack(weights)
    start = merge_linear(*parts, 6)
    merged = merge_at_distances(start, *parts, ExpectedRotations.same(expected_rotation(ROTARY, 6)))
    return start.over(torch.stack(heads)), merged.over(torch.stack(heads))


@given(seed=st.integers(0, 10**6), num_heads=st.integers(1, 4))
def test_merges_at_distances_lose_what_they_say_and_less_than_where_they_started(seed: int, num_heads: int) -> None:
    heads = [random_matrix(seed + i, 6, 7) for i in range(num_heads)]
    roots = [random_matrix(seed + 50 + i, 8, 6) for i in range(num_heads)]
    weights, x = [root.T @ root for root in roots], random_matrix(seed + 99, 30, 7)
    gram = x.T @ x / 30
    start, merged = merged_at_distances(heads, weights, gram)
    least = error_at_distances(heads, merged, weights, gram, ROTARY)
    assert least == pytest.approx(merged.total - merged.kept, rel=1e-6, abs=1e-9 * merged.total)
    assert least <= error_at_distances(heads, start, weights, gram, ROTARY) + 1e-9 * merged.total
    for attempt in range(3):
        readers = merged.readers + 0.01 * random_matrix(seed + 2000 + attempt, *merged.readers.shape)
        changed = type(merged)(merged.shared, readers, 0.0, 0.0)
        assert error_at_distances(heads, changed, weights, gram, ROTARY) >= least - 1e-9 * merged.total


def test_merges_at_distances_end_where_no_key_nearby_loses_less() -> None:
    """Keys as alike as those of a model: the turns of the alternation have come to rest."""
    base = random_matrix(0, 6, 7)
    heads = [base + 0.3 * random_matrix(1 + i, 6, 7) for i in range(3)]
    roots, x = [random_matrix(50 + i, 8, 6) for i in range(3)], random_matrix(99, 30, 7)
    weights, gram = [root.T @ root for root in roots], x.T @ x / 30
    _, merged = merged_at_distances(heads, weights, gram)
    least = error_at_distances(heads, merged, weights, gram, ROTARY)
    for attempt in range(20):
        moved = merged.shared + 0.01 * random_matrix(1000 + attempt, *merged.shared.shape)
        changed = type(merged)(moved, merged.readers, 0.0, 0.0)
        assert error_at_distances(heads, changed, weights, gram, ROTARY) > least


@given(seed=st.integers(0, 10**6))
def test_losses_of_pairs_are_those_of_their_merges_or_less(seed: int) -> None:
    heads = [random_matrix(seed + i, 6, 7) for i in range(3)]
    roots, x = [random_matrix(seed + 50 + i, 8, 6) for i in range(3)], random_matrix(seed + 99, 30, 7)
    weights, gram = [root.T @ root for root in roots], x.T @ x / 30
    parts = covariances(heads, gram), torch.stack(weights)
    still, turned = pair_losses(*parts), pair_losses(*parts, expected_rotation(ROTARY, 6))
    all_linear, all_rotated = merged_at_distances(heads, weights, gram)
    for i, j in product(range(3), range(3)):
        linear, merged = merged_at_distances([heads[i], heads[j]], [weights[i], weights[j]], gram)
        expected = 0.0 if i == j else (linear.total - linear.kept) / all_linear.total
        assert still[i, j].item() == pytest.approx(expected, rel=1e-6, abs=1e-9)
        assert 0 <= turned[i, j].item() <= (merged.total - merged.kept) / all_rotated.total + 1e-9


def test_no_other_output_projection_fits_better() -> None:
    """The objective that the refit states, at its solution and around it."""
    original, closed_form = random_matrix(1, 5, 6), random_matrix(2, 5, 6)
    wanted, found = random_matrix(3, 40, 6), random_matrix(4, 40, 6)
    normal = found.T @ found / 40
    strength = 0.2 * normal.diagonal().mean()

    def objective(matrix: torch.Tensor) -> float:
        misfit = wanted @ original.T - found @ matrix.T
        return (misfit.pow(2).sum() / 40 + strength * (matrix - closed_form).pow(2).sum()).item()

    best = refitted(original, closed_form, wanted.T @ found / 40, normal, 0.2)
    for attempt in range(50):
        assert objective(best + 0.01 * random_matrix(10 + attempt, 5, 6)) > objective(best)


@pytest.mark.parametrize("outlier", [1.0, 1e3], ids=["even", "with-an-outlier"])
def test_a_fit_in_float32_loses_nothing(outlier: float) -> None:
    """A ridge that float32 takes, against float64, with outputs that are as uneven as those of massive activations.

    The objective may be greater by the square of what float32 leaves of the solution, 1e-3 at the worst condition.
    """
    size = 512
    found = random_matrix(1, 800, size)
    found[:, 0] *= outlier
    wanted, original, closed_form = (
        found + random_matrix(2, 800, size),
        random_matrix(3, 64, size),
        torch.ones(64, size),
    )
    cross, normal, strength = wanted.T @ found / 800, found.T @ found / 800, 0.2 * found.square().mean()

    def objective(matrix: torch.Tensor) -> float:
        misfit = wanted @ original.T - found @ matrix.T
        return (misfit.square().sum() / 800 + strength * (matrix - closed_form).square().sum()).item()

    closed_form = closed_form.double()
    exact = torch.linalg.solve(
        normal + strength * torch.eye(size, dtype=torch.float64), (original @ cross + strength * closed_form).T
    ).T
    fit = refitted(original, closed_form, cross, normal, 0.2)
    assert 0 < (fit - exact).abs().max() < 1e-3  # it was not done in float64
    assert objective(fit) == pytest.approx(objective(exact), rel=1e-6)
    assert objective(fit) < 0.99 * objective(closed_form)


def test_float32_does_not_do_for_covariances() -> None:
    """Heads that are images of one another merge without loss: to 1e-12 in float64, in float32 to 6e-5, far above the
    rounding of a float32 checkpoint. What has 1e-8 of the largest energy has 1e-4 of its amplitude.
    """
    base = random_matrix(0, 16, 40)
    heads = [(torch.eye(16) + 0.3 * random_matrix(1 + i, 16, 16)) @ base for i in range(4)]
    x = random_matrix(99, 200, 40) * torch.logspace(0, -4, 40, dtype=torch.float64)  # dims that differ as in a model
    gram, weights = x.T @ x / 200, torch.eye(16, dtype=torch.float64).expand(4, -1, -1)
    losses = []
    for dtype in (torch.float64, torch.float32):
        merged = merge_linear(covariances(heads, gram).to(dtype), weights.to(dtype), 16)
        shared, readers = (part.double() for part in (merged.shared, merged.readers))
        left = torch.stack(heads) - readers @ (shared @ torch.cat(heads))
        losses.append(((left @ x.T).square().mean() / (torch.stack(heads) @ x.T).square().mean()).sqrt().item())
    assert losses[0] < 1e-10
    assert losses[1] > 1e-5


@pytest.mark.parametrize(
    ("model_type", "overrides", "keys_free", "values_free"),
    [
        ("qwen3", {}, False, True),
        ("olmo2", {}, False, True),
        ("olmo", {"clip_qkv": 1.5}, False, False),
        ("diffllama", {}, True, False),
        ("bitnet", {}, True, False),
    ],
)
def test_a_side_that_is_not_free_takes_the_mean(
    model_type: str,
    overrides: dict[str, Any],
    keys_free: bool,
    values_free: bool,
    make_checkpoint: CheckpointFactory,
    tmp_path: Path,
) -> None:
    source = make_checkpoint(model_type, **overrides)
    output = convert(source, 2, tmp_path / "out", refit=False, grouping="contiguous")
    projections = []
    for directory in (source, output):
        with open_checkpoint(directory) as checkpoint:
            projections.append(read_projections(Source.of(checkpoint), 0))
    before, after = projections
    for side, free in (("k", keys_free), ("v", values_free)):
        mean = getattr(before, side).unflatten(0, (2, 4, 8)).mean(1).flatten(0, 1)
        assert torch.allclose(getattr(after, side), mean, atol=1e-6) != free, side


@pytest.mark.parametrize("model_type", ["bitnet", "diffllama", "qwen3", "bloom"])
def test_heads_keep_their_places_where_they_matter(
    model_type: str, make_checkpoint: CheckpointFactory, tmp_path: Path
) -> None:
    """BitNet has gains for each head after the values, DiffLlama subtracts halves, ALiBi has slopes for each head."""
    with as_target(open_checkpoint(make_checkpoint(model_type)), 2) as view:
        prepared = Gqa(2, merge="svd").prepare(view, Preparation(tmp_path))
    assert {report.groups for report in prepared.reports} == {((0, 1, 2, 3), (4, 5, 6, 7))}


def test_a_plan_without_the_tensors_that_were_made_for_it_is_refused(
    make_checkpoint: CheckpointFactory, tmp_path: Path
) -> None:
    with open_checkpoint(make_checkpoint()) as checkpoint:
        plan = Gqa(2, merge="svd").plan(Source.of(checkpoint))
        with pytest.raises(
            CheckpointError, match=r"the plan reads model\.layers\.0.*, which is not in what the method"
        ):
            execute(plan, checkpoint, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_encoder_decoders_are_refused(tmp_path: Path) -> None:
    from test_seq2seq import T5, make

    with as_target(open_checkpoint(make(tmp_path / "model", "t5", T5)), 2) as view:
        with pytest.raises(UnsupportedError, match="svd merges the heads of decoders only"):
            Gqa(2, merge="svd").prepare(view, Preparation(tmp_path))


@pytest.fixture
def source(make_checkpoint: CheckpointFactory) -> Path:
    return make_checkpoint(with_tokenizer=True)


def test_the_command_reports_what_each_layer_keeps(
    source: Path, invoke: Command, prose_file: Path, tmp_path: Path
) -> None:
    options = ("--method", "svd", "--calibration", prose_file, "--calibration-tokens", 512, "--json")
    outcome = invoke("mha2gqa", "-g", 2, source, *options, "-o", tmp_path / "out")
    assert outcome.returncode == 0, outcome.stderr
    result = json.loads(outcome.stdout)
    assert [layer["layers"] for layer in result["layers"]] == [[0], [1]]
    for layer in result["layers"]:
        assert sorted(head for group in layer["groups"] for head in group) == list(range(8))
        assert all(0 < kept < 1 for kept in layer["keys_retained"] + layer["values_retained"])
    assert result["calibration"]["num_tokens"] == 512
    record = json.loads((tmp_path / "out" / "kvconvert.json").read_text())
    assert (record["method"], record["calibration"]) == ("svd", result["calibration"])
    assert not list(tmp_path.glob(".*merging*"))


def test_statistics_are_kept_and_used_again(
    source: Path, invoke: Command, prose_file: Path, tmp_path: Path, make_checkpoint: CheckpointFactory
) -> None:
    file = tmp_path / "statistics.safetensors"
    text = ("--calibration", prose_file, "--calibration-tokens", 512, "--no-refit", "--save-statistics", file)
    svd = ("mha2gqa", "-g", 2, source, "--method", "svd")
    assert invoke(*svd, *text, "-o", tmp_path / "one").returncode == 0
    assert invoke(*svd, "--statistics", file, "-o", tmp_path / "two").returncode == 0
    one, two = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("one", "two"))
    assert one == two
    dry = invoke(*svd, "--statistics", file, "--dry-run", "--json", "-o", tmp_path / "three")
    assert len(json.loads(dry.stdout)["layers"]) == 2
    assert not (tmp_path / "three").exists()
    for other in (make_checkpoint(name="deeper", num_hidden_layers=3), make_checkpoint(name="other-weights", seed=1)):
        outcome = invoke("mha2gqa", "-g", 2, other, "--method", "svd", "--statistics", file)
        assert outcome.returncode == 2
        assert "these statistics are of another model" in outcome.stderr


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--calibration", "text.txt"), "--calibration belongs to --method svd"),
        (("--method", "svd", "--device", "teapot"), "device 'teapot': this machine has none"),
        (("--no-refit",), "--no-refit belongs to --method svd"),
        (("--precision", "fp32"), "--precision belongs to --method svd"),
        (("--method", "svd", "--save-statistics", "f", "--dry-run"), "--dry-run writes nothing"),
        (("--method", "svd", "--save-statistics", "/dev/null"), "/dev/null already exists"),
        (("--method", "svd", "--save-statistics", "out/f", "-o", "out"), "out/f lies in out, which is replaced"),
        (("--method", "svd", "--calibration", "a.txt", "--no-calibration"), "give one of --calibration"),
        (("--method", "svd", "--no-calibration", "--save-statistics", "f"), "--save-statistics needs text"),
        (("--method", "svd", "--no-calibration", "--split", "test"), "--split is about a calibration text"),
        (("--method", "svd", "--statistics", "f", "--calibration-tokens", "9"), "and --statistics rules one out"),
        (("--method", "svd", "--statistics", "f", "--device", "cpu"), "--device is about a calibration text"),
        (("--method", "svd", "--no-calibration", "--device", "cpu"), "--device is about a calibration text"),
        (("--method", "svd", "--calibration", "missing.txt"), "missing.txt"),
        (("--method", "svd", "--statistics", "missing"), "no such file"),
        (("--method", "svd", "--save-statistics", "missing/f"), "missing is not a writable directory"),
    ],
)
def test_options_that_do_not_go_together(
    options: tuple[str, ...], message: str, source: Path, invoke: Callable[..., Any]
) -> None:
    outcome = invoke("mha2mqa", source, *options)
    assert outcome.returncode == 2
    assert message in outcome.stderr
    assert not source.with_name("model-mqa").exists()


def test_without_calibration_inputs_count_as_white(source: Path, invoke: Command, tmp_path: Path) -> None:
    outcome = invoke("mha2mqa", source, "--method", "svd", "--no-calibration", "-o", tmp_path / "out")
    assert outcome.returncode == 0, outcome.stderr
    assert "keeps" in outcome.stdout
