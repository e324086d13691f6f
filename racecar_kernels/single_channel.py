"""One channel on one side of a convolution: a library's kernels idle there, a matrix product and k² shifts do not.

Between an image of one channel and C of them a convolution multiplies every pixel's C values with C × k² weights; the
rest is moving the k² results (or the one channel) into place.
"""

from __future__ import annotations

from itertools import product

import torch
from torch import Tensor
from torch.nn import functional as F

from .layer import Ints, Tied

LEAST_PIXELS = 4096  # of the whole batch, from which on a transposed convolution pays
LEAST_READ = 1 << 20  # elements of the many channels, from which on ∂/∂W from one channel to many pays


def _served(wide: Tensor, weight: Tensor, tied: Tied) -> bool:
    return (
        tied.dims == 2
        and tied.groups == 1
        and tied.padding_mode == "zeros"
        and max(weight.shape[:2]) >= 16
        and wide.device.type == "cpu"
        and wide.dtype in (torch.float32, torch.float64)
        and wide.is_contiguous(memory_format=torch.channels_last)
    )


def weight_gradient_serves(read: Tensor, grad: Tensor, weight: Tensor, tied: Tied) -> bool:
    """Whether ∂/∂W has one channel on one side, and is served here.

    What is in the second-level cache a library multiplies as fast, where the one channel is what was read.
    """
    if weight.shape[1] == 1:
        return grad.numel() >= LEAST_READ and max(tied.stride) == 1 and _served(grad, weight, tied)
    return weight.shape[0] == 1 and max(tied.stride) == 1 and _served(read, weight, tied)


def weight_gradient(read: Tensor, grad: Tensor, weight: Tensor, tied: Tied) -> Tensor:
    """∂/∂W[o, c, t] = Σ_q read[c, q] grad[o, q + p - d·t], with the neighbourhoods of the single channel as rows."""
    c_out, c_in, *kernel = weight.shape
    if c_in == 1:  # pixels of grad, and what of read belongs to each
        places = _neighbours(read, tied.padding, tuple(kernel), tied.dilation)
        flat = places @ grad.permute(0, 2, 3, 1).reshape(-1, c_out)
        return flat.t().reshape(c_out, 1, *kernel)
    reach = [d * (k - 1) for d, k in zip(tied.dilation, kernel, strict=True)]
    around = tuple((r - before, r - after) for r, (before, after) in zip(reach, tied.padding, strict=True))
    places = _neighbours(grad, around, tuple(kernel), tied.dilation)  # the other way round: the last tap comes first
    flat = places @ read.permute(0, 2, 3, 1).reshape(-1, c_in)
    return flat.view(*kernel, c_in).flip(0, 1).permute(2, 0, 1).unsqueeze(0)


def _neighbours(single: Tensor, padding: tuple[tuple[int, int], ...], kernel: Ints, dilation: Ints) -> Tensor:
    """(taps, pixels): row t holds the image moved by d·t."""
    image = F.pad(single.squeeze(1), [n for pair in reversed(padding) for n in pair])
    size = [n - d * (k - 1) for n, d, k in zip(image.shape[1:], dilation, kernel, strict=True)]
    sn, sh, sw = image.stride()
    every = image.as_strided((*kernel, image.shape[0], *size), (sh * dilation[0], sw * dilation[1], sn, sh, sw))
    return every.reshape(kernel[0] * kernel[1], -1)


def transposed_serves(s: Tensor, weight: Tensor, tied: Tied) -> bool:
    """Whether u = Wᵀ s has one channel and enough pixels, and is served here."""
    return weight.shape[1] == 1 and s.numel() >= LEAST_PIXELS * s.shape[1] and _served(s, weight, tied)


def transposed(s: Tensor, weight: Tensor, tied: Tied, shape: Ints) -> Tensor:
    """u[stride·q + d·t - p] = Σ W[:, t]ᵀ s[q]: every tap's product with all pixels, moved into place and added."""
    c_out, _, *kernel = weight.shape
    n, _, height, width = s.shape
    taps = (s.permute(0, 2, 3, 1).reshape(-1, c_out) @ weight.reshape(c_out, -1)).view(n, height, width, -1)
    (top, _), (left, _) = tied.padding
    (down, right), (high, wide) = tied.stride, tied.dilation
    rows = max((height - 1) * down + high * (kernel[0] - 1) + 1, top + shape[2])  # rows that no pixel reaches are 0
    columns = max((width - 1) * right + wide * (kernel[1] - 1) + 1, left + shape[3])
    u = s.new_zeros(n, rows, columns)
    for t, (i, j) in enumerate(product(*map(range, kernel))):
        y, x = i * high, j * wide
        u[:, y : y + (height - 1) * down + 1 : down, x : x + (width - 1) * right + 1 : right].add_(taps[..., t])
    u = u[:, top : top + shape[2], left : left + shape[3]]
    cut = u.unsqueeze(1).contiguous(memory_format=torch.channels_last)
    return cut if cut.numel() * cut.element_size() == cut.untyped_storage().nbytes() else cut.clone()
