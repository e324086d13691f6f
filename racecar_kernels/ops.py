"""The operator `racecar::reverse_layers`: schema, checks, fake implementation and autograd.

Start reading here. One call runs the reverse of one layer or of several, each the source of the next:

    y  ──> s = undo(y) - b_m ──> u_m = W_mᵀ s ──> a_m = φ_{m-1}(u_m) ──> (source of layer m-1)
                                                  └──> Σ (d_m - undo_m(a_m))²

What is not a tensor stands in a string (`str(Segment(...))`, see `layer.py`). The mathematics is in the backends.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from . import tape
from .backends import Backend, Query, choose
from .checks import check
from .contract import Call, Grads, Needs, State, keeps_output
from .layer import Segment, parse
from .results import NoSecondDerivative, as_gradient, loss_dtype

_LIB = torch.library.Library("racecar", "DEF")
_TAGS = (torch.Tag.pt2_compliant_tag,)
_TENSORS = "Tensor y, Tensor[] targets, Tensor[] weights, Tensor?[] biases, Tensor?[] params, str segment"

# `a` of the last layer, the sum of squares of every layer, and (if `keep`) one tensor per layer for the backward; the
# last of them is empty where `a` itself serves, since an operator's results may not share memory
_LIB.define(f"reverse_layers({_TENSORS}, bool keep) -> (Tensor a, Tensor losses, Tensor[] kept)", tags=_TAGS)
# gradients in the order of the inputs, without those that `needs` leaves out
_LIB.define(
    f"reverse_layers_backward(Tensor? grad_a, Tensor? grad_losses, {_TENSORS}, Tensor[] kept, bool[] needs)"
    " -> Tensor[]",
    tags=_TAGS,
)

Tensors = Sequence[Tensor]
MaybeTensors = Sequence["Tensor | None"]


class Inputs:
    """The tensors of one call beside the segment that they belong to; cuts out what belongs to one layer.

    The one place that names what the schema's `_TENSORS` holds: the implementations pass it on as it comes.
    """

    def __init__(
        self, y: Tensor, targets: Tensors, weights: Tensors, biases: MaybeTensors, params: MaybeTensors, segment: str
    ):
        self.segment: Segment = parse(segment)
        self.y, self.targets, self.weights, self.biases, self.params = y, targets, weights, biases, params
        ends = list(accumulate(layer.tensors for layer in self.segment.layers))
        self.params_of = [params[a:b] for a, b in zip([0, *ends], ends, strict=False)]

    def check(self) -> None:
        check(self.segment, self.y, self.targets, self.weights, self.biases, self.params)

    def flat(self) -> list[Tensor | None]:
        """Every tensor in the order of the schema."""
        return [self.y, *self.targets, *self.weights, *self.biases, *self.params]

    def backend(self, i: int) -> Backend:
        return choose(Query(self.segment.layers[i], self.y.device.type, self.y.dtype), self.segment.backend)

    def resume(self, i: int, kept: Tensor) -> State:
        return self.backend(i).resume(self.segment.layers[i], kept, self.params_of[i])

    def call(self, i: int, y: Tensor) -> Call:
        layer = self.segment.layers[i]
        return Call(
            layer, self.segment.undo_of(i), y, self.targets[i], self.weights[i], self.biases[i], self.params_of[i]
        )


def layout(y: Tensor, weight: Tensor) -> torch.memory_format:
    """Memory layout of a: channels_last where the source or the weight is, as PyTorch's convolutions decide too."""
    for dims, last in ((4, torch.channels_last), (5, torch.channels_last_3d)):
        if y.dim() == dims and any(
            t.dim() == dims and t.is_contiguous(memory_format=last) and not t.is_contiguous() for t in (y, weight)
        ):
            return last
    return torch.contiguous_format


# ------------------------------------------------------------------------------------------- implementation


def _forward(*call: Any) -> tuple[Tensor, Tensor, list[Tensor]]:
    *tensors, keep = call
    inputs = Inputs(*tensors)
    inputs.check()
    weights, targets, a = inputs.weights, inputs.targets, inputs.y
    losses, kept = [], []
    with torch._C._DisableAutocast():  # `functional.autocast` has cast; inside, every dtype is what the schema says
        for i, weight in enumerate(weights):
            dense = layout(a, weight)
            state, u, loss = inputs.backend(i).forward(inputs.call(i, a))
            losses.append(loss)
            a = state.a.contiguous(memory_format=dense)
            if keep and u is not None:
                kept.append(u.contiguous(memory_format=dense))
            elif keep:
                kept.append(a if i + 1 < len(weights) else a.new_empty(0))
            del state, u
        return a, torch.stack(losses).to(loss_dtype(inputs.y, *targets)), kept


def _backward(grad_a: Tensor | None, grad_losses: Tensor | None, *call: Any) -> list[Tensor]:
    *tensors, kept, needs = call
    inputs = Inputs(*tensors)
    wanted = _Wanted(inputs, needs)
    n = len(inputs.segment.layers)
    states: list[State | None] = [None] * n
    if not kept:
        with torch._C._DisableAutocast():
            states, kept = _rerun(inputs)
    twice = None if grad_losses is None else (grad_losses * 2).unbind()
    grads: list[Grads] = []
    with torch._C._DisableAutocast():
        for i in reversed(range(n)):
            state = states[i] or inputs.resume(i, kept[i])
            if i:  # its source is a of the layer above
                states[i - 1] = above = states[i - 1] or inputs.resume(i - 1, kept[i - 1])
            source = above.a if i else inputs.y
            c = None if twice is None else twice[i]
            result = inputs.backend(i).backward(inputs.call(i, source), state, grad_a, c, wanted.of(i))
            states[i] = None
            grad_a, result.y = result.y, (None if i else result.y)
            grads.append(result)
        return wanted.collect(grads[::-1])


def _rerun(inputs: Inputs) -> tuple[list[State | None], list[Tensor]]:
    """The forward again, for a segment of which nothing was kept."""
    kept: list[Tensor] = []
    state: State | None = None
    a = inputs.y
    for i in range(len(inputs.segment.layers)):
        call = inputs.call(i, a)
        call = call._replace(layer=replace(call.layer, compare=False))  # its loss is known
        state, u, _ = inputs.backend(i).forward(call)
        a = state.a
        kept.append(a if u is None else u)
    return [*[None] * (len(kept) - 1), state], kept


class _Wanted:
    """The flags of `needs`, one per tensor in the order of the schema, and the gradients that answer them."""

    def __init__(self, inputs: Inputs, needs: Sequence[bool]):
        n = len(inputs.segment.layers)
        self.inputs = inputs
        self.y, rest = needs[0], list(needs[1:])
        self.targets, self.weights, self.biases = rest[:n], rest[n : 2 * n], rest[2 * n : 3 * n]
        self.params = rest[3 * n :]

    def of(self, i: int) -> Needs:
        below = i > 0 or self.y  # a layer's source needs its gradient only if something above it does
        return Needs(below, self.targets[i], self.weights[i], self.biases[i])

    def collect(self, grads: list[Grads]) -> list[Tensor]:
        inputs = self.inputs
        each: list[tuple[bool, Tensor | None, Tensor | None]] = [(self.y, grads[0].y, inputs.y)]
        each += list(zip(self.targets, [g.target for g in grads], inputs.targets, strict=True))
        each += list(zip(self.weights, [g.weight for g in grads], inputs.weights, strict=True))
        each += list(zip(self.biases, [g.bias for g in grads], inputs.biases, strict=True))
        each += list(zip(self.params, [p for g in grads for p in g.params], inputs.params, strict=True))
        return [as_gradient(g, x) for wanted, g, x in each if wanted and x is not None]


# ------------------------------------------------------------------------------------------- fake


def _fake_forward(*call: Any) -> tuple[Tensor, Tensor, list[Tensor]]:
    *tensors, keep = call
    inputs = Inputs(*tensors)
    inputs.check()
    y, layers = inputs.y, inputs.segment.layers
    source, results = y, []
    for layer, target, weight in zip(layers, inputs.targets, inputs.weights, strict=True):
        shape = layer.input_shape(tuple(target.shape))
        source = torch.empty(shape, dtype=y.dtype, device=y.device, memory_format=layout(source, weight))
        results.append(source)
    kept = results if keep else []
    if keep:
        kept = [*results[:-1], y.new_empty(0) if keeps_output(layers[-1]) else torch.empty_like(results[-1])]
    return results[-1], y.new_empty(len(layers), dtype=loss_dtype(y, *inputs.targets)), kept


def _fake_backward(grad_a: Tensor | None, grad_losses: Tensor | None, *call: Any) -> list[Tensor]:
    *tensors, _, needs = call
    return [
        torch.empty_like(t)
        for t, needed in zip(Inputs(*tensors).flat(), needs, strict=True)
        if needed and t is not None
    ]


# ------------------------------------------------------------------------------------------- autograd


class _ReverseLayers(torch.autograd.Function):
    """Saves the inputs (which the network keeps anyway) and, under `keep`, one tensor per layer."""

    @staticmethod
    def forward(ctx: Any, segment: str, keep: bool, *flat: Tensor | None) -> tuple[Tensor, ...]:
        a, losses, kept = _run(segment, flat, keep)
        ctx.segment, ctx.inputs = segment, len(flat)
        if keep and kept[-1].numel() == 0:
            kept[-1] = a
        ctx.save_for_backward(*flat, *kept)
        ctx.set_materialize_grads(False)
        return a, losses

    @staticmethod
    def backward(ctx: Any, grad_a: Tensor | None, grad_losses: Tensor | None) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors
        flat, kept = saved[: ctx.inputs], saved[ctx.inputs :]
        return None, None, *backward(ctx.segment, flat, kept, ctx.needs_input_grad[2:], grad_a, grad_losses)


def _run(segment: str, flat: Sequence[Tensor | None], keep: bool) -> tuple[Tensor, Tensor, list[Tensor]]:
    """The operator; past it, where nothing watches."""
    given = (*_unflatten(segment, flat), segment, keep)
    with torch._C._AutoDispatchBelowAutograd():
        if tape.is_watched(flat):
            return torch.ops.racecar.reverse_layers(*given)
        return tape.run(("reverse", segment, keep), list(flat), lambda: _forward(*given))


class Report:
    """Where a deferred layer leaves its loss once it is computed; `ran`: by a backward pass."""

    def __init__(self) -> None:
        self.loss: Tensor | None = None
        self.ran = False


class Deferred(torch.autograd.Function):
    """An identity on what a layer gave, in whose backward the whole reverse layer runs."""

    @staticmethod
    def forward(
        ctx: Any, segment: str, report: Report, passed: Tensor | None, y: Tensor, *rest: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        ctx.segment, ctx.report = segment, report
        ctx.save_for_backward(y, *rest)
        ctx.set_materialize_grads(False)
        # detach, not a view: what follows may work in place, and the version counter is shared, so that is noticed
        out = y if passed is None else passed
        return out.detach(), torch.zeros((), dtype=loss_dtype(y), device=y.device)

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor | None, grad_loss: Tensor | None) -> tuple[Tensor | None, ...]:
        flat = ctx.saved_tensors
        needs_passed, *needs = ctx.needs_input_grad[2:]
        own: list[Tensor | None] = [None] * len(flat)
        if grad_loss is not None:
            a, losses, kept = _run(ctx.segment, flat, True)
            ctx.report.loss, ctx.report.ran = losses[0], True
            kept = [a if k.numel() == 0 else k for k in kept]
            del a
            own = backward(ctx.segment, flat, kept, needs, None, grad_loss.reshape(1))
        if needs_passed:
            return None, None, grad_y, *own
        if grad_y is not None:
            own[0] = grad_y if own[0] is None else _add(own[0], grad_y)
        return None, None, None, *own


def _add(own: Tensor, g: Tensor) -> Tensor:
    """In place where the graph is not itself differentiated: `own` is fresh."""
    return own + g if own.requires_grad or g.requires_grad else own.add_(g)


def backward(
    segment: str,
    flat: Sequence[Tensor | None],
    kept: Tensors,
    needs: Sequence[bool],
    grad_a: Tensor | None,
    grad_losses: Tensor | None,
) -> list[Tensor | None]:
    """One gradient per input of a call, in the schema's order; None where `needs` has False."""
    if grad_a is None and grad_losses is None:
        return [None] * len(flat)
    with torch.no_grad():
        given = (grad_a, grad_losses, *_unflatten(segment, flat), segment, list(kept), list(needs))
        read = [grad_a, grad_losses, *flat, *kept]
        if tape.is_watched(read):
            grads = torch.ops.racecar.reverse_layers_backward(*given)
        else:
            grads = tape.run(("reverse backward", segment, tuple(needs)), read, lambda: _backward(*given))
    if torch.is_grad_enabled():  # create_graph=True
        grads = NoSecondDerivative.apply(len(grads), *grads, *flat, grad_a, grad_losses)
    left = iter(grads)
    return [next(left) if needed else None for needed in needs]


def _autograd(*call: Any) -> tuple[Tensor, Tensor, list[Tensor]]:
    *tensors, keep = call
    segment, flat = tensors[-1], Inputs(*tensors).flat()
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in flat):
        a, losses = _ReverseLayers.apply(segment, keep, *flat)
        return a, losses, []  # what is kept belongs to the graph
    with torch._C._AutoDispatchBelowAutograd():
        return torch.ops.racecar.reverse_layers(*call)


def _unflatten(segment: str, flat: Sequence[Tensor | None]) -> tuple[Any, ...]:
    n = len(parse(segment).layers)
    return flat[0], flat[1 : n + 1], flat[n + 1 : 2 * n + 1], flat[2 * n + 1 : 3 * n + 1], flat[3 * n + 1 :]


_LIB.impl("reverse_layers", _forward, "CompositeExplicitAutograd")
_LIB.impl("reverse_layers_backward", _backward, "CompositeExplicitAutograd")
_LIB.impl("reverse_layers", _autograd, "Autograd")
torch.library.register_fake("racecar::reverse_layers", _fake_forward, lib=_LIB)
torch.library.register_fake("racecar::reverse_layers_backward", _fake_backward, lib=_LIB)
