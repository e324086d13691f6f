"""Kernels of the tied linear layer: forward and reverse share one weight. `linear.py` says what they compute.

Matrices are (rows, features) with a stride between rows and none between features. A program works on a tile of the
result and loops over the features that are summed; what is read on the way (the source y - b, the gradient of u) is
made in registers from what was kept. Products are summed in float32. Sums are two-stage: one partial sum per program
or split, finished in a fixed order by a second kernel. No atomics. Offsets of rows are 64 bits wide.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .activations import activate, differentiate


@triton.jit
def place(rows, columns, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr, GROUP: tl.constexpr):
    """This program's block row and block column: GROUP block rows go together, so that a cache holds their columns."""
    pid = tl.program_id(0)
    down, across = tl.cdiv(rows, BLOCK_R), tl.cdiv(columns, BLOCK_C)
    first = pid // (GROUP * across) * GROUP
    size = tl.minimum(down - first, GROUP)
    rest = pid % (GROUP * across)
    return first + rest % size, rest // size


@triton.jit
def offsets(o_r, o_c, stride):
    return o_r.to(tl.int64)[:, None] * stride + o_c[None, :]


@triton.jit
def inside(o_r, o_c, rows, columns):
    return (o_r < rows)[:, None] & (o_c < columns)[None, :]


@triton.jit
def read(x, o_r, o_c, stride, m):
    """A tile of x as it is stored, 0 outside."""
    return tl.load(x + offsets(o_r, o_c, stride), mask=m, other=0.0)


@triton.jit
def read_bias(bias, o_c, columns):
    """One value per feature as (1, BLOCK), or None. One way out: Triton compiles what stands behind a return."""
    if bias is None:
        b = None
    else:
        b = tl.load(bias + o_c, mask=o_c < columns, other=0.0).to(tl.float32)[None, :]
    return b


@triton.jit
def read_source(y, bias, o_r, o_c, stride, rows, columns):
    """A tile of s = y - b, rounded to the type of y; 0 outside."""
    m = inside(o_r, o_c, rows, columns)
    b_y = read(y, o_r, o_c, stride, m)
    if bias is not None:
        b_y = tl.where(m, b_y.to(tl.float32) - read_bias(bias, o_c, columns), 0.0).to(b_y.dtype)
    return b_y


@triton.jit
def read_grad(a, p, g_in, b_c2, o_r, o_c, s_a, s_p, s_g, rows, columns, p0, p1, p2, ACT: tl.constexpr):
    """A tile of g_u = act'(a) · (g_in + c2 · (a - p)), rounded to the type of a; 0 outside. b_c2, g_in may be None."""
    m = inside(o_r, o_c, rows, columns)
    b_a = read(a, o_r, o_c, s_a, m)
    b_v = b_a.to(tl.float32)
    b_g = tl.zeros(b_a.shape, tl.float32)
    if b_c2 is not None:
        b_g = b_c2 * (b_v - read(p, o_r, o_c, s_p, m).to(tl.float32))
    if g_in is not None:
        b_g += read(g_in, o_r, o_c, s_g, m).to(tl.float32)
    return tl.where(m, differentiate(b_g, b_v, p0, p1, p2, ACT), 0.0).to(b_a.dtype)


@triton.jit
def product(b_x, b_y, b_sum, PRECISION: tl.constexpr):
    """b_x b_y + b_sum (which may be None) in float32. "wide": for the interpreter, which reads bfloat16 as integers."""
    if PRECISION == "wide":
        b = tl.dot(b_x.to(tl.float32), b_y.to(tl.float32), b_sum, input_precision="ieee")
    else:
        b = tl.dot(b_x, b_y, b_sum, input_precision=PRECISION)
    return b


@triton.jit
def read_scalar(x):
    if x is None:
        b = None
    else:
        b = tl.load(x).to(tl.float32)
    return b


@triton.jit
def write_compared(b_u, p, a, o_r, o_c, s_p, s_a, rows, columns, p0, p1, p2, ACT: tl.constexpr):
    """Writes a = act(u); gives (a - p)² as it is stored, 0 outside and where p is None."""
    m = inside(o_r, o_c, rows, columns)
    b_a = activate(b_u, p0, p1, p2, ACT).to(a.dtype.element_ty)
    tl.store(a + offsets(o_r, o_c, s_a), b_a, mask=m)
    b_off = tl.zeros(b_u.shape, tl.float32)
    if p is not None:
        b_off = tl.where(m, b_a.to(tl.float32) - read(p, o_r, o_c, s_p, m).to(tl.float32), 0.0)
    return b_off * b_off


# ------------------------------------------------------------------------------------------- forward and reverse


@triton.jit
def tied_fwd_kernel(
    p, weight, bias, y, a, partials, rows, inputs, outputs, s_p, s_w, s_y, s_a, f_p0, f_p1, f_p2, r_p0, r_p1, r_p2,
    F_ACT: tl.constexpr, R_ACT: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_I: tl.constexpr, BLOCK_O: tl.constexpr,
):  # fmt: skip
    """y = act_f(p Wᵀ + b), a = act_r((y - b) W), partials[program] = Σ (a - p)². BLOCK_O holds all output features."""
    o_r = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    o_o = tl.arange(0, BLOCK_O)
    b_c = tl.zeros((BLOCK_R, BLOCK_O), tl.float32)
    for start in range(0, inputs, BLOCK_I):
        o_i = start + tl.arange(0, BLOCK_I)
        b_p = read(p, o_r, o_i, s_p, inside(o_r, o_i, rows, inputs))
        b_w = read(weight, o_o, o_i, s_w, inside(o_o, o_i, outputs, inputs))
        b_c = product(b_p, tl.trans(b_w), b_c, PRECISION)
    b_b = read_bias(bias, o_o, outputs)
    if b_b is not None:
        b_c += b_b
    b_s = activate(b_c, f_p0, f_p1, f_p2, F_ACT).to(y.dtype.element_ty)
    m = inside(o_r, o_o, rows, outputs)
    tl.store(y + offsets(o_r, o_o, s_y), b_s, mask=m)
    if b_b is not None:
        b_s = (b_s.to(tl.float32) - b_b).to(y.dtype.element_ty)
    b_s = tl.where(m, b_s, 0.0).to(y.dtype.element_ty)
    b_squares = tl.zeros((BLOCK_R,), tl.float32)
    for start in range(0, inputs, BLOCK_I):
        o_i = start + tl.arange(0, BLOCK_I)
        b_w = read(weight, o_o, o_i, s_w, inside(o_o, o_i, outputs, inputs))
        b_u = product(b_s, b_w, None, PRECISION)
        b_off = write_compared(b_u, p, a, o_r, o_i, s_p, s_a, rows, inputs, r_p0, r_p1, r_p2, R_ACT)
        b_squares += tl.sum(b_off, 1)
    tl.store(partials + tl.program_id(0), tl.sum(b_squares, 0))


@triton.jit
def linear_fwd_kernel(
    p, weight, bias, y, rows, inputs, outputs, s_p, s_w, s_y, p0, p1, p2, ACT: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """y = act(p Wᵀ + b)."""
    row, column = place(rows, outputs, BLOCK_R, BLOCK_C, GROUP)
    o_r, o_o = row * BLOCK_R + tl.arange(0, BLOCK_R), column * BLOCK_C + tl.arange(0, BLOCK_C)
    b_c = tl.zeros((BLOCK_R, BLOCK_C), tl.float32)
    for start in range(0, inputs, BLOCK_K):
        o_i = start + tl.arange(0, BLOCK_K)
        b_p = read(p, o_r, o_i, s_p, inside(o_r, o_i, rows, inputs))
        b_w = read(weight, o_o, o_i, s_w, inside(o_o, o_i, outputs, inputs))
        b_c = product(b_p, tl.trans(b_w), b_c, PRECISION)
    if bias is not None:
        b_c += read_bias(bias, o_o, outputs)
    b_y = activate(b_c, p0, p1, p2, ACT).to(y.dtype.element_ty)
    tl.store(y + offsets(o_r, o_o, s_y), b_y, mask=inside(o_r, o_o, rows, outputs))


@triton.jit
def reverse_fwd_kernel(
    y, p, weight, bias, a, partials, rows, inputs, outputs, s_y, s_p, s_w, s_a, p0, p1, p2,
    ACT: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """a = act((y - b) W); unless p is None, partials[program] = Σ (a - p)²."""
    row, column = place(rows, inputs, BLOCK_R, BLOCK_C, GROUP)
    o_r, o_i = row * BLOCK_R + tl.arange(0, BLOCK_R), column * BLOCK_C + tl.arange(0, BLOCK_C)
    b_u = tl.zeros((BLOCK_R, BLOCK_C), tl.float32)
    for start in range(0, outputs, BLOCK_K):
        o_o = start + tl.arange(0, BLOCK_K)
        b_s = read_source(y, bias, o_r, o_o, s_y, rows, outputs)
        b_w = read(weight, o_o, o_i, s_w, inside(o_o, o_i, outputs, inputs))
        b_u = product(b_s, b_w, b_u, PRECISION)
    b_squares = write_compared(b_u, p, a, o_r, o_i, s_p, s_a, rows, inputs, p0, p1, p2, ACT)
    if p is not None:
        tl.store(partials + tl.program_id(0), tl.sum(b_squares))


# ------------------------------------------------------------------------------------------- backward


@triton.jit
def grad_source_kernel(
    a, p, g_in, c2, weight, y, g_out, out, partials, rows, inputs, outputs, s_a, s_p, s_g, s_w, s_y, s_go, s_out,
    r_p0, r_p1, r_p2, f_p0, f_p1, f_p2, R_ACT: tl.constexpr, F_ACT: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """gs = g_u Wᵀ with g_u made on the way. Without y: out = gs, partials[block row, o] = -Σ gs.

    With y, the layer's own output: out = g_c = act_f'(y) · (g_out + gs), partials[block row, o] = Σ (g_c - gs).
    """
    row, column = place(rows, outputs, BLOCK_R, BLOCK_C, GROUP)
    o_r, o_o = row * BLOCK_R + tl.arange(0, BLOCK_R), column * BLOCK_C + tl.arange(0, BLOCK_C)
    b_c2 = read_scalar(c2)
    b_s = tl.zeros((BLOCK_R, BLOCK_C), tl.float32)
    for start in range(0, inputs, BLOCK_K):
        o_i = start + tl.arange(0, BLOCK_K)
        b_g = read_grad(a, p, g_in, b_c2, o_r, o_i, s_a, s_p, s_g, rows, inputs, r_p0, r_p1, r_p2, R_ACT)
        b_w = read(weight, o_o, o_i, s_w, inside(o_o, o_i, outputs, inputs))
        b_s = product(b_g, tl.trans(b_w), b_s, PRECISION)
    m = inside(o_r, o_o, rows, outputs)
    b_out, b_bias = b_s, -b_s
    if y is not None:
        if g_out is not None:
            b_out += read(g_out, o_r, o_o, s_go, m).to(tl.float32)
        b_out = differentiate(b_out, read(y, o_r, o_o, s_y, m).to(tl.float32), f_p0, f_p1, f_p2, F_ACT)
        b_bias += b_out
    if out is not None:
        tl.store(out + offsets(o_r, o_o, s_out), b_out.to(out.dtype.element_ty), mask=m)
    if partials is not None:
        b_bias = tl.sum(tl.where(m, b_bias, 0.0), 0)
        tl.store(partials + row.to(tl.int64) * outputs + o_o, b_bias, mask=o_o < outputs)


@triton.jit
def grad_input_kernel(
    g_c, weight, a, p, c2, out, rows, inputs, outputs, s_gc, s_w, s_a, s_p, s_out, PRECISION: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """out = g_c W + c2 · (p - a), what p receives from the forward and from the residual; c2 may be None."""
    row, column = place(rows, inputs, BLOCK_R, BLOCK_C, GROUP)
    o_r, o_i = row * BLOCK_R + tl.arange(0, BLOCK_R), column * BLOCK_C + tl.arange(0, BLOCK_C)
    b_p = tl.zeros((BLOCK_R, BLOCK_C), tl.float32)
    for start in range(0, outputs, BLOCK_K):
        o_o = start + tl.arange(0, BLOCK_K)
        b_g = read(g_c, o_r, o_o, s_gc, inside(o_r, o_o, rows, outputs))
        b_w = read(weight, o_o, o_i, s_w, inside(o_o, o_i, outputs, inputs))
        b_p = product(b_g, b_w, b_p, PRECISION)
    m = inside(o_r, o_i, rows, inputs)
    if c2 is not None:
        b_off = read(p, o_r, o_i, s_p, m).to(tl.float32) - read(a, o_r, o_i, s_a, m).to(tl.float32)
        b_p += tl.load(c2).to(tl.float32) * b_off
    tl.store(out + offsets(o_r, o_i, s_out), b_p.to(out.dtype.element_ty), mask=m)


@triton.jit
def grad_weight_kernel(
    y, bias, a, p, g_in, c2, g_c, out, rows, inputs, outputs, each, s_y, s_a, s_p, s_g, s_gc, p0, p1, p2,
    ACT: tl.constexpr, REVERSE: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_O: tl.constexpr, BLOCK_I: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """out[split] = Σ sᵀ g_u + g_cᵀ p over the split's `each` rows: reverse pair if REVERSE, forward pair if g_c."""
    row, column = place(outputs, inputs, BLOCK_O, BLOCK_I, GROUP)
    o_o, o_i = row * BLOCK_O + tl.arange(0, BLOCK_O), column * BLOCK_I + tl.arange(0, BLOCK_I)
    split = tl.program_id(1)
    first = split * each
    stop = tl.minimum(rows - first, each) + first  # the sum first + each might not fit
    b_c2 = read_scalar(c2)
    b_w = tl.zeros((BLOCK_O, BLOCK_I), tl.float32)
    for start in range(first, stop, BLOCK_K):
        o_r = start + tl.arange(0, BLOCK_K)
        if REVERSE:
            b_s = read_source(y, bias, o_r, o_o, s_y, stop, outputs)
            b_g = read_grad(a, p, g_in, b_c2, o_r, o_i, s_a, s_p, s_g, stop, inputs, p0, p1, p2, ACT)
            b_w = product(tl.trans(b_s), b_g, b_w, PRECISION)
        if g_c is not None:
            b_gc = read(g_c, o_r, o_o, s_gc, inside(o_r, o_o, stop, outputs))
            b_p = read(p, o_r, o_i, s_p, inside(o_r, o_i, stop, inputs))
            b_w = product(tl.trans(b_gc), b_p, b_w, PRECISION)
    o = split.to(tl.int64) * outputs * inputs + offsets(o_o, o_i, inputs)
    tl.store(out + o, b_w.to(out.dtype.element_ty), mask=inside(o_o, o_i, outputs, inputs))
