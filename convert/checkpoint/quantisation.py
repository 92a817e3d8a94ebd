"""Whether the weights of a checkpoint are quantised, by what the files hold: config.json often does not say."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from typing import Any

from .tensors import TensorInfo

__all__ = ["BITSANDBYTES", "declared_method", "quantised_refusal", "weights_format"]

BITSANDBYTES = "bitsandbytes"
_KEYS = ("quantization_config", "compression_config", "quantization")  # of transformers, compressed-tensors and MLX
# what the names of tensors end with, the more special endings first
_ENDINGS = {
    r"\.weight_packed": "compressed-tensors",
    r"\.weight_scale_inv": "FP8 in blocks",
    r"\.weight_scale_2": "NVFP4",
    r"\.SCB": BITSANDBYTES,
    r"\.quant_state\.bitsandbytes__\w+": BITSANDBYTES,
    r"\.(nested_)?absmax": BITSANDBYTES,
    r"\.W_q": "HQQ",
    r"\.codebooks": "AQLM",
    r"\.trellis": "EXL3",
    r"\.q_(invperm|groups)": "EXL2",
    r"\.centroids\.weight": "VPTQ",
    r"\.Qidxs\w*": "QuIP#",
    r"\.weight\._data": "quanto",
    r"\.(weight|input)_scales?": "scaled weights",
    r"\.qzeros": "GPTQ or AWQ",
}
_NAMES = {re.compile(f"{ending}$"): method for ending, method in _ENDINGS.items()}
_SMALL_FLOAT = re.compile(r"F[468](_|$)")  # F4, F6_E2M3, F8_E4M3 …
_INTEGER = re.compile(r"[IU]\d+$")
# files that some tools write in place of an entry of config.json
_SIDE_FILES = {"hf_quant_config.json": "ModelOpt", "quantize_config.json": "GPTQ", "quant_config.json": "AWQ"}


def declared_method(config: Mapping[str, Any]) -> str | None:
    """Return the method of quantisation that a config names, or None if it names none."""
    for key in _KEYS:
        declared = config.get(key)
        if not declared:
            continue
        if isinstance(declared, Mapping):
            if declared.get("quant_method"):
                return str(declared["quant_method"])
            if any(str(name).startswith("load_in_") for name in declared):  # as transformers wrote it at first
                return BITSANDBYTES
        return "MLX" if key == "quantization" else "compressed-tensors" if key == "compression_config" else key
    return None


def weights_format(
    config: Mapping[str, Any], tensors: Mapping[str, TensorInfo], files: Collection[str]
) -> tuple[str, TensorInfo] | None:
    """Return how weights are quantised and a tensor that shows it, or None where they are numbers to compute with.

    The names and dtypes of tensors decide whether; config, and `files` beside the weights, can say more about how.
    """
    found = _by_name(tensors) or _by_dtype(tensors)
    if found is None:
        return None
    method, info = found
    side = next((name for file, name in _SIDE_FILES.items() if file in files), None)
    declared = declared_method(config)
    if declared and declared not in _KEYS:
        return declared, info
    if side is not None and side != method:
        return f"{side} {method}" if side == "ModelOpt" else side, info
    return method, info


def quantised_refusal(
    config: Mapping[str, Any], tensors: Mapping[str, TensorInfo], files: Collection[str]
) -> str | None:
    """Return why a checkpoint cannot be converted for its quantisation, or None.

    Weights that are quantised cannot. Where only config.json says so it can be a method that quantises what is computed
    with on the way, so that the weights alone are not the model; bitsandbytes is none of these.
    """
    found = weights_format(config, tensors, files)
    if found is not None:
        method, info = found
        return (
            f"the checkpoint is quantised ({method}: {info.name} in {info.dtype}); "
            "convert the unquantised original, then quantise the result"
        )
    declared = declared_method(config)
    if declared is None or declared == BITSANDBYTES:
        return None
    return (
        f"the checkpoint is quantised by what config.json says ({declared}), and its weights are not; "
        "if they are the unquantised original's, take that entry out of config.json"
    )


def _by_name(tensors: Mapping[str, TensorInfo]) -> tuple[str, TensorInfo] | None:
    for info in tensors.values():
        method = _by_companions(info, tensors)
        if method is not None:
            return method, info
    for pattern, method in _NAMES.items():
        for name, info in tensors.items():
            if pattern.search(name):
                return method, info
    return None


def _by_companions(info: TensorInfo, tensors: Mapping[str, TensorInfo]) -> str | None:
    """What a tensor is together with the scales beside it; None where it is nothing that is known so."""
    stem, _, last = info.name.rpartition(".")
    scales = tensors.get(f"{stem}.scales")
    if last == "qweight" and scales is not None and len(info.shape) == len(scales.shape) == 2:
        # AWQ packs along the outputs, of which there is one scale each, GPTQ along the inputs
        return "GPTQ" if info.shape[1] == scales.shape[1] else "AWQ"
    if last == "weight" and scales is not None and f"{stem}.biases" in tensors:
        return "MLX"
    if last.endswith("_blocks") and f"{info.name.removesuffix('_blocks')}_scales" in tensors:
        return "MXFP4"
    if last == "weight" and f"{info.name}_scale" in tensors and f"{info.name}_scale_2" not in tensors:
        return "FP8" if info.dtype.startswith("F8") else "INT8" if info.dtype == "I8" else None
    return None


def _by_dtype(tensors: Mapping[str, TensorInfo]) -> tuple[str, TensorInfo] | None:
    for info in tensors.values():
        if _SMALL_FLOAT.match(info.dtype):
            return "floats of less than 16 bits", info
        if _INTEGER.match(info.dtype) and info.name.endswith(".weight") and len(info.shape) > 1:
            return "packed or whole numbers", info
    return None
