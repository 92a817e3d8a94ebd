"""Where models run by default, and in which precision."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

__all__ = ["default_device", "default_precision"]


def default_device() -> torch.device:
    """Return the accelerator of this machine if it has one, else the CPU."""
    import torch

    return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")


def default_precision() -> str:
    """Return "bf16" where the GPU, or else the CPU, has instructions for it, and "fp32" where bf16 would be slower."""
    import torch

    if torch.cuda.is_available():
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    capabilities = torch.cpu.get_capabilities()
    return "bf16" if capabilities.get("amx_bf16") or capabilities.get("avx512_bf16") else "fp32"
