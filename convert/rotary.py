"""Which dims of a head rotate with the position, and in which order its pairs lie."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from .architecture import Architecture
from .checkpoint import Checkpoint
from .loading import class_config

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Rotary", "read_rotary"]


@dataclass(frozen=True)
class Rotary:
    """The first `dims` dims of a head rotate: pairs (i, i + dims / 2), or if `interleaved` (2i, 2i + 1)."""

    dims: int
    interleaved: bool = False

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


def read_rotary(checkpoint: Checkpoint, architecture: Architecture, head_dim: int, num_layers: int) -> list[Rotary]:
    """For each layer, from the config as the class reads it: its defaults are the class's own."""
    config = class_config(checkpoint)
    parameters = getattr(config, "rope_parameters", None) or {}
    sections = [section for section in parameters.values() if isinstance(section, dict)] or [parameters]
    factor = sections[0].get("partial_rotary_factor") or 1.0
    turning = Rotary(int(head_dim * factor), architecture.interleaved_rotary)
    still = Rotary(0)
    return [turning if architecture.rotates(config, layer) else still for layer in range(num_layers)]
