"""kvconvert mha2mla: keys and values in one latent."""

from __future__ import annotations

from enum import StrEnum

from ..convert.conversion import Calibration
from ..convert.methods.mla import Mla
from ..pipeline import option_groups
from ..pipeline.conversion_options import mla_of
from .conversion import ConversionRequest, run_conversion, text_options
from .options import Given, Model, SettingsOptions, accepts

__all__ = ["mha2mla"]


class RopeLayout(StrEnum):
    interleaved = "interleaved"
    half_split = "half-split"


_MLA = SettingsOptions(
    "mla",
    option_groups.MLA,
    "Latent",
    types={"rope_interleave": RopeLayout},
    defaults={"rope_interleave": RopeLayout.interleaved},
    help={
        "rope_interleave": "Order of rotary pairs. half-split is for transformers and vLLM's Transformers backend.",
    },
)
_TEXT = text_options(omit=("statistics", "save_statistics"))


@accepts(_MLA, _TEXT, ConversionRequest)
def mha2mla(model: Model, mla: Given[Mla], text: Given[Calibration], request: ConversionRequest) -> None:
    """Compress keys and values into one latent (MLA), as a dense DeepSeek-V3. Sizes need no divisor of anything.

    Example: kvconvert mha2mla model_dir --kv-lora-rank 512 --qk-rope-head-dim 64 --calibration text.jsonl
    """
    run_conversion(model, mla_of(mla, text), text, request)
