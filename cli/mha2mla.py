"""kvconvert mha2mla: keys and values in one latent."""

from __future__ import annotations

from enum import StrEnum

from ..convert.conversion import Calibration
from ..convert.errors import InputError
from ..convert.methods.mla import Mla
from .conversion import ConversionRequest, run_conversion, text_options
from .options import Given, Model, SettingsOptions, accepts

__all__ = ["mha2mla"]


class RopeLayout(StrEnum):
    interleaved = "interleaved"
    half_split = "half-split"


_MLA = SettingsOptions(
    "mla",
    Mla,
    "Latent",
    flags={"rope_interleave": ("--rope-layout",), "refit": ("--no-refit",)},
    types={"rope_interleave": RopeLayout},
    defaults={"rope_interleave": RopeLayout.interleaved},
    help={
        "refit": "Keep the closed form; fit nothing to the text.",
        "rope_interleave": "Order of rotary pairs. half-split is for transformers and vLLM's Transformers backend.",
    },
    bounds={"kv_lora_rank": 1, "qk_rope_head_dim": 1, "v_head_dim": 1},
    omit=("rope_pairs", "refit_ridge"),
)
_TEXT = text_options(omit=("statistics", "save_statistics"))


@accepts(_MLA, _TEXT, ConversionRequest)
def mha2mla(model: Model, mla: Given[Mla], text: Given[Calibration], request: ConversionRequest) -> None:
    """Compress keys and values into one latent (MLA), as a dense DeepSeek-V3. Sizes need no divisor of anything.

    Example: kvconvert mha2mla model_dir --kv-lora-rank 512 --qk-rope-head-dim 64 --calibration text.jsonl
    """
    if text.values["weights_only"]:
        of_text = [name for name in text.values if name != "weights_only"]
        for option in sorted([*mla.typed(["fit_steps", "refit"]), *text.typed(of_text)]):
            raise InputError(
                f"{option} is about a calibration text, and --no-calibration rules one out",
                hint=f"leave out {option} or --no-calibration",
            )
    interleave = mla.values["rope_interleave"] is RopeLayout.interleaved
    run_conversion(model, mla.build(rope_interleave=interleave), text, request)
