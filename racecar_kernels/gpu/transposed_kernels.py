"""Kernels of the fused transposed convolution and of its gradients. `transposed.py` launches them.

All are implicit GEMMs over images in channels_last, (n, y, x, c), whose pixels are dense and whose batch stride is
given; sizes are those of the forward convolution: it read C_IN channels at H × W and gave C_OUT channels at P × Q, in
groups of CG_IN and CG_OUT. Offsets of images are 64 bits wide.

A stride is decomposed by output phase: row y of u is t · SH + r - pad with r = (y + pad) mod SH; only the taps
i = l · SH + r reach it, from row t - l of the source. The phases are programs of their own, or, where every phase has
all its taps and the channels are few, columns beside the channels (PHASES): the source is then read once for all.

The reduction goes over taps and channels: a block of channels of one tap per step, or, with few channels, both
flattened into one (FLAT). What is one per step then has shape (1,), what differs within it shape (BLOCK_K,).

Sums are written per program and finished in a fixed order by a second, small kernel. No atomics.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .activations import activate, differentiate
from .norm_kernels import part_of_tile
from .pointwise_kernels import read_channels, read_value

# Triton's interpreter multiplies bfloat16 as the integers in which it keeps them, so that they are widened there.
WIDEN: tl.constexpr = tl.constexpr(triton.knobs.runtime.interpret)


@triton.jit
def multiply(a, b, acc, PRECISION: tl.constexpr):
    """acc + a b, in the matrix units where PRECISION and the type allow it."""
    if WIDEN:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision=PRECISION)


@triton.jit
def pixel_place(q, h, w):
    """(n, y, x) of pixel number q = (n · h + y) · w + x."""
    rest = q // w
    n = rest // h
    return n.to(tl.int64), rest - n * h, q - rest * w


@triton.jit
def count_steps(taps, C, FLAT: tl.constexpr, BLOCK_K: tl.constexpr):
    """How many blocks the reduction over taps and channels has."""
    if FLAT:
        steps = tl.cdiv(taps * C, BLOCK_K)
    else:
        steps = taps * tl.cdiv(C, BLOCK_K)
    return steps


@triton.jit
def step_place(k, taps_h, taps_w, C, FLAT: tl.constexpr, BLOCK_K: tl.constexpr):
    """(tap row, tap column, channel, mask) of block number k of the reduction."""
    o_k = tl.arange(0, BLOCK_K)
    if FLAT:
        t = (k * BLOCK_K + o_k) // C
        c = k * BLOCK_K + o_k - t * C
        m = t < taps_h * taps_w
    else:
        blocks = tl.cdiv(C, BLOCK_K)
        t = tl.zeros((1,), tl.int32) + k // blocks
        c = (k % blocks) * BLOCK_K + o_k
        m = c < C
    i = t // taps_w
    return i, t - i * taps_w, c, m


@triton.jit
def read_source(p_y, m, c, m_c, scale, shift, p0, p1, p2, bias, ACT: tl.constexpr, DONE: tl.constexpr):
    """s = y - bias in the type of y, 0 outside; y itself is computed where it is read."""
    b_scale = read_channels(scale, c, m_c) if scale is not None else None
    b_shift = read_channels(shift, c, m_c) if shift is not None else None
    s = read_value(p_y, m, b_scale, b_shift, p0, p1, p2, ACT, DONE)
    if bias is not None:
        s = s - read_channels(bias, c, m_c)
    return tl.where(m, s, 0.0).to(p_y.dtype.element_ty)


@triton.jit
def read_gradient(
    g, a, a_p0, a_p1, a_p2, d, d_scale, d_shift, d_p0, d_p1, d_p2, b_c2, n, o, c, m, m_c, g_n, a_n, d_n, like,
    A_ACT: tl.constexpr, A_DONE: tl.constexpr, D_ACT: tl.constexpr, D_DONE: tl.constexpr,
):  # fmt: skip
    """g_u = act'(·) · (g + c2 · (a - d)) in the type of like; g_u = g without a. n, o: image, and offset in it."""
    if g is not None:
        b_g = tl.load(g + n * g_n + o, mask=m, other=0.0).to(tl.float32)
    else:
        b_g = tl.where(m, 0.0, 0.0)
    if a is not None:
        b_a = read_value(a + n * a_n + o, m, None, None, a_p0, a_p1, a_p2, A_ACT, A_DONE)
        if d is not None:
            b_scale = read_channels(d_scale, c, m_c) if d_scale is not None else None
            b_shift = read_channels(d_shift, c, m_c) if d_shift is not None else None
            b_d = read_value(d + n * d_n + o, m, b_scale, b_shift, d_p0, d_p1, d_p2, D_ACT, D_DONE)
            b_g = b_g + b_c2 * (b_a - b_d)
        b_g = tl.where(m, differentiate(b_g, b_a, a_p0, a_p1, a_p2, A_ACT), 0.0)
    return b_g.to(like.dtype.element_ty)


@triton.jit
def count_pixels(phase, m, t_y, t_x, pad_h, pad_w, H, W, SH: tl.constexpr, SW: tl.constexpr):
    """How many of the places t where m are pixels of u, in each phase: a sum a phase, to need few registers."""
    count = tl.zeros_like(phase)
    for r in tl.static_range(SH * SW):
        o_y, o_x = t_y * SH + r // SW - pad_h, t_x * SW + r % SW - pad_w
        inside = m & (o_y >= 0) & (o_y < H) & (o_x >= 0) & (o_x < W)
        count = tl.where(phase == r, tl.sum(inside.to(tl.int32)), count)
    return count


@triton.jit
def transposed_kernel(
    y, y_scale, y_shift, y_p0, y_p1, y_p2, bias, weight, a_scale, a_shift, a_p0, a_p1, a_p2,
    d, d_scale, d_shift, d_p0, d_p1, d_p2, minus, out, source, partials, norm_parts, norm_rows,
    count, t_h, t_w, first_h, first_w, P, Q, H, W, pad_h, pad_w, y_n, u_n, d_n, w_o, w_i, w_h, w_w,
    C_OUT, C_IN, CG_OUT, CG_IN,
    Y_ACT: tl.constexpr, Y_DONE: tl.constexpr, A_ACT: tl.constexpr, D_ACT: tl.constexpr, D_DONE: tl.constexpr,
    KEEP_U: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr, SH: tl.constexpr, SW: tl.constexpr,
    PH: tl.constexpr, PW: tl.constexpr, RAGGED_H: tl.constexpr, RAGGED_W: tl.constexpr, FLAT: tl.constexpr,
    PHASES: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """u = Wᵀ (y - bias), a = act(u · a_scale + a_shift); out = u or a, source = a - minus, partials = Σ (d - a)².

    norm_parts: of u as it is stored, mean and Σ (u - mean)² per channel, and in norm_rows of how many pixels they are;
    a part is what a block of places has of one phase.

    Grid: blocks of the count = N · t_h · t_w places t; blocks of columns × phases × groups. d has PH × PW pixels for
    each of a, and RAGGED_H rows, RAGGED_W columns more, which belong to the last window.
    """
    q = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    n, t_y, t_x = pixel_place(q, t_h, t_w)
    n, t_y, t_x = n[:, None], (t_y + first_h)[:, None], (t_x + first_w)[:, None]
    rest = tl.program_id(1)
    if PHASES:
        blocks = tl.cdiv(CG_IN * SH * SW, BLOCK_N)
        o_n = (rest % blocks) * BLOCK_N + tl.arange(0, BLOCK_N)
        phase = o_n // CG_IN
        c_in = o_n - phase * CG_IN
        m_n = phase < SH * SW
        group = rest // blocks
        taps_h, taps_w = KH // SH, KW // SW
    else:
        blocks = tl.cdiv(CG_IN, BLOCK_N)
        c_in = (rest % blocks) * BLOCK_N + tl.arange(0, BLOCK_N)
        m_n = c_in < CG_IN
        own = (rest // blocks) % (SH * SW)
        phase = tl.zeros((1,), tl.int32) + own
        group = rest // (blocks * SH * SW)
        taps_h, taps_w = (KH - own // SW + SH - 1) // SH, (KW - own % SW + SW - 1) // SW
    r_h, r_w = (phase // SW)[None, :], (phase % SW)[None, :]
    y += group * CG_OUT
    p_weight = weight + group * CG_OUT * w_o + c_in[None, :] * w_i
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for k in range(count_steps(taps_h * taps_w, CG_OUT, FLAT, BLOCK_K)):
        l_h, l_w, c, m_k = step_place(k, taps_h, taps_w, CG_OUT, FLAT, BLOCK_K)
        s_y, s_x = t_y - l_h[None, :], t_x - l_w[None, :]
        m = (s_y >= 0) & (s_y < P) & (s_x >= 0) & (s_x < Q) & (q < count)[:, None] & m_k[None, :]
        o = n * y_n + (s_y * Q + s_x) * C_OUT + c[None, :]
        o_c = group * CG_OUT + c
        s = read_source(y + o, m, o_c, m_k, y_scale, y_shift, y_p0, y_p1, y_p2, bias, Y_ACT, Y_DONE)
        tap_h, tap_w = l_h[:, None] * SH + r_h, l_w[:, None] * SW + r_w
        p_w = p_weight + c[:, None] * w_o + tap_h * w_h + tap_w * w_w
        b_w = tl.load(p_w, mask=m_k[:, None] & m_n[None, :], other=0.0)
        acc = multiply(s, b_w, acc, PRECISION)

    o_y, o_x = t_y * SH + r_h - pad_h, t_x * SW + r_w - pad_w
    m = (q < count)[:, None] & m_n[None, :] & (o_y >= 0) & (o_y < H) & (o_x >= 0) & (o_x < W)
    o_c = group * CG_IN + c_in
    o = n * u_n + (o_y * W + o_x) * C_IN + o_c[None, :]
    if KEEP_U:
        b_u = acc.to(out.dtype.element_ty)
        tl.store(out + o, b_u, mask=m)
        acc = b_u.to(tl.float32)
    if norm_parts is not None:
        rows = count_pixels(phase, (q < count)[:, None], t_y, t_x, pad_h, pad_w, H, W, SH, SW)
        mean, squares = part_of_tile(acc, m, rows)
        part = tl.program_id(0) * (SH * SW) + phase
        p_part = norm_parts + part.to(tl.int64) * 2 * C_IN + o_c
        tl.store(p_part, mean, mask=m_n)
        tl.store(p_part + C_IN, squares, mask=m_n)
        tl.store(norm_rows + part + o_c, rows, mask=m_n & (o_c == 0))
    if a_scale is not None:
        acc = acc * read_channels(a_scale, o_c, m_n)
    if a_shift is not None:
        acc = acc + read_channels(a_shift, o_c, m_n)
    b_a = activate(acc, a_p0, a_p1, a_p2, A_ACT).to(y.dtype.element_ty)
    if out is not None and not KEEP_U:
        tl.store(out + o, b_a, mask=m)
    acc = b_a.to(tl.float32)
    if source is not None:
        less = acc
        if minus is not None:
            less = acc - read_channels(minus, o_c, m_n)
        tl.store(source + o, less.to(source.dtype.element_ty), mask=m)
    if d is not None:
        bd_scale = read_channels(d_scale, o_c, m_n) if d_scale is not None else None
        bd_shift = read_channels(d_shift, o_c, m_n) if d_shift is not None else None
        squares = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for i in tl.static_range(PH + RAGGED_H):
            for j in tl.static_range(PW + RAGGED_W):
                m_tap = m
                if i >= PH:
                    m_tap = m_tap & (o_y == H - 1)
                if j >= PW:
                    m_tap = m_tap & (o_x == W - 1)
                o = n * d_n + ((o_y * PH + i) * (W * PW + RAGGED_W) + o_x * PW + j) * C_IN + o_c[None, :]
                v = read_value(d + o, m_tap, bd_scale, bd_shift, d_p0, d_p1, d_p2, D_ACT, D_DONE)
                off = tl.where(m_tap, v - acc, 0.0)
                squares += off * off
        tl.store(partials + tl.program_id(0) * tl.num_programs(1) + tl.program_id(1), tl.sum(squares))


@triton.jit
def source_gradient_kernel(
    g, a, a_p0, a_p1, a_p2, d, d_scale, d_shift, d_p0, d_p1, d_p2, c2, weight, out, partials,
    count, P, Q, H, W, pad_h, pad_w, g_n, a_n, d_n, s_n, w_o, w_i, w_h, w_w, C_OUT, C_IN, CG_OUT, CG_IN,
    A_ACT: tl.constexpr, A_DONE: tl.constexpr, D_ACT: tl.constexpr, D_DONE: tl.constexpr,
    KH: tl.constexpr, KW: tl.constexpr, SH: tl.constexpr, SW: tl.constexpr, FLAT: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """out = W g_u, the convolution without its bias, and partials[block, c] = Σ out over the block's pixels.

    Grid: blocks of the count = N · P · Q pixels; blocks of columns × groups.
    """
    q = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    m_q = (q < count)[:, None]
    n, s_y, s_x = pixel_place(q, P, Q)
    n, s_y, s_x = n[:, None], s_y[:, None], s_x[:, None]
    blocks = tl.cdiv(CG_OUT, BLOCK_N)
    group = tl.program_id(1) // blocks
    c_out = (tl.program_id(1) % blocks) * BLOCK_N + tl.arange(0, BLOCK_N)
    m_n = c_out < CG_OUT
    b_c2 = 0.0 if c2 is None else tl.load(c2).to(tl.float32)
    o_n = group * CG_OUT + c_out
    p_weight = weight + o_n[None, :] * w_o
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for k in range(count_steps(KH * KW, CG_IN, FLAT, BLOCK_K)):
        i, j, c, m_k = step_place(k, KH, KW, CG_IN, FLAT, BLOCK_K)
        g_y, g_x = s_y * SH - pad_h + i[None, :], s_x * SW - pad_w + j[None, :]
        m = (g_y >= 0) & (g_y < H) & (g_x >= 0) & (g_x < W) & m_q & m_k[None, :]
        o_c = group * CG_IN + c
        o = (g_y * W + g_x) * C_IN + o_c[None, :]
        b_g = read_gradient(
            g, a, a_p0, a_p1, a_p2, d, d_scale, d_shift, d_p0, d_p1, d_p2, b_c2, n, o, o_c, m, m_k, g_n, a_n, d_n,
            weight, A_ACT, A_DONE, D_ACT, D_DONE,
        )  # fmt: skip
        p_w = p_weight + c[:, None] * w_i + i[:, None] * w_h + j[:, None] * w_w
        b_w = tl.load(p_w, mask=m_k[:, None] & m_n[None, :], other=0.0)
        acc = multiply(b_g, b_w, acc, PRECISION)
    if partials is not None:
        tl.store(partials + tl.program_id(0) * C_OUT + o_n, tl.sum(tl.where(m_q, acc, 0.0), 0), mask=m_n)
    if out is not None:
        o = n * s_n + (s_y * Q + s_x) * C_OUT + o_n[None, :]
        tl.store(out + o, acc.to(out.dtype.element_ty), mask=m_q & m_n[None, :])


@triton.jit
def weight_gradient_kernel(
    p, p_scale, p_shift, p_p0, p_p1, p_p2, gp, g, a, a_p0, a_p1, a_p2, d, d_scale, d_shift, d_p0, d_p1, d_p2, c2,
    y, y_scale, y_shift, y_p0, y_p1, y_p2, bias, out,
    count, each, P, Q, H, W, pad_h, pad_w, p_n, gp_n, g_n, a_n, d_n, y_n, o_split, o_o, o_i, o_h, o_w,
    C_OUT, C_IN, CG_OUT, CG_IN,
    P_ACT: tl.constexpr, P_DONE: tl.constexpr, A_ACT: tl.constexpr, A_DONE: tl.constexpr, D_ACT: tl.constexpr,
    D_DONE: tl.constexpr, Y_ACT: tl.constexpr, Y_DONE: tl.constexpr, FORWARD: tl.constexpr, REVERSE: tl.constexpr,
    KH: tl.constexpr, KW: tl.constexpr, SH: tl.constexpr, SW: tl.constexpr, FLAT: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """out[split] = Σ gp · p over the pixels of the forward's pair and Σ (y - bias) · g_u over those of the reverse's.

    Grid: blocks of C_OUT × blocks of columns (channels of one tap, or FLAT: channels of all taps) × groups; splits,
    each of which takes `each` of the blocks of pixels, the forward's first.
    """
    rest = tl.program_id(0)
    blocks_m = tl.cdiv(CG_OUT, BLOCK_M)
    c_out = (rest % blocks_m) * BLOCK_M + tl.arange(0, BLOCK_M)
    rest = rest // blocks_m
    steps = count_steps(KH * KW, CG_IN, FLAT, BLOCK_N)
    i, j, c_in, m_n = step_place(rest % steps, KH, KW, CG_IN, FLAT, BLOCK_N)
    group = rest // steps
    m_m = c_out < CG_OUT
    o_m, o_n = group * CG_OUT + c_out, group * CG_IN + c_in
    i, j = i[None, :], j[None, :]
    b_c2 = 0.0 if c2 is None else tl.load(c2).to(tl.float32)
    per_pair = tl.cdiv(count, BLOCK_K)
    first = tl.program_id(1) * each
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    if FORWARD:
        for block in range(first, tl.minimum(first + each, per_pair)):
            q = block * BLOCK_K + tl.arange(0, BLOCK_K)
            n, s_y, s_x = pixel_place(q, P, Q)
            n, s_y, s_x = n[:, None], s_y[:, None], s_x[:, None]
            m_q = (q < count)[:, None]
            o_g = n * gp_n + (s_y * Q + s_x) * C_OUT + o_m[None, :]
            b_g = tl.load(gp + o_g, mask=m_q & m_m[None, :], other=0.0)
            u_y, u_x = s_y * SH - pad_h + i, s_x * SW - pad_w + j
            m = (u_y >= 0) & (u_y < H) & (u_x >= 0) & (u_x < W) & m_q & m_n[None, :]
            o = n * p_n + (u_y * W + u_x) * C_IN + o_n[None, :]
            b_p = read_source(p + o, m, o_n, m_n, p_scale, p_shift, p_p0, p_p1, p_p2, None, P_ACT, P_DONE)
            acc = multiply(tl.trans(b_g), b_p, acc, PRECISION)
        first = tl.maximum(first - per_pair, 0)
        each = tl.maximum((tl.program_id(1) + 1) * each - per_pair - first, 0)
    if REVERSE:
        for block in range(first, tl.minimum(first + each, per_pair)):
            q = block * BLOCK_K + tl.arange(0, BLOCK_K)
            n, s_y, s_x = pixel_place(q, P, Q)
            n, s_y, s_x = n[:, None], s_y[:, None], s_x[:, None]
            m_q = (q < count)[:, None]
            m_s = m_q & m_m[None, :]
            o_y = n * y_n + (s_y * Q + s_x) * C_OUT + o_m[None, :]
            b_s = read_source(y + o_y, m_s, o_m, m_m, y_scale, y_shift, y_p0, y_p1, y_p2, bias, Y_ACT, Y_DONE)
            u_y, u_x = s_y * SH - pad_h + i, s_x * SW - pad_w + j
            m = (u_y >= 0) & (u_y < H) & (u_x >= 0) & (u_x < W) & m_q & m_n[None, :]
            o = (u_y * W + u_x) * C_IN + o_n[None, :]
            b_g = read_gradient(
                g, a, a_p0, a_p1, a_p2, d, d_scale, d_shift, d_p0, d_p1, d_p2, b_c2, n, o, o_n, m, m_n, g_n, a_n, d_n,
                y, A_ACT, A_DONE, D_ACT, D_DONE,
            )  # fmt: skip
            acc = multiply(tl.trans(b_s), b_g, acc, PRECISION)
    o = o_m[:, None] * o_o + c_in[None, :] * o_i + i * o_h + j * o_w
    p_out = out + tl.program_id(1).to(tl.int64) * o_split
    tl.store(p_out + o, acc.to(out.dtype.element_ty), mask=m_m[:, None] & m_n[None, :])
