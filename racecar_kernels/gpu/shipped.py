"""What is compiled ahead of time (`make kernels`): every tile of every kernel that a launcher can choose.

Tiles are whole. Where there is less to do than a tile holds, launchers choose a part of it, which needs no more
registers and no more shared memory; `tests/test_triton_launch.py` compares what they choose with this list.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

from . import configs, norm_kernels
from . import pointwise_kernels as pointwise
from . import sums as of_programs
from .device import Device


class Shipped(NamedTuple):
    """One specialisation of a kernel, as Triton's compiler takes it.

    Attributes:
        signature: argument name to type ("*bf16", "i32", "fp32"); what is missing is a constant.
        constants: argument name to value; missing: None.
        aligned: arguments whose value, or address, is divisible by 16.
        matrix: whether it has to use the matrix units.
    """

    name: str
    kernel: Any
    signature: dict[str, str]
    constants: dict[str, Any]
    options: dict[str, int]
    aligned: tuple[str, ...]
    matrix: bool = False


_SIZES = ["count", "h", "w", "f_n", "f_y", "f_x", "f_c", "s_n", "s_y", "s_x", "s_c", "C"]
_PARAMETERS = [who + p for who in ("", "d_", "a_") for p in ("p0", "p1", "p2")]
_FULL = ["x", "d", "a", "g_in", "g_pooled", "g_full", "out", "pooled", "source"]
_NORM = dict.fromkeys([who + n for who in ("", "d_", "a_") for n in ("scale", "shift", "mean")], "fp32")


def everything(architecture: int) -> Iterator[Shipped]:
    """All entries for sm_<architecture>."""
    from . import linear, transposed_shipped  # they take `Shipped` from here

    yield from of_pointwise(Device(f"sm_{architecture}", 132))
    yield from transposed_shipped.shipped(f"sm_{architecture}")
    yield from linear.shipped(f"sm_{architecture}")


def of_pointwise(on: Device) -> Iterator[Shipped]:
    """Every tile of the table, each with the arguments that take most registers; a cheaper case of the usual one."""
    for dtype, kind in (("fp32", "single"), ("bf16", "half")):
        for channels, last, window in (
            (256, True, (1, 1)), (256, True, (2, 2)), (64, True, (2, 2)), (3, True, (1, 1)), (64, False, (2, 2)),
            (64, False, (1, 1)),
        ):  # fmt: skip
            blocks, _, options = configs.pointwise(1 << 20, channels, last, window[0] * window[1], on, kind)
            layout = "channels_last" if last else "contiguous"
            grid = (f"{dtype} C={channels} {layout} {window[0]}x{window[1]}", channels, last)
            yield from _with_window(grid, dtype, window, blocks, options, cheap=channels == 64 and last)
            if window == (1, 1):
                yield from _per_channel(grid, dtype, blocks, options)
    yield from _finishing()


def _entry(
    grid: tuple[str, int, bool],
    kernel: Any,
    pointers: dict[str, str],
    constants: dict[str, Any],
    options: dict[str, int],
) -> Shipped:
    name, channels, last = grid
    ones = {"f_c": 1, "s_c": 1} if last else {"f_x": 1, "s_x": 1}  # an argument that is 1 is a constant to Triton
    named = set(kernel.arg_names)
    signature = {n: "i32" for n in _SIZES if n in named and n not in ones}
    signature |= {n: "fp32" for n in _PARAMETERS if n in named}
    signature |= {n: f"*{kind}" for n, kind in pointers.items() if n in named}
    strides = [n for n in _SIZES[3:] if n in signature] if channels % 16 == 0 else []
    constants = {n: v for n, v in {**ones, **constants}.items() if n in named}
    return Shipped(name, kernel, signature, constants, options, (*(n for n in pointers if n in named), *strides))


def _with_window(
    grid: tuple[str, int, bool],
    dtype: str,
    window: tuple[int, int],
    blocks: dict[str, int],
    options: dict[str, int],
    *,
    cheap: bool,
) -> Iterator[Shipped]:
    kh, kw = window
    shape = {"KH": kh, "KW": kw, "FLAT": window == (1, 1) and grid[2], **blocks}
    given = {**dict.fromkeys(_FULL, dtype), **dict.fromkeys(["c2", "minus", "partials"], "fp32")}
    for name, act, affine, rest in (("norm, elu, a rest", 3, True, 1), ("relu", 1, False, 0))[: 2 if cheap else 1]:
        constants = {**shape, "RAGGED_H": int(rest and kh > 1), "RAGGED_W": int(rest and kw > 1)}
        constants |= dict.fromkeys(["ACT", "D_ACT", "A_ACT"], act) | dict.fromkeys(["DONE", "D_DONE", "A_DONE"], False)
        pointers = {**given, **_NORM, "squares_out": "fp32"} if affine else given
        for kernel in (
            pointwise.compare_kernel,
            pointwise.grad_reverse_kernel,
            pointwise.grad_forward_kernel,
            pointwise.materialise_kernel,
        ):
            yield _entry((f"{grid[0]} {name}", *grid[1:]), kernel, pointers, constants, options)


def _per_channel(
    grid: tuple[str, int, bool], dtype: str, blocks: dict[str, int], options: dict[str, int]
) -> Iterator[Shipped]:
    shape = {"FLAT": grid[2], **blocks}
    for squares in (True, False):
        pointers = {"x": dtype, "partials": "fp64" if squares else "fp32"}
        yield _entry(grid, pointwise.sums_kernel, pointers, {**shape, "SQUARES": squares}, options)
    pointers = {"g": dtype, "x": dtype, "out": dtype, **dict.fromkeys(["mean", "k0", "k1", "k2"], "fp32")}
    yield _entry(grid, pointwise.combine_kernel, pointers, shape, options)


def _finishing() -> Iterator[Shipped]:
    for programs, out in ((4, "*bf16"), (64, "*fp32")):
        types = {"partials": "*fp32", "out": out, "programs": "i32", "count": "i32"}
        kernel, constants = of_programs.sum_partials_kernel, {"SIGN": 1, **configs.summing(programs)}
        yield Shipped(f"{programs} programs", kernel, types, constants, {"num_warps": 4}, ("partials", "out"))
    for channels in (3, 512):
        grid, blocks = (f"C={channels}", channels, True), configs.finishing(channels)
        sums = dict.fromkeys(["partials", "first", "second"], "fp32")
        entry = _entry(grid, pointwise.finish_sums_kernel, sums, blocks, {"num_warps": 4})
        yield entry._replace(signature={**entry.signature, "programs": "i32"})
        norm = dict.fromkeys(["weight", "bias", "mean", "rstd", "scale", "shift"], "fp32") | {"partials": "fp64"}
        for name, more in (("", {}), (" parts with rows", {"rows": "i32"})):
            where = (grid[0] + name, *grid[1:])
            constants = {**blocks, "ROWS": 32}
            entry = _entry(where, norm_kernels.finish_norm_kernel, norm | more, constants, {"num_warps": 4})
            yield entry._replace(signature={**entry.signature, "programs": "i32", "eps": "fp32"})
        parts = {"partials": "fp64", "out": "fp64", "rows": "i32", "out_rows": "i32"}
        constants = {**blocks, "BLOCK_P": configs.MOST_PARTS}
        entry = _entry(grid, norm_kernels.combine_parts_kernel, parts, constants, {"num_warps": 4})
        yield entry._replace(signature={**entry.signature, "programs": "i32"})
