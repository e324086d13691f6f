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
from .fused import Fused, Incoming
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


class Ran(NamedTuple):
    """a as the kernels read it, the tensor to keep; and what `compare` gives, where the same kernel gave it."""

    reading: phi.Reading
    kept: Tensor
    loss: Tensor | None = None
    source: Tensor | None = None


def run(
    kernels: Family, r: Reverse, s: Tensor | None = None, *, below: Layer | None = None, minus: Tensor | None = None
) -> Ran:
    """s is what `source` gives, if it is there already; `below` and `minus` are those of `compare`."""
    factor = factor_of(r)
    if kernels.fused is not None and kernels.fused.takes("forward", r.weight, r.layer.tied, factor):
        found = _run_fused(kernels, kernels.fused, r, s, factor, below, minus)
        if found is not None:
            return found
    s = spread(source(kernels, r) if s is None else s, r, factor)
    u = few_channels.forward(kernels, s, r.weight, r.layer.tied, r.layer.input_shape(tuple(r.d.x.shape)), factor)
    del s
    own = r.layer.latent
    reading = phi.read(kernels, u, own, r.params, done=False)
    if phi.writes_result(own, pooled=True):
        a = kernels.materialise(reading.lazy, in_place=True)[0]
        reading = reading._replace(lazy=reading.lazy._replace(x=made(a), done=True))
    return Ran(reading, u if reading.entries is not None else reading.lazy.x)


def _run_fused(
    kernels: Family,
    fused: Fused,
    r: Reverse,
    s: Tensor | None,
    factor: Ints | None,
    below: Layer | None,
    minus: Tensor | None,
) -> Ran | None:
    """The same in one kernel, but for what is behind a norm's statistics; None where none is taken."""
    own, (known, window) = r.layer.latent, pooling.window_of(r.layer.pre)
    act, args = _activation(r)
    compared = act is not None and known and r.layer.compare
    goes_on = compared and below is not None and on_matrix(below, r.d.x)
    y, bias = _read(kernels, r, s, factor)
    done = phi.writes_result(own, pooled=True)
    found = fused.forward(
        y,
        r.weight,
        r.layer.tied,
        r.layer.input_shape(tuple(r.d.x.shape)),
        bias=bias,
        factor=factor,
        act=act or "identity",
        args=args,
        keep="a" if done else "u",
        d=r.d if compared else None,
        window=window if compared else None,
        source=goes_on and (minus is not None or act != "identity"),
        minus=minus if goes_on else None,
        norm=phi.affine_of(own, r.params),
    )
    if found is None:
        return None
    kept = made(found.kept)
    return Ran(phi.read(kernels, kept, own, r.params, done=done, norm=found.norm), kept, found.loss, found.source)


def _read(kernels: Family, r: Reverse, s: Tensor | None, factor: Ints | None) -> tuple[Lazy, Tensor | None]:
    """What a fused kernel reads as y, and the bias that it subtracts."""
    if s is None and r.repeats and (factor is not None or not r.undo):
        return r.y, r.bias
    return Lazy(spread(source(kernels, r) if s is None else s, r, factor)), None


def _activation(r: Reverse) -> tuple[str | None, tuple[object, ...]]:
    """Of a φ that is an activation and nothing else; (None, ()) for another one."""
    own = phi.parts(r.layer.latent)
    if own is None or own.norm is not None:
        return None, ()
    return ("identity", ()) if own.act is None else (own.act.name, own.act.args)


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
    c2, factor, found = c2 if r.layer.compare else None, factor_of(r), None
    params: list[Tensor | None] = []
    g_u = None if loss else _unwritten(r, reading.lazy, g, c2)
    weight = weight_fused(kernels, r, g_u, factor) if needs_weight else None
    g_s, bias = source_fused(kernels, r, g_u, factor, needs_y, needs_bias) if needs_y or needs_bias else (None, None)
    pair = None
    left = (needs_y and g_s is None) or (needs_bias and bias is None) or (needs_weight and weight is None)
    if left or loss or kernels.fused is None or g_u is None:
        grad = _to_u(kernels, r, reading.lazy, g, c2, loss=loss)
        written, params, _ = phi.backward(kernels, grad, kept, own, r.params, reading)
        found = grad.loss
        del grad, g
        g_u = Incoming(written)
        if needs_weight and weight is None:
            weight = weight_fused(kernels, r, g_u, factor)
        if needs_weight and weight is None:  # first: a library reorders s for it, and g_s is not there yet
            pair = Pair(written, spread(source(kernels, r), r, factor))
            if factor is not None or not (hold and joining_pays(pair, r.weight, r.layer.tied)):
                weight, pair = few_channels.weight_gradient(kernels, pair, r.weight, r.layer.tied, factor), None
        if (needs_y and g_s is None) or (needs_bias and bias is None):
            g_s, bias = source_fused(kernels, r, g_u, factor, needs_y, needs_bias)
        if (needs_y and g_s is None) or (needs_bias and bias is None):
            g_s = few_channels.source_gradient(kernels, written, r.weight, r.layer.tied, factor)
    if needs_bias and bias is None and g_s is not None:
        sums = kernels.channel_sum(g_s) if on_matrix(r.layer, g_s) else over_channels(g_s, r.layer)
        bias = sums.neg_()
    if needs_y and g_s is not None and factor is None and r.undo:
        g_s = undo.adjoint(g_s, whole(kernels, r.y), r.undo, r.shape)
    return Grads(g_s if needs_y else None, weight, pair, bias, params, found)


def _unwritten(r: Reverse, a: Lazy, g: Tensor | None, c2: Tensor | None) -> Incoming | None:
    """The gradient of u as fused kernels compute it where they read it; None where it has to be written first."""
    known, window = pooling.window_of(r.layer.pre)
    if _activation(r)[0] is None or (c2 is not None and (not known or window is not None)):
        return None
    return Incoming(g, a, None if c2 is None else r.d, c2)


def weight_fused(kernels: Family, r: Reverse, g_u: Incoming | None, factor: Ints | None) -> Tensor | None:
    """The weight's gradient by a fused kernel, where one is taken."""
    if kernels.fused is None or g_u is None or not kernels.fused.takes("weight", r.weight, r.layer.tied, factor):
        return None
    y, bias = _read(kernels, r, None, factor)
    return kernels.fused.weight_gradient(r.weight, r.layer.tied, reverse=(g_u, y, bias), factor=factor)


def source_fused(
    kernels: Family, r: Reverse, g_u: Incoming | None, factor: Ints | None, needs_s: bool, needs_bias: bool
) -> tuple[Tensor | None, Tensor | None]:
    """The gradients of s (before its pooling is undone where that is folded) and of the bias by a fused kernel."""
    if kernels.fused is None or g_u is None or not kernels.fused.takes("source", r.weight, r.layer.tied, factor):
        return None, None
    shape = r.shape if factor is None else tuple(r.y.x.shape)
    found = kernels.fused.source_gradient(
        g_u, r.weight, r.layer.tied, shape, factor=factor, needs_source=needs_s, bias=needs_bias
    )
    return (None, None) if found is None else found


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
