"""A tied convolution with one channel, or a few, on one side: by the kernels of a pointwise family, else by a library.

Between an image of few channels and many of them, a library spends its time with moving numbers. All four maps are a
convolution of the narrow image, or its weight's gradient:

    W p, the gradient of s       the operation itself; with up-sampling folded, strided with the folded weight
    Wᵀ s, s narrow               a convolution of s with W turned round, padded by d·(k - 1) - p
    ∂/∂W, p narrow               Σ_q p[q + t] g[q]
    ∂/∂W, g narrow               Σ_q g[q + t'] p[q], the taps turned round likewise
"""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache

from torch import Tensor

from . import transposed
from .layer import Ints, Tied
from .lazy import Lazy, made
from .pointwise import Family
from .transposed import fold, fold_adjoint
from .weight_gradient import Pair
from .weight_gradient import weight_gradient as by_library

FEW = 4  # channels, up to which the image kernels are taken; `python -m bench.forms --only few` times both


def forward(kernels: Family, s: Tensor, weight: Tensor, tied: Tied, shape: Ints, factor: Ints | None = None) -> Tensor:
    """u = Wᵀ s of `shape`. With `factor`, s stands for itself repeated by these factors."""
    turned = _turned(tied, tuple(weight.shape[2:])) if factor is None and 0 < weight.shape[0] <= FEW else None
    if turned is not None:
        found = kernels.convolved(s, weight.flip(2, 3).transpose(0, 1), None, turned)
        if found is not None and tuple(found.x.shape) == tuple(shape):
            return made(kernels.materialise(found)[0])
    return transposed.forward(s, weight, tied, shape, factor)


def source_gradient(kernels: Family, g: Tensor, weight: Tensor, tied: Tied, factor: Ints | None = None) -> Tensor:
    """∂/∂s from g = ∂/∂u."""
    if tied.dims == 2 and 0 < weight.shape[1] <= FEW:
        own, kind = (weight, tied) if factor is None else (fold(weight, factor), tied.with_stride(factor))
        found = kernels.convolved(g, own, None, kind)
        if found is not None:
            return made(kernels.materialise(found)[0])
    return transposed.source_gradient(g, weight, tied, factor)


def weight_gradient(
    kernels: Family, pair: Pair, weight: Tensor, tied: Tied, factor: Ints | None = None, add_to: Tensor | None = None
) -> Tensor:
    """∂/∂W in the shape of the weight; with `add_to` the sum of both, in its memory."""
    found = None
    if tied.dims == 2 and 0 < weight.shape[1] <= FEW:
        found = _of_image(kernels, pair.read, pair.grad, weight, tied, factor)
    elif tied.dims == 2 and 0 < weight.shape[0] <= FEW and factor is None:
        found = _of_narrow_gradient(kernels, pair, weight, tied)
    if found is None:
        return by_library(pair, weight, tied, factor, add_to)
    return found if add_to is None else add_to.add_(found)


def _of_image(
    kernels: Family, image: Tensor, g: Tensor, weight: Tensor, tied: Tied, factor: Ints | None
) -> Tensor | None:
    if factor is None:
        return _multiplied(kernels, image, g, weight, tied)
    folded = weight.new_empty(*weight.shape[:2], *(k + f - 1 for k, f in zip(weight.shape[2:], factor, strict=True)))
    found = _multiplied(kernels, image, g, folded, tied.with_stride(factor))
    return None if found is None else fold_adjoint(found, factor)


def _of_narrow_gradient(kernels: Family, pair: Pair, weight: Tensor, tied: Tied) -> Tensor | None:
    turned = _turned(tied, tuple(weight.shape[2:]))
    if turned is None:
        return None
    found = _multiplied(kernels, pair.grad, pair.read, weight.transpose(0, 1), turned)
    return None if found is None else found.flip(2, 3).transpose(0, 1)


def _multiplied(kernels: Family, image: Tensor, g: Tensor, weight: Tensor, tied: Tied) -> Tensor | None:
    found = kernels.grad_weight(Lazy(g), None, None, None, None, g, image, weight, tied)
    return None if found is None else found[0]


@lru_cache(maxsize=4096)
def _turned(tied: Tied, kernel: Ints) -> Tied | None:
    """The convolution that the transposed one is, where it is one: stride 1, no more padding than the kernel has."""
    if tied.dims != 2 or max(tied.stride) > 1 or tied.groups > 1:
        return None
    reach = [d * (k - 1) for d, k in zip(tied.dilation, kernel, strict=True)]
    padding = tuple((r - before, r - after) for r, (before, after) in zip(reach, tied.padding, strict=True))
    return None if min(min(p) for p in padding) < 0 else replace(tied, padding=padding)
