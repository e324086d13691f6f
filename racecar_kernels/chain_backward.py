"""The backward of a tied chain: the reverse's gradient of d_m is added where the forward's backward arrives there."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from . import few_channels, phi, pooling, reference, reverse, undo
from .chain import ChainTensors, first_layer, keeps_result, received, reverse_all, reverse_stats_count
from .layer import Layer
from .lazy import Lazy, Window
from .results import as_gradient, loss_dtype
from .reverse import on_matrix, whole, wide_of
from .weight_gradient import Pair, joined, product_pays

# Bytes of a part of the batch: it stays in a core's cache, and its memory is used again by the next one.
PART = 1 << 22


class Gradients(NamedTuple):
    """One entry per input, None where not needed; and the losses, if the backward had to find them."""

    x: Tensor | None
    weights: list[Tensor | None]
    biases: list[Tensor | None]
    params: list[Tensor | None]
    losses: Tensor | None

    def in_turn(self, inputs: Sequence[Tensor | None], needs: Sequence[bool]) -> list[Tensor]:
        """What the operator gives: one gradient per input (x, weights, biases, params) that `needs` has, the losses."""
        flat = zip(inputs, [self.x, *self.weights, *self.biases, *self.params], needs, strict=True)
        grads = [as_gradient(g, t) for t, g, needed in flat if needed and t is not None]
        x = reverse.made(inputs[0])
        found = x.new_empty(0) if self.losses is None else self.losses
        return [*grads, found.to(loss_dtype(x))]


class Needs(NamedTuple):
    """Which gradients are asked for; those of the norms' and activations' tensors are always given."""

    x: bool
    weights: Sequence[bool]
    biases: Sequence[bool]


class Arriving(NamedTuple):
    """What reaches d_m: gradients at pooled and at full size, and the residual of the reverse behind it."""

    pooled: Tensor | None = None
    full: Tensor | None = None
    a: Lazy | None = None
    c2: Tensor | None = None
    window: Window = None
    owned: bool = True  # whether `full` may be written over

    @property
    def nothing(self) -> bool:
        return self.pooled is None and self.full is None and self.c2 is None

    def part(self, at: int, size: int) -> Arriving:
        """The same for `size` samples from `at` on."""
        pooled, full = (None if t is None else t.narrow(0, at, size) for t in (self.pooled, self.full))
        return self._replace(pooled=pooled, full=full, a=None if self.a is None else self.a.part(at, size))


class Backward:
    """The backward of one chain. It empties `kept` and `back`, what the forward kept: each is let go after its use."""

    def __init__(
        self, tied: ChainTensors, out: Tensor, stats: Sequence[Tensor], kept: list[Tensor], back: list[Tensor]
    ):
        self.tied, self.out, self.kept = tied, out, kept
        self.kernels = tied.kernels()
        self.first = first_layer(tied, self.kernels)
        self.again = self.first.d if self.first is not None and self.first.again else None
        self.layers = range(len(tied.chain.layers))
        self.stats = _cut(stats, [phi.measured(tied.latent(m)[0]) for m in self.layers])
        self.set_reverse(back)
        self.pending: list[Pair | None] = [None for _ in self.layers]  # of the reverse, to join the forward's
        self.weights: list[Tensor | None] = [None for _ in self.layers]
        self.biases: list[Tensor | None] = [None for _ in self.layers]
        self.params: list[list[Tensor | None]] = [[None] * len(tied.latent(m)[1]) for m in self.layers]
        self.losses: list[Tensor] = []
        self.readings: dict[int, phi.Reading] = {}

    def set_reverse(self, kept: list[Tensor]) -> None:
        """What the reverse left behind; empty where it kept nothing."""
        n = len(self.layers)
        self.back = list(kept[:n])
        self.back_stats = _cut(kept[n:], [reverse_stats_count(self.tied.chain, m) if kept else 0 for m in self.layers])
        kept.clear()

    def run(self, grad_out: Tensor | None, grad_losses: Tensor | None, needs: Needs) -> Gradients:
        """All gradients; the reverse's first (full), then the forward's from the last layer to the first."""
        chain = self.tied.chain
        twice = [None for _ in self.layers] if grad_losses is None else list((grad_losses * 2).unbind())
        late = grad_losses is not None and not self.back
        arriving = Arriving(full=grad_out, owned=False)
        if grad_losses is not None and chain.full:
            if late:
                inputs = [self.value(m) for m in range(len(self.layers) + 1)]
                self.set_reverse(reverse_all(self.tied, self.kernels, inputs, store=True)[1])
                del inputs
            g = self.full_backward(twice, needs)
            arriving = Arriving(full=g if grad_out is None else g.add_(grad_out))
        for m in reversed(self.layers):
            a = None
            if grad_losses is not None and chain.full:
                a = self.reading(m).lazy
            elif grad_losses is not None and chain.reverses(m):
                arriving, a = self.local_backward(m, arriving, twice[m], needs, late=late)
            elif grad_losses is not None:
                self.losses.append(self.out.new_zeros((), dtype=wide_of(self.out)))
            self.let_go(self.back, m)  # `a` has it as long as it is needed
            if not arriving.nothing and m == 0 and not needs.x:
                self.first_backward(arriving, needs)
                arriving = Arriving()
            elif not arriving.nothing:
                arriving = self.forward_backward(m, arriving, a, twice[m], needs)
            self.readings.pop(m, None)
            self.let_go(self.kept, m)
        found = torch.stack(self.losses[::-1]) if late and not chain.full else None
        flat = [p for own in self.params for p in own]
        return Gradients(self.at_input(arriving) if needs.x else None, self.weights, self.biases, flat, found)

    # ------------------------------------------------------------------ what the forward gave

    def value(self, m: int) -> Lazy:
        """What layer m (counted from 0) received; of n the output."""
        if m == 0:
            return Lazy(self.tied.x)
        return Lazy(self.out) if m == len(self.layers) else self.given(m - 1).lazy

    def given(self, m: int) -> phi.Reading:
        """What layer m gave, as φ makes it of what was kept."""
        if m in self.readings:
            return self.readings[m]
        if m == 0 and self.again is not None:
            return phi.Reading(self.again)
        own, params = self.tied.latent(m)
        known = phi.parts(own) is not None
        stats = self.stats[m] if known else ()
        done = keeps_result(self.tied.chain, m) or (m == 0 and self.first is not None)
        reading = phi.read(self.kernels, self.kept[m], own, params, stats, done=done)
        if known:  # another one holds a tensor of its own
            self.readings[m] = reading
        return reading

    def shape(self, m: int) -> tuple[int, ...]:
        """Shape of what layer m received."""
        if m == 1 and self.again is not None:
            return tuple(self.again.x.shape)
        return tuple((self.kept[m - 1] if m else self.tied.x).shape)

    def received(self, m: int, d: Lazy) -> Tensor:
        """What the operation of layer m received, from what the layer did."""
        if m == 1 and self.again is not None and self.kept[0].numel():
            return self.kept[0]
        return received(self.kernels, d, self.tied.chain.layers[m].pre)

    def reading(self, m: int) -> phi.Reading:
        """What the reverse of layer m gave."""
        layer, params = self.tied.chain.layers[m], self.tied.latent(m - 1)[1] if m else ()
        return reverse.resume(self.kernels, layer, params, self.back[m], self.back_stats[m])

    def let_go(self, of: list[Tensor], m: int) -> None:
        """Nobody reads what was kept of layer m any more."""
        if m < len(of):
            of[m] = self.out.new_empty(0)

    # ------------------------------------------------------------------ the reverse

    def full_backward(self, twice: Sequence[Tensor | None], needs: Needs) -> Tensor:
        """Through the reverse, from layer 1 up; gives the gradient of the chain's output."""
        g, reading = None, self.reading(0)
        for m in self.layers:
            last = m + 1 == len(self.layers)
            above = None if last else self.reading(m + 1)
            y = Lazy(self.out) if above is None else above.lazy
            g = self.reverse_backward(m, reading, self.back[m], y, g, twice[m], needs).y
            reading = above if above is not None else reading
        return reverse.made(g)

    def local_backward(
        self, m: int, arriving: Arriving, c2: Tensor | None, needs: Needs, *, late: bool
    ) -> tuple[Arriving, Lazy]:
        """The reverse of layer m, run here where nothing of it was kept; its gradient of y arrives at d_{m+1}."""
        y = self.value(m + 1)
        if late:
            reading, kept, *_ = reverse.run(self.kernels, self.tied.reverse(m, y, self.value(m)))
        else:
            reading, kept = self.reading(m), self.back[m]
        grads = self.reverse_backward(m, reading, kept, y, None, c2, needs, loss=late)
        if late:
            self.losses.append(reverse.made(grads.loss))
        g = reverse.made(grads.y)
        if arriving.full is not None:
            g = g.add_(arriving.full)
        return arriving._replace(full=g, owned=True), reading.lazy

    def reverse_backward(
        self,
        m: int,
        reading: phi.Reading,
        kept: Tensor,
        y: Lazy,
        g: Tensor | None,
        c2: Tensor | None,
        needs: Needs,
        *,
        loss: bool = False,
    ) -> reverse.Grads:
        """Through the reverse of layer m; adds the gradients of its tensors, or keeps a pair that is to be joined."""
        grads = reverse.backward(
            self.kernels,
            self.tied.reverse(m, y, self.value(m)),
            reading,
            kept,
            g,
            c2,
            needs_y=True,
            needs_weight=needs.weights[m],
            needs_bias=needs.biases[m],
            loss=loss,
            hold=True,
        )
        self.weights[m], self.pending[m], self.biases[m] = grads.weight, grads.pair, grads.bias
        if m:
            _add_each(self.params[m - 1], grads.params)
        return grads

    # ------------------------------------------------------------------ the forward

    def forward_backward(self, m: int, arriving: Arriving, a: Lazy | None, c2: Tensor | None, needs: Needs) -> Arriving:
        """Through the forward of layer m: what reaches d_m from what reaches d_{m+1}."""
        layer, weight, d = self.tied.chain.layers[m], self.tied.weights[m], self.value(m)
        g = self.through_operation(m, self.given(m), arriving, d, needs)
        del arriving
        g = few_channels.forward(self.kernels, g, weight, layer.tied, layer.input_shape(self.shape(m)))
        return self.in_front(layer, g, d, a, c2 if layer.compare else None)

    def first_backward(self, arriving: Arriving, needs: Needs) -> None:
        """The same for layer 1 where x needs no gradient: in one pass or part by part, where there is no norm."""
        reading, x = self.given(0), Lazy(self.tied.x)
        c = reading.lazy.x
        if (
            reading.norm is None
            and reading.entries is None
            and needs.weights[0]
            and self.fused(reading, arriving, needs)
        ):
            return
        narrow = c.element_size() < 4  # the weight's gradient would be rounded part by part
        if reading.norm is not None or reading.entries is not None or c.dim() < 3 or narrow:
            self.through_operation(0, reading, arriving, x, needs)
            return
        batch = c.shape[0]
        step = max(1, PART * batch // (c.numel() * c.element_size()))
        for at in range(0, batch, step):
            size = min(step, batch - at)
            of_part = reading._replace(lazy=reading.lazy.part(at, size))
            self.through_operation(0, of_part, arriving.part(at, size), x.part(at, size), needs)

    def fused(self, reading: phi.Reading, arriving: Arriving, needs: Needs) -> bool:
        """Layer 1 in one pass, the gradient of what its operation gave never written; whether a kernel serves that."""
        layer = self.tied.chain.layers[0]
        if layer.pre:
            return False
        found = self.kernels.grad_weight(
            reading.lazy,
            arriving.a,
            arriving.window,
            arriving.c2,
            arriving.pooled,
            arriving.full,
            self.tied.x,
            self.tied.weights[0],
            layer.tied,
            sums=needs.biases[0],
        )
        if found is None:
            return False
        waiting, self.pending[0] = self.pending[0], None
        if waiting is not None:
            self.weights[0] = few_channels.weight_gradient(self.kernels, waiting, self.tied.weights[0], layer.tied)
        self.weights[0], self.biases[0] = _plus(self.weights[0], found[0]), _plus(self.biases[0], found[1])
        return True

    def through_operation(self, m: int, reading: phi.Reading, arriving: Arriving, d: Lazy, needs: Needs) -> Tensor:
        """The gradient of what the operation of layer m gave; adds those of φ's tensors, the bias and the weight."""
        layer, (own, params) = self.tied.chain.layers[m], self.tied.latent(m)
        c = self.kept[m] if reading.entries is not None else reading.lazy.x
        sums = needs.biases[m] and on_matrix(layer, c)
        grad = self.kernels.grad_forward(
            reading.lazy,
            arriving.a,
            arriving.window,
            arriving.c2,
            arriving.pooled,
            arriving.full,
            in_place=arriving.owned and arriving.full is not None,
            sums=sums,
        )
        del arriving
        g, own_grads, total = phi.backward(self.kernels, grad, c, own, params, reading)
        del grad, reading, c
        _add_each(self.params[m], own_grads)
        if needs.biases[m]:
            own_sum = total if sums and total is not None else self.bias_gradient(g, layer)
            self.biases[m] = _plus(self.biases[m], own_sum)
        if needs.weights[m]:
            self.add_weight(m, Pair(self.received(m, d), g))
        return g

    def in_front(self, layer: Layer, g: Tensor, received: Lazy, a: Lazy | None, c2: Tensor | None) -> Arriving:
        """What reaches d_m, from the gradient of what the operation received and from its reverse."""
        known, window = pooling.window_of(layer.pre)
        if known:
            return Arriving(g, None, a, c2, window)
        d = whole(self.kernels, received)
        g = pooling.before_adjoint(g, d, layer.pre)
        if c2 is not None and a is not None:
            add_residual(g, c2, d, whole(self.kernels, a), layer)
        return Arriving(full=g)

    def at_input(self, arriving: Arriving) -> Tensor | None:
        """The gradient of x, from what reaches it."""
        pooled, full, a, c2, window, _ = arriving
        if arriving.nothing:
            return None
        if pooled is None and c2 is None:
            return full
        return self.kernels.grad_forward(Lazy(self.tied.x), a, window, c2, pooled, full).g

    def add_weight(self, m: int, pair: Pair) -> None:
        """The weight's gradient of the forward, in one product with that of the reverse where both wait for it."""
        weight, kind = self.tied.weights[m], self.tied.chain.layers[m].tied
        waiting, self.pending[m] = self.pending[m], None
        if waiting is not None and product_pays(pair, weight, kind):
            self.weights[m] = few_channels.weight_gradient(self.kernels, waiting, weight, kind)
        elif waiting is not None:
            pair = joined(waiting, pair)
        del waiting
        self.weights[m] = few_channels.weight_gradient(self.kernels, pair, weight, kind, add_to=self.weights[m])

    def bias_gradient(self, g: Tensor, layer: Layer) -> Tensor:
        return self.kernels.channel_sum(g) if on_matrix(layer, g) else reference.over_channels(g, layer)


def add_residual(g: Tensor, c2: Tensor, d: Tensor, a: Tensor, layer: Layer) -> None:
    """g += c2 (d - undo(a)) in place; the difference exists one cache-sized piece at a time where pooling is undone."""
    for part, big, small in undo.triples(g, d, a, layer.pre):
        part.add_(torch.sub(big, small).mul_(c2))


def _plus(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    """a + b, in a's memory; either may be missing."""
    if a is None or b is None:
        return b if a is None else a
    return a.add_(b)


def _add_each(to: list[Tensor | None], grads: Sequence[Tensor | None]) -> None:
    for i, grad in enumerate(grads):
        to[i] = _plus(to[i], grad)


def _cut(flat: Sequence[Tensor], counts: Iterable[int]) -> list[list[Tensor]]:
    """`flat` in parts of these lengths."""
    left = iter(flat)
    return [[next(left) for _ in range(count)] for count in counts]
