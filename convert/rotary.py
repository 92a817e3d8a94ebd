"""Which dims of a head rotate with the position, how fast, and in which order its pairs lie."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING

from .architecture import Architecture, AttentionShape
from .checkpoint import Checkpoint
from .errors import UnsupportedError
from .loading import empty_model

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Rotary", "Turning", "read_rotary", "turning"]

_DISTANCES_AT_ONCE = 8192


@dataclass(frozen=True)
class Turning:
    """The rotations between a query and the keys before it, at random distances.

    basis: (d, d) complex and unitary; the rotation by one position is diagonal in it, with e^{iω}. coherence: (d, d),
    E e^{i (ω_a − ω_b) distance}.
    """

    basis: Tensor
    coherence: Tensor

    def mean(self, matrix: Tensor) -> Tensor:
        """E[R matrix Rᵀ] over the rotations R; matrix is (…, d, d)."""
        return self._mean(matrix, self.coherence)

    def mean_back(self, matrix: Tensor) -> Tensor:
        """E[Rᵀ matrix R]."""
        return self._mean(matrix, self.coherence.conj())

    def _mean(self, matrix: Tensor, coherence: Tensor) -> Tensor:
        turned = coherence * (self.basis @ matrix.to(self.basis.dtype) @ self.basis.mH)
        mean: Tensor = (self.basis.mH @ turned @ self.basis).real
        return mean


@dataclass(frozen=True)
class Rotary:
    """The first dims of a head rotate, two for each of `frequencies`, in radians per position.

    Pairs are (i, i + half of the dims), or if `interleaved` (2i, 2i + 1). `longest` is the longest distance between a
    query and a key.
    """

    frequencies: tuple[float, ...]
    interleaved: bool = False
    longest: int = 1

    @property
    def dims(self) -> int:
        return 2 * len(self.frequencies)

    def half_split(self, head: Tensor) -> Tensor:
        """The rows of a head, (head_dim, …), with rotary pairs (i, i + dims / 2) whatever their order."""
        return head[self._order(head)]

    def original(self, head: Tensor) -> Tensor:
        """The inverse of `half_split`."""
        return head[self._order(head).argsort()]

    def _order(self, head: Tensor) -> Tensor:
        import torch

        order = torch.arange(len(head))
        if self.interleaved:
            order[: self.dims] = torch.cat([order[0 : self.dims : 2], order[1 : self.dims : 2]])
        return order


@cache
def turning(rotary: Rotary, head_dim: int) -> Turning:
    """Rotations of a half-split head at distances below `longest`, a distance n as likely as 1 / (n + 1)."""
    import torch

    angular = torch.tensor(rotary.frequencies, dtype=torch.float64)
    # a key n positions before the query is turned back by n
    angular = torch.cat([-angular, angular, torch.zeros(head_dim - rotary.dims, dtype=torch.float64)])
    coherence = torch.zeros(head_dim, head_dim, dtype=torch.complex128)
    total = 0.0
    for distances in torch.arange(rotary.longest, dtype=torch.float64).split(_DISTANCES_AT_ONCE):
        likelihood = 1 / (distances + 1)
        phases = torch.exp(1j * angular[:, None] * distances)
        coherence += (phases * likelihood) @ phases.mH
        total += float(likelihood.sum())
    pairs = torch.eye(len(rotary.frequencies), dtype=torch.complex128) / 2**0.5
    basis = torch.eye(head_dim, dtype=torch.complex128)
    basis[: rotary.dims, : rotary.dims] = torch.cat(
        [torch.cat([pairs, 1j * pairs], dim=1), torch.cat([pairs, -1j * pairs], dim=1)]
    )
    return Turning(basis, coherence / total)


def read_rotary(checkpoint: Checkpoint, architecture: Architecture, shape: AttentionShape) -> list[Rotary]:
    """For each layer, with the frequencies that its class computes."""
    model = empty_model(checkpoint.config)
    found = {name.rpartition("rotary_emb.")[2]: buffer for name, buffer in model.named_buffers()}
    kinds = getattr(model.config, "layer_types", None) or [""] * shape.num_hidden_layers
    context = checkpoint.config_int(architecture.config_name("max_position_embeddings"), default=2048)
    layers = []
    for layer, window in enumerate(shape.windows):
        buffer = found.get(f"{kinds[layer]}_inv_freq", found.get("inv_freq"))
        frequencies: tuple[float, ...] = ()
        if architecture.rotates(model.config, layer):
            if buffer is None:
                raise UnsupportedError(
                    f"{checkpoint.name}: {type(model).__name__} does not say how fast its keys rotate",
                    hint="use --method mean",
                )
            frequencies = tuple(buffer.tolist())
        longest = min(context, window or context)
        layers.append(Rotary(frequencies, architecture.interleaved_rotary, longest))
    return layers
