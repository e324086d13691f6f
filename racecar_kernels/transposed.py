"""The transposed tied operation u = Wᵀ s in plain PyTorch, and its gradient of s; that of W is in `weight_gradient.py`.

Everything is stated as the adjoint of the *forward* operation, so sizes, `same` padding and padding modes come back
exactly. Three forms of a transposed convolution whose source is repeated by whole factors f (a pooling undone):

* plain: repeat the source, transpose with stride 1.
* strided: one transposed convolution of the small source with stride f and a folded kernel of k + f - 1 taps, the sum
  of W's f shifts: W_f[t] = Σ_{i<f} W[t - i].
* polyphase: every output phase r is a dense convolution with the taps W_f[f·l + r]: one stride-1 convolution to f^d
  times as many channels, interleaved.

All are the same linear map; at 3x3 and f = 2 the folded forms multiply 2.25 times less. Folded weights are never kept.
"""

from __future__ import annotations

from itertools import product
from math import prod

import torch
from torch import Tensor
from torch.nn import functional as F

from . import single_channel
from .layer import Ints, Tied

aten = torch.ops.aten

CONV = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
_CONV_TRANSPOSE = {1: F.conv_transpose1d, 2: F.conv_transpose2d, 3: F.conv_transpose3d}
_PAD_BACKWARD = {
    "reflect": {
        1: aten.reflection_pad1d_backward,
        2: aten.reflection_pad2d_backward,
        3: aten.reflection_pad3d_backward,
    },
    "replicate": {
        1: aten.replication_pad1d_backward,
        2: aten.replication_pad2d_backward,
        3: aten.replication_pad3d_backward,
    },
}


def forward(s: Tensor, weight: Tensor, tied: Tied, shape: Ints, factor: Ints | None = None) -> Tensor:
    """u = Wᵀ s of `shape`. With `factor`, s stands for itself repeated by these factors."""
    if tied.dims == 0:
        return torch.matmul(s, weight)
    if factor is None:
        return plain(s, weight, tied, shape)
    strided = tied.with_stride(factor)
    if single_channel.transposed_serves(s, weight, strided):
        return single_channel.transposed(s, fold(weight, factor), strided, shape)
    if polyphase_pays(weight, tied):
        return polyphase(s, weight, tied, shape, factor)
    return plain(s, fold(weight, factor), strided, shape)


def source_gradient(g: Tensor, weight: Tensor, tied: Tied, factor: Ints | None = None) -> Tensor:
    """∂/∂s from g = ∂/∂u: the operation itself, without its bias."""
    if tied.dims == 0:
        return F.linear(g, weight)
    if factor is not None:
        weight, tied = fold(weight, factor), tied.with_stride(factor)
    g, padding = padded(g, tied)
    return CONV[tied.dims](g, weight, None, tied.stride, padding, tied.dilation, tied.groups)


def can_fold(tied: Tied) -> bool:
    """Folding is written for the convolutions behind which networks pool: stride 1, no dilation, zero padding."""
    return tied.dims > 0 and tied.padding_mode == "zeros" and max(tied.stride) == 1 and max(tied.dilation) == 1


def folding_pays(source: Ints, weight: Ints, factor: Ints) -> bool:
    """Whether multiplying less outweighs folding the weight, which is paid once however many pixels there are.

    The bounds here and in `polyphase_pays` are what `python -m bench.forms --only forms` measured on a CPU in float32.
    """
    plain = prod(f * k for f, k in zip(factor, weight[2:], strict=True))
    folded = prod(k + f - 1 for f, k in zip(factor, weight[2:], strict=True))
    pixels = prod(source) // source[1]
    return folded < 0.8 * plain and pixels >= 384


def polyphase_pays(weight: Tensor, tied: Tied) -> bool:
    """With few channels in its result a strided transposed convolution idles, and interleaving the phases is cheap."""
    return tied.groups == 1 and tied.dims < 3 and weight.shape[1] <= 8


def fold(weight: Tensor, factor: Ints) -> Tensor:
    """W_f: the sum of W's shifts by 0 .. f-1 in every spatial dimension, k + f - 1 taps."""
    if len(factor) == 2 and max(factor) <= 2:  # one pass: windows of f over W with f - 1 zeros around it
        return F.avg_pool2d(weight, factor, 1, [f - 1 for f in factor], divisor_override=1)
    dtype = weight.dtype
    weight = weight.to(torch.float32) if dtype.itemsize < 4 else weight
    for i, f in enumerate(factor):
        k = weight.shape[2 + i]
        out = weight.new_zeros(*weight.shape[: 2 + i], k + f - 1, *weight.shape[3 + i :])
        for shift in range(f):
            out.narrow(2 + i, shift, k).add_(weight)
        weight = out
    return weight.to(dtype)


def fold_adjoint(grad: Tensor, factor: Ints) -> Tensor:
    """∂/∂W from ∂/∂W_f: the sum over windows of f."""
    if len(factor) == 2:
        return F.avg_pool2d(grad, factor, 1, divisor_override=1)
    dtype = grad.dtype
    grad = grad.to(torch.float32) if dtype.itemsize < 4 else grad
    for i, f in enumerate(factor):
        k = grad.shape[2 + i] - f + 1
        total = grad.narrow(2 + i, 0, k).clone()
        for shift in range(1, f):
            total.add_(grad.narrow(2 + i, shift, k))
        grad = total
    return grad.to(dtype)


def plain(s: Tensor, weight: Tensor, tied: Tied, shape: Ints) -> Tensor:
    """u = Wᵀ s by a transposed convolution, or by what `single_channel.py` does where u has one channel."""
    if single_channel.transposed_serves(s, weight, tied):
        return single_channel.transposed(s, weight, tied, shape)
    dims, kernel = tied.dims, weight.shape[2:]
    if tied.padding_mode == "zeros":
        cut = tied.padding
    else:  # the padded image comes back whole; its borders are then sent where they were read
        cut = ((0, 0),) * dims
        shape = (*shape[:2], *(n + sum(p) for n, p in zip(shape[2:], tied.padding, strict=True)))
    padding = [min(p) for p in cut]
    base = [
        (n - 1) * st - 2 * p + d * (k - 1) + 1
        for n, st, p, d, k in zip(s.shape[2:], tied.stride, padding, tied.dilation, kernel, strict=True)
    ]
    start = [before - p for (before, _), p in zip(cut, padding, strict=True)]
    # rows at the end that the forward's stride never reached come back as zeros
    missing = [max(0, at + n - have) for at, n, have in zip(start, shape[2:], base, strict=True)]
    u = _CONV_TRANSPOSE[dims](s, weight, None, tied.stride, padding, missing, tied.groups, tied.dilation)
    if u.shape[2:] != shape[2:]:  # never a view of something larger: it may be kept
        layout = torch.channels_last if dims == 2 and not u.is_contiguous() else torch.contiguous_format
        for i in range(dims):
            u = u.narrow(2 + i, start[i], shape[2 + i])
        u = u.contiguous(memory_format=layout)
    return u if tied.padding_mode == "zeros" else _pad_adjoint(u, tied)


def padded(g: Tensor, tied: Tied) -> tuple[Tensor, Ints]:
    """g with the padding that a convolution cannot add itself, and the padding that it can."""
    even = tuple(before for before, _ in tied.padding)
    if tied.padding_mode == "zeros" and all(p[0] == p[1] for p in tied.padding):
        return g, even
    widths = [n for before_after in reversed(tied.padding) for n in before_after]
    mode = "constant" if tied.padding_mode == "zeros" else tied.padding_mode
    return F.pad(g, widths, mode=mode), (0,) * tied.dims


def _pad_adjoint(u: Tensor, tied: Tied) -> Tensor:
    """Adds the padded borders of u back to the places that they were copied from."""
    size = [n - sum(p) for n, p in zip(u.shape[2:], tied.padding, strict=True)]
    if tied.padding_mode in _PAD_BACKWARD:
        widths = [n for before_after in reversed(tied.padding) for n in before_after]
        inside = u.new_empty(*u.shape[:2], *size)  # the kernel reads its shape only
        return _PAD_BACKWARD[tied.padding_mode][tied.dims](u.contiguous(), inside, widths)
    for i, (before, after) in enumerate(tied.padding):  # circular
        dim, n = 2 + i, size[i]
        inside = u.narrow(dim, before, n).clone()
        if before:
            inside.narrow(dim, n - before, before).add_(u.narrow(dim, 0, before))
        if after:
            inside.narrow(dim, 0, after).add_(u.narrow(dim, before + n, after))
        u = inside
    return u


def polyphase(s: Tensor, weight: Tensor, tied: Tied, shape: Ints, factor: Ints) -> Tensor:
    dims = tied.dims
    taps = [-(-(k + f - 1) // f) for k, f in zip(weight.shape[2:], factor, strict=True)]
    last = dims == 2 and not (s.is_contiguous() and weight.is_contiguous())
    layout = torch.channels_last if last else torch.contiguous_format
    phases = _phase_weights(fold(weight, factor), factor, taps).contiguous(memory_format=layout)
    dense = CONV[dims](s, phases, None, 1, [n - 1 for n in taps])
    u = torch.empty(shape, dtype=s.dtype, device=s.device, memory_format=layout)
    channels = weight.shape[1]
    for phase, r in enumerate(product(*map(range, factor))):
        part = dense.narrow(1, phase * channels, channels)
        out = u
        for i in range(dims):  # row x of u is row x + padding of the full result: f·t + r
            f, before = factor[i], tied.padding[i][0]
            t = max(0, -(-(before - r[i]) // f))
            first = f * t + r[i] - before
            count = len(range(first, shape[2 + i], f))
            out = out[(slice(None),) * (2 + i) + (slice(first, None, f),)]
            part = part.narrow(2 + i, t, count)
        out.copy_(part)
    return u


def _phase_weights(folded: Tensor, factor: Ints, taps: list[int]) -> Tensor:
    """(f^d·C_in, C_out, *taps): the folded kernel's taps of every phase, as weights of an ordinary convolution."""
    dims = len(factor)
    short = [n * f - k for n, f, k in zip(taps, factor, folded.shape[2:], strict=True)]
    folded = F.pad(folded, [n for extra in reversed(short) for n in (0, extra)])
    folded = folded.unflatten(-1, (taps[-1], factor[-1])) if dims == 1 else folded
    if dims == 2:
        folded = folded.view(*folded.shape[:2], taps[0], factor[0], taps[1], factor[1])
    steps, rest = [2 + 2 * i for i in range(dims)], [3 + 2 * i for i in range(dims)]
    return folded.flip(steps).permute(*rest, 1, 0, *steps).reshape(-1, folded.shape[0], *taps)
