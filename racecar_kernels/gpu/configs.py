"""The static tables of launch configurations, by architecture and shape class.

The figures are what Triton compiles without spilling and what the chips' sheets suggest; they are not yet measured on
a GPU. `racecar bench --suite gpu` measures them.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any, NamedTuple

from .device import Device


class Pointwise(NamedTuple):
    """Elements of a tile without pooling, warps of a program, programs per multiprocessor."""

    elements: int
    warps: int
    programs: int


# A warp reads 32 · 16 bytes at a time; two such loads in flight per thread and operand.
POINTWISE = {
    "sm_80": Pointwise(2048, 4, 8),
    "sm_90": Pointwise(4096, 8, 8),
    "sm_100": Pointwise(4096, 8, 8),
}


def table_entry(table: dict[str, Any], architecture: str) -> Any:
    """The entry of the newest architecture in the table that is not newer than this one; else the oldest."""
    number = int(architecture.removeprefix("sm_"))
    known = sorted(int(name.removeprefix("sm_")) for name in table)
    return table[f"sm_{max((k for k in known if k <= number), default=known[0])}"]


@lru_cache(maxsize=4096)
def pointwise(
    count: int, channels: int, last: bool, taps: int, on: Device
) -> tuple[dict[str, int], tuple[int, int], dict[str, int]]:
    """Blocks, programs and compiler options for `count` windows of `taps` values and `channels` channels.

    last: channels lie beside each other; else the windows of a channel do. A tile is smaller the more taps a window
    has, and no larger than what there is to do.
    """
    entry: Pointwise = table_entry(POINTWISE, on.architecture)
    elements = max(256, entry.elements // (1 if taps == 1 else 2 if taps <= 4 else 4))
    block_c = min(_power_of_two(channels), 128) if last else 1
    block_q = max(1, min(elements // block_c, _power_of_two(count)))
    across = -(-channels // block_c)
    down = min(-(-count // block_q), max(1, entry.programs * on.multiprocessors // across))
    warps = max(1, min(entry.warps, block_q * block_c // 128))
    return {"BLOCK_Q": block_q, "BLOCK_C": block_c}, (down, across), {"num_warps": warps}


def finishing(channels: int) -> dict[str, int]:
    """Blocks of the kernels that add up what programs have summed."""
    return {"BLOCK_P": 32, "BLOCK_C": min(_power_of_two(channels), 32)}


def _power_of_two(n: int) -> int:
    return 1 << max(0, n - 1).bit_length()
