"""Launches the Triton kernels of the pointwise family: what a chain asks of a backend, on a GPU.

Every function has the arguments and the results of its namesake in `racecar_kernels/pointwise.py`, which says what it
computes. `why_not` names what is not served; a function given such tensors computes with plain PyTorch instead.
"""

from __future__ import annotations

from functools import lru_cache
from math import prod
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from .. import pointwise_ref as ref
from ..lazy import BatchNorm, Gradient, Lazy, Window
from ..pointwise import Family, convolved_ref, grad_weight_ref, numbered
from . import configs, device, norm_kernels
from . import pointwise_kernels as kernels
from .tuning import launcher

MOST_TAPS = 64  # of a pooling window: they are unrolled
MOST_WINDOWS = 2**31 - 2**16  # they are numbered with 32 bits
MOST_BLOCKS = 65535  # of channels: CUDA's limit of a grid's second dimension


class Grid(NamedTuple):
    """A tensor as windows and channels: the kernels' sizes and strides, and the tile that a program works on."""

    windows: int
    h: int
    w: int
    full: tuple[int, int, int, int]  # strides of batch, rows, columns and channels
    small: tuple[int, int, int, int]
    channels: int
    constants: dict[str, Any]
    blocks: dict[str, int]
    programs: tuple[int, int]
    options: dict[str, int]


def why_not(*operands: Lazy | Tensor | None, window: Window = None) -> str | None:
    """None where the Triton kernels serve these operands together, else a sentence that says why not."""
    tensors = [o.x if isinstance(o, Lazy) else o for o in operands if o is not None]
    first = tensors[0]
    reason = device.why_not_tensors(tensors)
    if reason is not None:
        return reason
    if first.dim() < 2:
        return "tensors need a channel dimension"
    if window is not None and (first.dim() != 4 or window[0] * window[1] > MOST_TAPS):
        return (
            f"pooling is served for (N, C, H, W) and up to {MOST_TAPS} values a window, got {window} of {first.dim()}"
        )
    if first.numel() // max(1, first.shape[1]) > MOST_WINDOWS:
        return f"up to {MOST_WINDOWS} values a channel are served, got {first.numel() // max(1, first.shape[1])}"
    if not all(t.is_contiguous() for t in tensors) and not all(map(ref.is_channels_last, tensors)):
        return "the tensors are neither all contiguous nor all channels_last"
    apart = first.is_contiguous() and prod(first.shape[2:]) > 1  # the channels, so that each is a block of its own
    most = MOST_BLOCKS * (1 if apart else configs.MOST_CHANNELS)
    if first.shape[1] > most:
        return f"up to {most} channels are served in this layout, got {first.shape[1]}"
    for lazy in operands:
        if isinstance(lazy, Lazy) and numbered(lazy.act, lazy.args) is None:
            return f"not served: {lazy.act}{lazy.args or ''} is not computed from its output"
    return None


@launcher
def channel_sum(g: Tensor) -> Tensor:
    if not _served(g):
        return ref.channel_sum_ref(g)
    grid = make_grid(g, None, not g.is_contiguous())
    partials = _sums(g, grid, squares=False)
    total = g.new_empty(grid.channels, dtype=torch.float32)
    _finish(partials, total, None)
    return total


@launcher
def batch_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> BatchNorm:
    if not _served(x) or any(t is not None and t.dtype == torch.float64 for t in (weight, bias)):
        return ref.batch_norm_ref(x, weight, bias, eps)
    grid = make_grid(x, None, not x.is_contiguous())
    partials = _sums(x, grid, squares=True)
    return finish_norm(partials, None, grid.windows, grid.blocks["BLOCK_Q"], weight, bias, eps)


def batch_norm_backward_(g: Tensor, x: Tensor, norm: BatchNorm, total: Tensor, with_x: Tensor) -> Tensor:
    per = norm.scale / -(x.numel() / max(1, x.shape[1]))
    return norm_input_grad_(g, x, norm.mean, norm.scale, with_x * norm.rstd.square() * per, total * per)


@launcher
def norm_input_grad_(g: Tensor, x: Tensor, mean: Tensor, k0: Tensor, k1: Tensor, k2: Tensor) -> Tensor:
    if not _served(g, x):
        return ref.norm_input_grad_ref_(g, x, mean, k0, k1, k2)
    grid = make_grid(g, None, not (g.is_contiguous() and x.is_contiguous()))
    kernels.combine_kernel[grid.programs](
        g, x, mean, k0, k1, k2, g, grid.windows, grid.h, grid.w, *grid.full, grid.channels,
        FLAT=grid.constants["FLAT"], **grid.blocks, **grid.options,
    )  # fmt: skip
    return g


@launcher
def materialise(
    lazy: Lazy,
    window: Window = None,
    *,
    full: bool = True,
    pooled: bool = False,
    in_place: bool = False,
    minus: Tensor | None = None,
) -> tuple[Tensor | None, Tensor | None]:
    ref.check_wanted(window, full, pooled, in_place)
    nothing = lazy.as_it_is and minus is None
    if nothing and not pooled:
        return lazy.x, None
    if not _served(lazy, window=window):
        return ref.materialise_ref(lazy, window, full=full, pooled=pooled, in_place=in_place, minus=minus)
    grid = make_grid(lazy.x, window, not lazy.x.is_contiguous())
    whole = None
    if full and not nothing:
        whole = lazy.x if in_place else torch.empty_like(lazy.x)
    small = _empty_pooled(lazy.x, grid, window) if pooled else None
    x, scale, shift, _, p, known = _handed(lazy)
    kernels.materialise_kernel[grid.programs](
        x, scale, shift, *p, _wide(minus), whole, small, *_sizes(grid), **known, **grid.constants, **grid.blocks,
        **grid.options,
    )  # fmt: skip
    return lazy.x if full and nothing else whole, small


@launcher
def sum_of_squares(d: Lazy, a: Lazy, window: Window = None) -> Tensor:
    if not _served(d, a, window=window):
        return ref.sum_of_squares_ref(d, a, window)
    return _compare(d, a, window, None, None)


@launcher
def compare(d: Lazy, a: Lazy, window: Window = None, *, minus: Tensor | None = None) -> tuple[Tensor, Tensor]:
    if not _served(d, a, window=window):
        return ref.compare_ref(d, a, window, minus=minus)
    source = torch.empty_like(a.x)
    return _compare(d, a, window, minus, source), source


@launcher
def grad_reverse(
    d: Lazy,
    a: Lazy,
    window: Window,
    c2: Tensor | None,
    g_in: Tensor | None,
    *,
    in_place: bool = False,
    sums: bool = False,
    loss: bool = False,
) -> Gradient:
    ref.check_in_place(in_place, g_in, "g_in")
    if not _served(d, a, g_in, window=window):
        return ref.grad_reverse_ref(d, a, window, c2, g_in, in_place=in_place, sums=sums, loss=loss)
    ref.check_sizes(d, window, a=a.x, g_in=g_in)
    if loss and c2 is None:
        raise ValueError("the sum of squares needs c2, with which the residual is looked at; got c2 = None")
    grid = make_grid(d.x, window, not _all_contiguous(d.x, a.x, g_in))
    out = g_in if in_place and g_in is not None else torch.empty_like(a.x)
    affine = a.shift is not None
    partials = _partials(grid, d.x) if sums or affine else None
    squares = d.x.new_empty(grid.programs, dtype=torch.float32) if loss else None
    d_x, d_scale, d_shift, _, d_p, d_known = _handed(d, "D_")
    a_x, a_scale, a_shift, a_mean, a_p, a_known = _handed(a, "A_")
    kernels.grad_reverse_kernel[grid.programs](
        d_x, d_scale, d_shift, *d_p, a_x, a_scale, a_shift, a_mean, *a_p, c2, g_in, out, partials, squares,
        *_sizes(grid), **d_known, **a_known, **grid.constants, **grid.blocks, **grid.options,
    )  # fmt: skip
    return _gradient(out, partials, affine, squares)


@launcher
def grad_forward(
    d: Lazy,
    a: Lazy | None,
    window: Window,
    c2: Tensor | None,
    g_pooled: Tensor | None,
    g_full: Tensor | None,
    *,
    in_place: bool = False,
    sums: bool = False,
) -> Gradient:
    ref.check_in_place(in_place, g_full, "g_full")
    if not _served(d, a, g_pooled, g_full, window=window):
        return ref.grad_forward_ref(d, a, window, c2, g_pooled, g_full, in_place=in_place, sums=sums)
    ref.check_sizes(d, window, a=None if a is None else a.x, g_pooled=g_pooled)
    ref.check_sizes(d, None, g_full=g_full)
    if c2 is not None and a is None:
        raise ValueError("c2 needs a, from which the residual is taken; got a = None")
    grid = make_grid(d.x, window, not _all_contiguous(d.x, None if a is None else a.x, g_pooled, g_full))
    out = g_full if in_place and g_full is not None else torch.empty_like(d.x)
    affine = d.shift is not None
    partials = _partials(grid, d.x) if sums or affine else None
    d_x, d_scale, d_shift, d_mean, d_p, d_known = _handed(d, "D_")
    a_x, a_scale, a_shift, _, a_p, a_known = _handed(d if a is None else a, "A_")
    kernels.grad_forward_kernel[grid.programs](
        d_x, d_scale, d_shift, d_mean, *d_p, a_x, a_scale, a_shift, *a_p, c2, g_pooled, g_full, out, partials,
        *_sizes(grid), **d_known, **a_known, **grid.constants, **grid.blocks, **grid.options,
    )  # fmt: skip
    return _gradient(out, partials, affine, None)


KERNELS = Family(
    channel_sum,
    batch_norm,
    batch_norm_backward_,
    norm_input_grad_,
    materialise,
    sum_of_squares,
    compare,
    grad_reverse,
    grad_forward,
    grad_weight_ref,
    convolved_ref,
)


# ------------------------------------------------------------------------------------------- tensors as the kernels see


def make_grid(x: Tensor, window: Window, last: bool) -> Grid:
    """Sizes, strides and tiles for x at full size. last: in the order of channels_last, else contiguous."""
    kh, kw = window or (1, 1)
    n, channels = x.shape[0], x.shape[1]
    one = kh * kw == 1
    height, width = (x.shape[2], x.shape[3]) if not one else (1, x.numel() // max(1, n * channels))
    if one and (last or width == 1):  # pixels one after the other, whatever image they are in
        n, width = n * width, 1
    if kh > height or kw > width:
        raise ValueError(f"a pooling window of {kh} x {kw} does not fit an image of {height} x {width}")
    h, w = height // kh, width // kw
    constants = {"KH": kh, "KW": kw, "RAGGED_H": height - h * kh, "RAGGED_W": width - w * kw, "FLAT": h * w == 1}
    count = n * h * w
    kind = "single" if x.dtype == torch.float32 else "half"
    blocks, programs, options = configs.pointwise(count, channels, last or width == 1, kh * kw, device.of(x), kind)
    return Grid(
        count,
        h,
        w,
        _strides(height, width, channels, last),
        _strides(h, w, channels, last),
        channels,
        constants,
        blocks,
        programs,
        options,
    )


def _strides(height: int, width: int, channels: int, last: bool) -> tuple[int, int, int, int]:
    if last:
        return height * width * channels, width * channels, channels, 1
    return channels * height * width, width, 1, height * width


def _sizes(grid: Grid) -> tuple[int, ...]:
    return (grid.windows, grid.h, grid.w, *grid.full, *grid.small, grid.channels)


def _empty_pooled(x: Tensor, grid: Grid, window: Window) -> Tensor:
    if window is None:
        raise ValueError("pooled=True needs the window (kh, kw), got None")
    shape = (x.shape[0], x.shape[1], grid.h, grid.w) if window != (1, 1) else tuple(x.shape)
    last = ref.is_channels_last(x) and not x.is_contiguous()
    return x.new_empty(shape).to(memory_format=torch.channels_last) if last else x.new_empty(shape)


def _handed(lazy: Lazy, prefix: str = "") -> tuple[Any, ...]:
    """Pointers, parameters and constants as the kernels take them."""
    number, p = _activation(lazy.act, lazy.args, lazy.x.dtype)
    known = {f"{prefix}ACT": number, f"{prefix}DONE": lazy.done}
    return lazy.x, _wide(lazy.scale), _wide(lazy.shift), _wide(lazy.mean), p, known


@lru_cache(maxsize=1024)
def _activation(act: str, args: tuple[Any, ...], dtype: torch.dtype) -> tuple[int, tuple[float, ...]]:
    number, p = numbered(act, args) or (0, (0.0, 0.0, 0.0))
    if act in ("relu", "relu6", "hardtanh"):  # bounds as results are stored, which the derivative compares with them
        p = tuple(float(torch.tensor(bound, dtype=dtype)) for bound in p)
    return number, p


def _wide(t: Tensor | None) -> Tensor | None:
    return None if t is None else t.detach().float().contiguous()


def _partials(grid: Grid, like: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    return like.new_empty(grid.programs[0], 2, grid.channels, dtype=dtype)


def _sums(x: Tensor, grid: Grid, *, squares: bool) -> Tensor:
    partials = _partials(grid, x, torch.float64 if squares else torch.float32)  # means are subtracted from each other
    kernels.sums_kernel[grid.programs](
        x, partials, grid.windows, grid.h, grid.w, *grid.full, grid.channels, SQUARES=squares,
        FLAT=grid.constants["FLAT"], **grid.blocks, **grid.options,
    )  # fmt: skip
    return partials


def _finish(partials: Tensor, first: Tensor | None, second: Tensor | None) -> None:
    programs, _, channels = partials.shape
    blocks = configs.finishing(channels)
    grid = (triton.cdiv(channels, blocks["BLOCK_C"]),)
    kernels.finish_sums_kernel[grid](partials, first, second, programs, channels, **blocks)


def finish_norm(
    partials: Tensor,
    rows: Tensor | None,
    count: int,
    block: int,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
) -> BatchNorm:
    """A batch norm of `count` values a channel, from parts (programs, 2, C): see `norm_kernels.py`.

    rows: how many values each part is of; None where they are those of `sums_kernel`'s tiles of `block` rows.
    """
    blocks = configs.finishing(partials.shape[2])
    while rows is not None and partials.shape[0] > configs.MOST_PARTS:
        partials, rows = _combined(partials, rows, {**blocks, "BLOCK_P": configs.MOST_PARTS})
    programs, _, channels = partials.shape
    found = partials.new_empty(4, channels, dtype=torch.float32).unbind()
    flat = [None if t is None else t.detach().reshape(-1).contiguous() for t in (weight, bias)]
    norm_kernels.finish_norm_kernel[(triton.cdiv(channels, blocks["BLOCK_C"]),)](
        partials, rows, *flat, *found, programs, count, eps, channels, ROWS=block, **blocks
    )
    return BatchNorm(*found)


def _combined(partials: Tensor, rows: Tensor, blocks: dict[str, int]) -> tuple[Tensor, Tensor]:
    """Fewer parts, which stand for the same values."""
    programs, _, channels = partials.shape
    fewer = triton.cdiv(programs, blocks["BLOCK_P"])
    out, out_rows = partials.new_empty(fewer, 2, channels), rows.new_empty(fewer)
    norm_kernels.combine_parts_kernel[(fewer, triton.cdiv(channels, blocks["BLOCK_C"]))](
        partials, rows, out, out_rows, programs, channels, **blocks
    )
    return out, out_rows


def _compare(d: Lazy, a: Lazy, window: Window, minus: Tensor | None, source: Tensor | None) -> Tensor:
    ref.check_sizes(d, window, a=a.x)
    grid = make_grid(d.x, window, not _all_contiguous(d.x, a.x))
    partials = d.x.new_empty(grid.programs, dtype=torch.float32)
    d_x, d_scale, d_shift, _, d_p, d_known = _handed(d, "D_")
    a_x, a_scale, a_shift, _, a_p, a_known = _handed(a, "A_")
    kernels.compare_kernel[grid.programs](
        d_x, d_scale, d_shift, *d_p, a_x, a_scale, a_shift, *a_p, _wide(minus), source, partials, *_sizes(grid),
        **d_known, **a_known, **grid.constants, **grid.blocks, **grid.options,
    )  # fmt: skip
    return partials.sum()


def _gradient(out: Tensor, partials: Tensor | None, affine: bool, squares: Tensor | None) -> Gradient:
    loss = None if squares is None else squares.sum()
    if partials is None:
        return Gradient(out, loss=loss)
    sums = partials.new_empty(2, partials.shape[2]).unbind()
    _finish(partials, sums[0], sums[1] if affine else None)
    return Gradient(out, sums[0], sums[1] if affine else None, loss)


def _all_contiguous(*tensors: Tensor | None) -> bool:
    return all(t is None or t.is_contiguous() for t in tensors)


def _served(*operands: Lazy | Tensor | None, window: Window = None) -> bool:
    return why_not(*operands, window=window) is None and all(
        o is None or (o.x if isinstance(o, Lazy) else o).numel() > 0 for o in operands
    )
