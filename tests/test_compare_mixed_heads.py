"""Numbers of heads that benchmarks/compare_mixed_heads.py chooses for each layer, and the models that it makes."""

from __future__ import annotations

import copy
import importlib.util
import sys
from collections.abc import Callable, Iterator
from itertools import product
from pathlib import Path
from types import ModuleType

import pytest
import torch
from conftest import VOCAB_SIZE, load, logits
from hypothesis import given
from hypothesis import strategies as st
from kvconvert.convert import Gqa, Source, open_checkpoint
from kvconvert.convert.calibration.fitting import Fit
from kvconvert.convert.calibration.text import CalibrationText
from kvconvert.convert.methods.prepared import Preparation

OPTIONS = (1, 2, 4)


def load_script() -> ModuleType:
    path = Path(__file__).parents[1] / "benchmarks" / "compare_mixed_heads.py"
    spec = importlib.util.spec_from_file_location("compare_mixed_heads", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where its dataclass looks for the names of its annotations
    spec.loader.exec_module(module)
    return module


SCRIPT = load_script()
TEXT = CalibrationText(torch.randint(VOCAB_SIZE, (64, 16), generator=torch.Generator().manual_seed(0)), "numbers")


@pytest.fixture
def source(make_checkpoint: Callable[..., Path]) -> Iterator[Source]:
    checkpoint = make_checkpoint("llama", num_attention_heads=8, num_key_value_heads=4)
    with Gqa(1, merge="svd").source(open_checkpoint(checkpoint)) as source:
        yield source


@given(st.lists(st.tuples(*[st.floats(0, 1) for _ in OPTIONS]), min_size=1, max_size=4), st.data())
def test_no_other_numbers_within_the_budget_lose_less(rows: list[tuple[float, ...]], data: st.DataObject) -> None:
    damages = {(layer, n): loss for layer, row in enumerate(rows) for n, loss in zip(OPTIONS, row, strict=True)}
    budget = data.draw(st.integers(len(rows), 4 * len(rows)))

    def total(numbers: tuple[int, ...]) -> float:
        return sum(damages[place] for place in enumerate(numbers))

    chosen = SCRIPT.best_numbers(damages, len(rows), OPTIONS, budget)
    possible = [numbers for numbers in product(OPTIONS, repeat=len(rows)) if sum(numbers) <= budget]
    assert chosen in possible
    assert total(chosen) == pytest.approx(min(map(total, possible)))


def test_all_choices_leave_no_room() -> None:
    assert sorted(SCRIPT.all_numbers(2, OPTIONS, 5)) == [(1, 4), (2, 2), (4, 1)]
    assert sorted(SCRIPT.all_numbers(2, OPTIONS, 8)) == [(4, 4)]


def test_the_same_number_for_all_layers_is_what_gqa_makes(source: Source, tmp_path: Path) -> None:
    method = Gqa(2, merge="svd", fit_steps=8)
    wanted = method.prepare(source, Preparation(tmp_path, TEXT)).overlay
    assert wanted is not None
    merges = SCRIPT.Merges(source, TEXT)
    found = dict(SCRIPT.converted(source, merges, TEXT, (2, 2), Fit(8)).named_parameters())
    other = dict(SCRIPT.converted(source, merges, TEXT, (2, 2), Fit(0)).named_parameters())
    names = [name for name in found if "_proj" in name and "mlp" not in name]
    assert len(names) == 8
    for name in names:
        assert found[name].equal(wanted.read(name)), name
    assert not all(other[name].equal(wanted.read(name)) for name in names)


def test_different_numbers_are_a_stock_model_with_repeated_heads(source: Source) -> None:
    merges = SCRIPT.Merges(source, TEXT)
    mixed = SCRIPT.converted(source, merges, TEXT, (4, 1), Fit(0))
    assert mixed.model.layers[1].self_attn.k_proj.weight.shape[0] == source.shape.head_dim
    stock = load(source.checkpoint.directory)
    weights = copy.deepcopy(mixed.state_dict())
    for name in weights:
        if "layers.1" in name and name.endswith(("k_proj.weight", "v_proj.weight")):
            weights[name] = weights[name].repeat(4, 1)
    stock.load_state_dict(weights)
    torch.testing.assert_close(logits(stock), logits(mixed))
    assert not torch.allclose(logits(stock), logits(load(source.checkpoint.directory)), atol=1e-3)


def test_damage_is_that_of_the_model_in_which_one_layer_is_merged(source: Source) -> None:
    merges = SCRIPT.Merges(source, TEXT)
    damages = SCRIPT.measure_damages(source, merges, TEXT, (1, 2, 4))
    assert damages[0, 4] == 0
    assert 0 < damages[1, 2] < damages[1, 1]
    original, merged = load(source.checkpoint.directory), load(source.checkpoint.directory)
    SCRIPT.with_heads(merged, source.shape, (4, 2))
    tensors = original.state_dict() | merges.tensors(1, 2)
    merged.load_state_dict(tensors)
    for model in (original, merged):  # so that the last hidden states are those that leave the layer
        model.model.norm = torch.nn.Identity()
    with torch.no_grad():
        before, after = (model.model(TEXT.token_ids).last_hidden_state for model in (original, merged))
    error = ((after - before).square().sum(-1) / before.square().sum(-1)).mean()
    assert damages[1, 2] == pytest.approx(error.item(), rel=1e-4)
