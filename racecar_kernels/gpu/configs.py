"""The static tables of launch configurations, by architecture and shape class.

The figures are what Triton compiles without spilling and what the chips' sheets suggest; they are not yet measured on
a GPU. `racecar bench --suite gpu` measures them.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from typing import Any, NamedTuple, TypeVar

from .device import Device

Config = TypeVar("Config", "Pointwise", "Gemm", "Tile")


class Pointwise(NamedTuple):
    """Elements of a tile without pooling, warps of a program, programs per multiprocessor."""

    elements: int
    warps: int
    programs: int


MOST_CHANNELS = 128  # of a tile
# A warp reads 32 · 16 bytes at a time; two such loads in flight per thread and operand.
POINTWISE = {
    "sm_80": Pointwise(2048, 4, 8),
    "sm_90": Pointwise(4096, 8, 8),
    "sm_100": Pointwise(4096, 8, 8),
}
MORE_POINTWISE = (Pointwise(2048, 4, 8), Pointwise(4096, 8, 8), Pointwise(2048, 8, 16))  # a warp's part is no larger


# What tuning.py has measured, by architecture and shape class; and what was looked up since it last changed.
_measured: dict[tuple[str, str], tuple[int, ...]] = {}
_asked: dict[tuple[str, str], Any] = {}


def overlay(architecture: str, entries: Mapping[str, tuple[int, ...]]) -> None:
    """Takes these instead of the tables' own on an architecture."""
    for key in [k for k in _measured if k[0] == architecture]:
        del _measured[key]
    _measured.update({(architecture, name): values for name, values in entries.items()})
    _asked.clear()
    for cached in (pointwise, gemm, weight_gemm, linear, linear_weight, linear_tied):
        cached.cache_clear()


def asked(architecture: str) -> dict[str, list[Any]]:
    """Shape classes that were looked up since `overlay`, with their candidates, the one of the table first."""
    found = {name: own for (where, name), own in _asked.items() if where == architecture}
    return {name: [own, *(c for c in candidates(name, architecture) if c != own)] for name, own in found.items()}


def candidates(name: str, architecture: str) -> tuple[Any, ...]:
    """Every config of a shape class, "family/kind/class", that is compiled ahead of time. KeyError: there is none."""
    family, kind, shape = name.split("/")
    if family == "pointwise":
        return tuple(dict.fromkeys((table_entry(POINTWISE, architecture), *MORE_POINTWISE)))
    if family in GEMMS:
        own = table_entry(GEMMS[family], architecture)[kind][shape]
        return (own, *MORE_GEMMS.get((family, kind, shape), ()))
    ragged, kernel = shape.startswith("ragged"), family.removeprefix("linear ")
    return linear_tiles(architecture, not ragged)[kernel][kind]


def _chosen(name: str, own: Config, on: Device) -> Config:
    """What was measured for a shape class, else the table's own config."""
    _asked[on.architecture, name] = own
    measured = _measured.get((on.architecture, name))
    return own if measured is None else type(own)(*measured)


def table_entry(table: dict[str, Any], architecture: str) -> Any:
    """The entry of the newest architecture in the table that is not newer than this one; else the oldest."""
    number = int(architecture.removeprefix("sm_"))
    known = sorted(int(name.removeprefix("sm_")) for name in table)
    return table[f"sm_{max((k for k in known if k <= number), default=known[0])}"]


@lru_cache(maxsize=4096)
def pointwise(
    count: int, channels: int, last: bool, taps: int, on: Device, kind: str
) -> tuple[dict[str, int], tuple[int, int], dict[str, int]]:
    """Blocks, programs and compiler options for `count` windows of `taps` values and `channels` channels.

    kind: half or single, the width of what is read. last: channels lie beside each other; else the windows of a
    channel do. A tile is smaller the more taps a window has, and no larger than what there is to do.
    """
    part = 1 if taps == 1 else 2 if taps <= 4 else 4
    name = f"pointwise/{kind}/{'channels_last' if last else 'contiguous'} {part}"
    entry = _chosen(name, Pointwise(*table_entry(POINTWISE, on.architecture)), on)
    elements = max(256, entry.elements // part)
    block_c = min(_power_of_two(channels), MOST_CHANNELS) if last else 1
    block_q = max(1, min(elements // block_c, _power_of_two(count)))
    across = -(-channels // block_c)
    down = min(-(-count // block_q), max(1, entry.programs * on.multiprocessors // across))
    warps = max(1, min(entry.warps, block_q * block_c // 128))
    return {"BLOCK_Q": block_q, "BLOCK_C": block_c}, (down, across), {"num_warps": warps}


MOST_PARTS = 64  # of a batch's statistics, which one program combines: with more, several do it first


def finishing(channels: int) -> dict[str, int]:
    """Blocks of the kernels that add up what programs have summed."""
    return {"BLOCK_P": 32, "BLOCK_C": min(_power_of_two(channels), 32)}


def _power_of_two(n: int) -> int:
    return 1 << max(0, n - 1).bit_length()


# ------------------------------------------------------------------------------------------- transposed convolution

FEW = 16  # channels of a tap below which the reduction runs over taps and channels alike


class Gemm(NamedTuple):
    """Rows, columns and reduction of a tile, warps of a program, stages of its pipeline."""

    m: int
    n: int
    k: int
    warps: int
    stages: int

    @property
    def blocks(self) -> dict[str, int]:
        return {"BLOCK_M": self.m, "BLOCK_N": self.n, "BLOCK_K": self.k}

    @property
    def options(self) -> dict[str, int]:
        return {"num_warps": self.warps, "num_stages": self.stages}


# By how operands are multiplied (half: bfloat16 and float16; tf32; ieee: float32 without the matrix units), and by
# shape class (see `shape_class`). What is few or odd is read value by value, with an address each: smaller tiles.
_IEEE = Gemm(64, 32, 16, 4, 2)
_TRANSPOSED = {
    "half": {
        "few": Gemm(64, 32, 16, 4, 2),
        "odd": Gemm(64, 32, 16, 4, 2),
        "many": Gemm(128, 64, 32, 8, 3),
        "point": Gemm(128, 64, 64, 8, 3),
    },
    "tf32": {
        "few": Gemm(64, 32, 16, 4, 2),
        "odd": Gemm(64, 32, 16, 4, 2),
        "many": Gemm(128, 64, 32, 8, 2),
        "point": Gemm(128, 64, 32, 8, 2),
    },
    "ieee": dict.fromkeys(("few", "odd", "many", "point"), _IEEE),
}
# tcgen05 keeps sums in a memory of its own, and the pipeline before it takes more registers
_TRANSPOSED_100 = {**_TRANSPOSED, "half": {**_TRANSPOSED["half"], "point": Gemm(128, 64, 32, 8, 3)}}
_WEIGHT = {
    "half": {
        "few": Gemm(64, 32, 32, 4, 2),
        "odd": Gemm(64, 32, 32, 4, 2),
        "many": Gemm(64, 64, 64, 4, 2),
        "point": Gemm(64, 64, 64, 4, 2),
    },
    "tf32": {
        "few": Gemm(64, 32, 32, 4, 2),
        "odd": Gemm(64, 32, 32, 4, 2),
        "many": Gemm(64, 64, 32, 4, 2),
        "point": Gemm(64, 64, 32, 4, 2),
    },
    "ieee": dict.fromkeys(("few", "odd", "many", "point"), _IEEE._replace(m=32)),
}
GEMMS: dict[str, dict[str, dict[str, dict[str, Gemm]]]] = {
    "transposed": {"sm_80": _TRANSPOSED, "sm_90": _TRANSPOSED, "sm_100": _TRANSPOSED_100},
    "source": {"sm_80": _TRANSPOSED, "sm_90": _TRANSPOSED, "sm_100": _TRANSPOSED},
    "weight": {"sm_80": _WEIGHT, "sm_90": _WEIGHT, "sm_100": _WEIGHT},
}
# What tuning may find to be quicker: smaller tiles, of which a multiprocessor holds more.
MORE_GEMMS: Mapping[tuple[str, str, str], tuple[Gemm, ...]] = {
    (family, kind, shape): (Gemm(64, 64, 32, 4, stages),)
    for family in ("transposed", "source")
    for kind, stages in (("half", 3), ("tf32", 2))
    for shape in ("many", "point")
} | {("weight", "half", shape): (Gemm(64, 64, 32, 4, 3),) for shape in ("many", "point")}


def shape_class(channels: int, others: int, taps: int) -> str:
    """Of a tap's channels, and of those on the other side of the weight.

    few: so few that the reduction (of the weight's gradient: the columns) is over taps and channels alike; odd: wide
    loads do not divide them; point: one tap, a plain GEMM; else many. Up to 16 others are one narrow tile.
    """
    if channels < FEW:
        return "few"
    if channels % 16 or (others > 16 and others % 16):
        return "odd"
    return "point" if taps == 1 else "many"


def _gemm(family: str, kind: str, shape: str, on: Device) -> Gemm:
    own: Gemm = table_entry(GEMMS[family], on.architecture)[kind][shape]
    return _chosen(f"{family}/{kind}/{shape}", own, on)


@lru_cache(maxsize=4096)
def gemm(family: str, kind: str, channels: int, columns: int, taps: int, on: Device) -> Gemm:
    """Tile of `transposed` or `source`: a reduction over taps of `channels`; no wider than what there is to do."""
    own = _gemm(family, kind, shape_class(channels, columns, taps), on)
    reduced = channels * taps if channels < FEW else channels
    return own._replace(n=_fit(columns, own.n), k=_fit(reduced, own.k))


@lru_cache(maxsize=4096)
def weight_gemm(kind: str, rows: int, channels: int, taps: int, on: Device) -> Gemm:
    """Tile of the weight's gradient: C_out rows, taps of `channels` columns, a reduction over pixels."""
    own = _gemm("weight", kind, shape_class(channels, rows, taps), on)
    columns = channels * taps if channels < FEW else channels
    return own._replace(m=_fit(rows, own.m), n=_fit(columns, own.n))


def splits(tiles: int, blocks: int, numel: int, on: Device) -> int:
    """Into how many parts `blocks` of pixels are split: four programs per multiprocessor, partial sums below 64 MiB."""
    wanted = -(-4 * on.multiprocessors // tiles)
    return max(1, min(wanted, blocks // 4, 2**24 // max(1, numel)))


def summing(programs: int) -> dict[str, int]:
    """Blocks of the kernel that adds up partial sums."""
    return {"BLOCK_P": 32, "BLOCK_E": 32} if programs > 32 else {"BLOCK_P": 4, "BLOCK_E": 256}


def _fit(size: int, most: int) -> int:
    """A power of two for `size` values; matrix units take 16 at least."""
    return max(16, min(most, _power_of_two(size)))


# ------------------------------------------------------------------------------------------- tied linear


class Tile(NamedTuple):
    """Rows, columns and depth of a block of a product, warps of a program, and loads in flight."""

    rows: int
    columns: int
    depth: int
    warps: int
    stages: int


Tiles = dict[str, dict[str, tuple[Tile, ...]]]
GROUP = 8  # block rows that go together, so that a cache holds what they share
MOST_SPLITS = 64

# By kernel and arithmetic, the largest first; a smaller one is taken where the larger would leave multiprocessors idle.
# product: y, a and the gradient of p; source: the gradient of y, whose left side is made on the way; weight: rows and
# columns are output and input features, depth is rows; tied: columns is the largest number of output features.
_LINEAR_SM_80: Tiles = {
    "product": {
        "half": (Tile(128, 128, 32, 8, 3), Tile(64, 64, 32, 4, 4)),
        "tf32": (Tile(128, 128, 16, 8, 3), Tile(64, 64, 32, 4, 3)),
        "ieee": (Tile(64, 64, 16, 8, 2), Tile(32, 32, 16, 4, 2)),
    },
    "source": {
        "half": (Tile(128, 64, 32, 8, 3), Tile(64, 64, 32, 4, 3)),
        "tf32": (Tile(128, 64, 16, 8, 3), Tile(64, 64, 16, 4, 3)),
        "ieee": (Tile(64, 64, 16, 8, 2), Tile(32, 32, 16, 4, 2)),
    },
    "weight": {
        "half": (Tile(128, 64, 32, 8, 3), Tile(64, 64, 32, 4, 3)),
        "tf32": (Tile(128, 64, 16, 8, 3), Tile(64, 64, 16, 4, 3)),
        "ieee": (Tile(64, 64, 16, 8, 2), Tile(32, 32, 16, 4, 2)),
    },
    "tied": {
        "half": (Tile(64, 128, 32, 8, 2), Tile(32, 128, 32, 4, 3), Tile(16, 128, 32, 4, 3)),
        "tf32": (Tile(64, 128, 16, 8, 3), Tile(32, 128, 16, 4, 3)),
        "ieee": (Tile(32, 128, 16, 4, 2), Tile(16, 128, 16, 4, 1)),
    },
}
_LINEAR_SM_90: Tiles = {
    "product": {
        "half": (Tile(128, 128, 64, 8, 3), Tile(64, 64, 64, 4, 4)),
        "tf32": (Tile(128, 128, 32, 8, 3), Tile(64, 64, 32, 4, 4)),
        "ieee": _LINEAR_SM_80["product"]["ieee"],
    },
    "source": {
        "half": (Tile(128, 128, 32, 8, 3), Tile(64, 64, 64, 4, 3)),
        "tf32": (Tile(128, 64, 32, 8, 3), Tile(64, 64, 32, 4, 3)),
        "ieee": _LINEAR_SM_80["source"]["ieee"],
    },
    "weight": {
        "half": (Tile(128, 128, 32, 8, 3), Tile(64, 64, 64, 4, 3)),
        "tf32": (Tile(128, 64, 32, 8, 3), Tile(64, 64, 32, 4, 3)),
        "ieee": _LINEAR_SM_80["weight"]["ieee"],
    },
    "tied": {
        "half": (Tile(64, 128, 32, 8, 3), Tile(32, 128, 32, 4, 3), Tile(16, 128, 32, 4, 3)),
        "tf32": (Tile(64, 128, 16, 8, 3), Tile(32, 128, 16, 4, 3)),
        "ieee": _LINEAR_SM_80["tied"]["ieee"],
    },
}
# sm_120 is the consumers' chip: its shared memory is as small as that of sm_86 and sm_89, which read the row of sm_80.
LINEAR = {"sm_80": _LINEAR_SM_80, "sm_90": _LINEAR_SM_90, "sm_100": _LINEAR_SM_90, "sm_120": _LINEAR_SM_80}
# Where features are no multiple of 16, or rows not aligned to it, every value has its own mask and address: smaller
# tiles, on all architectures.
_RAGGED: Tiles = {
    "product": {
        "half": (Tile(64, 64, 32, 4, 3),),
        "tf32": (Tile(64, 64, 16, 4, 3),),
        "ieee": (Tile(32, 32, 16, 4, 2),),
    },
    "source": {"half": (Tile(64, 64, 16, 4, 3),), "tf32": (Tile(64, 64, 16, 4, 3),), "ieee": (Tile(32, 32, 16, 4, 2),)},
    "weight": {"half": (Tile(64, 64, 32, 4, 3),), "tf32": (Tile(64, 64, 16, 4, 3),), "ieee": (Tile(32, 32, 16, 4, 2),)},
    "tied": {
        "half": (Tile(32, 128, 32, 8, 2), Tile(16, 128, 32, 4, 3)),
        "tf32": (Tile(16, 128, 16, 4, 3),),
        "ieee": (Tile(16, 128, 16, 4, 1),),
    },
}


def linear_tiles(architecture: str, aligned: bool) -> Tiles:
    """The tiles that an architecture is given, for aligned and for ragged features."""
    tiles: Tiles = table_entry(LINEAR, architecture)
    return tiles if aligned else _RAGGED


@lru_cache(maxsize=4096)
def linear(
    kernel: str, math: str, rows: int, columns: int, depth: int, on: Device, aligned: bool
) -> tuple[dict[str, int], tuple[int], dict[str, int]]:
    """Blocks, grid and compiler options of a kernel that writes rows × columns and sums over depth."""
    tile = _tile(kernel, math, rows, columns, depth, on, aligned)
    blocks = {"BLOCK_R": tile.rows, "BLOCK_C": tile.columns, "BLOCK_K": tile.depth, "GROUP": GROUP}
    return blocks, (_count(tile, rows, columns),), options(tile)


@lru_cache(maxsize=4096)
def linear_weight(
    math: str, rows: int, inputs: int, outputs: int, on: Device, aligned: bool, splits: int | None
) -> tuple[dict[str, int], tuple[int, int], int, dict[str, int]]:
    """Blocks, grid, rows of a split and compiler options of the weight's gradient."""
    tile = _tile("weight", math, outputs, inputs, rows, on, aligned)
    tiles = _count(tile, outputs, inputs)
    wanted = max(1, min(MOST_SPLITS, on.multiprocessors // tiles)) if splits is None else splits
    each = -(-rows // (wanted * tile.depth)) * tile.depth
    blocks = {"BLOCK_O": tile.rows, "BLOCK_I": tile.columns, "BLOCK_K": tile.depth, "GROUP": GROUP}
    return blocks, (tiles, -(-rows // each)), each, options(tile)


@lru_cache(maxsize=4096)
def linear_tied(
    math: str, rows: int, inputs: int, outputs: int, on: Device, aligned: bool
) -> tuple[dict[str, int], tuple[int], dict[str, int]]:
    """Blocks, grid and compiler options of forward and reverse in one kernel."""
    tile = _tile("tied", math, rows, outputs, inputs, on, aligned)
    blocks = {"BLOCK_R": tile.rows, "BLOCK_I": tile.depth, "BLOCK_O": tile.columns}
    return blocks, (-(-rows // tile.rows),), options(tile)


def _tile(kernel: str, math: str, rows: int, columns: int, depth: int, on: Device, aligned: bool) -> Tile:
    """The largest tile that gives every multiprocessor one, else the smallest; no larger than what there is to do."""
    tiles = linear_tiles(on.architecture, aligned)[kernel][math]
    own = next((t for t in tiles if _count(t, rows, columns) >= on.multiprocessors), tiles[-1])
    shape = f"{'aligned' if aligned else 'ragged'} {'large' if own == tiles[0] else 'small'}"
    tile = _chosen(f"linear {kernel}/{math}/{shape}", own, on)
    r, c, d = (max(16, min(most, _power_of_two(n))) for most, n in zip(tile[:3], (rows, columns, depth), strict=True))
    return tile._replace(rows=r, columns=c, depth=d)


def _count(tile: Tile, rows: int, columns: int) -> int:
    return -(-rows // tile.rows) * -(-columns // tile.columns)


def options(tile: Tile) -> dict[str, int]:
    """Compiler options of a tile."""
    return {"num_warps": tile.warps, "num_stages": tile.stages}
