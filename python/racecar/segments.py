"""Where a full reverse that keeps nothing is cut, so that little has to be held while it is computed again."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from itertools import pairwise

import torch

_MOST_LIMITS = 64  # enough to be exact up to 10 layers, and quick for hundreds


def split(sizes: tuple[int, ...]) -> list[int]:
    """Lengths of the segments of a reverse pass whose i-th result (highest layer first) takes `sizes[i]` bytes.

    The last result of every segment but the last is kept until the backward pass; a segment's own results are held
    while it is computed again. Minimises kept + largest held, as gradient checkpointing does (Chen et al. 2016), but
    by bytes: with equal sizes this is about √n segments.
    """
    return _split(sizes) if torch.compiler.is_compiling() else list(_cached(sizes))


@lru_cache(maxsize=256)
def _cached(sizes: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(_split(sizes))


def _split(sizes: tuple[int, ...]) -> list[int]:
    before = [0]  # before[i]: bytes of the results in front of i
    for size in sizes:
        before.append(before[-1] + size)
    best: list[int] = []
    least = before[-1] + 1
    for limit in _limits(sizes, before):  # plain loops: torch.compile traces them
        cuts = _cut(sizes, before, limit)
        cost = _cost(sizes, before, cuts)
        if cost < least or (cost == least and len(cuts) < len(best)):
            least, best = cost, cuts
    return [b - a for a, b in zip([0, *best], [*best, len(sizes)], strict=True)]


def _limits(sizes: tuple[int, ...], before: list[int]) -> list[int]:
    """Sums of neighbouring results: the bounds on a segment that can make a difference, thinned out if many."""
    n, largest = len(sizes), max(sizes)
    sums = {before[b] - before[a] for a in range(n) for b in range(a + 1, n + 1)}
    limits = sorted([s for s in sums if s >= largest])
    step = -(-len(limits) // _MOST_LIMITS)
    return limits[::-step]  # the largest, no cut at all, is always among them


def _cut(sizes: tuple[int, ...], before: list[int], limit: int) -> list[int]:
    """The cuts that keep least, with no segment holding more than `limit`: dynamic programming over the last cut."""
    kept, came = [0], [0]
    for end in range(1, len(sizes) + 1):
        start = end - 1
        cheapest, source = kept[start] + (sizes[start - 1] if start else 0), start
        while start and before[end] - before[start - 1] <= limit:
            start -= 1
            cost = kept[start] + (sizes[start - 1] if start else 0)
            if cost < cheapest:
                cheapest, source = cost, start
        kept.append(cheapest)
        came.append(source)
    cuts, at = [], came[-1]
    while at:
        cuts.append(at)
        at = came[at]
    return cuts[::-1]


def _cost(sizes: tuple[int, ...], before: list[int], cuts: Sequence[int]) -> int:
    bounds = [0, *cuts, len(sizes)]
    held = max([before[b] - before[a] for a, b in pairwise(bounds)])
    return sum([sizes[c - 1] for c in cuts]) + held
