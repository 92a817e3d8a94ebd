"""CrossLayerDecoder, our class for Llama-shaped decoders whose layers share keys and values."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import VOCAB_SIZE, build_model
from kvconvert.convert.runtime.transformers_interface import CACHE_NAME, cache_of, checkpoint_activations
from transformers import AttentionInterface, AutoModelForCausalLM, DynamicCache, LlamaForCausalLM, StaticCache
from transformers.integrations.sdpa_attention import sdpa_attention_forward

KINDS: dict[str, dict[str, Any]] = {
    "pairs": {"kv_source_layers": [0, 0, 2, 2], "attention_bias": ["q_proj", "k_proj", "v_proj", "o_proj"]},
    "threes": {"kv_source_layers": [0, 0, 0, 3], "num_key_value_heads": 1, "qk_norm": True},
    "windows": {
        "kv_source_layers": [0, 0, 2, 2],
        "layer_types": ["sliding_attention"] * 2 + ["full_attention"] * 2,
        "sliding_window": 4,
        "rope_parameters": {"rope_type": "default", "rope_theta": 99.0, "partial_rotary_factor": 0.5},
    },
}
each_kind = pytest.mark.parametrize("overrides", KINDS.values(), ids=KINDS)


@pytest.fixture
def input_ids() -> torch.Tensor:
    return torch.randint(3, VOCAB_SIZE, (2, 12), generator=torch.Generator().manual_seed(0))


def build(overrides: dict[str, Any], **more: Any) -> Any:
    return build_model("cross_layer_decoder", **{"num_hidden_layers": 4, "num_key_value_heads": 4} | overrides | more)


def readers(model: Any) -> list[int]:
    """The layers that read another's keys and values."""
    return [layer for layer, source in enumerate(model.config.kv_source_layers) if source != layer]


@each_kind
def test_layers_that_read_have_queries_and_outputs_only(overrides: dict[str, Any]) -> None:
    model = build(overrides)
    for layer in range(4):
        names = {name.split(".")[0] for name, _ in model.model.layers[layer].self_attn.named_parameters()}
        norms = {"q_norm", "k_norm"} if model.config.qk_norm else set()
        own = {"q_proj", "k_proj", "v_proj", "o_proj"} | norms
        assert names == (own - {"k_proj", "v_proj", "k_norm"} if layer in readers(model) else own)


@each_kind
def test_a_layer_attends_to_what_its_source_computed(overrides: dict[str, Any], input_ids: torch.Tensor) -> None:
    model = build(overrides)
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []

    def note(module: Any, query: Any, key: torch.Tensor, value: torch.Tensor, *arguments: Any, **named: Any) -> Any:
        seen.append((key, value))
        return sdpa_attention_forward(module, query, key, value, *arguments, **named)

    AttentionInterface.register("noting", note)
    model.set_attn_implementation("noting")
    with torch.inference_mode():
        model(input_ids, use_cache=False)
    for layer, source in enumerate(model.config.kv_source_layers):
        assert seen[layer][0] is seen[source][0]
        assert seen[layer][1] is seen[source][1]
    assert len({id(key) for key, _ in seen}) == len(set(model.config.kv_source_layers))


@each_kind
def test_eager_and_sdpa_agree_on_padded_rows(overrides: dict[str, Any], input_ids: torch.Tensor) -> None:
    model = build(overrides)
    mask = torch.ones_like(input_ids)
    mask[0, :3] = 0
    with torch.inference_mode():
        expected = model(input_ids, attention_mask=mask).logits[:, 3:]
        model.set_attn_implementation("eager")
        found = model(input_ids, attention_mask=mask).logits[:, 3:]
    assert expected.abs().max() > 1
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5 * expected.abs().max().item())


@pytest.mark.parametrize(
    "options", [{}, {"cache_implementation": "static"}, {"num_beams": 3}], ids=["dynamic", "static", "beams"]
)
@each_kind
def test_generation_with_a_cache_is_generation_without(
    overrides: dict[str, Any], options: dict[str, Any], input_ids: torch.Tensor
) -> None:
    model = build(overrides)
    padded = torch.cat([torch.zeros(2, 3, dtype=torch.long), input_ids], dim=1)
    mask = (torch.arange(15) >= 3).long().expand(2, -1)
    settings = {"attention_mask": mask, "max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False}
    beams = {key: value for key, value in options.items() if key == "num_beams"}
    expected = model.generate(padded, use_cache=False, **settings, **beams)
    assert torch.equal(model.generate(padded, **settings, **options), expected)
    settings["attention_mask"] = mask[:, 3:]
    assert torch.equal(model.generate(input_ids, **settings, **beams), expected[:, 3:])


@pytest.mark.parametrize("make", [DynamicCache, lambda config: StaticCache(config, max_cache_len=16)])
def test_layers_that_read_have_no_cache(make: Callable[..., Any], input_ids: torch.Tensor) -> None:
    model = build(KINDS["pairs"])
    with torch.inference_mode():
        cache = cache_of(model(input_ids, use_cache=True, **{CACHE_NAME: make(config=model.config)}))
    assert [layer for layer in range(4) if cache.layers[layer].keys is None] == [1, 3]
    assert all(cache.layers[layer].keys.shape[:2] == (2, 4) for layer in (0, 2))


@each_kind
def test_activation_checkpointing_changes_no_gradient(overrides: dict[str, Any], input_ids: torch.Tensor) -> None:
    gradients = []
    for checkpointing in (False, True):
        model = build(overrides).train()
        if checkpointing:
            checkpoint_activations(model)
        model(input_ids, labels=input_ids, use_cache=False).loss.backward()
        gradients.append({name: parameter.grad for name, parameter in model.named_parameters()})
    for name, gradient in gradients[0].items():
        assert gradient.abs().max() > 0, name
        torch.testing.assert_close(gradients[1][name], gradient, rtol=0, atol=1e-6)


def test_reentrant_checkpoints_are_refused_where_they_would_lose_gradients(input_ids: torch.Tensor) -> None:
    model = build(KINDS["pairs"]).train()
    checkpoint_activations(model, use_reentrant=True)
    with pytest.raises(ValueError, match="need activation checkpointing with use_reentrant=False"):
        model(input_ids, labels=input_ids)


def test_gradients_through_shared_keys_and_values_are_finite_differences(input_ids: torch.Tensor) -> None:
    model = build(KINDS["threes"]).double()
    for path, module in list(model.named_modules()):
        if type(module).__name__ == "LlamaRMSNorm":  # it computes in float32
            exact = torch.nn.RMSNorm(module.weight.shape, eps=module.variance_epsilon, dtype=torch.float64)
            exact.weight.data = module.weight.data
            parent, _, name = path.rpartition(".")
            setattr(model.get_submodule(parent), name, exact)

    def loss() -> torch.Tensor:
        logits = model(input_ids, use_cache=False).logits[:, :-1]
        return torch.nn.functional.cross_entropy(logits.flatten(0, 1), input_ids[:, 1:].flatten())

    parameters = {
        name: parameter
        for name, parameter in model.named_parameters()
        if name.startswith("model.layers.0.self_attn.") and ("k_" in name or "v_proj" in name)
    }
    assert len(parameters) == 3
    loss().backward()
    step = 1e-6
    for parameter in parameters.values():
        for index in range(0, parameter.numel(), max(parameter.numel() // 5, 1)):
            losses = []
            for sign in (1, -1):
                with torch.no_grad():
                    parameter.view(-1)[index] += sign * step
                    losses.append(loss().item())
                    parameter.view(-1)[index] -= sign * step
            expected = (losses[0] - losses[1]) / (2 * step)
            assert parameter.grad.view(-1)[index].item() == pytest.approx(expected, rel=1e-4, abs=1e-8)


@pytest.mark.parametrize("name", ["flash_attention_2", "flash_attention_3"])
def test_flash_attention_is_asked_for_by_name(name: str) -> None:
    """Where its package is not installed, that is all that is missing."""
    model = build(KINDS["pairs"])
    with pytest.raises(ImportError, match=r"the package for FlashAttention. doesn't seem to be installed"):
        model.set_attn_implementation(name)


@pytest.mark.slow
def test_a_compiled_model_computes_the_same(input_ids: torch.Tensor) -> None:
    model = build(KINDS["pairs"])
    with torch.inference_mode():
        expected = model(input_ids, use_cache=False).logits
        found = torch.compile(model, fullgraph=True, backend="aot_eager")(input_ids, use_cache=False).logits
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5 * expected.abs().max().item())


@pytest.mark.slow
def test_two_processes_share_the_work_by_the_tensor_parallel_plan(input_ids: torch.Tensor, tmp_path: Path) -> None:
    model = build(KINDS["pairs"])
    model.save_pretrained(tmp_path / "model")
    with torch.inference_mode():
        torch.save(model(input_ids, use_cache=False).logits, tmp_path / "expected")
    program = tmp_path / "program.py"
    program.write_text(
        textwrap.dedent(
            f"""
            import torch
            import kvconvert.convert
            from transformers import AutoModelForCausalLM
            model = AutoModelForCausalLM.from_pretrained({str(tmp_path / "model")!r}, tp_plan="auto").eval()
            assert model.model.layers[0].self_attn.k_proj.weight.to_local().shape[0] == 16
            ids = torch.tensor({input_ids.tolist()})
            with torch.inference_mode():
                logits = model(ids, use_cache=False).logits
            expected = torch.load({str(tmp_path / "expected")!r})
            torch.testing.assert_close(logits, expected, rtol=0, atol=1e-5 * expected.abs().max().item())
            torch.distributed.destroy_process_group()
            """
        )
    )
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone", str(program)]
    outcome = subprocess.run(
        command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}, check=False, timeout=120
    )
    assert outcome.returncode == 0, outcome.stderr[-3000:]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"num_key_value_heads": 3}, "num_attention_heads = 8 is not a multiple of num_key_value_heads = 3"),
        ({"kv_source_layers": [0, 0]}, "must name a layer for each of 4 layers"),
        ({"kv_source_layers": [0, 0, 1, 3]}, r"kv_source_layers\[2\] = 1 is no layer up to it with keys of its own"),
        ({"kv_source_layers": [0, 2, 2, 3]}, r"kv_source_layers\[1\] = 2 is no layer up to it with keys of its own"),
        (
            {
                "kv_source_layers": [0, 1, 1, 3],
                "layer_types": ["full_attention"] * 2 + ["sliding_attention"] * 2,
                "sliding_window": 4,
            },
            "layers 1 and 2 share keys, and are full_attention and sliding_attention",
        ),
        ({"attention_bias": ["qkv"]}, "attention_bias: qkv is none of q_proj"),
    ],
)
def test_a_config_that_no_attention_can_have_is_refused(overrides: dict[str, Any], message: str) -> None:
    with pytest.raises(Exception, match=message):
        build(overrides)


def test_llama_does_not_open_the_weights(
    tmp_path: Path, run_without_kvconvert: Callable[[str], str], input_ids: torch.Tensor
) -> None:
    """They would fill the missing projections with random numbers."""
    model = build(KINDS["pairs"])
    model.save_pretrained(tmp_path / "model")
    assert type(AutoModelForCausalLM.from_pretrained(tmp_path / "model")).__name__ == "CrossLayerDecoderForCausalLM"
    with pytest.raises(Exception, match="Validation error for field 'attention_bias'"):
        LlamaForCausalLM.from_pretrained(tmp_path / "model")
    printed = run_without_kvconvert(
        f"""
        import json
        from transformers import AutoModelForCausalLM
        try:
            AutoModelForCausalLM.from_pretrained({str(tmp_path / "model")!r})
        except ValueError as error:
            print(json.dumps("cross_layer_decoder" in str(error)))
        """
    )
    assert json.loads(printed) is True
