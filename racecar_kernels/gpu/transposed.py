"""Launches the fused transposed convolution: u = Wᵀ (y - b) with its whole epilogue, and both of its gradients.

For layers that are bound by memory. Everything is float32 between what is read and what is written; float32 itself
is multiplied as TF32 where PyTorch's convolutions are (`torch.backends.cudnn.conv.fp32_precision`). Tensors are
channels_last; a source that stands for itself repeated by whole factors meets a folded weight (see
`racecar_kernels/transposed.py`). Nothing is chosen here: `why_not` says what the kernels do not serve.
"""

from __future__ import annotations

from math import prod
from typing import Any

import torch
import triton
from torch import Tensor

from ..fused import Affine, Incoming, Result
from ..layer import Ints, Tied
from ..lazy import Lazy, Window
from ..transposed import fold_adjoint
from . import configs, device
from . import transposed_kernels as kernels
from .pointwise import _handed, _wide, finish_norm
from .sums import sum_partials
from .transposed_operands import (
    as_lazy,
    blocks_of,
    check,
    empty_image,
    folded_weight,
    handed_incoming,
    kernel_sizes,
    kind_of,
    phases_inside,
    sizes_of,
    taps_of,
    why_not_operands,
    why_not_pair,
    why_not_residual,
)
from .transposed_shipped import shipped as shipped
from .tuning import launcher


def why_not(
    y: Lazy | Tensor,
    weight: Tensor,
    tied: Tied,
    shape: Ints,
    *,
    factor: Ints | None = None,
    d: Lazy | Tensor | None = None,
    window: Window = None,
    a: Lazy | None = None,
) -> str | None:
    """None where the kernels serve this layer, forward and backward, else a sentence that says why not.

    shape: of u. d: what a is compared with, at `window` times the size of u. a: the latent, or u and its activation.
    """
    y, d = as_lazy(y), None if d is None else as_lazy(d)
    operands = [v for v in (y, d, a) if v is not None]
    reason = why_not_operands(operands, weight, tied, shape, tuple(y.x.shape), factor)
    return reason or why_not_residual(d, window, shape)


def why_not_gradient(incoming: Incoming, window: Window = None) -> str | None:
    """None where the gradients compute g_u = act'(a) · (g + c2 · (a - d)) where they read it, else a sentence."""
    if window is not None and max(window) > 1 and incoming.d is not None:
        return f"the gradient through a pooling by {window} is left to the pointwise kernel: every tap would repeat it"
    if incoming.a is not None and incoming.a.shift is not None:
        return "a norm's own gradients are sums over g_u, which the pointwise kernel computes"
    return None


def why_not_gradients(
    incoming: Incoming, others: list[Lazy], weight: Tensor, tied: Tied, given: Ints, factor: Ints | None = None
) -> str | None:
    """None where the gradients from g_u, with `others` read beside it, are served; given: the shape of y."""
    return why_not_gradient(incoming) or why_not_pair(incoming, others, weight, tied, given, factor)


@launcher
def forward(
    y: Lazy,
    weight: Tensor,
    tied: Tied,
    shape: Ints,
    *,
    bias: Tensor | None = None,
    factor: Ints | None = None,
    act: str = "identity",
    args: tuple[Any, ...] = (),
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    keep: str = "a",
    d: Lazy | None = None,
    window: Window = None,
    source: bool = False,
    minus: Tensor | None = None,
    norm: Affine | None = None,
) -> Result:
    """u = Wᵀ (y - bias) of `shape` (N, C_in, H, W), a = act(u · scale[c] + shift[c]); keeps "u", "a" or "nothing".

    y: (N, C_out, P, Q), or smaller by `factor`. d: compared with a, every value of which stands for a `window` of d.
    source: also a - minus[c], what the next reverse layer reads. norm: also the batch norm of u as it is kept, which
    needs keep="u".
    """
    if norm is not None and keep != "u":
        raise ValueError(f'a batch norm is taken of u, which keep="u" keeps; got keep="{keep}"')
    check(why_not(y, weight, tied, shape, factor=factor, d=d, window=window))
    weight, tied = folded_weight(weight, tied, factor)
    inside = phases_inside(weight, tied)
    size, pixels = sizes_of(shape, tuple(y.x.shape), weight, tied)
    first = [p[0] // s for p, s in zip(tied.padding, tied.stride, strict=True)]
    t = [(n - 1 + p[0]) // s - f + 1 for n, p, s, f in zip(shape[2:], tied.padding, tied.stride, first, strict=True)]
    phases = prod(tied.stride)
    columns = size["CG_IN"] * (phases if inside else 1)
    own = configs.gemm("transposed", kind_of(weight), size["CG_OUT"], columns, taps_of(weight), device.of(weight))
    grid = (
        triton.cdiv(shape[0] * prod(t), own.m),
        triton.cdiv(columns, own.n) * (1 if inside else phases) * tied.groups,
    )
    like = Lazy(y.x, scale, shift, act, args)
    kept, to_source = (empty_image(y.x, shape) if wanted else None for wanted in (keep != "nothing", source))
    partials = None if d is None else y.x.new_empty(grid, dtype=torch.float32)
    parts, rows = (None, None) if norm is None else _empty_parts(grid[0] * phases, like.x, shape[1])
    y_x, y_scale, y_shift, _, y_p, y_known = _handed(y, "Y_")
    _, a_scale, a_shift, _, a_p, a_known = _handed(like, "A_")
    d_x, d_scale, d_shift, _, d_p, d_known = _handed(d or Lazy(y.x), "D_")
    kh, kw = window or (1, 1)
    ragged = (0, 0) if d is None else (d.x.shape[2] - kh * shape[2], d.x.shape[3] - kw * shape[3])
    kernels.transposed_kernel[grid](
        y_x, y_scale, y_shift, *y_p, _wide(bias), weight, a_scale, a_shift, *a_p,
        None if d is None else d_x, d_scale, d_shift, *d_p, _wide(minus), kept, to_source, partials,
        parts, rows, shape[0] * prod(t), *t, *first, *pixels, y.x.stride(0), prod(shape[1:]),
        0 if d is None else d.x.stride(0), *weight.stride(), *size.values(),
        **y_known, A_ACT=a_known["A_ACT"], **d_known, KEEP_U=keep == "u", **kernel_sizes(weight, tied),
        PH=kh, PW=kw, RAGGED_H=ragged[0], RAGGED_W=ragged[1], PHASES=inside,
        **blocks_of(own, kind_of(weight), size["CG_OUT"]),
    )  # fmt: skip
    found = None
    if norm is not None and parts is not None:
        found = finish_norm(parts, rows, shape[0] * prod(shape[2:]), 1, *norm)
    return Result(kept, None if partials is None else partials.sum(), to_source, found)


def _empty_parts(parts: int, like: Tensor, channels: int) -> tuple[Tensor, Tensor]:
    """For a batch's statistics: mean and squares of every part, and its number of rows."""
    return (
        like.new_empty(parts, 2, channels, dtype=torch.float64),
        like.new_empty(parts, dtype=torch.int32),
    )


@launcher
def source_gradient(
    incoming: Incoming,
    weight: Tensor,
    tied: Tied,
    shape: Ints,
    *,
    factor: Ints | None = None,
    needs_source: bool = True,
    bias: bool = False,
) -> tuple[Tensor | None, Tensor | None]:
    """∂/∂y of `shape` (that of y, so smaller by `factor`) from g_u, and ∂/∂bias = -Σ ∂/∂y per channel."""
    like = incoming.like
    check(why_not_gradients(incoming, [], weight, tied, shape, factor))
    weight, tied = folded_weight(weight, tied, factor)
    size, pixels = sizes_of(tuple(like.shape), shape, weight, tied)
    own = configs.gemm("source", kind_of(weight), size["CG_IN"], size["CG_OUT"], taps_of(weight), device.of(weight))
    count = shape[0] * prod(shape[2:])
    grid = (triton.cdiv(count, own.m), triton.cdiv(size["CG_OUT"], own.n) * tied.groups)
    out = empty_image(like, shape) if needs_source else None
    partials = like.new_empty(grid[0], shape[1], dtype=torch.float32) if bias else None
    g_u, strides, known = handed_incoming(incoming)
    kernels.source_gradient_kernel[grid](
        *g_u, weight, out, partials, count, *pixels, *strides, prod(shape[1:]), *weight.stride(), *size.values(),
        **known, **kernel_sizes(weight, tied), **blocks_of(own, kind_of(weight), size["CG_IN"]),
    )  # fmt: skip
    total = None
    if partials is not None:
        total = like.new_empty(shape[1], dtype=torch.float32)
        sum_partials(partials, total, sign=-1)
    return out, total


@launcher
def weight_gradient(
    weight: Tensor,
    tied: Tied,
    *,
    read: tuple[Lazy, Tensor] | None = None,
    reverse: tuple[Incoming, Lazy, Tensor | None] | None = None,
    factor: Ints | None = None,
) -> Tensor:
    """∂/∂W in the layout of the weight: the sum of what its use forward and its use in reverse give.

    read: what the operation read (N, C_in, H, W), and the gradient of what it gave (N, C_out, P, Q).
    reverse: the gradient of u (N, C_in, H, W), y and the bias. `factor`: y stands for itself repeated.
    """
    if factor is not None and reverse is not None:
        folded, strided = folded_weight(weight, tied, factor)
        g = fold_adjoint(_weight_gradient(folded, strided, None, reverse, torch.float32), factor)
        if read is not None:
            g += _weight_gradient(weight, tied, read, None, torch.float32)
        return torch.empty_like(weight).copy_(g)
    return _weight_gradient(weight, tied, read, reverse, weight.dtype)


def _weight_gradient(
    weight: Tensor,
    tied: Tied,
    read: tuple[Lazy, Tensor] | None,
    reverse: tuple[Incoming, Lazy, Tensor | None] | None,
    dtype: torch.dtype,
) -> Tensor:
    """The same without a factor."""
    pairs = []
    if read is not None:
        pairs.append((Incoming(None, read[0]), Lazy(read[1])))
    if reverse is not None:
        check(why_not_gradient(reverse[0]))
        pairs.append(reverse[:2])
    for big, small in pairs:
        check(why_not_pair(big, [small], weight, tied, tuple(small.x.shape), None))
    shape, given = tuple(pairs[0][0].like.shape), tuple(pairs[0][1].x.shape)
    if any(tuple(big.like.shape) != shape for big, _ in pairs):
        raise ValueError(f"both uses of a weight need one size, got {[tuple(big.like.shape) for big, _ in pairs]}")
    size, pixels = sizes_of(shape, given, weight, tied)
    count, taps = given[0] * prod(given[2:]), taps_of(weight)
    own = configs.weight_gemm(kind_of(weight), size["CG_OUT"], size["CG_IN"], taps, device.of(weight))
    flat = size["CG_IN"] < configs.FEW
    columns = triton.cdiv(taps * size["CG_IN"], own.n) if flat else taps * triton.cdiv(size["CG_IN"], own.n)
    tiles = triton.cdiv(size["CG_OUT"], own.m) * columns * tied.groups
    blocks = max(1, triton.cdiv(count, own.k)) * (2 if read is not None and reverse is not None else 1)
    each = triton.cdiv(blocks, configs.splits(tiles, blocks, weight.numel(), device.of(weight)))
    splits = triton.cdiv(blocks, each)
    out = torch.empty_like(weight, dtype=dtype)
    # the partial sums have the order of the result's memory, so that the second stage adds them as they lie
    to = out if splits == 1 else out.new_empty(splits, out.numel(), dtype=torch.float32)
    incoming, y, bias = (Incoming(weight), Lazy(weight), None) if reverse is None else reverse
    p, gp = (Lazy(weight), weight) if read is None else read
    g_u, g_strides, g_known = handed_incoming(incoming)
    p_x, p_scale, p_shift, _, p_p, p_known = _handed(p, "P_")
    y_x, y_scale, y_shift, _, y_p, y_known = _handed(y, "Y_")
    kernels.weight_gradient_kernel[(tiles, splits)](
        p_x, p_scale, p_shift, *p_p, gp, *g_u, y_x, y_scale, y_shift, *y_p, _wide(bias), to,
        count, each, *pixels, p.x.stride(0), gp.stride(0), *g_strides, y.x.stride(0), weight.numel(), *out.stride(),
        *size.values(), **p_known, **g_known, **y_known, FORWARD=read is not None, REVERSE=reverse is not None,
        **kernel_sizes(weight, tied), **blocks_of(own, kind_of(weight), size["CG_IN"]),
    )  # fmt: skip
    if splits > 1:
        sum_partials(to, out)
    return out
