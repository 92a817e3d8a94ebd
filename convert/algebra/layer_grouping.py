"""Which layers share keys and values."""

from __future__ import annotations

from dataclasses import dataclass

from ..errors import UnsupportedError

__all__ = ["LayerGrouping"]


@dataclass(frozen=True)
class LayerGrouping:
    """Which layer's keys and values each layer reads: layer i reads those of `sources[i]`, itself or an earlier layer.

    Cross-layer attention (CLA, Brandon et al. 2024, arXiv 2405.12981) is the case where some layers read those of an
    earlier one. Raises ValueError where a source lies after its reader, or reads another layer's itself.
    """

    sources: tuple[int, ...]

    def __post_init__(self) -> None:
        for layer, source in enumerate(self.sources):
            if not 0 <= source <= layer:
                raise ValueError(f"layer {layer} cannot read keys and values of layer {source}: no layer up to it")
            if self.sources[source] != source:
                raise ValueError(f"layer {layer} cannot read keys and values of layer {source}, which has none")

    @classmethod
    def of_sizes(cls, sizes: tuple[int, ...]) -> LayerGrouping:
        """Return the grouping of neighbouring layers in which group g has `sizes[g]` layers, all reading its first."""
        sources: list[int] = []
        for size in sizes:
            sources += [len(sources)] * size
        return cls(tuple(sources))

    @classmethod
    def uniform(cls, num_layers: int, share: int, *, keep_first: int = 0, keep_last: int = 0) -> LayerGrouping:
        """Return the grouping of `share` neighbours each (the paper's CLA2 for 2), the last group taking the remainder.

        The first `keep_first` and the last `keep_last` layers share with none (the paper's dense front and back).
        Raises UnsupportedError where fewer than two layers are left between them, or `share` is below 2.
        """
        between = num_layers - keep_first - keep_last
        if share < 2 or between < 2:
            raise UnsupportedError(
                f"{num_layers} layers, {keep_first} kept first and {keep_last} last, cannot share in groups of {share}",
                hint="at least two layers have to share",
            )
        sizes = [share] * (between // share) + ([between % share] if between % share else [])
        return cls.of_sizes((1,) * keep_first + tuple(sizes) + (1,) * keep_last)

    @property
    def groups(self) -> tuple[tuple[int, ...], ...]:
        """The layers of each group in order. The first of a group computes the keys and values that all of it read."""
        return tuple(
            tuple(layer for layer, source in enumerate(self.sources) if source == first)
            for first in sorted(set(self.sources))
        )
