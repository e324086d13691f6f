"""How the kernels between few and many channels are cut into blocks; mirrors the sizes in csrc/cuda/few_channels_*.cuh.

A tile is what a block computes, a rect what it reads for it at most; both in pixels (rows, columns).
"""

from __future__ import annotations

from functools import lru_cache
from math import prod
from typing import NamedTuple

THREADS = 256
MOST_SHARED = 96 * 1024  # bytes of a block; sm_86 and sm_89 have 99 KB
GROUP_TAPS = {1: 9, 2: 5, 3: 3, 4: 3}  # that a thread keeps sums of, by few channels
BLOCKS = 528  # of the weight's gradient: four for each multiprocessor of an H200; fixed, for results to repeat
SIDES = (1, 2, 4, 8, 16, 32)

Two = tuple[int, int]


class Geometry(NamedTuple):
    """large: whether the result has the size of the operation's input. result: its pixels. channels: the many."""

    result: Two
    large: bool
    kernel: Two
    stride: Two
    dilation: Two
    few: int
    channels: int
    itemsize: int

    @property
    def groups(self) -> int:
        """Of taps."""
        return -(-prod(self.kernel) // GROUP_TAPS[self.few])

    @property
    def per_words(self) -> int:
        """Channels in 16 bytes."""
        return 16 // self.itemsize

    def rect(self, tile: Two) -> Two:
        def reach(t: int, k: int, s: int, d: int) -> int:
            return (t - 1 + (k - 1) * d) // s + 1 if self.large else (t - 1) * s + (k - 1) * d + 1

        return tuple(map(reach, tile, self.kernel, self.stride, self.dilation))  # type: ignore[return-value]

    def tiles(self, tile: Two) -> Two:
        return -(-self.result[0] // tile[0]), -(-self.result[1] // tile[1])


class Cut(NamedTuple):
    """tile, rect; lanes: threads that share a pixel; shared: bytes of a block."""

    tile: Two
    rect: Two
    shared: int
    lanes: int = 1


def _few_bytes(few: int) -> int:
    return 4 * (4 if few == 3 else few)


def _power(n: int) -> int:
    return 1 << max(0, n - 1).bit_length()


def _best(found: list[tuple[float, Cut]]) -> Cut | None:
    fitting = [(cost, cut) for cost, cut in found if cut.shared <= MOST_SHARED]
    return min(fitting, key=lambda own: (own[0], own[1].shared))[1] if fitting else None


@lru_cache(maxsize=1024)
def narrow(own: Geometry) -> Cut | None:
    """To few channels. The tile for which the threads have the fewest turns; None where none fits."""
    columns = GROUP_TAPS[own.few] * own.few
    found = []
    for tile in ((a, b) for a in SIDES for b in SIDES):
        rect = own.rect(tile)
        pixels = prod(rect)
        shared = 16 * pixels * (32 // own.per_words | 1) + 4 * 32 * own.groups * (-(-columns // 4) * 4)
        shared += 4 * pixels * (own.groups * columns | 1) + 4 * (THREADS + 16) * (1 + own.few)
        turns = -(-(-(-pixels // 4) * own.groups) // THREADS)
        found.append((prod(own.tiles(tile)) * (turns + 0.3), Cut(tile, rect, shared)))
    return _best(found)


@lru_cache(maxsize=1024)
def wide(own: Geometry) -> Cut | None:
    """To many channels: at most 64 of them in a block."""
    lanes = min(_power(-(-own.channels // own.per_words)), 64 // own.per_words)
    found = []
    for tile in ((a, b) for a in SIDES for b in SIDES):
        if prod(tile) <= THREADS // lanes * (32 // own.per_words):
            rect = own.rect(tile)
            shared = 4 * prod(own.kernel) * own.few * lanes * own.per_words + 4 * THREADS * (own.per_words + 1) + 64
            cut = Cut(tile, rect, shared + _few_bytes(own.few) * prod(rect), lanes)
            found.append((float(prod(own.tiles(tile))), cut))
    return _best(found)


@lru_cache(maxsize=1024)
def weight(own: Geometry) -> Cut | None:
    """Of the weight's gradient; `result` is the image of many channels."""
    lanes = min(16, max(2, _power(-(-own.channels // 4))))
    while lanes > 2 and lanes * own.groups > THREADS:
        lanes //= 2
    if lanes * own.groups > THREADS:
        return None
    found = []
    for tile in ((a, b) for a in SIDES for b in SIDES):
        rect = own.rect(tile)
        shared = 16 * prod(tile) * (lanes * 4 // own.per_words | 1) + _few_bytes(own.few) * prod(rect)
        sums = 4 * THREADS * 4 * GROUP_TAPS[own.few] * own.few
        cost = prod(own.tiles(tile)) * (prod(tile) + 0.5 * prod(rect) + 64)  # 64: what beginning a tile costs
        found.append((cost, Cut(tile, rect, max(shared, sums), lanes)))
    return _best(found)


def rows(own: Geometry, cut: Cut, images: int) -> Two:
    """How many rows of partial sums, and the tiles of each."""
    total = images * prod(own.tiles(cut.tile))
    apart = -(-own.channels // (cut.lanes * 4))
    each = -(-total // min(total, max(1, BLOCKS // apart)))
    return -(-total // each), each
