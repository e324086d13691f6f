"""The operator `racecar::tied_chain`: forward and reverse of a whole chain in one autograd node.

Schema, fake implementation and autograd; the mathematics is in `chain.py`. What is not a tensor stands in a string
(`str(Chain(...))`, see `layer.py`).
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice, zip_longest
from typing import Any

import torch
from torch import Tensor

from . import chain as mathematics
from . import chain_backward, chain_engines, phi, tape
from .layer import parse_chain
from .layout import memory_format_of
from .ops import _LIB
from .results import NoSecondDerivative, loss_dtype

_TAGS = (torch.Tag.pt2_compliant_tag,)
_TENSORS = "Tensor x, Tensor[] weights, Tensor?[] biases, Tensor?[] params"

# the chain's output; Σ (d - d')² of every layer; mean and 1/deviation of every batch norm; what the backward reads of
# forward and reverse (the output itself is an empty tensor there: an operator's results may not share memory)
_LIB.define(
    f"tied_chain({_TENSORS}, str chain, str memory)"
    " -> (Tensor out, Tensor losses, Tensor[] stats, Tensor[] forward, Tensor[] reverse)",
    tags=_TAGS,
)
# gradients in the order of the inputs, without those that `needs` leaves out; then the losses, if they were found here
# `reverse` holds one tensor per layer, then the statistics that the norms in the reverse took
_LIB.define(
    f"tied_chain_backward(Tensor? grad_out, Tensor? grad_losses, {_TENSORS}, Tensor out, Tensor[] stats,"
    " Tensor[] forward, Tensor[] reverse, str chain, bool[] needs) -> Tensor[]",
    tags=_TAGS,
)


def _forward(
    x: Tensor, weights: list[Tensor], biases: Any, params: Any, chain: str, memory: str
) -> tuple[Tensor, Tensor, list[Tensor], list[Tensor], list[Tensor]]:
    engine = chain_engines.serving(parse_chain(chain), x, weights)
    if engine is not None:
        return engine.forward(chain, x, weights, biases, memory)
    tied = mathematics.ChainTensors(parse_chain(chain), x, weights, biases, params)
    with torch._C._DisableAutocast():
        ran = mathematics.forward(tied, store=memory == "store", reverse=memory != "deferred")
    dense = _layouts(tied)
    kept = [_laid_out(t, like) for t, like in zip(ran.forward, dense, strict=True)]
    out = ran.out.contiguous(memory_format=dense[-1])
    if mathematics.keeps_result(tied.chain, len(weights) - 1):
        kept[-1] = out.new_empty(0)
    back = [_laid_out(t, like) for t, like in zip_longest(ran.reverse, _back_layouts(tied))] if ran.reverse else []
    return out, ran.losses, ran.stats, kept, back


def _laid_out(t: Tensor, like: torch.memory_format | None) -> Tensor:
    return t if like is None or t.numel() == 0 else t.contiguous(memory_format=like)


def _backward(grad_out: Tensor | None, grad_losses: Tensor | None, *call: Any) -> list[Tensor]:
    x, weights, biases, params, out, stats, kept, back, text, needs = call
    engine = chain_engines.serving(parse_chain(text), x, weights)
    if engine is not None:
        return engine.backward(text, grad_out, grad_losses, x, weights, biases, out, (kept, back), needs)
    tied = mathematics.ChainTensors(parse_chain(text), x, weights, biases, params)
    if kept[-1].numel() == 0:
        kept[-1] = out
    n = len(weights)
    wanted = chain_backward.Needs(needs[0], needs[1 : 1 + n], needs[1 + n : 1 + 2 * n])
    with torch._C._DisableAutocast():
        grads = chain_backward.Backward(tied, out, stats, kept, back).run(grad_out, grad_losses, wanted)
    return grads.in_turn([x, *weights, *biases, *params], needs)


def _layouts(tied: mathematics.ChainTensors) -> list[torch.memory_format]:
    """Memory format of what every layer gives, as PyTorch's convolutions decide: channels_last spreads.

    Where one channel or one pixel leave it open, strides decide.
    """
    formats, form = [], memory_format_of(tied.x)
    for weight in tied.weights:
        form = _joined(form, memory_format_of(weight)) if weight.dim() > 2 else torch.contiguous_format
        formats.append(form)
    return formats


def _back_layouts(tied: mathematics.ChainTensors) -> list[torch.memory_format]:
    """Memory format of what every reverse layer gives, m = 1 first."""
    formats = _layouts(tied)
    return [
        _joined(form, memory_format_of(w)) if w.dim() > 2 else form
        for form, w in zip(formats, tied.weights, strict=True)
    ]


def _joined(a: torch.memory_format, b: torch.memory_format) -> torch.memory_format:
    return b if a == torch.contiguous_format else a


# ------------------------------------------------------------------------------------------- autograd


class ChainReport:
    """What a chain gives beside its output.

    Attributes:
        losses: of a deferred chain, m = 1 first, once a backward pass has found them.
        stats: mean and 1/deviation of every batch norm that took them of the batch, in turn, for running statistics.
    """

    def __init__(self) -> None:
        self.losses: Tensor | None = None
        self.stats: list[Tensor] = []


class TiedChain(torch.autograd.Function):
    """Saves the inputs and what the operator keeps."""

    @staticmethod
    def forward(ctx: Any, chain: str, memory: str, report: ChainReport | None, n: int, *flat: Any) -> Any:
        chain = chain_engines.decided(chain, flat[0])
        given = *_split(flat, n), chain, memory
        with torch._C._AutoDispatchBelowAutograd():
            if tape.is_watched(flat):
                out, losses, stats, kept, back = torch.ops.racecar.tied_chain(*given)
            else:
                key = ("forward", chain, memory)
                out, losses, stats, kept, back = tape.run(key, list(flat), lambda: _forward(*given))
        ctx.chain, ctx.report, ctx.n, ctx.counts = chain, report, n, (len(flat), len(stats), len(kept))
        ctx.save_for_backward(*flat, out, *stats, *kept, *back)
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*stats)
        return out, losses, *stats

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor | None, grad_losses: Tensor | None, *_: Any) -> Any:
        needs = list(ctx.needs_input_grad[4:])
        if grad_out is None and grad_losses is None:
            return (None,) * (4 + len(needs))
        saved = iter(ctx.saved_tensors)
        flat, (out,), stats, kept = (list(islice(saved, n)) for n in (ctx.counts[0], 1, *ctx.counts[1:]))
        back = list(saved)
        del saved
        # past the operator where nothing watches it: what is kept is then let go as soon as it has been used
        watched = tape.is_watched((*flat, grad_out, grad_losses))
        if not watched:
            ctx.maybe_clear_saved_tensors()  # keeps them if the graph is to be used again
        given = (grad_out, grad_losses, *_split(flat, ctx.n), out, stats, kept, back, ctx.chain, needs)
        with torch.no_grad():
            if watched:
                *grads, losses = torch.ops.racecar.tied_chain_backward(*given)
            else:
                key = ("backward", ctx.chain, tuple(needs))
                read = [grad_out, grad_losses, *flat, out, *stats, *kept, *back]
                *grads, losses = tape.run(key, read, lambda: _backward(*given), lambda: _cleared(kept, back))
        if ctx.report is not None and losses.numel():
            ctx.report.losses = losses
        if torch.is_grad_enabled():  # create_graph=True
            grads = list(NoSecondDerivative.apply(len(grads), *grads, *flat, grad_out, grad_losses))
        left = iter(grads)
        return None, None, None, None, *(next(left) if needed else None for needed in needs)


def _cleared(*kept: list[Tensor]) -> None:
    for tensors in kept:
        tensors.clear()


def _split(flat: Sequence[Any], n: int) -> tuple[Any, Any, Any, Any]:
    return flat[0], list(flat[1 : 1 + n]), list(flat[1 + n : 1 + 2 * n]), list(flat[1 + 2 * n :])


_LIB.impl("tied_chain", _forward, "CompositeExplicitAutograd")
_LIB.impl("tied_chain_backward", _backward, "CompositeExplicitAutograd")


# ------------------------------------------------------------------------------------------- fake


def _fake_forward(
    x: Tensor, weights: list[Tensor], biases: Any, params: Any, chain: str, memory: str
) -> tuple[Tensor, Tensor, list[Tensor], list[Tensor], list[Tensor]]:
    tied = mathematics.ChainTensors(parse_chain(chain), x, weights, biases, params)
    kept, back, stats, back_stats = [], [], [], []
    shape = tuple(x.shape)
    for m, (layer, form, other) in enumerate(zip(tied.chain.layers, _layouts(tied), _back_layouts(tied), strict=True)):
        seen = layer.input_shape(shape)
        shape = layer.output_shape(shape, tuple(weights[m].shape))
        kept.append(torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=form))
        reverses = tied.chain.reverses(m)
        back.append(
            torch.empty(
                seen if reverses else 0,
                dtype=x.dtype,
                device=x.device,
                memory_format=other if reverses else torch.contiguous_format,
            )
        )
        wide = loss_dtype(x)
        stats += [x.new_empty(_channels(shape), dtype=wide) for _ in range(phi.measured(tied.chain.latent(m)))]
        count = mathematics.reverse_stats_count(tied.chain, m)
        back_stats += [x.new_empty(_channels(seen), dtype=wide) for _ in range(count)]
    out = torch.empty_like(kept[-1])
    if mathematics.keeps_result(tied.chain, len(weights) - 1):
        kept[-1] = x.new_empty(0)
    first = mathematics.first_layer(tied, tied.kernels())
    if first is not None and first.again:
        pooled = tied.chain.layers[1].input_shape(tuple(first.d.x.shape))
        kept[0] = x.new_empty(pooled if memory == "store" else 0)
        kept[0] = _laid_out(kept[0], _layouts(tied)[0])
    losses = x.new_empty(len(weights), dtype=loss_dtype(x))
    engine = chain_engines.serving(tied.chain, x, weights)
    if engine is not None:
        kept, back = engine.fake_kept(tied.chain, x, weights, memory)
        return out, losses, stats, kept, back
    return out, losses, stats, kept, [*back, *back_stats] if memory == "store" else []


def _channels(shape: tuple[int, ...]) -> int:
    return shape[1] if len(shape) > 1 else shape[-1]


def _fake_backward(grad_out: Tensor | None, grad_losses: Tensor | None, *call: Any) -> list[Tensor]:
    x, weights, biases, params, _, _, _, back, text, needs = call
    chain = parse_chain(text)
    flat = [x, *weights, *biases, *params]
    found = len(weights) if grad_losses is not None and not back and not chain.full else 0
    grads = [torch.empty_like(t) for t, needed in zip(flat, needs, strict=True) if needed and t is not None]
    return [*grads, x.new_empty(found, dtype=loss_dtype(x))]


def _autograd(*call: Any) -> Any:
    x, weights, biases, params, chain, memory = call
    flat = (x, *weights, *biases, *params)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in flat):
        out, losses, *stats = TiedChain.apply(chain, memory, None, len(weights), *flat)
        return out, losses, stats, [], []  # what is kept belongs to the graph
    with torch._C._AutoDispatchBelowAutograd():
        return torch.ops.racecar.tied_chain(*call)


_LIB.impl("tied_chain", _autograd, "Autograd")
torch.library.register_fake("racecar::tied_chain", _fake_forward, lib=_LIB)
torch.library.register_fake("racecar::tied_chain_backward", _fake_backward, lib=_LIB)
