"""Kernels that combine what programs have found of a batch's statistics. `pointwise.py` launches them.

A part is of some of a channel's values: partials[part, 0, c] is their mean, [part, 1, c] = Σ (x - mean)², in float64.
Where a part's number of rows is stored beside it, the squares are about the mean as float32 has it instead (see
`origin_of`), so near that moving them to the mean cancels no digits: whoever writes a part needs fewer registers.

Parts are combined by Chan, Golub and LeVeque (1979): Σ (x - mean)² of all is that of each, about its own mean, and its
number of rows times (its mean - mean)². In float64, in a fixed order. No atomics.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def rows_of_program(pid, programs, count, BLOCK_Q: tl.constexpr):
    """How many of the `count` rows its tiles pid, pid + programs, ... have; the last of all tiles may be cut."""
    tiles = tl.cdiv(count, BLOCK_Q)
    cut = tl.where((tiles - 1) % programs == pid, tiles * BLOCK_Q - count, 0)
    return tl.cdiv(tiles - pid, programs) * BLOCK_Q - cut


@triton.jit
def origin_of(mean):
    """What the squares of a part are summed about: the mean as float32 has it, and 0 where it is infinite or NaN."""
    origin = mean.to(tl.float32)
    return tl.where(tl.abs(origin) < float("inf"), origin, 0.0)


@triton.jit
def part_of_tile(x, m, rows):
    """(mean, Σ (x - origin)²) of the `rows` values that every column of a tile has where m, summed in float64."""
    mean = tl.sum(tl.where(m, x, 0.0).to(tl.float64), 0) / tl.maximum(rows, 1)
    off = tl.where(m, x - origin_of(mean)[None, :], 0.0)
    return mean, tl.sum((off * off).to(tl.float64), 0)


@triton.jit
def read_part(
    partials, rows, start, o_c, m_c, programs, count, C, ROWS: tl.constexpr, BLOCK_P: tl.constexpr
):  # fmt: skip
    """Of parts start, start + 1, ...: mean, Σ (x - mean)² and number of rows, 0 beyond the last."""
    o_p = start + tl.arange(0, BLOCK_P)[:, None]
    m = (o_p < programs) & m_c[None, :]
    p_part = partials + o_p.to(tl.int64) * 2 * C + o_c[None, :]
    mean = tl.load(p_part, mask=m, other=0.0).to(tl.float64)
    squares = tl.load(p_part + C, mask=m, other=0.0).to(tl.float64)
    if rows is not None:
        b_rows = tl.load(rows + o_p, mask=o_p < programs, other=0).to(tl.float64)
        moved = mean - origin_of(mean)
        squares -= b_rows * moved * moved
    else:
        b_rows = tl.where(o_p < programs, rows_of_program(o_p, programs, count, ROWS), 0).to(tl.float64)
    return mean, squares, b_rows


@triton.jit
def combine_parts_kernel(
    partials, rows, out, out_rows, programs, C, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr
):  # fmt: skip
    """One part, and its number of rows, of every BLOCK_P: where there are too many for `finish_norm_kernel` alone."""
    pid = tl.program_id(0)
    o_c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    m_c = o_c < C
    own, about_own, b_rows = read_part(partials, rows, pid * BLOCK_P, o_c, m_c, programs, 0, C, 1, BLOCK_P)
    count = tl.sum(b_rows, 0)
    b_mean = tl.sum(b_rows * own, 0) / tl.maximum(count, 1.0)
    off = own - origin_of(b_mean)[None, :]
    p_out = out + pid.to(tl.int64) * 2 * C + o_c
    tl.store(p_out, b_mean, mask=m_c)
    tl.store(p_out + C, tl.sum(about_own + b_rows * off * off, 0), mask=m_c)
    tl.store(out_rows + pid + o_c, count.to(tl.int32), mask=o_c == 0)


@triton.jit
def finish_norm_kernel(
    partials, rows, weight, bias, mean, rstd, scale, shift, programs, count, eps, C,
    ROWS: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """A batch's mean and 1/deviation, and the affine that the norm is.

    rows: how many rows each part has; None where they are those that `sums_kernel` found in tiles of ROWS.
    """
    o_c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    m_c = o_c < C
    total = tl.zeros((BLOCK_P, BLOCK_C), tl.float64)
    for start in range(0, programs, BLOCK_P):
        own, _, b_rows = read_part(partials, rows, start, o_c, m_c, programs, count, C, ROWS, BLOCK_P)
        total += b_rows * own
    b_mean = tl.sum(total, 0) / count
    squares = tl.zeros((BLOCK_P, BLOCK_C), tl.float64)
    for start in range(0, programs, BLOCK_P):
        own, about_own, b_rows = read_part(partials, rows, start, o_c, m_c, programs, count, C, ROWS, BLOCK_P)
        off = own - b_mean[None, :]
        squares += about_own + b_rows * off * off
    var = tl.sum(squares, 0) / count
    var = tl.where(var < 0, 0.0, var)  # NaN stays
    b_rstd = 1.0 / tl.sqrt(var + eps)
    b_scale = b_rstd
    if weight is not None:
        b_scale = b_rstd * tl.load(weight + o_c, mask=m_c, other=0.0).to(tl.float64)
    b_shift = -b_mean * b_scale
    if bias is not None:
        b_shift += tl.load(bias + o_c, mask=m_c, other=0.0).to(tl.float64)
    tl.store(mean + o_c, b_mean.to(tl.float32), mask=m_c)
    tl.store(rstd + o_c, b_rstd.to(tl.float32), mask=m_c)
    tl.store(scale + o_c, b_scale.to(tl.float32), mask=m_c)
    tl.store(shift + o_c, b_shift.to(tl.float32), mask=m_c)
