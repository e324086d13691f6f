"""Where a full reverse that keeps nothing is cut, so that little has to be held while it is computed again."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache


@lru_cache(maxsize=256)
def split(sizes: tuple[int, ...]) -> list[int]:
    """Lengths of the segments of a reverse pass whose i-th result (highest layer first) takes `sizes[i]` bytes.

    The last result of every segment but the last is kept until the backward pass; a segment's own results are held
    while it is computed again. Minimises kept + largest held, as gradient checkpointing does (Chen et al. 2016), but
    by bytes: with equal sizes this is about √n segments.
    """
    best, cuts = min(
        ((_cost(sizes, cuts), cuts) for cuts in map(lambda limit: _cut(sizes, limit), _limits(sizes))),
        key=lambda pair: (pair[0], len(pair[1])),
    )
    return [b - a for a, b in zip([0, *cuts], [*cuts, len(sizes)], strict=True)]


def _limits(sizes: Sequence[int]) -> list[int]:
    """Every sum of neighbouring results: the bounds on a segment that can make a difference."""
    n = len(sizes)
    return sorted({sum(sizes[a:b]) for a in range(n) for b in range(a + 1, n + 1) if sum(sizes[a:b]) >= max(sizes)})


def _cut(sizes: Sequence[int], limit: int) -> tuple[int, ...]:
    """The cuts that keep least, with no segment holding more than `limit`: dynamic programming over the last cut."""
    n = len(sizes)
    kept: list[float] = [0.0] + [float("inf")] * n
    came = [0] * (n + 1)
    for end in range(1, n + 1):
        for start in range(end):
            if sum(sizes[start:end]) <= limit:
                cost = kept[start] + (sizes[start - 1] if start else 0)
                if cost < kept[end]:
                    kept[end], came[end] = cost, start
    cuts, at = [], came[n]
    while at:
        cuts.append(at)
        at = came[at]
    return tuple(cuts[::-1])


def _cost(sizes: Sequence[int], cuts: tuple[int, ...]) -> int:
    bounds = [0, *cuts, len(sizes)]
    return sum(sizes[c - 1] for c in cuts) + max(sum(sizes[a:b]) for a, b in zip(bounds, bounds[1:], strict=False))
