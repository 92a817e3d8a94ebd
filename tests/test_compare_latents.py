"""The baselines of benchmarks/compare_latents.py lose nothing where nothing has to be dropped."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from conftest import VOCAB_SIZE, CheckpointFactory
from kvconvert.convert import Source, open_checkpoint
from kvconvert.convert.algebra.attention_shape import AttentionShape
from kvconvert.convert.algebra.projections import Projections
from kvconvert.convert.algebra.rotations import Rotary
from kvconvert.convert.calibration.text import CalibrationText
from kvconvert.convert.checkpoint.loading import load_model

TOKENS = torch.randint(3, VOCAB_SIZE, (4, 32), generator=torch.Generator().manual_seed(0))
TEXT = CalibrationText(TOKENS, "random")
EXACT = 1e-4  # of the logits' scale
SHAPE = AttentionShape(12, 4, 2, 8, (None,))
ROTARY = Rotary((1.0, 0.5, 0.2, 0.1), longest=32)


@pytest.fixture(scope="module")
def script() -> ModuleType:
    path = Path(__file__).parents[1] / "benchmarks" / "compare_latents.py"
    spec = importlib.util.spec_from_file_location("compare_latents", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their annotations up there
    spec.loader.exec_module(module)
    return module


def error_of(script: ModuleType, directory: Path, method: str, rank: int, rope_dim: int) -> float:
    """The largest difference of logits from the original's, of their scale."""
    with torch.inference_mode(), open_checkpoint(directory) as checkpoint:
        source = Source.of(checkpoint)
        layers = script.convert(script.measure(source, TEXT), getattr(script, method), rank, rope_dim)
        found = script.build(source, layers)(input_ids=TOKENS, use_cache=False).logits
        original: Any = load_model(directory, dtype=torch.float32, device="cpu")
        expected = original(input_ids=TOKENS, use_cache=False).logits
    scale = expected.abs().max().item()
    assert scale > 1
    return float((found - expected).abs().max().item() / scale)


CASES = {
    "transmla-mqa": ("transmla", 1, 8, 8),
    "mha2mla-mqa": ("mha2mla", 1, 8, 8),
    "mha2mla-gqa": ("mha2mla", 2, 16, 16),
    "mha2mla-mha": ("mha2mla", 8, 64, 64),
}
each_case = pytest.mark.parametrize(("method", "num_heads", "rank", "rope_dim"), CASES.values(), ids=CASES)


@each_case
@pytest.mark.parametrize("overrides", [{}, {"attention_bias": True}, {"tie_word_embeddings": True}])
def test_every_key_in_the_rotary_part_and_all_of_the_values_lose_nothing(
    script: ModuleType,
    make_checkpoint: CheckpointFactory,
    method: str,
    num_heads: int,
    rank: int,
    rope_dim: int,
    overrides: dict[str, Any],
) -> None:
    source = make_checkpoint(num_key_value_heads=num_heads, **overrides)
    assert error_of(script, source, method, rank, rope_dim) < EXACT


@each_case
def test_fewer_directions_or_fewer_pairs_are_not_exact(
    script: ModuleType, make_checkpoint: CheckpointFactory, method: str, num_heads: int, rank: int, rope_dim: int
) -> None:
    """So that the test above can fail."""
    source = make_checkpoint(num_key_value_heads=num_heads)
    assert error_of(script, source, method, rank * 3 // 4, rope_dim) > 100 * EXACT
    assert error_of(script, source, method, rank, rope_dim // 2) > 100 * EXACT


def test_keys_that_do_not_turn_need_no_position(script: ModuleType, make_checkpoint: CheckpointFactory) -> None:
    """With frequencies near 0 all is linear: what TransMLA and MHA2MLA leave to the latent is lost by neither."""
    rope = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 1e7}
    source = make_checkpoint(num_key_value_heads=2, rope_parameters=rope)
    assert error_of(script, source, "transmla", 28, 4) < EXACT
    assert error_of(script, source, "transmla", 24, 8) < EXACT
    assert error_of(script, source, "mha2mla", 24, 8) < EXACT
    assert error_of(script, source, "transmla", 26, 4) > 10 * EXACT


def test_heads_that_are_multiples_of_one_fit_in_the_first_rotated_head(
    script: ModuleType, make_checkpoint: CheckpointFactory
) -> None:
    source = make_checkpoint(num_key_value_heads=4)
    model: Any = load_model(source, dtype=torch.float32, device="cpu")
    factors = torch.tensor([1.0, -2.0, 0.5, 0.3])[:, None, None]
    for layer in model.model.layers:
        keys = layer.self_attn.k_proj.weight
        keys.data.copy_((factors * keys.data[:8]).flatten(0, 1))
    model.save_pretrained(source)
    assert error_of(script, source, "transmla", 32, 8) < EXACT
    assert error_of(script, source, "mha2mla", 32, 8) > 100 * EXACT


def random(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)), dtype=torch.float64)


def energies(keys: torch.Tensor, gram: torch.Tensor) -> torch.Tensor:
    """Of each rotary pair of a half-split head, (F,)."""
    return ((keys @ gram) * keys).sum(1).view(2, -1).sum(0)


def test_no_head_has_more_energy_at_a_frequency_than_the_first_rotated_one(script: ModuleType) -> None:
    source = Projections(random(32, 13), random(16, 13), random(16, 13), random(12, 32))
    inputs = random(13, 40)
    gram = inputs @ inputs.T / 40
    first = script.transmla(source, SHAPE, ROTARY, gram, 12, 8).layer
    for head in source.k.split(8):
        assert torch.all(energies(first.rope_key, gram) >= energies(head, gram) - 1e-9)
    folded = script.transmla(source, SHAPE, ROTARY, gram, 12, 4)
    assert folded.frequencies.tolist() == pytest.approx([1.0, 0.2])
    for head in source.k.split(8):
        assert torch.all(energies(folded.layer.rope_key, gram) >= energies(head, gram).view(2, 2).amax(1) - 1e-9)
    wider = script.transmla(source, SHAPE, ROTARY, gram, 12, 4, freqfold=2)
    assert wider.frequencies.tolist() == pytest.approx([1.0, 0.2])
    assert energies(wider.layer.rope_key, gram).sum() >= energies(folded.layer.rope_key, gram).sum() - 1e-9


def test_a_head_keeps_its_own_pairs_with_the_largest_norms(script: ModuleType) -> None:
    keys = random(2, 2, 4, 13) * 0.1
    keys[0, :, 2] *= 100
    keys[1, :, 3] *= 100
    source = Projections(random(32, 13), keys.flatten(0, 2), random(16, 13), random(12, 32))
    result = script.mha2mla(source, SHAPE, ROTARY, torch.eye(13, dtype=torch.float64), 6, 6)
    assert result.frequencies.tolist() == pytest.approx([0.2, 0.1])
    assert len(result.layer.latent) == 6 + 6 - 4  # one pair of each head is 4 dims, and the latent gets the other 2
    torch.testing.assert_close(result.layer.rope_key, torch.stack([keys[0, :, 2], keys[1, :, 3]], dim=1).flatten(0, 1))
    rotary = result.layer.q[:, 8:].view(4, 2, 2, 13)
    assert torch.all(rotary[:2, :, 1] == 0)
    assert torch.all(rotary[2:, :, 0] == 0)
