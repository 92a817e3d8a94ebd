"""What is worth running on an accelerator: benchmarks/gpu.sh runs it there, CI on the CPU."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import LATENT, CheckpointFactory, KilledError, RunHere, build_model
from kvconvert.convert.device import default_device
from kvconvert.convert.runtime.transformers_interface import CACHE_NAME, cache_of
from kvconvert.uptrain.observation import Observation
from safetensors.torch import load_file
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import DynamicCache
from transformers.utils.import_utils import is_flash_attn_2_available

DEVICE = default_device()
TOKENS = torch.randint(3, 384, (2, 24), generator=torch.Generator().manual_seed(0))
CLASSES: dict[str, tuple[str, dict[str, Any]]] = {
    "cla2": ("cross_layer_decoder", {"kv_source_layers": [0, 0], "hidden_size": 256, "head_dim": 32}),
    "learned": ("grouped_decoder", {"num_key_value_heads": 2, "hidden_size": 256, "head_dim": 32}),
    "alibi": ("grouped_decoder", {"position_embedding_type": "alibi", "alibi_slopes": [2.0**-h for h in range(8)]}),
    "mla": ("deepseek_v3", LATENT),
}
IMPLEMENTATIONS = ("eager", "sdpa", "flash kernel of sdpa", "flash_attention_2")
BACKENDS = [SDPBackend.MATH, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.FLASH_ATTENTION]


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("kind", CLASSES)
def test_classes_compute_in_bfloat16_what_they_do_in_float32(kind: str, implementation: str) -> None:
    """Under every implementation of attention, at once and with a cache."""
    model_type, overrides = CLASSES[kind]
    is_flash = "flash" in implementation
    if is_flash and DEVICE.type != "cuda":
        pytest.skip("flash attention needs a GPU")
    if is_flash and kind in ("alibi", "mla"):
        pytest.skip("flash attention takes no position bias, and values as wide as keys only")
    if implementation == "flash_attention_2" and not is_flash_attn_2_available():
        pytest.skip("the package flash-attn is not installed")
    model = build_model(model_type, **overrides)
    with torch.inference_mode():
        expected = model(TOKENS, use_cache=False).logits
        in_sdpa = implementation == "flash kernel of sdpa"
        model.to(DEVICE, torch.bfloat16).set_attn_implementation("sdpa" if in_sdpa else implementation)
        with sdpa_kernel([SDPBackend.FLASH_ATTENTION] if in_sdpa else BACKENDS):
            found = model(TOKENS.to(DEVICE), use_cache=False).logits.float().cpu()
            cache = DynamicCache(config=model.config)
            parts = [
                model(TOKENS[:, begin:end].to(DEVICE), use_cache=True, **{CACHE_NAME: cache})
                for begin, end in ((0, 20), *((index, index + 1) for index in range(20, 24)))
            ]
    stepwise = torch.cat([part.logits for part in parts], dim=1).float().cpu()
    assert cache_of(parts[-1]) is cache
    scale = expected.std()
    # bfloat16 keeps 8 bits: errors of single logits stay within a few hundredths of the spread of all, on the mean
    for logits in (found, stepwise):
        assert (logits - expected).abs().mean() < 0.05 * scale
    assert (expected.roll(1, dims=1) - expected).abs().mean() > 0.5 * scale  # what another position computes


def test_a_calibrated_merge_on_the_device_is_that_of_the_cpu(
    make_checkpoint: CheckpointFactory, run_here: RunHere, prose_file: Path, tmp_path: Path
) -> None:
    if DEVICE.type == "cpu":
        pytest.skip("there is no other device to compare with the CPU")
    source = make_checkpoint(with_tokenizer=True)
    options = ("--method", "svd", "--calibration", prose_file, "--calibration-tokens", 2048, "--precision", "fp32")
    for device in (str(DEVICE), "cpu"):
        run_here("mha2gqa", "--groups", 2, source, *options, "--device", device, "--output", tmp_path / device)
    here, there = (load_file(tmp_path / device / "model.safetensors") for device in (str(DEVICE), "cpu"))
    assert here.keys() == there.keys()
    for name, tensor in there.items():
        # products in float32 in another order, and what an eigenvector makes of it
        assert (here[name] - tensor).abs().max() <= 1e-2 * tensor.abs().max(), name


@pytest.mark.parametrize("recipe", ["pretraining", "distill", "light", "layerwise"])
def test_each_recipe_trains_on_the_device(
    recipe: str, make_checkpoint: CheckpointFactory, run_here: RunHere, prose_file: Path, tmp_path: Path
) -> None:
    teacher = make_checkpoint(with_tokenizer=True)
    run_here("mha2gqa", "--groups", 2, teacher, "--output", tmp_path / "out")
    options: tuple[Any, ...] = ("--data", prose_file, "--steps", 4)
    options += ("--sequence-length", 32, "--global-batch-tokens", 64)
    options += () if recipe == "pretraining" else ("--teacher", teacher)
    options += ("--layerwise-fraction", 0.5) if recipe == "layerwise" else ("--recipe", recipe)
    run_here("uptrain", tmp_path / "out", *options, "--output", tmp_path / "trained")
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("out", "trained"))
    name = "model.layers.0.self_attn.k_proj.weight"
    assert after[name].isfinite().all()
    assert not after[name].equal(before[name])


def test_a_run_that_was_stopped_ends_with_the_same_weights(
    make_checkpoint: CheckpointFactory, train: Callable[..., Path]
) -> None:
    """Exactly on a CPU; a GPU adds gradients up in no fixed order."""
    watch: dict[str, Any] = {"save_steps": 2, "log_steps": 1}
    whole = load_file(train("whole", watch=Observation(**watch)) / "model.safetensors")
    done = 0

    def stop(more: int) -> None:
        nonlocal done
        done += more
        if done == 3:
            raise KilledError

    with pytest.raises(KilledError):
        train("parts", watch=Observation(**watch, progress=stop))
    parts = load_file(train("parts", watch=Observation(**watch)) / "model.safetensors")
    rtol = 0.0 if DEVICE.type == "cpu" else 1e-3
    assert parts.keys() == whole.keys()
    for name, tensor in whole.items():
        torch.testing.assert_close(parts[name], tensor, rtol=rtol, atol=rtol * tensor.abs().max().item())
