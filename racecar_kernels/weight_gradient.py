"""∂/∂W of a tied operation: the sum of what its forward and its reverse give.

Both have the same form. With p what the operation read and g the gradient of what it gave (in reverse: the gradient of
u = Wᵀ s, and s), ∂/∂W is bilinear in them:

* a linear layer: gᵀ p,
* a convolution: a library's kernel; or, where there are fewer pixels than channels, gᵀ cols(p) with every pixel's
  neighbourhood as a row: the result then has the layout of a channels_last weight, is not reordered, and a second
  product is added to it in the same pass; or what `single_channel.py` does with one channel on one side.
"""

from __future__ import annotations

from math import prod
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from . import single_channel
from .layer import Ints, Tied
from .layout import memory_format_of
from .transposed import fold_adjoint, padded, source_gradient

aten = torch.ops.aten


class Pair(NamedTuple):
    """What the operation read, and the gradient of what it gave."""

    read: Tensor
    grad: Tensor


def backward(
    g: Tensor,
    s: Tensor,
    weight: Tensor,
    tied: Tied,
    factor: Ints | None = None,
    *,
    needs_source: bool = True,
    needs_weight: bool = True,
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of s and of the weight from g = ∂/∂u. With `factor`, both sums over the repetition are included."""
    # the weight's first: a library reorders s for it, and the gradient of s need not be there yet
    grad_w = weight_gradient(Pair(g, s), weight, tied, factor) if needs_weight else None
    return source_gradient(g, weight, tied, factor) if needs_source else None, grad_w


def weight_gradient(
    pair: Pair, weight: Tensor, tied: Tied, factor: Ints | None = None, add_to: Tensor | None = None
) -> Tensor:
    """∂/∂W in the shape of the weight; with `add_to` the sum of both, in its memory.

    With `factor`, `pair.grad` stands for itself repeated by these factors.
    """
    if factor is not None:
        folded = weight.new_empty(
            *weight.shape[:2], *(k + f - 1 for k, f in zip(weight.shape[2:], factor, strict=True))
        )
        found = fold_adjoint(by_convolution(pair, folded, tied.with_stride(factor)), factor)
    elif tied.dims == 0 or product_pays(pair, weight, tied):
        return by_product(pair, weight, tied, add_to)
    elif single_channel.weight_gradient_serves(*pair, weight, tied):
        found = single_channel.weight_gradient(*pair, weight, tied)
    else:
        found = by_convolution(pair, weight, tied)
    return found if add_to is None else add_to.add_(found)


def joined(a: Pair, b: Pair) -> Pair:
    """Both as one, whose gradient is the sum of theirs: one pass over the weight instead of two."""
    return Pair(torch.cat((a.read, b.read)), torch.cat((a.grad, b.grad)))


def joining_pays(pair: Pair, weight: Tensor, tied: Tied) -> bool:
    """Whether to wait for the second pair: where the weight is what there is most of, to multiply as to keep.

    The bounds here and in `product_pays` are what `python -m bench.forms --only joined` measured.
    """
    return tied.dims > 0 and weight.numel() > pair.read.numel() + pair.grad.numel()


def product_pays(pair: Pair, weight: Tensor, tied: Tied) -> bool:
    """Whether one matrix product beats the library's kernel: wide layers on few pixels, in float32 on a CPU.

    Accumulating in the result would lose digits in types that are narrower than what is accumulated in.
    """
    pixels = pair.grad.numel() // weight.shape[0]
    return (
        tied.dims == 2
        and tied.groups == 1
        and pair.grad.device.type == "cpu"
        and pair.grad.dtype in (torch.float32, torch.float64)
        and weight.shape[1] >= 64
        and pixels <= min(weight.shape[:2])
    )


def by_product(pair: Pair, weight: Tensor, tied: Tied, add_to: Tensor | None = None) -> Tensor:
    """gᵀ cols(p), its columns in the order of the weight's memory."""
    if tied.dims == 0:
        g, p = pair.grad.reshape(-1, pair.grad.shape[-1]), pair.read.reshape(-1, pair.read.shape[-1])
        return torch.mm(g.t(), p) if add_to is None else add_to.addmm_(g.t(), p)
    last = weight.is_contiguous(memory_format=torch.channels_last)
    g = pair.grad.permute(0, 2, 3, 1).reshape(-1, weight.shape[0])
    p = columns(pair, tuple(weight.shape[2:]), tied, last=last)
    if add_to is None:
        flat = torch.mm(g.t(), p)
        shape = (weight.shape[0], *weight.shape[2:], weight.shape[1])
        return flat.view(shape).permute(0, 3, 1, 2) if last else flat.view(weight.shape)
    flat = (add_to.permute(0, 2, 3, 1) if last else add_to).reshape(weight.shape[0], -1)
    if flat.data_ptr() != add_to.data_ptr():  # of another layout, so that this is a copy
        return add_to.add_(by_product(pair, weight, tied))
    flat.addmm_(g.t(), p)
    return add_to


def columns(pair: Pair, kernel: Ints, tied: Tied, *, last: bool) -> Tensor:
    """(pixels of g, kernel positions and channels), the channels innermost if `last`, else outermost."""
    p, padding = padded(pair.read, tied)
    p = F.pad(p, [padding[1], padding[1], padding[0], padding[0]]) if max(padding) else p
    n, c = p.shape[:2]
    rows, wide = pair.grad.shape[2:]
    sn, sc, sh, sw = p.stride()
    place = (sh * tied.dilation[0], sw * tied.dilation[1])
    size, stride = ((*kernel, c), (*place, sc)) if last else ((c, *kernel), (sc, *place))
    every = p.as_strided((n, rows, wide, *size), (sn, sh * tied.stride[0], sw * tied.stride[1], *stride))
    return every.reshape(n * rows * wide, prod(size))


def by_convolution(pair: Pair, weight: Tensor, tied: Tied) -> Tensor:
    """∂/∂W by a library's kernel."""
    read, padding = padded(pair.read, tied)
    settings = (None, tied.stride, padding, tied.dilation, False, (0,) * tied.dims, tied.groups)
    operands = (pair.grad, read, _clear(weight))
    if read.dtype == torch.bfloat16 and any(k > n for k, n in zip(weight.shape[2:], read.shape[2:], strict=True)):
        # oneDNN leaves taps that never meet the image unwritten in channels_last
        operands = (pair.grad.contiguous(), read.contiguous(), weight.contiguous())
    found: Tensor = aten.convolution_backward(*operands, *settings, (False, True, False))[1]
    return found


def _clear(weight: Tensor) -> Tensor:
    """The weight in strides that ATen reads in one way only.

    Dimensions of size 1 may have any stride; then one part of ATen takes a weight for channels_last, another does not,
    and its gradient fails ("grad_weight must be contiguous").
    """
    if weight.dim() != 4 or weight.is_contiguous() or memory_format_of(weight) == torch.channels_last:
        return weight
    return weight.contiguous()
