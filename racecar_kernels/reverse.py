"""One reverse layer, written once over the pointwise family that a backend has.

    s = undo(y) - b,   u = Wᵀ s,   a = φ(u),   loss = Σ (d - undo_pre(a))²

y, d and a are `Lazy`: computed where they are read. Between forward and backward u is kept, or a where φ is written
over it, and the statistics of φ's batch norm; s and the residual are made again where a gradient needs them.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from . import few_channels, phi, pooling, transposed, undo
from .contract import Params
from .layer import Ints, Layer, Pool, Step
from .lazy import Gradient, Lazy
from .lazy import made as made
from .pointwise import Family
from .reference import over_channels
from .weight_gradient import Pair, joining_pays


class Reverse(NamedTuple):
    """The inputs of one reverse layer. `undo` has still to be applied to y; d is what the layer received."""

    layer: Layer
    undo: tuple[Step, ...]
    y: Lazy
    d: Lazy
    weight: Tensor
    bias: Tensor | None
    params: Params

    @property
    def shape(self) -> Ints:
        """Shape of what the layer gave."""
        return self.layer.output_shape(tuple(self.d.x.shape), tuple(self.weight.shape))

    @property
    def repeats(self) -> bool:
        """Whether undoing only repeats values, so that a bias may be subtracted before."""
        return all(isinstance(step, Pool) for step in self.undo)


class Grads(NamedTuple):
    """Gradients of y, the weight (or the pair whose product it is), the bias, φ's tensors; and Σ (d - undo(a))²."""

    y: Tensor | None
    weight: Tensor | None
    pair: Pair | None
    bias: Tensor | None
    params: list[Tensor | None]
    loss: Tensor | None


def whole(kernels: Family, lazy: Lazy) -> Tensor:
    """`lazy` as a tensor."""
    return made(kernels.materialise(lazy)[0])


def on_matrix(layer: Layer, t: Tensor) -> bool:
    """Whether the bias of the layer belongs to dimension 1, where the kernels look for channels."""
    return layer.tied.dims > 0 or t.dim() == 2


# ------------------------------------------------------------------------------------------- forward


def source(kernels: Family, r: Reverse) -> Tensor:
    """y - b, as it is before its pooling is undone."""
    y = r.y
    if not r.repeats:  # a maximum has to be found before the bias is subtracted
        y = Lazy(undo.apply(whole(kernels, y), r.undo, r.shape))
    if r.bias is None:
        return whole(kernels, y)
    if not on_matrix(r.layer, y.x):
        return whole(kernels, y) - r.bias
    return made(kernels.materialise(y, minus=r.bias)[0])


def factor_of(r: Reverse) -> Ints | None:
    """The factors by which y is repeated, where folding them into the weight pays."""
    if len(r.undo) != 1 or not r.repeats:
        return None
    return _factor(r.layer, r.undo, tuple(r.y.x.shape), tuple(r.d.x.shape), tuple(r.weight.shape))


@lru_cache(maxsize=4096)
def _factor(layer: Layer, steps: tuple[Step, ...], small: Ints, d: Ints, weight: Ints) -> Ints | None:
    factor = undo.whole_factors(steps, small, layer.output_shape(d, weight))
    if factor is None or not transposed.can_fold(layer.tied) or len(factor) != layer.tied.dims:
        return None
    return factor if transposed.folding_pays(small, weight, factor) else None


def spread(s: Tensor, r: Reverse, factor: Ints | None) -> Tensor:
    """What `source` gave, with its pooling undone unless that is folded into the weight."""
    return s if factor is not None or not r.undo or not r.repeats else undo.apply(s, r.undo, r.shape)


def run(kernels: Family, r: Reverse, s: Tensor | None = None) -> tuple[phi.Reading, Tensor]:
    """a as the kernels read it, and the tensor to keep; s is what `source` gives, if it is there already."""
    factor = factor_of(r)
    s = spread(source(kernels, r) if s is None else s, r, factor)
    u = few_channels.forward(kernels, s, r.weight, r.layer.tied, r.layer.input_shape(tuple(r.d.x.shape)), factor)
    del s
    own = r.layer.latent
    reading = phi.read(kernels, u, own, r.params, done=False)
    if phi.writes_result(own, pooled=True):
        a = kernels.materialise(reading.lazy, in_place=True)[0]
        reading = reading._replace(lazy=reading.lazy._replace(x=made(a), done=True))
    return reading, u if reading.entries is not None else reading.lazy.x


def resume(kernels: Family, layer: Layer, params: Params, kept: Tensor, stats: list[Tensor]) -> phi.Reading:
    """a again, from what was kept."""
    own = layer.latent
    return phi.read(kernels, kept, own, params, stats, done=phi.writes_result(own, pooled=True))


def wide_of(x: Tensor) -> torch.dtype:
    """Losses are accumulated and reported in float32, or in float64 where the layer is."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def compare(
    kernels: Family, r: Reverse, a: Lazy, below: Layer | None, minus: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """Σ (d - undo(a))²; and a - minus, the source of the reverse layer `below`, where both come from one pass."""
    known, window = pooling.window_of(r.layer.pre)
    if not r.layer.compare:
        return torch.zeros((), dtype=wide_of(a.x), device=a.x.device), None
    if not known:
        return undo.sum_of_squares(whole(kernels, r.d), whole(kernels, a), r.layer.pre), None
    if below is None or not on_matrix(below, a.x) or (minus is None and a.as_it_is):
        return kernels.sum_of_squares(r.d, a, window), None
    return kernels.compare(r.d, a, window, minus=minus)


# ------------------------------------------------------------------------------------------- backward


def target_gradient(kernels: Family, r: Reverse, a: Lazy, c2: Tensor) -> Tensor:
    """c2 (d - undo(a)), the residual's gradient of d."""
    known, window = pooling.window_of(r.layer.pre)
    if known:
        return kernels.grad_forward(Lazy(r.d.x), a, window, c2, None, None).g
    return made(undo.residual_backward(c2, r.d.x, whole(kernels, a), r.layer.pre, target_needs_grad=True)[0])


def backward(
    kernels: Family,
    r: Reverse,
    reading: phi.Reading,
    kept: Tensor,
    g: Tensor | None,
    c2: Tensor | None,
    *,
    needs_y: bool,
    needs_weight: bool,
    needs_bias: bool,
    loss: bool = False,
    hold: bool = False,
) -> Grads:
    """From ∂/∂a, which is written over, and from c2, twice the gradient of the sum of squares; either may be None.

    `loss`: also the sum of squares itself. `hold`: the weight's gradient may be left as a pair, to be multiplied
    together with another one.
    """
    own, needs_bias = r.layer.latent, needs_bias and r.bias is not None
    grad = _to_u(kernels, r, reading.lazy, g, c2 if r.layer.compare else None, loss=loss)
    g_u, params, _ = phi.backward(kernels, grad, kept, own, r.params, reading)
    found = grad.loss
    del grad, g
    weight = pair = g_s = bias = None
    factor = factor_of(r)
    if needs_weight:  # first: a library reorders s for it, and the gradient of s need not be there yet
        pair = Pair(g_u, spread(source(kernels, r), r, factor))
        if factor is not None or not (hold and joining_pays(pair, r.weight, r.layer.tied)):
            weight, pair = few_channels.weight_gradient(kernels, pair, r.weight, r.layer.tied, factor), None
    if needs_y or needs_bias:
        g_s = few_channels.source_gradient(kernels, g_u, r.weight, r.layer.tied, factor)
    if needs_bias and g_s is not None:
        sums = kernels.channel_sum(g_s) if on_matrix(r.layer, g_s) else over_channels(g_s, r.layer)
        bias = sums.neg_()
    if needs_y and g_s is not None and factor is None and r.undo:
        g_s = undo.adjoint(g_s, whole(kernels, r.y), r.undo, r.shape)
    return Grads(g_s if needs_y else None, weight, pair, bias, params, found)


def _to_u(kernels: Family, r: Reverse, a: Lazy, g: Tensor | None, c2: Tensor | None, *, loss: bool) -> Gradient:
    """The gradient through the residual and the activation."""
    known, window = pooling.window_of(r.layer.pre)
    found = None
    if c2 is not None and not known:
        value, d = whole(kernels, a), whole(kernels, r.d)
        found = undo.sum_of_squares(d, value, r.layer.pre) if loss else None
        off = undo.residual_backward(c2, d, value, r.layer.pre, target_needs_grad=False)[1]
        g, c2 = off if g is None else g.add_(off), None
    if known and c2 is not None:
        return kernels.grad_reverse(r.d, a, window, c2, g, in_place=g is not None, loss=loss)
    return kernels.grad_reverse(a, a, None, None, g, in_place=g is not None)._replace(loss=found)
