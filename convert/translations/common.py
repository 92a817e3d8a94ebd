"""Parts that several translations are made of: configs, renamed tensors, and the parts of fused projections."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from ..checkpoint.tensors import Checkpoint
from .translation import Derived

if TYPE_CHECKING:
    from torch import Tensor

    Compute = Callable[[Tensor], Tensor]

__all__ = [
    "common_config",
    "head_part",
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
        "pad_token_id attention_dropout dtype torch_dtype quantization_config tie_word_embeddings"
    )
    config = checkpoint.full_config
    return {name: config[name] for name in same.split() if name in config} | {
        "architectures": [class_name],
        "model_type": model_type,
        "num_key_value_heads": config.get("num_attention_heads"),
    }


def rope_config(given: Mapping[str, Any]) -> dict[str, Any]:
    """Return rotary settings as transformers 5 reads them, and beside them as version 4 does.

    `given` are settings as version 5 has them in `rope_parameters`, which may leave out what has a usual value.
    """
    usual = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 1.0}
    parameters = usual | {name: value for name, value in given.items() if name != "type"}  # of version 4.42 and before
    older = {name: parameters[name] for name in ("rope_theta", "partial_rotary_factor")}
    if parameters["rope_type"] != "default":
        older["rope_scaling"] = {name: value for name, value in parameters.items() if name not in older}
    return {"rope_parameters": parameters, **older}


def present_prefix(checkpoint: Checkpoint, prefix: str, name: str) -> str:
    """Return `prefix` where the tensors' names begin with it, and "" where a base class saved them without it."""
    return prefix if prefix + name in checkpoint.tensors else ""


def same(checkpoint: Checkpoint, name: str, compute: Compute | None = None) -> Derived:
    """Return a tensor of the source, unchanged or changed by a `compute` that keeps its shape.

    One that the source lacks gets the shape of a matrix, and is missed where the checkpoint is checked.
    """
    return Derived((name,), checkpoint.tensors[name].shape if name in checkpoint.tensors else (1, 1), compute)


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
