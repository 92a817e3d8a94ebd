"""Which layers share keys and values."""

from __future__ import annotations

from dataclasses import dataclass

from ..errors import UnsupportedError

__all__ = ["LayerGrouping"]


@dataclass(frozen=True)
class LayerGrouping:
    """Layer i attends to the keys and values of layer `sources[i]`, itself or an earlier one.

    Raises ValueError unless every source computes its own.
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
        """Neighbouring layers, so many in each group."""
        sources: list[int] = []
        for size in sizes:
            sources += [len(sources)] * size
        return cls(tuple(sources))

    @classmethod
    def uniform(cls, num_layers: int, share: int, *, keep_first: int = 0, keep_last: int = 0) -> LayerGrouping:
        """`share` neighbours in each group, the last one smaller if they do not divide, as the paper's CLA3.

        The first `keep_first` and the last `keep_last` layers keep their own (the paper's dense front and back).
        Raises UnsupportedError where nothing is left to share.
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
        """The layers of each group, first the one that computes keys and values."""
        return tuple(
            tuple(layer for layer, source in enumerate(self.sources) if source == first)
            for first in sorted(set(self.sources))
        )
