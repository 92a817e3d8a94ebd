"""The four projections of one attention layer, whatever tensors a class keeps them in."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..algebra.attention_shape import AttentionShape
from ..algebra.heads import interleave_heads, stack_heads
from ..algebra.projections import Projections
from ..checkpoint.tensors import Checkpoint, torch_dtype
from .architecture import Architecture

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["projection_tensors", "read_projections"]


def projection_tensors(
    projections: Projections, checkpoint: Checkpoint, architecture: Architecture, shape: AttentionShape, layer: int
) -> dict[str, Tensor]:
    """The layer's tensors under the names, in the layout and in the dtype of the checkpoint's."""
    import torch

    parts = {"q_proj": projections.q, "k_proj": projections.k, "v_proj": projections.v}
    if architecture.qkv_proj is not None:
        fused = torch.cat(list(parts.values()))
        if architecture.interleaved:
            fused = interleave_heads(fused, shape.num_attention_heads, shape.num_key_value_heads)
        parts = {"qkv_proj": fused}
    result = {architecture.tensor_name(layer, "o_proj"): projections.o}
    for projection, rows in parts.items():
        result[architecture.tensor_name(layer, projection)] = rows[:, :-1]
        result[architecture.tensor_name(layer, projection, "bias")] = rows[:, -1]
    return {
        name: tensor.to(torch_dtype(checkpoint.tensors[name].dtype)).contiguous()
        for name, tensor in result.items()
        if name in checkpoint.tensors
    }


def read_projections(
    checkpoint: Checkpoint, architecture: Architecture, shape: AttentionShape, layer: int
) -> Projections:
    """The projections of a layer's self-attention, in float64."""

    def read(projection: str) -> Tensor:
        import torch

        weight = checkpoint.read(architecture.tensor_name(layer, projection)).double()
        bias = architecture.tensor_name(layer, projection, "bias")
        column = checkpoint.read(bias).double() if bias in checkpoint.tensors else weight.new_zeros(len(weight))
        return torch.cat([weight, column[:, None]], dim=1)

    o = checkpoint.read(architecture.tensor_name(layer, "o_proj")).double()
    if architecture.qkv_proj is None:
        return Projections(read("q_proj"), read("k_proj"), read("v_proj"), o)
    fused = read("qkv_proj")
    if architecture.interleaved:
        fused = stack_heads(fused, shape.num_attention_heads, shape.num_key_value_heads)
    query_rows = shape.num_attention_heads * shape.head_dim
    kv_rows = shape.num_key_value_heads * shape.head_dim
    q, k, v = fused.split([query_rows, kv_rows, kv_rows])
    return Projections(q, k, v, o)
