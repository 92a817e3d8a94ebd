"""GroupedDecoder, our class for decoders that no stock class holds with fewer K/V heads."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import VOCAB_SIZE, CheckpointFactory, build_model
from kvconvert.convert import Gqa, as_target, execute, open_checkpoint
from kvconvert.convert.checkpoint.loading import load_model
from kvconvert.convert.runtime import RUNTIME_CLASSES
from kvconvert.convert.runtime.transformers_interface import checkpoint_activations
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

SLOPES = [2.0**-head for head in range(8)]
KINDS: dict[str, dict[str, Any]] = {
    "learned": {},
    "alibi": {"position_embedding_type": "alibi", "alibi_slopes": SLOPES, "embedding_norm": True},
    "rotary": {
        "position_embedding_type": "rotary",
        "rope_parameters": {"rope_type": "default", "rope_theta": 99.0, "partial_rotary_factor": 0.5},
        "qk_norm": True,
    },
    "window": {"layer_types": ["full_attention", "sliding_attention"], "sliding_window": 4},
}
each_kind = pytest.mark.parametrize("overrides", KINDS.values(), ids=KINDS)


@pytest.fixture
def input_ids() -> torch.Tensor:
    return torch.randint(3, VOCAB_SIZE, (2, 12), generator=torch.Generator().manual_seed(0))


def build(overrides: dict[str, Any]) -> Any:
    return build_model("grouped_decoder", num_key_value_heads=2, **overrides)


@each_kind
def test_eager_and_sdpa_agree(overrides: dict[str, Any], input_ids: torch.Tensor) -> None:
    model = build(overrides)
    mask = torch.ones_like(input_ids)
    mask[0, :3] = 0
    with torch.inference_mode():
        expected = model(input_ids, attention_mask=mask).logits[:, 3:]
        model.set_attn_implementation("eager")
        found = model(input_ids, attention_mask=mask).logits[:, 3:]
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5 * expected.abs().max().item())


@pytest.mark.parametrize("options", [{"cache_implementation": "static"}, {"num_beams": 3}], ids=["static", "beams"])
@each_kind
def test_generation_with_other_caches(overrides: dict[str, Any], options: Any, input_ids: torch.Tensor) -> None:
    model = build(overrides)
    settings = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
    beams = {key: value for key, value in options.items() if key == "num_beams"}
    expected = model.generate(input_ids, use_cache=False, **settings, **beams)
    assert torch.equal(model.generate(input_ids, **settings, **options), expected)


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
        torch.testing.assert_close(gradients[1][name], gradient, rtol=0, atol=1e-6)


def test_alibi_refuses_attention_that_would_leave_it_out(input_ids: torch.Tensor) -> None:
    AttentionInterface.register("without_bias", sdpa_attention_forward)
    model = build(KINDS["alibi"])
    model.set_attn_implementation("without_bias")
    with pytest.raises(ValueError, match="without_bias attention takes no position bias, which ALiBi needs"):
        model(input_ids)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"num_key_value_heads": 3}, "num_attention_heads = 8 is not a multiple of num_key_value_heads = 3"),
        ({"position_embedding_type": "sinusoidal"}, "learned, rotary or alibi"),
        ({"position_embedding_type": "alibi"}, "alibi_slopes must hold num_attention_heads = 8 numbers"),
    ],
)
def test_a_config_that_no_attention_can_have_is_refused(overrides: dict[str, Any], message: str) -> None:
    with pytest.raises(Exception, match=message):
        build_model("grouped_decoder", **overrides)


def test_a_result_opens_in_a_process_without_kvconvert(
    make_checkpoint: CheckpointFactory,
    tmp_path: Path,
    input_ids: torch.Tensor,
    run_without_kvconvert: Callable[[str], str],
) -> None:
    source, output = make_checkpoint("bloom", tie_groups=2, n_layer=2), tmp_path / "out"
    with as_target(open_checkpoint(source), 2) as view:
        execute(Gqa(2).plan(view), view.checkpoint, output)
    original = load_model(source, dtype=torch.float32, device="cpu")
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
    assert names == ["GroupedDecoderModel", "GroupedDecoderForCausalLM"]
    assert tokens == expected


def test_the_files_beside_the_weights_import_nothing_of_kvconvert() -> None:
    for entry in RUNTIME_CLASSES.values():
        for file in entry.files:
            imports = [line for line in file.read_text().splitlines() if line.startswith(("from", "import"))]
            assert not [line for line in imports if "kvconvert" in line or line.startswith("from ..")]
