"""kvconvert mha2mla: keys and values in one latent."""

from __future__ import annotations

import tempfile
from dataclasses import asdict, dataclass
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..convert.architectures.attention import read_attention
from ..convert.architectures.rotary import read_rotary
from ..convert.architectures.table import find_architecture
from ..convert.checkpoint.opening import open_checkpoint
from ..convert.checkpoint.output import check_free_space, existing_parent
from ..convert.checkpoint.tensors import Checkpoint
from ..convert.describe.engines import latent_kernels
from ..convert.execute import check_source
from ..convert.methods.mla import Mla
from ..convert.translations.routes import as_latent_source
from .conversion import (
    OF_TEXT,
    ConversionRequest,
    calibration_text,
    check_device,
    checked_output,
    finish,
    memory_errors,
)
from .options import accepts

if TYPE_CHECKING:
    from ..convert.calibration.text import CalibrationText

__all__ = ["mha2mla"]


class LatentNorm(StrEnum):
    calibrated = "calibrated"
    exact = "exact"


class RopeSelection(StrEnum):
    high = "high"
    gain = "gain"


class RopeLayout(StrEnum):
    interleaved = "interleaved"
    half_split = "half-split"


@dataclass(frozen=True, kw_only=True)
class Request(ConversionRequest):
    kv_lora_rank: Annotated[int, typer.Option("--kv-lora-rank", min=1, help="Size of the latent.")]
    qk_rope_head_dim: Annotated[int, typer.Option("--qk-rope-head-dim", min=1, help="Size of the rotary key.")]
    latent_norm: Annotated[
        LatentNorm,
        typer.Option(
            help="How the norm of DeepSeek's latent is met: fitted to, which needs nothing of an engine, or made "
            "harmless by biases, which transformers and vLLM's Transformers backend serve."
        ),
    ] = LatentNorm.calibrated
    rope_selection: Annotated[
        RopeSelection,
        typer.Option(
            help="Frequencies of the rotary key: the highest, as a RoPE that every engine has, or those that gain "
            "most, which transformers and vLLM's Transformers backend serve."
        ),
    ] = RopeSelection.high
    rope_layout: Annotated[
        RopeLayout,
        typer.Option(help="Order of rotary pairs. half-split is for transformers and vLLM's Transformers backend."),
    ] = RopeLayout.interleaved
    v_head_dim: Annotated[
        int | None,
        typer.Option(
            "--v-head-dim", min=1, help="Pad values with zeros to a size that kernels take.", show_default=False
        ),
    ] = None
    no_calibration: Annotated[
        bool, typer.Option("--no-calibration", help="Compress by the weights alone, without a text.")
    ] = False

    @property
    def mla(self) -> Mla:
        return Mla(
            self.kv_lora_rank,
            self.qk_rope_head_dim,
            self.latent_norm.value,
            self.rope_selection.value,
            self.rope_layout is RopeLayout.interleaved,
            self.v_head_dim,
        )


@accepts(Request)
def mha2mla(request: Request) -> None:
    """Compress keys and values into one latent (MLA), as a dense DeepSeek-V3. Sizes need no divisor of anything.

    Example: kvconvert mha2mla model_dir --kv-lora-rank 512 --qk-rope-head-dim 64 --calibration text.jsonl
    """
    from ..convert.methods.compression import CompressSettings, compress_checkpoint

    if request.no_calibration:
        request.refuse(OF_TEXT | {"no_refit"}, "a calibration text, and --no-calibration was given")
    mla, terminal = request.mla, request.terminal
    with as_latent_source(open_checkpoint(request.model, revision=request.revision)) as checkpoint:
        architecture = find_architecture(checkpoint)
        shape = read_attention(checkpoint, architecture)
        mla.check(checkpoint, architecture, read_rotary(checkpoint, architecture, shape))
        target = checked_output(checkpoint, request, f"mla{mla.kv_lora_rank}-{mla.qk_rope_head_dim}")
        device = check_device(request)
        check_source(checkpoint)
        _check_space(checkpoint, mla, target, request)
        text = _text(checkpoint, request)
        settings = CompressSettings(
            refit=text is not None and not request.no_refit,
            precision=request.precision.chosen if text is not None else "fp32",
            device=device,
        )
        summary: dict[str, Any] = {"output": str(target), "dry_run": request.dry_run}
        summary["calibration"] = {
            "data": text.description if text else None,
            "num_tokens": text.num_tokens if text else 0,
            **asdict(settings),
            **asdict(mla),
        }
        kernels = latent_kernels(mla.latent_sizes(shape))
        summary["fast_kernels"] = kernels is None
        scratch_parent = existing_parent(target)
        with (
            tempfile.TemporaryDirectory(dir=scratch_parent, prefix=f".{target.name}.merging-") as scratch,
            terminal.progress("compressing", shape.num_hidden_layers) as advance,
            memory_errors(device),
        ):
            compressed = compress_checkpoint(
                checkpoint, architecture, mla, settings, Path(scratch), text=text, progress=advance
            )
            finish(mla.plan(compressed, architecture), compressed, target, request, summary)
    if mla.latent_sizes(shape).num_cached >= shape.cached_values:
        terminal.remark("the cache gets larger: ask for smaller sizes")
    if kernels is not None:
        terminal.remark(f"no engine has a fast kernel for these sizes: {kernels}")


def _check_space(checkpoint: Checkpoint, mla: Mla, target: Path, request: ConversionRequest) -> None:
    """Raise OutputError where the result, and its attention's tensors beside it, do not fit."""
    tensors = mla.tensors(checkpoint, find_architecture(checkpoint))
    beside = sum(info.num_bytes for name, info in tensors.items() if checkpoint.tensors.get(name) is not info)
    whole = sum(info.num_bytes for info in tensors.values())
    check_free_space(target, beside if request.dry_run else beside + whole)


def _text(checkpoint: Checkpoint, request: Request) -> CalibrationText | None:
    if request.no_calibration:
        request.terminal.remark("compressing by the weights alone, which is much worse than with a text")
        return None
    return calibration_text(checkpoint, find_architecture(checkpoint), request)
