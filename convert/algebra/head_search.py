"""Search for the groups of K/V heads that lose least when each group becomes one head."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import combinations, product

from .head_merge import Heads
from .heads import HeadGrouping

__all__ = ["best_grouping"]

Groups = tuple[tuple[int, ...], ...]
Losses = list[list[float]]
"""What merging two heads loses, (heads, heads), symmetric, 0 on the diagonal."""


def best_grouping(heads: Heads, num_groups: int) -> HeadGrouping:
    """Return groups of equal size with a small loss: the lost fraction of the keys' energy plus that of the values'.

    A group's loss is estimated as the sum over its pairs of heads of what merging the pair alone would lose
    (`Heads.pair_losses`), so that each pair is computed once. Each group gets the same number of heads of every layer.
    From each head as seed, groups are filled greedily, then heads are swapped between groups until no swap helps; the
    best result is returned, neighbouring heads being one of the candidates. QCQA (arXiv 2406.10247) searches groups
    too, for the mean of heads. The losses suppose that keys and values are both merged in closed form
    (`FreeTransformations`).
    """
    losses: Losses = heads.pair_losses().tolist()

    def total(groups: Groups) -> float:
        return sum(losses[one][other] for group in groups for one, other in combinations(group, 2))

    everything = tuple(range(len(heads)))
    size = len(everything) // num_groups
    candidates = [heads.in_order(num_groups).groups]
    candidates += [_grown(heads, seed, size, losses) for seed in everything]
    best = min((_swapped(groups, heads, losses) for groups in candidates), key=total)
    return HeadGrouping(tuple(sorted(tuple(sorted(group)) for group in best)))


def _grown(heads: Heads, seed: int, size: int, losses: Losses) -> Groups:
    """Fill groups one after the other with the head that adds least to the loss; the first begins with `seed`."""
    free = set(range(len(heads)))
    groups: list[tuple[int, ...]] = []
    while free:
        group = [seed if not groups else min(free)]
        free -= set(group)
        while len(group) < size:
            layers = [heads.layer(head) for head in group]
            wanted = [head for head in sorted(free) if layers.count(heads.layer(head)) < size // heads.num_layers]
            group.append(min(wanted, key=lambda head: _with(group, head, losses)))
            free.discard(group[-1])
        groups.append(tuple(group))
    return tuple(groups)


def _swapped(groups: Groups, heads: Heads, losses: Losses) -> Groups:
    """Swap two heads of one layer between groups as long as a swap lowers the loss."""
    current = [list(group) for group in groups]
    # of each head, what it loses with each group: a swap is judged without summing over the groups
    lost = [[_with(group, head, losses) for group in current] for head in range(len(heads))]
    improved = True
    while improved:
        improved = False
        for (a, one), (b, other) in combinations(enumerate(current), 2):
            for i, j in product(range(len(one)), range(len(other))):
                first, second = one[i], other[j]
                if heads.layer(first) != heads.layer(second):
                    continue
                gain = lost[first][a] + lost[second][b] - lost[first][b] - lost[second][a] + 2 * losses[first][second]
                if gain > 1e-12:
                    improved = True
                    one[i], other[j] = second, first
                    for head, row in enumerate(lost):
                        change = losses[head][second] - losses[head][first]
                        row[a] += change
                        row[b] -= change
    return tuple(tuple(group) for group in current)


def _with(group: Iterable[int], head: int, losses: Losses) -> float:
    """What a head loses with all heads of a group."""
    return sum(losses[head][member] for member in group)
