"""What the fused transposed convolution is asked: which operands it serves, and how its kernels are handed them."""

from __future__ import annotations

from dataclasses import replace
from math import prod
from typing import Any

import torch
from torch import Tensor

from ..fused import Incoming as Incoming
from ..layer import Ints, Tied
from ..lazy import Lazy, Window
from ..pointwise import numbered
from ..transposed import can_fold, fold
from . import configs, device
from .configs import Gemm
from .pointwise import _handed

MOST_STRIDE = 4
MOST_TAPS = 4  # of the window of a pooling that is undone in the epilogue
MOST_ELEMENTS = 2**31 - 2**16  # of one image and of the weight: offsets within them have 32 bits; and pixels of all


# ------------------------------------------------------------------------------------------- what is served


def why_not_operation(weight: Tensor, tied: Tied, shape: Ints, given: Ints, factor: Ints | None) -> str | None:
    if tied.dims != 2:
        return f"two-dimensional convolutions are served, this operation has {tied.dims} spatial dimensions"
    if max(tied.dilation) > 1 or max(tied.stride) > MOST_STRIDE:
        return f"dilation 1 and strides up to {MOST_STRIDE} are served, got {tied.dilation} and {tied.stride}"
    if tied.padding_mode != "zeros":
        return f"zero padding is served, got {tied.padding_mode}"
    if factor is not None and (not can_fold(tied) or max(factor) > MOST_STRIDE):
        return f"repetition by up to {MOST_STRIDE} is folded into a stride of 1, got {factor} and {tied.stride}"
    if tied.groups * prod(factor or tied.stride) > 4096:
        return f"up to 4096 groups, times the stride's phases, are served, got {tied.groups}"
    size = tied.output_size(shape[2:], tuple(weight.shape[2:]))
    whole = tuple(n * f for n, f in zip(given[2:], factor or (1, 1), strict=True))
    if size != whole or shape[0] != given[0]:
        return f"{shape[0]} images of {shape[2:]} become images of {size}, y stands for {given[0]} of {whole}"
    if (weight.shape[0], weight.shape[1] * tied.groups) != (given[1], shape[1]):
        return (
            f"the weight has sizes {tuple(weight.shape)} and {tied.groups} groups, y {given[1]} channels, u {shape[1]}"
        )
    pixels = shape[0] * max(prod(shape[2:]), prod(given[2:]))
    if max(prod(shape[1:]), prod(given[1:]), weight.numel(), pixels) > MOST_ELEMENTS:
        return f"images, weights and the number of pixels are served up to {MOST_ELEMENTS}, got images of {shape[1:]}"
    return None


def why_not_residual(d: Lazy | None, window: Window, shape: Ints) -> str | None:
    if d is None:
        return None
    kh, kw = window or (1, 1)
    if kh * kw > MOST_TAPS:
        return f"a pooling by up to {MOST_TAPS} values is undone here, one by {window} by the pointwise kernel"
    if (d.x.shape[2] // kh, d.x.shape[3] // kw) != tuple(shape[2:]):
        return f"d has {tuple(d.x.shape[2:])} pixels, which pooling by {window} does not turn into {tuple(shape[2:])}"
    if prod(d.x.shape[1:]) > MOST_ELEMENTS:
        return f"images of up to {MOST_ELEMENTS} elements are served, got {tuple(d.x.shape[1:])}"
    return None


def why_not_operands(
    operands: list[Lazy], weight: Tensor, tied: Tied, shape: Ints, given: Ints, factor: Ints | None
) -> str | None:
    """given: the shape of y."""
    reason = device.why_not_tensors([*(v.x for v in operands), weight])
    reason = reason or why_not_operation(weight, tied, shape, given, factor)
    if reason is not None:
        return reason
    for v in operands:
        if not is_dense(v.x):
            return f"the tensors are not channels_last: strides {v.x.stride()} for sizes {tuple(v.x.shape)}"
        if numbered(v.act, v.args) is None:
            return f"not served: {v.act}{v.args or ''} is not computed from its output"
    return None


def why_not_pair(
    incoming: Incoming, others: list[Lazy], weight: Tensor, tied: Tied, given: Ints, factor: Ints | None
) -> str | None:
    """Of a gradient, from g_u and whatever else; given: the shape of y."""
    shape = tuple(incoming.like.shape)
    parts = [v for v in (incoming.a, incoming.d, None if incoming.g is None else Lazy(incoming.g)) if v is not None]
    wrong = next((tuple(v.x.shape) for v in parts if tuple(v.x.shape) != shape), None)
    if wrong is not None:
        return f"g, a and d need the size of u, got {shape} and {wrong}"
    return why_not_operands([*parts, *others], weight, tied, shape, given, factor)


def check(reason: str | None) -> None:
    if reason is not None:
        raise ValueError(reason)


def is_dense(t: Tensor) -> bool:
    """Whether the pixels of every image lie beside each other, channels innermost; images may lie apart."""
    _, c, h, w = t.shape
    wanted = ((c, 1), (h, w * c), (w, c))
    return all(n == 1 or stride == own for (n, own), stride in zip(wanted, t.stride()[1:], strict=True))


# ------------------------------------------------------------------------------------------- what kernels are handed


def as_lazy(t: Lazy | Tensor) -> Lazy:
    return t if isinstance(t, Lazy) else Lazy(t)


def folded_weight(weight: Tensor, tied: Tied, factor: Ints | None) -> tuple[Tensor, Tied]:
    return (weight, tied) if factor is None else (fold(weight, factor), replace(tied, stride=factor))


def kind_of(weight: Tensor) -> str:
    """How operands are multiplied: half, tf32 or ieee."""
    if weight.dtype != torch.float32:
        return "half"
    precision = torch.backends.cudnn.conv.fp32_precision  # type: ignore[attr-defined]
    return "tf32" if precision == "tf32" else "ieee"


def taps_of(weight: Tensor) -> int:
    return prod(weight.shape[2:])


def phases_inside(weight: Tensor, tied: Tied) -> bool:
    """Whether a stride's phases are columns: few of them, and all with as many taps, so that none meets a zero."""
    even = all(k % s == 0 for k, s in zip(weight.shape[2:], tied.stride, strict=True))
    return even and prod(tied.stride) > 1 and prod(tied.stride) * weight.shape[1] <= 64


def sizes_of(shape: Ints, given: Ints, weight: Tensor, tied: Tied) -> tuple[dict[str, int], Ints]:
    """Channels, and sizes of images with the padding before them, as the kernels take them."""
    channels = {"C_OUT": given[1], "C_IN": shape[1], "CG_OUT": given[1] // tied.groups, "CG_IN": weight.shape[1]}
    return channels, (*given[2:], *shape[2:], *(p[0] for p in tied.padding))


def kernel_sizes(weight: Tensor, tied: Tied) -> dict[str, int]:
    return {"KH": weight.shape[2], "KW": weight.shape[3], "SH": tied.stride[0], "SW": tied.stride[1]}


def blocks_of(own: Gemm, kind: str, channels: int) -> dict[str, Any]:
    """Blocks and options, for taps of so many channels."""
    precision = "tf32" if kind == "tf32" else "ieee"
    return {"FLAT": channels < configs.FEW, "PRECISION": precision, **own.blocks, **own.options}


def handed_incoming(incoming: Incoming) -> tuple[tuple[Any, ...], Ints, dict[str, Any]]:
    """g_u: pointers and parameters, batch strides, constants."""
    a, d = incoming.a, incoming.d
    a_x, _, _, _, a_p, a_known = _handed(a or Lazy(incoming.like), "A_")
    d_x, d_scale, d_shift, _, d_p, d_known = _handed(d or Lazy(incoming.like), "D_")
    pointers = (
        incoming.g, a_x if a else None, *a_p, d_x if d else None, d_scale, d_shift, *d_p,
        None if incoming.c2 is None else incoming.c2.float(),
    )  # fmt: skip
    strides = tuple(0 if t is None else t.stride(0) for t in (incoming.g, a_x if a else None, d_x if d else None))
    return pointers, strides, {**a_known, **d_known}


def empty_image(like: Tensor, shape: Ints) -> Tensor:
    return torch.empty(shape, dtype=like.dtype, device=like.device, memory_format=torch.channels_last)
