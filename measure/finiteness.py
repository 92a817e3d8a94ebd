"""Why a model's logits are not finite."""

from __future__ import annotations

from typing import Any

from ..convert.errors import CheckpointError

__all__ = ["non_finite_logits", "non_finite_reason"]


def non_finite_reason(model: Any) -> str:
    """Say why a model computes values that are not finite: weights that are not, or the range of its dtype.

    All its parameters are read. Of a sharded model they are those of this process.
    """
    parameters = {
        name: parameter.to_local() if hasattr(parameter, "to_local") else parameter
        for name, parameter in model.named_parameters()
    }
    broken = [name for name, parameter in parameters.items() if not parameter.isfinite().all()]
    if broken:
        count = int((~parameters[broken[0]].isfinite()).sum())
        others = f", and {len(broken) - 1} more tensors" if len(broken) > 1 else ""
        return f"{count} values of its {broken[0]} are not finite{others}"
    dtype = str(next(iter(parameters.values())).dtype).removeprefix("torch.")
    return f"its weights are finite, so that the computation left the range of {dtype} or divided by zero"


def non_finite_logits(name: str, model: Any, where: str) -> CheckpointError:
    """Make the error that says that a checkpoint's logits are not finite, and why."""
    return CheckpointError(
        f"{name}: logits are not finite {where}: {non_finite_reason(model)}",
        hint="a checkpoint whose weights are finite may need float32; one whose weights are not has to be made again",
    )
