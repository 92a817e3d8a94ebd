"""GPUs: their peaks, and how many hours of one a run takes."""

from __future__ import annotations

import re

from ...convert.errors import InputError

__all__ = ["H100_PEAK_FLOPS", "detect_gpu", "gpu_hours", "peak_flops", "require_known_gpu"]


H100_PEAK_FLOPS = 989e12
_MFU = 0.4


_VENDOR_WORDS = frozenset({"NVIDIA", "AMD", "INSTINCT", "GEFORCE", "TESLA", "GPU"})
# dense bf16 TFLOPS of data sheets, and which further words of a device's name leave them true
_PEAKS: tuple[tuple[str, float, str], ...] = (
    ("H100 PCIE", 756, "80GB"),
    ("H100", 989, "SXM SXM5 80GB HBM3"),
    ("H200", 989, "SXM SXM5 141GB HBM3E"),
    ("B200", 2250, "SXM 180GB 192GB HBM3E"),
    ("A100", 312, "SXM SXM4 PCIE 40GB 80GB"),
    ("A10", 125, "PCIE 24GB"),
    ("A40", 149.7, "PCIE 48GB"),
    ("L4", 121, "24GB"),
    ("L40S", 362, "48GB"),
    ("RTX 4090", 165, "24GB"),
    ("MI300X", 1307, "OAM 192GB VF"),
)


def peak_flops(gpu_name: str) -> float | None:
    """Return the dense bf16 FLOPs per second of a GPU, by its name in torch; None where they are not known for sure.

    Parts of a GPU (MIG), laptop and NVL variants have other peaks than the name's start suggests; V100 and older have
    no bf16.
    """
    words = {word for word in re.split(r"[\s_-]+", gpu_name.upper()) if word} - _VENDOR_WORDS
    for model, teraflops, variants in _PEAKS:
        required = set(model.split())
        if required <= words <= required | set(variants.split()):
            return teraflops * 1e12
    return None


def require_known_gpu(gpu_name: str) -> None:
    """Raise InputError for a GPU whose peak is not known."""
    if peak_flops(gpu_name) is None:
        known = ", ".join(model for model, _, _ in _PEAKS)
        raise InputError(f"--gpu {gpu_name}: the peak of this GPU is not known", hint=f"known are {known}")


def detect_gpu() -> str | None:
    """Return the name of this machine's first GPU, as torch reports it; None if there is none."""
    import torch  # takes seconds: a dry run of a machine's own GPU is the only estimate that needs it

    return torch.cuda.get_device_name(0) if torch.cuda.is_available() else None


def gpu_hours(flops: float, peak: float, mfu: float = _MFU) -> float:
    """Compute the hours that one GPU takes, where training reaches the part `mfu` of its peak."""
    return flops / (peak * mfu * 3600)
