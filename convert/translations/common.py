"""Parts that several translations are made of: configs, renamed tensors, and the parts of fused projections."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from ..checkpoint.tensors import Checkpoint
from ..errors import CheckpointError
from .translation import Derived

if TYPE_CHECKING:
    from torch import Tensor

    Compute = Callable[[Tensor], Tensor]

__all__ = [
    "common_config",
    "head_part",
    "int_of",
    "linear",
    "present_prefix",
    "qkv",
    "rope_config",
    "same",
    "third",
    "whole",
    "zeros",
]


def common_config(checkpoint: Checkpoint, model_type: str, class_name: str) -> dict[str, Any]:
    """Return a config for the class `class_name` with the entries that both classes call the same."""
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
    """Return rotary settings as transformers 5 reads them, and beside them as version 4 does.

    The arguments are the values where the checkpoint's config has no rope_parameters. Raises CheckpointError where it
    has rope_scaling that is no object.
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


def int_of(checkpoint: Checkpoint, *names: str, default: int | None = None) -> int:
    """Return the config's positive integer under the first of `names` that it has; older files use other names."""
    present = [name for name in names if checkpoint.config_value(name) is not None]
    return checkpoint.config_int((present or names)[0], default=default)


def present_prefix(checkpoint: Checkpoint, prefix: str, name: str) -> str:
    """Return `prefix` where the tensors' names begin with it, and "" where a base class saved them without it."""
    return prefix if prefix + name in checkpoint.tensors else ""


def same(checkpoint: Checkpoint, name: str, compute: Compute | None = None) -> Derived:
    """Return a tensor of the source, unchanged or changed by a `compute` that keeps its shape."""
    return Derived((name,), checkpoint.tensors[name].shape if name in checkpoint.tensors else (1,), compute)


def linear(
    checkpoint: Checkpoint, new: str, old: str, compute: Compute | None = None, *, transposed: bool = False
) -> dict[str, Derived]:
    """Return weight and bias of a projection or norm `old` under the name `new`; a bias that is absent becomes zeros.

    `transposed` says that the source stores the weight as (inputs, outputs), which is turned into (outputs, inputs).
    """
    weight = same(checkpoint, f"{old}.weight", compute)
    if transposed:
        weight = Derived(weight.reads, weight.shape[::-1], lambda tensor: tensor.T)
    has_bias = f"{old}.bias" in checkpoint.tensors
    bias = same(checkpoint, f"{old}.bias", compute) if has_bias else zeros(weight)
    return {f"{new}.weight": weight, f"{new}.bias": bias}


def qkv(
    checkpoint: Checkpoint, new: str, old: str, part: Callable[[Tensor, int], Tensor], *, transposed: bool = False
) -> dict[str, Derived]:
    """Return q_proj, k_proj and v_proj of a fused projection; `part(tensor, index)` takes out the rows of one."""
    weight = same(checkpoint, f"{old}.weight")
    num_rows, num_columns = weight.shape[::-1] if transposed else (weight.shape * 2)[:2]
    tensors = {}
    for index, projection in enumerate(("q_proj", "k_proj", "v_proj")):

        def take(tensor: Tensor, index: int = index) -> Tensor:
            return part(tensor.T if transposed and tensor.dim() == 2 else tensor, index)

        derived = Derived(weight.reads, (num_rows // 3, num_columns), take)
        tensors[f"{new}.{projection}.weight"] = derived
        has_bias = f"{old}.bias" in checkpoint.tensors
        tensors[f"{new}.{projection}.bias"] = (
            Derived((f"{old}.bias",), (num_rows // 3,), take) if has_bias else zeros(derived)
        )
    return tensors


def third(tensor: Tensor, index: int) -> Tensor:
    """Return q, k or v (index 0, 1 or 2) of a projection with the rows [q; k; v]."""
    return tensor.chunk(3)[index]


def head_part(num_heads: int) -> Callable[[Tensor, int], Tensor]:
    """Return a function that takes q, k or v out of a projection whose rows are (num_heads, 3, head_dim)."""

    def part(tensor: Tensor, index: int) -> Tensor:
        heads = tensor.reshape(num_heads, 3, -1, *tensor.shape[1:])[:, index]
        return heads.reshape(-1, *tensor.shape[1:])

    return part


def zeros(like: Derived) -> Derived:
    """Return a bias of zeros in the dtype of the weight `like` that it belongs to."""
    num_rows = like.shape[0]
    return Derived(like.reads[:1], (num_rows,), lambda tensor: tensor.new_zeros(num_rows))


def whole(tensor: Tensor) -> Tensor:
    """Return the tensor itself."""
    return tensor
