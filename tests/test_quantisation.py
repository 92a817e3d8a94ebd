"""Quantised weights are recognised by what the files hold, whatever config.json says."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import CheckpointFactory, load
from kvconvert.convert import Gqa, convert, inspect, open_checkpoint
from kvconvert.convert.checkpoint.loading import load_model
from kvconvert.convert.checkpoint.quantisation import quantised_refusal
from kvconvert.convert.checkpoint.tensors import TensorInfo
from kvconvert.convert.errors import UnsupportedError
from safetensors.torch import load_file, save_file

PROJECTION = "model.layers.0.self_attn.q_proj"
Part = tuple[str, str, tuple[int, ...]]
WEIGHT: Part = (".weight", "BF16", (64, 64))
# the tensors of one projection of 64 × 64 in each format, by the ends of their names
FORMATS: dict[str, tuple[list[Part], str | None, str]] = {
    "gptq": (
        [
            (".qweight", "I32", (8, 64)),
            (".qzeros", "I32", (1, 8)),
            (".scales", "F16", (1, 64)),
            (".g_idx", "I32", (64,)),
        ],
        "quantize_config.json",
        "GPTQ",
    ),
    "gptq alone": ([(".qweight", "I32", (8, 64)), (".scales", "F16", (1, 64))], None, "GPTQ"),
    "awq": (
        [(".qweight", "I32", (64, 8)), (".qzeros", "I32", (1, 8)), (".scales", "F16", (1, 64))],
        "quant_config.json",
        "AWQ",
    ),
    "awq alone": ([(".qweight", "I32", (64, 8)), (".scales", "F16", (1, 64))], None, "AWQ"),
    "modelopt fp8": (
        [(".weight", "F8_E4M3", (64, 64)), (".weight_scale", "F32", ()), (".input_scale", "F32", ())],
        "hf_quant_config.json",
        "ModelOpt FP8",
    ),
    "nvfp4": (
        [(".weight", "U8", (64, 32)), (".weight_scale", "F8_E4M3", (64, 4)), (".weight_scale_2", "F32", ())],
        "hf_quant_config.json",
        "ModelOpt NVFP4",
    ),
    "mlx": (
        [(".weight", "U32", (64, 8)), (".scales", "F16", (64, 1)), (".biases", "F16", (64, 1))],
        None,
        "MLX",
    ),
    "compressed-tensors": (
        [(".weight_packed", "I32", (64, 8)), (".weight_scale", "BF16", (64, 1)), (".weight_shape", "I64", (2,))],
        None,
        "compressed-tensors",
    ),
    "deepseek": ([(".weight", "F8_E4M3", (64, 64)), (".weight_scale_inv", "F32", (1, 1))], None, "FP8 in blocks"),
    "bitsandbytes 4": (
        [
            (".weight", "U8", (2048, 1)),
            (".weight.absmax", "F32", (64,)),
            (".weight.quant_state.bitsandbytes__nf4", "U8", (80,)),
        ],
        None,
        "bitsandbytes",
    ),
    "bitsandbytes 8": ([(".weight", "I8", (64, 64)), (".SCB", "F32", (64,))], None, "bitsandbytes"),
    "int8": ([(".weight", "I8", (64, 64)), (".weight_scale", "F32", (64, 1))], None, "INT8"),
    "hqq": ([(".W_q", "U8", (32, 64)), (".scale", "F16", (64, 1))], None, "HQQ"),
    "mxfp4": ([(".up_blocks", "U8", (64, 2, 16)), (".up_scales", "U8", (64, 2))], None, "MXFP4"),
    "e8m0": ([WEIGHT, (".scale_of_blocks", "F8_E8M0", (64, 2))], None, "floats of less than 16 bits"),
    "f4": ([(".weight", "F4", (64, 64))], None, "floats of less than 16 bits"),
    "bare fp8": ([(".weight", "F8_E5M2", (64, 64))], None, "floats of less than 16 bits"),
    "bare uint8": ([(".weight", "U8", (64, 32))], None, "packed or whole numbers"),
}


def headers(parts: list[Part]) -> dict[str, TensorInfo]:
    infos = [TensorInfo(PROJECTION + end, dtype, shape, "model.safetensors", 0, 0) for end, dtype, shape in parts]
    return {info.name: info for info in infos}


@pytest.mark.parametrize(("parts", "file", "method"), FORMATS.values(), ids=FORMATS)
def test_a_format_is_named_without_a_word_in_config(parts: list[Part], file: str | None, method: str) -> None:
    refusal = quantised_refusal({}, headers(parts), [file] if file else [])
    assert refusal is not None
    assert refusal.startswith(f"the checkpoint is quantised ({method}: {PROJECTION}")
    assert refusal.endswith("; convert the unquantised original, then quantise the result")


@pytest.mark.parametrize("file", [None, "quantize_config.json", "hf_quant_config.json"])
def test_floats_are_not_quantised_whatever_lies_beside_them(file: str | None) -> None:
    """Masks and counters of older versions are whole numbers too."""
    parts = [
        WEIGHT,
        (".bias", "BF16", (64,)),
        (".masked_bias", "U8", (1, 1, 64, 64)),
        (".position_ids", "I64", (1, 64)),
    ]
    assert quantised_refusal({}, headers(parts), [file] if file else []) is None


@pytest.mark.parametrize(
    ("config", "method"),
    [
        ({"quantization_config": {"quant_method": "bitnet"}}, "bitnet"),
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, "gptq"),
        ({"quantization": {"bits": 4}}, "MLX"),
        ({"compression_config": {"format": "int-quantized"}}, "compressed-tensors"),
    ],
)
def test_a_config_that_calls_floats_quantised(config: dict[str, object], method: str) -> None:
    """Some methods quantise what is computed with on the way, so that such weights alone are not the model."""
    assert quantised_refusal(config, headers([WEIGHT]), []) == (
        f"the checkpoint is quantised by what config.json says ({method}), and its weights are not; "
        "if they are the unquantised original's, take that entry out of config.json"
    )


def edit_config(source: Path, **changes: object) -> None:
    config = json.loads((source / "config.json").read_text()) | changes
    (source / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize(
    "declared",
    [{"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}, {"load_in_8bit": True}],
)
def test_of_bitsandbytes_the_weights_decide(
    declared: dict[str, object], make_checkpoint: CheckpointFactory, tmp_path: Path
) -> None:
    """A LoRA merged into floats leaves the entry in config.json."""
    source = make_checkpoint(dtype=torch.bfloat16)
    expected = convert(source, Gqa(2), tmp_path / "expected").output
    edit_config(source, quantization_config=declared)
    remarks: list[str] = []
    output = convert(source, Gqa(2), tmp_path / "out", remark=remarks.append).output
    assert remarks == [
        "config.json says that bitsandbytes quantises the weights, and they are BF16: "
        "they are taken as they are, and quantization_config is left out"
    ]
    assert inspect(source).notes == tuple(remarks)
    for name in ("config.json", "model.safetensors"):
        assert (output / name).read_bytes() == (expected / name).read_bytes()
    loaded = load_model(source, dtype=torch.float32, device="cpu")
    assert torch.equal(loaded.lm_head.weight, load_file(source / "model.safetensors")["lm_head.weight"].float())
    assert load(output).dtype == torch.float32


def to_gptq(source: Path) -> None:
    tensors = load_file(source / "model.safetensors")
    for name in [name for name in tensors if "proj" in name]:
        stem, (rows, columns) = name.removesuffix(".weight"), tensors.pop(name).shape
        tensors[f"{stem}.qweight"] = torch.zeros(columns // 8, rows, dtype=torch.int32)
        tensors[f"{stem}.scales"] = torch.ones(1, rows)
    save_file(tensors, source / "model.safetensors")


def to_float8(source: Path) -> None:
    tensors = load_file(source / "model.safetensors")
    tensors |= {name: tensor.to(torch.float8_e4m3fn) for name, tensor in tensors.items() if "proj" in name}
    save_file(tensors, source / "model.safetensors")


@pytest.mark.parametrize("model_type", ["llama", "gpt_neox"])
@pytest.mark.parametrize("quantise", [to_gptq, to_float8])
def test_every_door_says_so(
    model_type: str, quantise: Callable[[Path], None], make_checkpoint: CheckpointFactory, tmp_path: Path
) -> None:
    source = make_checkpoint("llama")
    quantise(source)
    edit_config(source, model_type=model_type)
    for dry_run in (True, False):
        with pytest.raises(UnsupportedError, match=r"model: the checkpoint is quantised \("):
            convert(source, Gqa(2), tmp_path / "out", dry_run=dry_run)
    if model_type == "llama" and quantise is to_float8:  # the shapes of float8 weights can be shown
        assert all("the checkpoint is quantised (" in target.reason for target in inspect(source).targets)
    else:
        with pytest.raises(UnsupportedError, match=r"model: the checkpoint is quantised \("):
            inspect(source)


def test_pickles_are_looked_at_too(make_checkpoint: CheckpointFactory) -> None:
    source = make_checkpoint()
    to_float8(source)
    torch.save(load_file(source / "model.safetensors"), source / "pytorch_model.bin")
    (source / "model.safetensors").unlink()
    with open_checkpoint(source) as checkpoint:
        assert "in F8_E4M3" in str(checkpoint.quantised)
