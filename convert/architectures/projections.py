"""The four projections of one attention layer, read from whatever tensors a class keeps them in, and put back there."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..algebra.heads import interleave_heads, stack_heads
from ..algebra.projections import Projections
from ..checkpoint.finite import count_nonfinite
from ..checkpoint.tensors import torch_dtype
from ..errors import UnsupportedError
from .source import Source

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["projection_names", "projection_tensors", "read_finite", "read_projections"]


def projection_names(source: Source, layer: int) -> dict[str, str]:
    """Return the names of the tensors of a layer's projections, by what they are ("q_proj.weight").

    The bias of o_proj is not among them. A class with a fused projection has "qkv_proj" in place of "q_proj", "k_proj"
    and "v_proj".
    """
    architecture = source.architecture
    fused = architecture.qkv_proj is not None
    parts = [
        (projection, kind)
        for projection in (("qkv_proj",) if fused else ("q_proj", "k_proj", "v_proj"))
        for kind in ("weight", "bias")
    ]
    names = {
        f"{projection}.{kind}": architecture.tensor_name(layer, projection, kind)
        for projection, kind in (*parts, ("o_proj", "weight"))
    }
    return {part: name for part, name in names.items() if name in source.checkpoint.tensors}


def projection_tensors(projections: Projections, source: Source, layer: int) -> dict[str, Tensor]:
    """Return projections, with other K/V heads than the source perhaps, under its names, in its layout and dtypes."""
    import torch

    architecture, shape = source.architecture, source.shape
    parts = {"q_proj": projections.q, "k_proj": projections.k, "v_proj": projections.v}
    if architecture.qkv_proj is not None:
        fused = torch.cat(list(parts.values()))
        if architecture.qkv_interleaved:
            fused = interleave_heads(
                fused, shape.num_attention_heads, len(projections.k) * shape.num_attention_heads // len(projections.q)
            )
        parts = {"qkv_proj": fused}
    rows = {f"{part}.weight": matrix[:, :-1] for part, matrix in parts.items()}
    rows |= {f"{part}.bias": matrix[:, -1] for part, matrix in parts.items()}
    rows["o_proj.weight"] = projections.o
    tensors = source.checkpoint.tensors
    return {
        name: rows[part].to(torch_dtype(tensors[name].dtype)).contiguous()
        for part, name in projection_names(source, layer).items()
    }


def read_finite(source: Source, name: str) -> Tensor:
    """Return a tensor of the source in float64.

    Raises UnsupportedError where it has values that are not finite, which the source may allow and algebra may not.
    """
    tensor = source.checkpoint.read(name).double()
    if count_nonfinite(tensor):
        raise UnsupportedError(
            f"{source.name}: {name} has values that are infinite or not a number, which no closed form can merge",
            hint="only a method that measures nothing, such as the mean, can keep such weights",
        )
    return tensor


def read_projections(source: Source, layer: int) -> Projections:
    """Return the projections of a layer's self-attention in float64, biases as last columns.

    Raises UnsupportedError as `read_finite` does.
    """
    checkpoint, architecture, shape = source.checkpoint, source.architecture, source.shape

    def read(projection: str) -> Tensor:
        import torch

        weight = read_finite(source, architecture.tensor_name(layer, projection))
        bias = architecture.tensor_name(layer, projection, "bias")
        column = read_finite(source, bias) if bias in checkpoint.tensors else weight.new_zeros(len(weight))
        return torch.cat([weight, column[:, None]], dim=1)

    o = read_finite(source, architecture.tensor_name(layer, "o_proj"))
    if architecture.qkv_proj is None:
        return Projections(read("q_proj"), read("k_proj"), read("v_proj"), o)
    fused = read("qkv_proj")
    if architecture.qkv_interleaved:
        fused = stack_heads(fused, shape.num_attention_heads, shape.num_key_value_heads)
    query_rows = shape.num_attention_heads * shape.head_dim
    kv_rows = shape.num_key_value_heads * shape.head_dim
    q, k, v = fused.split([query_rows, kv_rows, kv_rows])
    return Projections(q, k, v, o)
