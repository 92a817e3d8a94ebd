"""What translations share: configs, renamed projections, biases of zeros."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

from ..checkpoint import Checkpoint
from ..errors import CheckpointError
from ..translation import Derived

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["common_config", "linear", "present_prefix", "rope_config", "whole", "zeros"]


def common_config(checkpoint: Checkpoint, model_type: str, class_name: str) -> dict[str, Any]:
    """What both configs call the same, with the target's class."""
    same = (
        "vocab_size hidden_size num_hidden_layers num_attention_heads initializer_range bos_token_id eos_token_id "
        "pad_token_id attention_dropout dtype torch_dtype quantization_config"
    )
    config = {name: checkpoint.config[name] for name in same.split() if name in checkpoint.config}
    num_heads = checkpoint.config.get("num_attention_heads")
    return config | {
        "architectures": [class_name],
        "model_type": model_type,
        "num_key_value_heads": num_heads,
        "tie_word_embeddings": bool(checkpoint.config.get("tie_word_embeddings", False)),
    }


def rope_config(checkpoint: Checkpoint, partial_rotary_factor: float, rope_theta: float) -> dict[str, Any]:
    """Rotary settings as transformers 5 reads them, and beside them as version 4 does.

    The arguments are the values where the config has no rope_parameters.
    """
    parameters: dict[str, Any] = {"rope_theta": rope_theta, "partial_rotary_factor": partial_rotary_factor}
    scaling = checkpoint.config.get("rope_scaling") or {}
    newer = checkpoint.config.get("rope_parameters") or {}
    if not isinstance(scaling, dict) or not isinstance(newer, dict):
        raise CheckpointError(f"{checkpoint.name}: config.json has rope_scaling = {scaling!r}, expected an object")
    parameters |= scaling | newer
    rope_type = parameters.pop("type", "default")  # the name of version 4.42 and before
    parameters.setdefault("rope_type", rope_type)
    older = {name: parameters[name] for name in ("rope_theta", "partial_rotary_factor")}
    if parameters["rope_type"] != "default":
        older["rope_scaling"] = {name: value for name, value in parameters.items() if name not in older}
    return {"rope_parameters": parameters, **older}


def present_prefix(checkpoint: Checkpoint, prefix: str, name: str) -> str:
    """The prefix of the decoder's tensors: none if a base class saved them."""
    return prefix if prefix + name in checkpoint.tensors else ""


def linear(checkpoint: Checkpoint, new: str, old: str, num_rows: int) -> dict[str, Derived]:
    """A projection under another name, with a bias of zeros if it has none."""
    info = checkpoint.tensors.get(f"{old}.weight")
    weight = Derived((f"{old}.weight",), info.shape if info else (num_rows,))
    has_bias = f"{old}.bias" in checkpoint.tensors
    bias = Derived((f"{old}.bias",), (num_rows,)) if has_bias else zeros(weight, num_rows)
    return {f"{new}.weight": weight, f"{new}.bias": bias}


def zeros(like: Derived, num_rows: int | None = None) -> Derived:
    """A bias of zeros, in the dtype of the weight that it belongs to."""
    rows = num_rows or like.shape[0]
    return Derived(like.reads[:1], (rows,), partial(_zeros_rows, num_rows=rows))


def whole(tensor: Tensor) -> Tensor:
    return tensor


def _zeros_rows(tensor: Tensor, *, num_rows: int) -> Tensor:
    return tensor.new_zeros(num_rows)
