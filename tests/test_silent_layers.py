"""Layers and heads that do nothing: they stay silent, change nothing for the others, and training can wake them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import TOKENS, build_model, load
from kvconvert.convert import Cla, Gqa, Mla, execute, open_checkpoint
from kvconvert.convert.algebra.attention_shape import AttentionShape
from kvconvert.convert.algebra.head_merge import FreeTransformations, Heads, LayerInput, merge_layers
from kvconvert.convert.algebra.heads import HeadGrouping, mean_heads
from kvconvert.convert.algebra.latent import latent_attention, normalised
from kvconvert.convert.algebra.layer_grouping import LayerGrouping
from kvconvert.convert.algebra.projections import Projections
from kvconvert.convert.algebra.refit import refitted
from kvconvert.convert.algebra.rotations import Rotary
from kvconvert.convert.calibration.text import CalibrationText
from kvconvert.convert.methods.method import Method
from kvconvert.convert.methods.prepared import Preparation
from kvconvert.convert.plan import KeepSilent
from safetensors.torch import load_file
from torch import Tensor

TEXT = CalibrationText(TOKENS[:, :16], "random")
# what is zero in each layer of the model; a layer without outputs is that of a block expansion (arXiv 2401.02415)
LAYERS: tuple[tuple[str, ...], ...] = (
    (),
    ("o_proj",),
    ("v_proj",),
    ("q_proj", "k_proj", "v_proj", "o_proj"),
    ("q_proj",),
    ("k_proj",),
    ("input_layernorm",),
)
SILENT = [layer for layer, zero in enumerate(LAYERS) if {"o_proj", "v_proj", "input_layernorm"} & set(zero)]
SHARED = LayerGrouping((0, 0, 2, 2, 4, 4, 4))
METHODS: dict[str, tuple[Method, CalibrationText | None]] = {
    "gqa-mean": (Gqa(2), None),
    "gqa-random": (Gqa(2, merge="random"), None),
    "gqa": (Gqa(2, merge="svd"), TEXT),
    "gqa-closed-form": (Gqa(2, merge="svd", refit=False), TEXT),
    "gqa-without-ridge": (Gqa(2, merge="svd", refit_ridge=0.0), TEXT),
    "gqa-weights-only": (Gqa(2, merge="svd"), None),
    "mqa": (Gqa(1, merge="svd"), TEXT),
    "cla-mean": (Cla(SHARED, num_key_value_heads=2), None),
    "cla-first": (Cla(SHARED, merge="first"), None),
    "cla": (Cla(SHARED, merge="svd", num_key_value_heads=2), TEXT),
    "cla-auto": (Cla(share=2, pairs="auto", merge="svd", refit=False), TEXT),
    "mla": (Mla(16, 4), TEXT),
    "mla-closed-form": (Mla(16, 4, refit=False), TEXT),
    "mla-weights-only": (Mla(16, 4), None),
    "mla-exact-padded": (Mla(16, 8, "exact", "gain", v_head_dim=16), TEXT),
    "mla-exact-weights-only": (Mla(16, 8, "exact", "gain"), None),
}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose layers but the first are silent, each in its own way."""
    sizes: dict[str, Any] = {"hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 4}
    model = build_model(num_hidden_layers=len(LAYERS), **sizes)
    with torch.no_grad():
        for layer, zero in zip(model.model.layers, LAYERS, strict=True):
            for name in zero:
                (layer if name == "input_layernorm" else layer.self_attn).get_submodule(name).weight.zero_()
    directory = tmp_path_factory.mktemp("silent") / "model"
    model.save_pretrained(directory)
    return directory


@pytest.mark.parametrize(("method", "text"), METHODS.values(), ids=METHODS)
def test_silent_layers_stay_silent_and_can_wake(
    method: Method, text: CalibrationText | None, source: Path, tmp_path: Path
) -> None:
    with method.source(open_checkpoint(source)) as view:
        resolved = method.resolve(view, text)
        (tmp_path / "scratch").mkdir()
        prepared = resolved.prepare(view, Preparation(tmp_path / "scratch", text))
        execute(resolved.plan(view), view.checkpoint, tmp_path / "result", prepared.overlay)
    assert all(tensor.isfinite().all() for tensor in load_file(tmp_path / "result/model.safetensors").values())

    model = load(tmp_path / "result")
    outputs: dict[int, Tensor] = {}
    for index, layer in enumerate(model.model.layers):
        layer.self_attn.register_forward_hook(lambda *call, index=index: outputs.update({index: call[2][0]}))
    model(input_ids=TOKENS, use_cache=False).logits.square().mean().backward()
    # random values are values, also where there were none
    silent = [layer for layer in SILENT if getattr(method, "merge", None) != "random" or LAYERS[layer] != ("v_proj",)]
    for layer in silent:
        assert not outputs[layer].any(), layer
    for layer in set(range(len(LAYERS))) - set(silent):
        assert outputs[layer].any(), layer
    # a block expansion is trained from its o_proj on, which needs values to read
    assert all(parameter.grad is None or parameter.grad.isfinite().all() for parameter in model.parameters())
    assert model.model.layers[1].self_attn.o_proj.weight.grad.any()


def random(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


SIZE, DIM = 12, 3  # hidden_size, head_dim
SHAPE = AttentionShape(SIZE, 4, 4, DIM, (None,))
DEAD = (1, 3)  # heads that do nothing: one that o_proj does not read, one without values


STILL = Rotary(())


def layer(*, dead: bool = True, scale: float = 1.0) -> LayerInput:
    """Four heads, of which two are dead; `scale` multiplies what dead heads have that nobody hears."""
    q, k, v = (random(seed, 4, DIM, SIZE + 1) for seed in range(3))
    o = random(3, SIZE, 4, DIM)
    inputs = torch.cat([random(4, 50, SIZE), torch.ones(50, 1, dtype=torch.float64)], dim=1)
    for head in DEAD:
        q[head] *= scale
        k[head] *= scale
    v[1] *= scale
    o[:, 3] *= scale
    if dead:
        o[:, 1] = 0
        v[3] = 0
    projections = Projections(q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1), o.flatten(1))
    return LayerInput(projections, inputs.T @ inputs / 50)


def best_approximation(parts: list[Tensor], gram: Tensor, rank: int) -> tuple[Tensor, float]:
    """The rows of `parts`, as nearly as `rank` linear functions of x can give them (Eckart-Young), and what is kept."""
    values, vectors = torch.linalg.eigh(gram)
    root = vectors * values.sqrt() @ vectors.T
    left, singular, right = torch.linalg.svd(torch.cat(parts) @ root, full_matrices=False)
    nearest = left[:, :rank] * singular[:rank] @ right[:rank] @ torch.linalg.inv(root)
    return nearest, float(singular[:rank].square().sum() / singular.square().sum())


def merged(given: LayerInput, rotary: Rotary = STILL) -> Any:
    return merge_layers(Heads([given], SHAPE, FreeTransformations(rotary)), HeadGrouping(((0, 1, 2, 3),)))


def functions(result: Any) -> list[Tensor]:
    """Of each query head: what it adds to the output per unit of attention, and its scores, as matrices of x."""
    q, k, v, o = (getattr(result.projections[0], name) for name in "qkvo")
    return [*(part @ v for part in o.split(DIM, dim=1)), *(part.T @ k for part in q.split(DIM))]


def test_the_mean_of_heads_takes_no_notice_of_what_they_do() -> None:
    """A head without values comes to read a part of another's, unless its layer shares keys and values with others."""
    values, output = random(0, 4, DIM, SIZE), random(1, SIZE, 4 * DIM)
    values[1] = 0
    pooled = mean_heads(values.flatten(0, 1), HeadGrouping.contiguous(4, 2)).unflatten(0, (2, DIM))
    torch.testing.assert_close(pooled[0], values[0] / 2)
    kept = KeepSilent(4)(output, torch.ones(SIZE), values.flatten(0, 1)).unflatten(1, (4, DIM))
    assert not kept[:, 1].any()
    others = [0, 2, 3]
    assert torch.equal(kept[:, others], output.unflatten(1, (4, DIM))[:, others])


def test_live_heads_keep_what_they_would_keep_alone() -> None:
    given = layer()
    outputs, queries = (
        given.projections.o.unflatten(1, (4, DIM)).transpose(0, 1),
        given.projections.q.unflatten(0, (4, DIM)),
    )
    keys, values = given.projections.k.unflatten(0, (4, DIM)), given.projections.v.unflatten(0, (4, DIM))
    result = merged(given)
    live = [head for head in range(4) if head not in DEAD]
    found = functions(result)

    # values: the outputs of the live heads; keys: their scores, E[q qᵀ]^½ k
    wanted, kept = best_approximation([outputs[head] @ values[head] for head in live], given.gram, DIM)
    torch.testing.assert_close(torch.cat([found[head] for head in live]), wanted)
    assert result.values_retained[0] == pytest.approx(kept)
    roots = []
    for head in live:
        power, vectors = torch.linalg.eigh(queries[head] @ given.gram @ queries[head].T)
        roots.append(vectors * power.sqrt() @ vectors.T)
    nearest, kept = best_approximation(
        [root @ keys[head] for root, head in zip(roots, live, strict=True)], given.gram, DIM
    )
    for root, head, rows in zip(roots, live, nearest.split(DIM), strict=True):
        torch.testing.assert_close(found[4 + head], queries[head].T @ torch.linalg.solve(root, rows))
    assert result.keys_retained[0] == pytest.approx(kept)
    for head in DEAD:
        assert torch.equal(found[head], torch.zeros_like(found[head]))

    awake = merged(layer(dead=False))  # the control
    assert not torch.allclose(torch.cat([functions(awake)[head] for head in live]), wanted)


@pytest.mark.parametrize("rotary", [STILL, Rotary((1.0,), longest=9)], ids=["still", "rotating"])
def test_what_nobody_hears_of_a_dead_head_does_not_matter(rotary: Rotary) -> None:
    one, other = (functions(merged(layer(scale=scale), rotary)) for scale in (1.0, 1000.0))
    for head in (0, 2):
        torch.testing.assert_close(one[head], other[head])
        torch.testing.assert_close(one[4 + head], other[4 + head], rtol=1e-6, atol=1e-6)
    awake = [functions(merged(layer(dead=False, scale=scale), rotary)) for scale in (1.0, 1000.0)]
    assert not torch.allclose(awake[0][0], awake[1][0], rtol=0.1)  # the control


@pytest.mark.parametrize("constant", [True, False])
def test_a_latent_holds_nothing_of_dead_heads(constant: bool) -> None:
    rotary = Rotary((1.0,), longest=9)

    def live(dead: bool, scale: float) -> Tensor:
        given = layer(dead=dead, scale=scale)
        made = latent_attention(
            given.projections, SHAPE, rotary, given.gram, rope_pairs=[(0, 0)], kv_lora_rank=5, constant=constant
        )
        outputs = made.o.unflatten(1, (4, DIM)).transpose(0, 1) @ made.value_up @ made.latent
        scores = made.q[:, :DIM].mT @ made.key_up @ made.latent
        return torch.cat([outputs[[0, 2]].flatten(), scores[[0, 2]].flatten()])

    torch.testing.assert_close(live(True, 1.0), live(True, 1000.0), rtol=1e-6, atol=1e-6)
    assert not torch.allclose(live(False, 1.0), live(False, 1000.0), rtol=0.1)  # the control


def test_where_values_are_not_free_every_head_counts() -> None:
    """Between heads' outputs and o_proj there may be anything then, so that a zero column says nothing of a head."""
    free = FreeTransformations(STILL, values=False)
    one, other = (Heads([layer(scale=scale)], SHAPE, free).merged_keys((0, 1, 2, 3)) for scale in (1.0, 1000.0))
    assert one.total > 0
    assert not torch.allclose(one.readers[0] @ one.shared, other.readers[0] @ other.shared, rtol=0.1)


def test_a_token_without_a_latent_is_left_out_of_the_norm() -> None:
    """The norm before the attention gives zeros for a token whose hidden state is zero, such as padding."""
    given = layer()
    made = latent_attention(
        given.projections,
        SHAPE,
        Rotary((1.0,), longest=9),
        given.gram,
        rope_pairs=[(0, 0)],
        kv_lora_rank=5,
        constant=False,
    )
    inputs = torch.cat([random(4, 50, SIZE + 1), torch.zeros(6, SIZE + 1, dtype=torch.float64)])
    fitted = normalised(made, inputs, torch.full((56,), 1 / 56, dtype=torch.float64))
    for part in (fitted.latent, fitted.key_up, fitted.value_up):
        assert part.isfinite().all()
    assert normalised(made, torch.zeros_like(inputs), torch.ones(56)) is made


@pytest.mark.parametrize("silence", ["o", "v"])
def test_where_all_heads_are_silent_they_are_merged_as_if_they_were_not(silence: str) -> None:
    given = layer(dead=False)
    getattr(given.projections, silence).zero_()
    result = merged(given)
    assert result.keys_retained == result.values_retained == (1.0,)  # nothing is lost of a zero
    keys, queries = given.projections.k.unflatten(0, (4, DIM)), given.projections.q.unflatten(0, (4, DIM))
    found = functions(result)
    errors = [found[4 + head] - queries[head].T @ keys[head] for head in range(4)]
    assert sum(map(energy, errors)) < 0.9 * sum(energy(queries[head].T @ keys[head]) for head in range(4))
    assert result.projections[0].v.any() == (silence == "o")
    assert result.projections[0].o.any() == (silence == "v")


def energy(matrix: Tensor) -> float:
    return float(matrix.square().sum())


def moments(z: Tensor, merged_z: Tensor) -> tuple[Tensor, Tensor]:
    return z.T @ merged_z / len(z), merged_z.T @ merged_z / len(z)


def ridge_fit(original: Tensor, closed_form: Tensor, z: Tensor, merged_z: Tensor, ridge: float) -> Tensor:
    """Least squares of a stacked system, whose last rows pull to the closed form."""
    pull = (ridge * merged_z.square().mean()) ** 0.5 * torch.eye(merged_z.shape[1], dtype=z.dtype)
    rows = torch.cat([merged_z / len(z) ** 0.5, pull])
    wanted = torch.cat([z @ original.T / len(z) ** 0.5, pull @ closed_form.T])
    solution: Tensor = torch.linalg.lstsq(rows, wanted).solution.T
    return solution


def test_a_fit_leaves_alone_what_is_silent() -> None:
    original, closed_form, z, merged_z = random(0, 5, 6), random(1, 5, 6), random(2, 40, 6), random(3, 40, 6)
    closed_form[:, 1] = 0  # a head that nothing reads
    merged_z[:, 4] = 0  # a head without values
    live = [0, 2, 3, 5]
    found = refitted(original, closed_form, *moments(z, merged_z), 0.2)
    wanted = ridge_fit(original, closed_form[:, live], z, merged_z[:, live], 0.2)
    torch.testing.assert_close(found[:, live], wanted)
    assert torch.equal(found[:, [1, 4]], closed_form[:, [1, 4]])

    other = ridge_fit(original, closed_form, z, merged_z, 0.2)  # the control: a fit of all columns
    assert not torch.allclose(found[:, live], other[:, live], rtol=1e-3)
    silent = refitted(original, closed_form, *moments(z, torch.zeros_like(z)), 0.2)
    assert torch.equal(silent, closed_form)


def test_a_fit_without_ridge_keeps_the_closed_form_where_nothing_decides() -> None:
    original, closed_form, z, merged_z = random(0, 5, 6), random(1, 5, 6), random(2, 40, 6), random(3, 40, 6)
    merged_z[:, 5] = merged_z[:, 0]  # only the sum of two columns matters
    found = refitted(original, closed_form, *moments(z, merged_z), 0.0)
    best = torch.linalg.lstsq(merged_z, z @ original.T, driver="gelsd").solution.T  # gelsy is for full rank
    torch.testing.assert_close(found @ merged_z.T, best @ merged_z.T)
    torch.testing.assert_close(found[:, 0] - found[:, 5], closed_form[:, 0] - closed_form[:, 5])
