"""Kernels of the pointwise family. `racecar_kernels/pointwise.py` says what they compute, `pointwise.py` launches them.

A program works on tiles of BLOCK_Q windows × BLOCK_C channels; without pooling a window is one pixel. Windows are
numbered q = (n · h + y) · w + x over the pooled size. Program (i, j) takes the tiles i, i + programs, and so on, of
channel block j, so that what it sums is fixed by the shape: partial sums are written per program, and finished in a
fixed order by a second, small kernel. No atomics.

Tensors come as pointer and strides (n, y, x, c), full (f_) and pooled (s_) size; a window's taps are unrolled. Where
the windows leave a rest (RAGGED_H rows, RAGGED_W columns), it belongs to the last window. All is computed in float32;
offsets of images are 64 bits wide.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .activations import activate, differentiate
from .norm_kernels import rows_of_program


@triton.jit
def window_place(q, h, w, FLAT: tl.constexpr):
    """(n, y, x) of window number q. FLAT: one window per image."""
    if FLAT:
        n, y, x = q, q * 0, q * 0
    else:
        rest = q // w
        x = q - rest * w
        n = rest // h
        y = rest - n * h
    return n.to(tl.int64), y.to(tl.int64), x.to(tl.int64)


@triton.jit
def read_value(p_x, m, b_scale, b_shift, p0, p1, p2, ACT: tl.constexpr, DONE: tl.constexpr):
    """act(x · scale + shift), rounded to the type of x; in float32. b_scale and b_shift are None or (1, BLOCK_C)."""
    b_x = tl.load(p_x, mask=m, other=0.0)
    u = b_x.to(tl.float32)
    if not DONE:
        if b_shift is not None:
            if b_scale is not None:
                u = u * b_scale + b_shift
            else:
                u = u + b_shift
        u = activate(u, p0, p1, p2, ACT)
        u = u.to(b_x.dtype).to(tl.float32)
    return u


@triton.jit
def read_channels(p, o_c, m_c):
    """One value per channel as (1, BLOCK_C). Not of None: Triton 3.6 takes no None as a function's result."""
    return tl.load(p + o_c, mask=m_c, other=0.0).to(tl.float32)[None, :]


@triton.jit
def tap(n, y, x, i: tl.constexpr, j: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr, h, w, f_n, f_y, f_x):
    """Offset of tap (i, j) of every window, and whether it has one: those of the rest only the last window has."""
    o = n * f_n + (y * KH + i) * f_y + (x * KW + j) * f_x
    m = x >= 0
    if i >= KH:
        m = m & (y == h - 1)
    if j >= KW:
        m = m & (x == w - 1)
    return o, m


@triton.jit
def read_tile(x, block, count, h, w, f_n, f_y, f_x, f_c, o_c, m_c, FLAT: tl.constexpr, BLOCK_Q: tl.constexpr):
    """Tile number `block` of x without pooling, in float32, 0 where it has no value; and where it has one."""
    q = block * BLOCK_Q + tl.arange(0, BLOCK_Q)
    n, y, at = window_place(q, h, w, FLAT)
    m = (q < count)[:, None] & m_c[None, :]
    o = (n * f_n + y * f_y + at * f_x)[:, None] + o_c[None, :].to(tl.int64) * f_c
    return tl.load(x + o, mask=m, other=0.0).to(tl.float32), m


@triton.jit
def sum_rows(b):
    """Σ over the rows of what a program has summed over its tiles: once, and in float64."""
    return tl.sum(b.to(tl.float64), 0)


@triton.jit
def sums_kernel(
    x, partials, count, h, w, f_n, f_y, f_x, f_c, C, SQUARES: tl.constexpr, FLAT: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """partials[program, 0, c] = Σ x; with SQUARES the mean of these x, and in [program, 1, c] Σ (x - mean)².

    The squares are summed about the first tile's mean and moved to the program's: near enough that no digits cancel.
    """
    pid, programs = tl.program_id(0), tl.num_programs(0)
    o_c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    m_c = o_c < C
    first, m = read_tile(x, pid, count, h, w, f_n, f_y, f_x, f_c, o_c, m_c, FLAT, BLOCK_Q)
    if SQUARES:
        origin = tl.sum(first, 0) / tl.minimum(count - pid * BLOCK_Q, BLOCK_Q)
        origin = tl.where(tl.abs(origin) < float("inf"), origin, 0.0)  # the mean is to be infinite then, not NaN
        first = tl.where(m, first - origin[None, :], 0.0)
        second = first * first
    for block in range(pid + programs, tl.cdiv(count, BLOCK_Q), programs):
        b_x, m = read_tile(x, block, count, h, w, f_n, f_y, f_x, f_c, o_c, m_c, FLAT, BLOCK_Q)
        if SQUARES:
            b_x = tl.where(m, b_x - origin[None, :], 0.0)
            second += b_x * b_x
        first += b_x
    p_out = partials + pid * 2 * C + o_c
    total = sum_rows(first)
    if SQUARES:
        off = total / rows_of_program(pid, programs, count, BLOCK_Q)
        tl.store(p_out + C, sum_rows(second) - total * off, mask=m_c)
        total = origin + off
    tl.store(p_out, total, mask=m_c)


@triton.jit
def materialise_kernel(
    x, scale, shift, p0, p1, p2, minus, out, pooled, count, h, w, f_n, f_y, f_x, f_c, s_n, s_y, s_x, s_c, C,
    ACT: tl.constexpr, DONE: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr, RAGGED_H: tl.constexpr,
    RAGGED_W: tl.constexpr, FLAT: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """out = value - minus[c] at full size, pooled = the largest value of every window; each None if unwanted."""
    pid, programs = tl.program_id(0), tl.num_programs(0)
    o_c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    m_c = o_c < C
    b_scale = read_channels(scale, o_c, m_c) if scale is not None else None
    b_shift = read_channels(shift, o_c, m_c) if shift is not None else None
    b_minus = read_channels(minus, o_c, m_c) if minus is not None else None
    o_c = o_c[None, :].to(tl.int64)  # times a stride: a channel of a contiguous image may lie anywhere in it
    for block in range(pid, tl.cdiv(count, BLOCK_Q), programs):
        q = block * BLOCK_Q + tl.arange(0, BLOCK_Q)
        n, y, at = window_place(q, h, w, FLAT)
        m = (q < count)[:, None] & m_c[None, :]
        most = tl.full((BLOCK_Q, BLOCK_C), float("-inf"), tl.float32)
        for i in tl.static_range(KH + RAGGED_H):
            for j in tl.static_range(KW + RAGGED_W):
                o, m_tap = tap(n, y, at, i, j, KH, KW, h, w, f_n, f_y, f_x)
                o, m_tap = o[:, None] + o_c * f_c, m & m_tap[:, None]
                v = read_value(x + o, m_tap, b_scale, b_shift, p0, p1, p2, ACT, DONE)
                if pooled is not None and i < KH and j < KW:
                    most = tl.where((v > most) | (v != v), v, most)
                if out is not None:
                    less = v if b_minus is None else v - b_minus
                    tl.store(out + o, less.to(out.dtype.element_ty), mask=m_tap)
        if pooled is not None:
            o = (n * s_n + y * s_y + at * s_x)[:, None] + o_c * s_c
            tl.store(pooled + o, most.to(pooled.dtype.element_ty), mask=m)


@triton.jit
def compare_kernel(
    d, d_scale, d_shift, d_p0, d_p1, d_p2, a, a_scale, a_shift, a_p0, a_p1, a_p2, minus, source, partials,
    count, h, w, f_n, f_y, f_x, f_c, s_n, s_y, s_x, s_c, C,
    D_ACT: tl.constexpr, D_DONE: tl.constexpr, A_ACT: tl.constexpr, A_DONE: tl.constexpr,
    KH: tl.constexpr, KW: tl.constexpr, RAGGED_H: tl.constexpr, RAGGED_W: tl.constexpr, FLAT: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """partials[program] = Σ (d - undo(a))²; source = a - minus[c] where wanted."""
    pid, programs = tl.program_id(0), tl.num_programs(0)
    o_c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    m_c = o_c < C
    bd_scale = read_channels(d_scale, o_c, m_c) if d_scale is not None else None
    bd_shift = read_channels(d_shift, o_c, m_c) if d_shift is not None else None
    ba_scale = read_channels(a_scale, o_c, m_c) if a_scale is not None else None
    ba_shift = read_channels(a_shift, o_c, m_c) if a_shift is not None else None
    b_minus = read_channels(minus, o_c, m_c) if minus is not None else None
    o_c = o_c[None, :].to(tl.int64)
    squares = tl.zeros((BLOCK_Q, BLOCK_C), tl.float32)
    for block in range(pid, tl.cdiv(count, BLOCK_Q), programs):
        q = block * BLOCK_Q + tl.arange(0, BLOCK_Q)
        n, y, at = window_place(q, h, w, FLAT)
        m = (q < count)[:, None] & m_c[None, :]
        o_small = (n * s_n + y * s_y + at * s_x)[:, None] + o_c * s_c
        b_a = read_value(a + o_small, m, ba_scale, ba_shift, a_p0, a_p1, a_p2, A_ACT, A_DONE)
        for i in tl.static_range(KH + RAGGED_H):
            for j in tl.static_range(KW + RAGGED_W):
                o, m_tap = tap(n, y, at, i, j, KH, KW, h, w, f_n, f_y, f_x)
                o, m_tap = o[:, None] + o_c * f_c, m & m_tap[:, None]
                v = read_value(d + o, m_tap, bd_scale, bd_shift, d_p0, d_p1, d_p2, D_ACT, D_DONE)
                off = tl.where(m_tap, v - b_a, 0.0)
                squares += off * off
        if source is not None:
            less = b_a if b_minus is None else b_a - b_minus
            tl.store(source + o_small, less.to(source.dtype.element_ty), mask=m)
    tl.store(partials + pid * tl.num_programs(1) + tl.program_id(1), tl.sum(tl.sum(squares, 1).to(tl.float64)))


@triton.jit
def add_products(total, g, p_x, m, b_mean):
    """total + g · (x - mean); mean is None for 0, and g is 0 where not m."""
    off = tl.load(p_x, mask=m, other=0.0).to(tl.float32)
    if b_mean is not None:
        off = off - b_mean
    return total + g * off


@triton.jit
def grad_reverse_kernel(
    d, d_scale, d_shift, d_p0, d_p1, d_p2, a, a_scale, a_shift, a_mean, a_p0, a_p1, a_p2, c2, g_in, out, partials,
    squares_out, count, h, w, f_n, f_y, f_x, f_c, s_n, s_y, s_x, s_c, C,
    D_ACT: tl.constexpr, D_DONE: tl.constexpr, A_ACT: tl.constexpr, A_DONE: tl.constexpr,
    KH: tl.constexpr, KW: tl.constexpr, RAGGED_H: tl.constexpr, RAGGED_W: tl.constexpr, FLAT: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """out = act_a'(·) · (g_in + c2 · Σ_window (undo(a) - d)), its sums per channel, Σ (d - undo(a))²."""
    pid, programs = tl.program_id(0), tl.num_programs(0)
    o_c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    m_c = o_c < C
    bd_scale = read_channels(d_scale, o_c, m_c) if d_scale is not None else None
    bd_shift = read_channels(d_shift, o_c, m_c) if d_shift is not None else None
    ba_scale = read_channels(a_scale, o_c, m_c) if a_scale is not None else None
    ba_shift = read_channels(a_shift, o_c, m_c) if a_shift is not None else None
    b_mean = read_channels(a_mean, o_c, m_c) if a_mean is not None else None
    p_sums = None if partials is None else partials + pid * 2 * C + o_c
    o_c = o_c[None, :].to(tl.int64)
    b_c2 = 0.0 if c2 is None else tl.load(c2).to(tl.float32)
    first, second = tl.zeros((BLOCK_Q, BLOCK_C), tl.float32), tl.zeros((BLOCK_Q, BLOCK_C), tl.float32)
    squares = tl.zeros((BLOCK_Q, BLOCK_C), tl.float32)
    for block in range(pid, tl.cdiv(count, BLOCK_Q), programs):
        q = block * BLOCK_Q + tl.arange(0, BLOCK_Q)
        n, y, at = window_place(q, h, w, FLAT)
        m = (q < count)[:, None] & m_c[None, :]
        o_small = (n * s_n + y * s_y + at * s_x)[:, None] + o_c * s_c
        b_a = read_value(a + o_small, m, ba_scale, ba_shift, a_p0, a_p1, a_p2, A_ACT, A_DONE)
        g = tl.zeros((BLOCK_Q, BLOCK_C), tl.float32)
        if c2 is not None:
            for i in tl.static_range(KH + RAGGED_H):
                for j in tl.static_range(KW + RAGGED_W):
                    o, m_tap = tap(n, y, at, i, j, KH, KW, h, w, f_n, f_y, f_x)
                    o, m_tap = o[:, None] + o_c * f_c, m & m_tap[:, None]
                    v = read_value(d + o, m_tap, bd_scale, bd_shift, d_p0, d_p1, d_p2, D_ACT, D_DONE)
                    off = tl.where(m_tap, b_a - v, 0.0)
                    g += off
                    if squares_out is not None:
                        squares += off * off
            g = g * b_c2
        if g_in is not None:
            g += tl.load(g_in + o_small, mask=m, other=0.0).to(tl.float32)
        g = differentiate(g, b_a, a_p0, a_p1, a_p2, A_ACT).to(out.dtype.element_ty)
        tl.store(out + o_small, g, mask=m)
        if partials is not None:
            b_g = tl.where(m, g.to(tl.float32), 0.0)
            first += b_g
            if a_shift is not None:
                second = add_products(second, b_g, a + o_small, m, b_mean)
    if partials is not None:
        tl.store(p_sums, sum_rows(first), mask=m_c)
        tl.store(p_sums + C, sum_rows(second), mask=m_c)
    if squares_out is not None:
        tl.store(squares_out + pid * tl.num_programs(1) + tl.program_id(1), tl.sum(tl.sum(squares, 1).to(tl.float64)))


@triton.jit
def grad_forward_kernel(
    d, d_scale, d_shift, d_mean, d_p0, d_p1, d_p2, a, a_scale, a_shift, a_p0, a_p1, a_p2, c2, g_pooled, g_full, out,
    partials, count, h, w, f_n, f_y, f_x, f_c, s_n, s_y, s_x, s_c, C,
    D_ACT: tl.constexpr, D_DONE: tl.constexpr, A_ACT: tl.constexpr, A_DONE: tl.constexpr,
    KH: tl.constexpr, KW: tl.constexpr, RAGGED_H: tl.constexpr, RAGGED_W: tl.constexpr, FLAT: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """out = act_d'(·) · (unpool(g_pooled) + g_full + c2 · (d - undo(a))), and its sums per channel."""
    pid, programs = tl.program_id(0), tl.num_programs(0)
    o_c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    m_c = o_c < C
    bd_scale = read_channels(d_scale, o_c, m_c) if d_scale is not None else None
    bd_shift = read_channels(d_shift, o_c, m_c) if d_shift is not None else None
    ba_scale = read_channels(a_scale, o_c, m_c) if a_scale is not None else None
    ba_shift = read_channels(a_shift, o_c, m_c) if a_shift is not None else None
    b_mean = read_channels(d_mean, o_c, m_c) if d_mean is not None else None
    p_sums = None if partials is None else partials + pid * 2 * C + o_c
    o_c = o_c[None, :].to(tl.int64)
    b_c2 = 0.0 if c2 is None else tl.load(c2).to(tl.float32)
    first, second = tl.zeros((BLOCK_Q, BLOCK_C), tl.float32), tl.zeros((BLOCK_Q, BLOCK_C), tl.float32)
    for block in range(pid, tl.cdiv(count, BLOCK_Q), programs):
        q = block * BLOCK_Q + tl.arange(0, BLOCK_Q)
        n, y, at = window_place(q, h, w, FLAT)
        m = (q < count)[:, None] & m_c[None, :]
        o_small = (n * s_n + y * s_y + at * s_x)[:, None] + o_c * s_c
        place = tl.zeros((BLOCK_Q, BLOCK_C), tl.int32)
        b_pooled = tl.zeros((BLOCK_Q, BLOCK_C), tl.float32)
        b_a = tl.zeros((BLOCK_Q, BLOCK_C), tl.float32)
        if c2 is not None:
            b_a = read_value(a + o_small, m, ba_scale, ba_shift, a_p0, a_p1, a_p2, A_ACT, A_DONE)
        if g_pooled is not None:
            b_pooled = tl.load(g_pooled + o_small, mask=m, other=0.0).to(tl.float32)
            if KH * KW > 1:
                most = tl.full((BLOCK_Q, BLOCK_C), float("-inf"), tl.float32)
                for i in tl.static_range(KH):
                    for j in tl.static_range(KW):
                        o, m_tap = tap(n, y, at, i, j, KH, KW, h, w, f_n, f_y, f_x)
                        o = o[:, None] + o_c * f_c
                        v = read_value(d + o, m, bd_scale, bd_shift, d_p0, d_p1, d_p2, D_ACT, D_DONE)
                        larger = (v > most) | (v != v)
                        most = tl.where(larger, v, most)
                        place = tl.where(larger, i * KW + j, place)
        for i in tl.static_range(KH + RAGGED_H):
            for j in tl.static_range(KW + RAGGED_W):
                o, m_tap = tap(n, y, at, i, j, KH, KW, h, w, f_n, f_y, f_x)
                o, m_tap = o[:, None] + o_c * f_c, m & m_tap[:, None]
                v = read_value(d + o, m_tap, bd_scale, bd_shift, d_p0, d_p1, d_p2, D_ACT, D_DONE)
                g = tl.zeros((BLOCK_Q, BLOCK_C), tl.float32)
                if g_pooled is not None and i < KH and j < KW:
                    g = tl.where(place == i * KW + j, b_pooled, 0.0)
                if g_full is not None:
                    g += tl.load(g_full + o, mask=m_tap, other=0.0).to(tl.float32)
                if c2 is not None:
                    g += b_c2 * (v - b_a)
                g = differentiate(g, v, d_p0, d_p1, d_p2, D_ACT).to(out.dtype.element_ty)
                tl.store(out + o, g, mask=m_tap)
                if partials is not None:
                    b_g = tl.where(m_tap, g.to(tl.float32), 0.0)
                    first += b_g
                    if d_shift is not None:
                        second = add_products(second, b_g, d + o, m_tap, b_mean)
    if partials is not None:
        tl.store(p_sums, sum_rows(first), mask=m_c)
        tl.store(p_sums + C, sum_rows(second), mask=m_c)


@triton.jit
def combine_kernel(
    g, x, mean, k0, k1, k2, out, count, h, w, f_n, f_y, f_x, f_c, C, FLAT: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """out = k0[c] · g + k1[c] · (x - mean[c]) + k2[c]."""
    pid, programs = tl.program_id(0), tl.num_programs(0)
    o_c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    m_c = o_c < C
    b_k0 = read_channels(k0, o_c, m_c) if k0 is not None else None
    b_k1 = read_channels(k1, o_c, m_c) if k1 is not None else None
    b_k2 = read_channels(k2, o_c, m_c) if k2 is not None else None
    b_mean = read_channels(mean, o_c, m_c) if mean is not None else None
    for block in range(pid, tl.cdiv(count, BLOCK_Q), programs):
        q = block * BLOCK_Q + tl.arange(0, BLOCK_Q)
        n, y, at = window_place(q, h, w, FLAT)
        m = (q < count)[:, None] & m_c[None, :]
        o = (n * f_n + y * f_y + at * f_x)[:, None] + o_c[None, :].to(tl.int64) * f_c
        b_g = tl.load(g + o, mask=m, other=0.0).to(tl.float32)
        b_x = tl.load(x + o, mask=m, other=0.0).to(tl.float32)
        tl.store(out + o, (b_k0 * b_g + b_k1 * (b_x - b_mean) + b_k2).to(out.dtype.element_ty), mask=m)


@triton.jit
def finish_sums_kernel(partials, first, second, programs, C, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr):
    """first[c] = Σ_program partials[program, 0, c], second likewise; each None if unwanted. In a fixed order."""
    o_c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    m_c = o_c < C
    if first is not None:
        tl.store(first + o_c, sum_of_programs(partials, o_c, m_c, programs, C, BLOCK_P, BLOCK_C), mask=m_c)
    if second is not None:
        tl.store(second + o_c, sum_of_programs(partials + C, o_c, m_c, programs, C, BLOCK_P, BLOCK_C), mask=m_c)


@triton.jit
def sum_of_programs(partials, o_c, m_c, programs, C, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr):
    """Σ over the programs, in float64: they are few, and their sums may cancel."""
    total = tl.zeros((BLOCK_P, BLOCK_C), tl.float64)
    for start in range(0, programs, BLOCK_P):
        o_p = start + tl.arange(0, BLOCK_P)
        m = (o_p < programs)[:, None] & m_c[None, :]
        total += tl.load(partials + o_p[:, None] * 2 * C + o_c[None, :], mask=m, other=0.0).to(tl.float64)
    return tl.sum(total, 0)
