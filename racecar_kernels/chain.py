"""Forward and reverse of a whole chain, written once over the pointwise family that a backend has.

    d_{m+1} = φ_m( W_m pre_m(d_m) + b_m )                                forward, m = 1 .. n
    a_m     = φ_{m-1}( W_mᵀ (y_m - b_m) ),   loss_m = Σ (d_m - undo_m(a_m))²    reverse

with y_m = undo(a_{m+1}) (full, from y_n = d_{n+1}) or y_m = d_{m+1} (local). Who owns both keeps little: what max
pooling gave and where it took it from are found again from d_m, and under a norm only its input is kept. d and a are
computed where they are read (`Lazy`, `phi.py`). One reverse layer is in `reverse.py`, the backward of all in
`chain_backward.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from . import phi, pooling, reverse, transposed
from .backends import Query, choose
from .contract import Params
from .layer import Chain, Latent, Layer, Step
from .layout import memory_format_of
from .lazy import Lazy, Window
from .pointwise import Family
from .reverse import Reverse, made, whole, wide_of

# Weights of an output channel up to which c is computed again and not kept: the largest tensor of a small network is
# saved, for less than twice the time of reading it (`python -m bench.forms --only first`).
MOST_AGAIN = 12

MaybeTensors = Sequence["Tensor | None"]


class ChainTensors(NamedTuple):
    """The tensors of a chain beside its description; cuts out what belongs to layer m, counted from 0."""

    chain: Chain
    x: Tensor
    weights: Sequence[Tensor]
    biases: MaybeTensors
    params: MaybeTensors

    def latent(self, m: int) -> tuple[tuple[Latent, ...], Params]:
        """φ of layer m's output, and its tensors."""
        own, start, stop = self.chain.cuts[m]
        return own, self.params[start:stop]

    def kernels(self) -> Family:
        """The pointwise family of the backend that serves every layer; ValueError if the one asked for cannot."""
        device, dtype = self.x.device.type, self.x.dtype
        chosen = [choose(Query(layer, device, dtype), self.chain.backend) for layer in self.chain.layers]
        return chosen[-1].kernels()

    def reverse(self, m: int, y: Lazy, d: Lazy) -> Reverse:
        """The reverse of layer m from y; full: y is a of the layer above, or the chain's output."""
        n = len(self.chain.layers)
        above = self.chain.layers[m + 1].pre if self.chain.full and m + 1 < n else ()
        params = self.latent(m - 1)[1] if m else ()
        return Reverse(self.chain.layers[m], above, y, d, self.weights[m], self.biases[m], params)


class Ran(NamedTuple):
    """What a forward gives: the output, the losses, (mean, 1/deviation) of every batch norm in turn, what to keep."""

    out: Tensor
    losses: Tensor
    stats: list[Tensor]
    forward: list[Tensor]
    reverse: list[Tensor]


def keeps_result(chain: Chain, m: int) -> bool:
    """Whether d_{m+1} is kept, and not what φ_m is applied to."""
    above = chain.layers[m + 1].pre if m + 1 < len(chain.layers) else ()
    known, window = pooling.window_of(above)
    return phi.writes_result(chain.latent(m), pooled=known and window is not None)


# ------------------------------------------------------------------------------------------- forward


def forward(tied: ChainTensors, *, store: bool, reverse: bool = True) -> Ran:
    """The chain, and its reverse unless that is put off until the backward."""
    chain, kernels = tied.chain, tied.kernels()
    n = len(chain.layers)
    inputs, kept, stats = [Lazy(tied.x)], [], []
    first, pooled = first_layer(tied, kernels), None
    for m, layer in enumerate(chain.layers):
        own, params = tied.latent(m)
        if m == 0 and first is not None:
            c, d, pooled = begin(kernels, first, store=store)
        else:
            p, pooled = received(kernels, inputs[-1], layer.pre) if pooled is None else pooled, None
            c = convolve(p, tied.weights[m], tied.biases[m], layer)
            del p
            reading = phi.read(kernels, c, own, params, done=False)
            stats += phi.stats_of(reading, own)
            d = reading.lazy
            if keeps_result(chain, m):
                c = made(kernels.materialise(d, in_place=True)[0])
                d = d._replace(x=c, done=True)
            del reading
        if keeps_result(chain, m) and own and m == n - 1 and c.is_contiguous():
            c = c.as_strided(c.shape, torch.empty(c.shape, device="meta").stride())  # as PyTorch, where a size is 1
            d = d._replace(x=c)
        elif m == n - 1 and not keeps_result(chain, m):
            d = Lazy(whole(kernels, d))
        kept.append(c)
        inputs.append(d)
        del c
    losses = tied.x.new_zeros(n, dtype=wide_of(tied.x))
    back: list[Tensor] = []
    if reverse:
        losses, back = reverse_all(tied, kernels, inputs, store=store)
    return Ran(inputs[-1].x, losses, stats, kept, back)


class First(NamedTuple):
    """Layer 1, where a kernel computes what it gives of a narrow x.

    Attributes:
        d: d_2, computed wherever it is read.
        window: of the pooling in front of layer 2; None: d_2 is written, and kept.
        again: whether d_2 is never written, but computed again by whoever reads it.
    """

    d: Lazy
    window: Window
    again: bool


def first_layer(tied: ChainTensors, kernels: Family) -> First | None:
    """A matter of shapes, types and strides alone: the backward and a trace find it as the forward does."""
    layers, known = tied.chain.layers, phi.parts(tied.latent(0)[0])
    if layers[0].pre or layers[0].tied.dims != 2 or known is None or known.norm is not None:
        return None
    window = None
    if not keeps_result(tied.chain, 0):
        window = pooling.window_of(layers[1].pre)[1] if len(layers) > 1 else None
        if window is None:
            return None
    if torch.channels_last not in (memory_format_of(tied.x), memory_format_of(tied.weights[0])):
        return None  # an image of one channel lies both ways, but what is around it does not
    act, args = ("identity", ()) if known.act is None else (known.act.name, known.act.args)
    d = kernels.convolved(tied.x, tied.weights[0], tied.biases[0], layers[0].tied, act, args)
    if d is None or (window is not None and any(k > n for k, n in zip(window, d.x.shape[2:], strict=True))):
        return None
    return First(d, window, window is not None and prod(tied.weights[0].shape[1:]) <= MOST_AGAIN)


def begin(kernels: Family, first: First, *, store: bool) -> tuple[Tensor, Lazy, Tensor | None]:
    """What is kept of layer 1, d_2 as it is read, and pooled for layer 2."""
    if first.again:
        pooled = made(kernels.materialise(first.d, first.window, full=False, pooled=True)[1])
        return pooled if store else pooled.new_empty(0), first.d, pooled
    found, pooled_too = kernels.materialise(first.d, first.window, pooled=first.window is not None)
    d = made(found)
    return d, first.d._replace(x=d, done=True, convolved=None), pooled_too


def received(kernels: Family, d: Lazy, steps: tuple[Step, ...]) -> Tensor:
    """What the tied operation receives: d pooled and up-sampled."""
    known, window = pooling.window_of(steps)
    if known and window is not None:
        return made(kernels.materialise(d, window, full=False, pooled=True)[1])
    return pooling.before(whole(kernels, d), steps)


def convolve(p: Tensor, weight: Tensor, bias: Tensor | None, layer: Layer) -> Tensor:
    """W p + b."""
    kind = layer.tied
    if kind.dims == 0:
        return F.linear(p, weight, bias)
    p, padding = transposed.padded(p, kind)
    return transposed.CONV[kind.dims](p, weight, bias, kind.stride, padding, kind.dilation, kind.groups)


# ------------------------------------------------------------------------------------------- reverse


def reverse_all(
    tied: ChainTensors, kernels: Family, inputs: Sequence[Lazy], *, store: bool
) -> tuple[Tensor, list[Tensor]]:
    """Every layer's loss, m = 1 first; and where `store` one tensor per layer, then the norms' statistics in turn."""
    chain, n = tied.chain, len(tied.chain.layers)
    zero = tied.x.new_zeros((), dtype=wide_of(tied.x))
    losses, back = [zero] * n, [tied.x.new_empty(0)] * n
    stats: list[list[Tensor]] = [[] for _ in range(n)]
    y, s = inputs[n], None
    for m in reversed(range(n)):
        if not chain.reverses(m):
            continue
        r = tied.reverse(m, y if chain.full else inputs[m + 1], inputs[m])
        below = chain.layers[m - 1] if chain.full and m else None
        minus = tied.biases[m - 1] if below is not None else None
        reading, kept, loss, s = reverse.run(kernels, r, s, below=below, minus=minus)
        y = reading.lazy
        if loss is None:
            loss, s = reverse.compare(kernels, r, y, below, minus)
        losses[m] = loss
        if store:
            back[m], stats[m] = kept, reverse_stats(chain, m, reading)
        del reading, kept, r
    every = torch.stack([loss.to(zero.dtype) for loss in losses])
    return every, [*back, *(t for own in stats for t in own)] if store else []


def reverse_stats(chain: Chain, m: int, reading: phi.Reading) -> list[Tensor]:
    """The statistics that the reverse of layer m took of the batch, where the backward reads them."""
    return phi.stats_of(reading, chain.layers[m].latent) if reading.entries is None else []


def reverse_stats_count(chain: Chain, m: int) -> int:
    """How many tensors `reverse_stats` gives."""
    own = chain.layers[m].latent
    return phi.measured(own) if phi.parts(own) is not None and chain.reverses(m) else 0
