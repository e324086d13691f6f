"""A chain of linear layers in the Triton kernels of `linear.py`: forward and reverse share what each of them reads.

The mathematics is that of `chain.py`. Locally a layer whose outputs fit a tile is one kernel forwards, and three
backwards: the gradient of c = W p + b from both uses of y, the weight's over both its uses, and that of p. Kept are
d_2 .. d_n, which the network keeps anyway, and under `store` the a of every layer that runs backwards; neither y - b,
nor a residual, nor a gradient of u = Wᵀ (y - b) is ever in memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from math import prod
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from ..chain_backward import Gradients, Needs
from ..layer import Activation, Chain, Latent, parse_chain
from ..lazy import Lazy, made
from ..linear_chain import Kept, MaybeTensors, why_never
from . import device

if TYPE_CHECKING:
    from .linear import Act, Reversed

BACKENDS = (None, "triton", "triton:fused", "cuda")
# A gradient of so many numbers is held until the weight's other use is known, to launch once. A larger one is not,
# unless the weight is larger still: the peak counts more than a launch.
MOST_HELD = 2**20


def why_not(chain: Chain, x: Tensor, weights: Sequence[Tensor]) -> str | None:
    """None where these kernels are taken for the chain, else a sentence. Reads shapes, types and the device alone."""
    if any(w.dim() != 2 for w in weights):  # asked first, since it costs nothing
        return "not all of its layers are linear"
    if chain.backend is None and x.device.type != "cuda":
        return f"the Triton kernels are chosen on NVIDIA GPUs, got tensors on {x.device}"
    reason = why_never(chain, BACKENDS) or device.why_not_tensors([x, *weights])
    if reason is not None:
        return reason
    from . import chooser, linear

    rows, widest = prod(x.shape[:-1]), max(max(w.shape) for w in weights)
    if min(rows, *(min(w.shape) for w in weights)) == 0 or max(rows, widest) > linear.MOST_FEATURES:
        return f"1 to {linear.MOST_FEATURES} rows and features are served, got {tuple(x.shape)} and {widest}"
    fastest = partial(chooser.is_fastest, precision=chain.precision)
    takes = chooser.always if chain.backend == "triton:fused" else fastest
    passes = chooser.CHAIN_PASSES["full" if chain.full else "local"]
    for weight, layer in zip(weights, chain.layers, strict=True):
        slower = [pass_ for pass_ in passes if not takes(pass_, weight, layer.tied, None)]
        if slower:
            return f"a layer of {tuple(weight.shape)} was not measured to be faster ({', '.join(slower)})"
    return None


class Linear(NamedTuple):
    """One layer as the kernels take it."""

    weight: Tensor
    bias: Tensor | None
    act: Act  # φ of what the layer gives
    reverse_act: Act  # φ of the layer below
    compare: bool
    reverses: bool


def forward(
    text: str, x: Tensor, weights: list[Tensor], biases: MaybeTensors, memory: str
) -> tuple[Tensor, Tensor, list[Tensor], list[Tensor], list[Tensor]]:
    """What the operator `tied_chain` gives."""
    from . import chooser, linear

    chain = parse_chain(text)
    tf32 = chooser.linear_kind(x, chain.precision) == "tf32"
    layers = layers_of(chain, weights, biases)
    losses = [x.new_zeros((), dtype=torch.float32)] * len(layers)
    d, back = [matrix(x)], []
    for m, own in enumerate(layers):
        if own.reverses and not chain.full and memory != "deferred":
            y, a, losses[m] = linear.tied(d[-1], own.weight, own.bias, own.act, own.reverse_act, tf32=tf32)
            back += [a] if memory == "store" else []
            del a
        else:
            y = linear.linear(d[-1], own.weight, own.bias, own.act, tf32=tf32)
        d.append(y)
    if chain.full:
        for m in reversed(range(len(layers))):
            own = layers[m]
            y, loss = linear.reverse(y, own.weight, own.bias, own.reverse_act, d[m] if own.compare else None, tf32=tf32)
            losses[m] = losses[m] if loss is None else loss
            back += [y] if memory == "store" else []
        back.reverse()
    return d[-1].view(*x.shape[:-1], -1), torch.stack(losses), [], d[1:-1], back


def backward(
    text: str,
    grad_out: Tensor | None,
    grad_losses: Tensor | None,
    x: Tensor,
    weights: list[Tensor],
    biases: MaybeTensors,
    out: Tensor,
    kept: Kept,
    needs: Sequence[bool],
) -> list[Tensor]:
    """What the operator `tied_chain_backward` gives."""
    chain, n = parse_chain(text), len(weights)
    d, left = [matrix(x), *kept[0], matrix(out)], iter(kept[1])
    late = grad_losses is not None and not kept[1]
    a = [None if late else next(left, None) if chain.reverses(m) else None for m in range(n)]
    for part in kept:
        part.clear()  # each tensor is let go after its use
    run = Backward(
        chain, layers_of(chain, weights, biases), d, a,
        Needs(needs[0], needs[1 : 1 + n], needs[1 + n : 1 + 2 * n]),
    )  # fmt: skip
    inputs = [x, *weights, *biases]
    return run.run(None if grad_out is None else matrix(grad_out), grad_losses, late=late).in_turn(inputs, needs)


def fake_kept(chain: Chain, x: Tensor, weights: Sequence[Tensor], memory: str) -> Kept:
    """Tensors like those that `forward` keeps: d_2 .. d_n, and under `store` every a."""
    rows = prod(x.shape[:-1])
    reversed_ = [w for m, w in enumerate(weights) if memory == "store" and chain.reverses(m)]
    return [x.new_empty(rows, w.shape[0]) for w in weights[:-1]], [x.new_empty(rows, w.shape[1]) for w in reversed_]


class Backward:
    """The backward of one chain. It empties `d` and `a`: d_1 .. d_{n+1}, and the a that were kept."""

    def __init__(
        self, chain: Chain, layers: list[Linear], d: list[Tensor], a: list[Tensor | None], needs: Needs
    ) -> None:
        from . import chooser, linear, pointwise

        self.kernels, self.pointwise = linear, pointwise.KERNELS
        self.tf32 = chooser.linear_kind(d[0], chain.precision) == "tf32"
        self.chain, self.layers, self.d, self.a, self.needs = chain, layers, d, a, needs
        self.found = Gradients(None, [None] * len(layers), [None] * len(layers), [], None)

    def run(self, grad_out: Tensor | None, grad_losses: Tensor | None, *, late: bool) -> Gradients:
        """All gradients: full, the reverse's first; then from the last layer to the first."""
        n, full = len(self.layers), self.chain.full
        twice = [None] * n if grad_losses is None else [
            c2 if own.compare else None for c2, own in zip((grad_losses * 2).unbind(), self.layers, strict=True)
        ]  # fmt: skip
        losses = [self.d[0].new_zeros((), dtype=torch.float32)] * n
        waiting: list[tuple[Reversed, bool]] = []
        if full and grad_losses is not None:
            if late:
                self.reverse_again()
            waiting = self.through_reverse(twice)
        g = grad_out
        for m in reversed(range(n)):
            own, r, joined = self.layers[m], None, True
            if waiting:
                r, joined = waiting.pop()
            elif grad_losses is not None and own.reverses:
                if late:
                    losses[m] = made(self.reverse(m, self.d[m + 1], compare=True))
                r = self.reversed_(m, self.d[m + 1], None, twice[m])
            if r is not None and (not full or m == n - 1):
                g_c = self.through_both(m, r, g)
            elif g is not None:
                g_c = self.through_activation(m, g, owned=g is not grad_out)
            else:
                continue
            g = self.through_forward(m, g_c, r, joined=joined)
            self.a[m] = None
            self.d.pop()
            del r, g_c
        return self.found._replace(x=g, losses=torch.stack(losses) if late and not full else None)

    def reverse(self, m: int, y: Tensor, *, compare: bool) -> Tensor | None:
        """a of layer m, which the forward did not keep, and its loss."""
        own, p = self.layers[m], self.d[m] if compare else None
        self.a[m], loss = self.kernels.reverse(y, own.weight, own.bias, own.reverse_act, p, tf32=self.tf32)
        return loss

    def reversed_(self, m: int, y: Tensor, g_in: Tensor | None, c2: Tensor | None) -> Reversed:
        own = self.layers[m]
        a = made(self.a[m])
        return self.kernels.Reversed(y, a, self.d[m], own.weight, own.bias, own.reverse_act, g_in, c2)

    def wants_bias(self, m: int) -> bool:
        return self.needs.biases[m] and self.layers[m].bias is not None

    # ------------------------------------------------------------------ full: the reverse

    def reverse_again(self) -> None:
        """What a forward that kept none of it gave; the losses are known."""
        y = self.d[-1]
        for m in reversed(range(len(self.layers))):
            self.reverse(m, y, compare=False)
            y = made(self.a[m])

    def through_reverse(self, twice: Sequence[Tensor | None]) -> list[tuple[Reversed, bool]]:
        """From layer 1 up to the source of the last one, which is that layer's own output and so waits for its forward.

        Gives every reverse with what its result receives, and whether its part of the weight's gradient is to come.
        """
        waiting, g_in, last = [], None, len(self.layers) - 1
        for m, own in enumerate(self.layers):
            y = self.d[-1] if m == last else made(self.a[m + 1])
            r = self.reversed_(m, y, g_in, twice[m])
            if m < last:
                bias = self.wants_bias(m)
                g_y, self.found.biases[m] = self.kernels.grad_source(r, needs_bias=bias, tf32=self.tf32)
            joined = m == last or g_in is None or g_in.numel() <= max(MOST_HELD, own.weight.numel())
            if not joined:
                if self.needs.weights[m]:
                    self.found.weights[m] = self.kernels.grad_weight(r, tf32=self.tf32)
                r = r._replace(g_in=None)
            waiting.append((r, joined))
            g_in = g_y if m < last else None
        return waiting

    # ------------------------------------------------------------------ one layer

    def through_both(self, m: int, r: Reversed, g: Tensor | None) -> Tensor:
        """The gradient of c = W p + b, whose φ(c) the reverse has as its source; and the bias's, from both its uses."""
        g_c, self.found.biases[m] = self.kernels.grad_source(
            r, own=self.layers[m].act, g_out=g, needs_bias=self.wants_bias(m), tf32=self.tf32
        )
        return made(g_c)

    def through_activation(self, m: int, g: Tensor, *, owned: bool) -> Tensor:
        """The same where the forward is all that φ(c) goes into."""
        own, sums = self.layers[m], self.wants_bias(m)
        y = Lazy(self.d[m + 1], None, None, *own.act, done=True)
        if own.act[0] == "identity":
            total = self.pointwise.channel_sum(g) if sums else None
        else:
            found = self.pointwise.grad_forward(y, None, None, None, None, g, in_place=owned, sums=sums)
            g, total = found.g, found.total
        before = self.found.biases[m]
        self.found.biases[m] = before if total is None else total if before is None else before.add_(total)
        return g

    def through_forward(self, m: int, g_c: Tensor, r: Reversed | None, *, joined: bool) -> Tensor | None:
        """The weight's gradient, and what p receives from the forward and from the residual."""
        p, weight = self.d[m], self.layers[m].weight
        both = r is not None and joined
        r = self.kernels.Reversed(None, p, p, weight) if r is None else r
        if self.needs.weights[m]:
            own, before = self.kernels.grad_weight(r, g_c, reverse=both, tf32=self.tf32), self.found.weights[m]
            self.found.weights[m] = own if before is None else before.add_(own)
        return self.kernels.grad_input(g_c, r, tf32=self.tf32) if m or self.needs.x else None


# ------------------------------------------------------------------------------------------- the chain as matrices


def layers_of(chain: Chain, weights: Sequence[Tensor], biases: MaybeTensors) -> list[Linear]:
    """The layers, m = 1 first."""
    return [
        Linear(
            matrix(weight), None if bias is None else bias.contiguous(), _act(chain.latent(m)), _act(layer.latent),
            layer.compare, chain.reverses(m),
        )
        for m, (layer, weight, bias) in enumerate(zip(chain.layers, weights, biases, strict=True))
    ]  # fmt: skip


def matrix(t: Tensor) -> Tensor:
    """t as (rows, features); a copy only where no stride leads from row to row, or features lie apart."""
    found = t.reshape(-1, t.shape[-1])
    return found if found.shape[1] == 1 or found.stride(1) == 1 else found.contiguous()


def _act(own: tuple[Latent, ...]) -> Act:
    step = own[0] if own else Activation("identity")
    if not isinstance(step, Activation):
        raise TypeError(f"the kernels know activations, got {step}")
    return step.name, step.args
