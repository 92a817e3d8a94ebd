from __future__ import annotations

import math
from dataclasses import replace
from fractions import Fraction
from typing import Any

import pytest
from conftest import OVERRIDES, SETTINGS, build_model
from hypothesis import given
from hypothesis import strategies as st
from kvconvert.convert.architectures.table import known_architecture
from kvconvert.convert.errors import UnsupportedError
from kvconvert.uptrain.recipe import Objective, Recipe, Stage, Trained, attention_names, stages, trained_names

ATTENTION, PREDICTION = Objective.attention_regression, Objective.prediction
RATES = {"learning_rate": 1e-3, "layerwise_learning_rate": 2e-3}


def plan(recipe: Recipe, steps: int, fraction: float = 0.0, trained: Trained = Trained.all) -> tuple[Stage, ...]:
    return stages(recipe, steps=steps, layerwise_fraction=fraction, trained=trained, **RATES)


@pytest.mark.parametrize(
    ("recipe", "fraction", "trained", "expected"),
    [
        (Recipe.pretraining, 0.0, Trained.all, [("main", PREDICTION, Trained.all, 10, 0, 1e-3)]),
        (Recipe.distill, 0.0, Trained.kv, [("main", PREDICTION, Trained.kv, 10, 0, 1e-3)]),
        (
            Recipe.distill,
            0.25,
            Trained.all,
            [("layerwise", ATTENTION, Trained.attention, 3, 0, 2e-3), ("main", PREDICTION, Trained.all, 7, 3, 1e-3)],
        ),
        (
            Recipe.light,
            0.5,
            Trained.all,
            [
                ("layerwise", ATTENTION, Trained.attention, 5, 0, 2e-3),
                ("main", PREDICTION, Trained.attention, 5, 5, 1e-3),
            ],
        ),
        (Recipe.layerwise, 0.0, Trained.all, [("layerwise", ATTENTION, Trained.attention, 10, 0, 2e-3)]),
        (Recipe.layerwise, 0.0, Trained.kv, [("layerwise", ATTENTION, Trained.kv, 10, 0, 2e-3)]),
    ],
)
def test_stages(recipe: Recipe, fraction: float, trained: Trained, expected: list[tuple[Any, ...]]) -> None:
    assert plan(recipe, 10, fraction, trained) == tuple(Stage(*row) for row in expected)


@given(
    st.sampled_from([Recipe.distill, Recipe.light]),
    st.integers(1, 10**6),
    st.floats(0, 1, exclude_max=True),
    st.sampled_from(Trained),
)
def test_stages_share_the_steps(recipe: Recipe, steps: int, fraction: float, trained: Trained) -> None:
    made = plan(recipe, steps, fraction, trained)
    assert sum(stage.steps for stage in made) == steps
    assert [stage.first_step for stage in made] == [0, *(stage.last_step for stage in made[:-1])]
    assert min(stage.steps for stage in made) >= 1
    assert made[-1].objective is PREDICTION
    assert (len(made) == 2) == (fraction > 0 and steps > 1)


@given(st.integers(1, 99), st.integers(1, 10**4))
def test_a_fraction_is_exact(percent: int, hundreds: int) -> None:
    """ceil(0.07 · 100) is 8 in floats."""
    assert plan(Recipe.distill, 100 * hundreds, percent / 100)[0].steps == percent * hundreds


def test_the_control_of_exactness() -> None:
    assert math.ceil(0.07 * 100) == 8
    assert math.ceil(Fraction("0.07") * 100) == 7


@pytest.mark.parametrize("fraction", [-0.1, 1.0, math.nan])
def test_fractions_that_are_none(fraction: float) -> None:
    with pytest.raises(UnsupportedError, match=f"layer-wise fraction is {fraction}, expected at least 0 and below 1"):
        plan(Recipe.distill, 10, fraction)


@pytest.mark.parametrize("recipe", [Recipe.pretraining, Recipe.layerwise])
def test_a_recipe_of_one_stage_takes_no_fraction(recipe: Recipe) -> None:
    with pytest.raises(UnsupportedError, match=rf"fraction is 0\.2, but recipe {recipe} has one stage only"):
        plan(recipe, 10, 0.2)


KV: dict[str, set[str]] = {
    "llama": {"k_proj.weight", "k_proj.bias", "v_proj.weight", "v_proj.bias"},
    "qwen3": {"k_proj.weight", "v_proj.weight", "k_norm.weight"},
    "phi3": {"qkv_proj.weight"},
    "stablelm": {"k_proj.weight", "k_proj.bias", "v_proj.weight", "v_proj.bias"}
    | {f"k_layernorm.norms.{head}.weight" for head in range(8)},
    "gpt_bigcode": {"c_attn.weight", "c_attn.bias"},
    "deepseek_v3": {"kv_a_proj_with_mqa.weight", "kv_a_layernorm.weight", "kv_b_proj.weight"},
}
LATENT = {"head_dim": 4, "q_lora_rank": None, "kv_lora_rank": 16, "qk_rope_head_dim": 4, "qk_nope_head_dim": 8}
LATENT |= {"v_head_dim": 8, "n_routed_experts": 4, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 2}
MORE: dict[str, dict[str, Any]] = {"stablelm": {"qk_layernorm": True}, "deepseek_v3": LATENT}
PLACES = {"gpt_bigcode": "transformer.h.{}.attn"}


@pytest.mark.parametrize("model_type", KV)
def test_trained_names(model_type: str) -> None:
    model = build_model(model_type, **OVERRIDES.get(model_type, {}), **MORE.get(model_type, {}))
    names = [name for name, _ in model.named_parameters()]
    architecture = known_architecture(model_type)
    assert architecture is not None
    place = PLACES.get(model_type, "model.layers.{}.self_attn")
    assert trained_names(names, architecture, Trained.kv) == {
        f"{place.format(layer)}.{rest}" for layer in range(2) for rest in KV[model_type]
    }
    attention = {name for name in names if name.startswith((f"{place.format(0)}.", f"{place.format(1)}."))}
    assert trained_names(names, architecture, Trained.attention) == attention == attention_names(names, architecture)
    assert trained_names(names, architecture, Trained.all) == set(names) > attention


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"precision": "fp16"}, "precision is 'fp16', expected 'bf16', 'fp32' or 'fp64'"),
        ({"warmup_fraction": 1.5}, "warmup fraction is 1.5, expected a number from 0 to 1"),
        ({"body_lr_multiplier": math.nan}, "body lr multiplier is nan, expected 0 or more"),
        ({"weight_decay": -1.0}, "weight decay is -1.0, expected 0 or more"),
        ({"max_grad_norm": math.inf}, "max grad norm is inf, expected 0 or more"),
        ({"layerwise_learning_rate": 0.0}, "learning rate is 0.0, expected a positive number"),
        ({"layerwise_fraction": 0.5}, "recipe pretraining has one stage only"),
    ],
)
def test_settings_check_themselves(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UnsupportedError, match=message):
        replace(SETTINGS, **changes)
