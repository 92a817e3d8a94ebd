"""What a launcher such as torchrun or accelerate told this process of the run that it is a part of."""

from __future__ import annotations

import os

from .estimate.shape import Sharding
from .settings import Execution

__all__ = ["count_local_processes", "count_processes", "sharding_of", "uses_deepspeed"]


def count_processes() -> int:
    """Count the processes that `accelerate launch` or `torchrun` started for this run."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def sharding_of(execution: Execution) -> Sharding:
    """Tell which states are divided over the processes: FSDP2 divides all, else DeepSpeed's ZeRO stage decides."""
    if execution.fsdp:
        return "fsdp"
    stage = os.environ.get("ACCELERATE_DEEPSPEED_ZERO_STAGE") if uses_deepspeed() else None
    return "zero2" if stage == "2" else "zero3" if stage == "3" else "none"


def uses_deepspeed() -> bool:
    """Tell whether accelerate's configuration asks for DeepSpeed."""
    return os.environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower() == "true"


def count_local_processes() -> int:
    """Count the run's processes on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
