"""Which sample comes from which source, in closed form, and the orders that samples are seen in."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from hashlib import blake2b
from itertools import accumulate, pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...convert.errors import InputError

__all__ = ["WINDOW", "Mixture", "drawn_seed", "shuffled", "splitmix64"]


WINDOW = 1024
_WHOLE = 2**40  # shares are integers of this: sums of floats would differ between machines in their last bits


@dataclass(frozen=True)
class Mixture:
    """The rule that mixes sources by share: after each window of 1024 samples, counts are within one of the exact ones.

    `bounds` are the shares summed up, from 0 to 2**40. Within a window the order is drawn by `seed`. Raises InputError
    for a share below one sample in a window: rounded sums of it would not always grow.
    """

    bounds: tuple[int, ...]
    seed: int

    def __post_init__(self) -> None:
        for source, (below, above) in enumerate(pairwise(self.bounds)):
            if (above - below) * WINDOW < _WHOLE:
                raise InputError(
                    f"source {source + 1} has {(above - below) / _WHOLE:.2g} of the weight, "
                    f"less than one sample in {WINDOW}",
                    hint="give it more weight, or leave it out",
                )

    @classmethod
    def of(cls, weights: Sequence[float], *, seed: int) -> Mixture:
        """Make the mixture of sources with these weights, which may have any positive sum."""
        total = sum(weights)
        sums = [round(part / total * _WHOLE) for part in accumulate(weights)]
        return cls((0, *sums[:-1], _WHOLE), seed)

    @property
    def num_sources(self) -> int:
        """The number of sources."""
        return len(self.bounds) - 1

    def locate(self, sample: int) -> tuple[int, int]:
        """Find the source of a sample, and how many samples of that source come before it."""
        window, place = divmod(sample, WINDOW)
        order = _order(self, window)
        source = int(order[place])
        return source, self._before(window)[source] + int(np.count_nonzero(order[:place] == source))

    def counts(self, num_samples: int) -> tuple[int, ...]:
        """Count how many of the first `num_samples` samples come from each source."""
        window, place = divmod(num_samples, WINDOW)
        begun = np.bincount(_order(self, window)[:place], minlength=self.num_sources).tolist()
        return tuple(before + count for before, count in zip(self._before(window), begun, strict=True))

    def _before(self, window: int) -> tuple[int, ...]:
        """How many samples of each source come before a window."""
        edges = [(window * WINDOW * bound + _WHOLE // 2) // _WHOLE for bound in self.bounds]
        return tuple(above - below for below, above in pairwise(edges))


@lru_cache(maxsize=4)
def _order(mixture: Mixture, window: int) -> NDArray[Any]:
    """The source of each sample of a window, (1024,)."""
    before, after = mixture._before(window), mixture._before(window + 1)
    counts = [end - begin for begin, end in zip(before, after, strict=True)]
    sources: NDArray[Any] = np.repeat(np.arange(mixture.num_sources), counts)
    return sources[shuffled(WINDOW, mixture.seed, "window", window)]


def shuffled(count: int, *key: int | str) -> NDArray[np.uint32]:
    """Return the numbers below `count`, (count,), in an order drawn by `key`.

    No library's generator draws it: their streams may change between versions, and a resumed run must not notice.
    """
    return np.argsort(splitmix64(drawn_seed(*key), count), kind="stable").astype(np.uint32)


def drawn_seed(*key: int | str) -> int:
    """Return a number of 64 bits, which looks unrelated for each key."""
    return int.from_bytes(blake2b(repr(key).encode(), digest_size=8).digest(), "little")


def splitmix64(start: int, count: int) -> NDArray[np.uint64]:
    """Return `count` outputs, (count,), of SplitMix64 (Steele, Lea, Flood 2014) from the state `start` on."""
    z = np.arange(1, count + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15) + np.uint64(start)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))
