"""Launches the CUDA kernels of transposed convolutions between 1 to 4 channels and many, and both their gradients.

    u = Wᵀ (y - b),   a = act(u · scale + shift),   Σ (d - undo(a))²

The interface is that of `gpu/transposed.py`; the kernels (csrc/cuda/few_channels_*.cuh) accumulate in float32. A test
hands the same parameters to the same source on the CPU. Not yet measured on a GPU: the backend `cuda` has them wherever
they serve, the backend `triton` only where a measurement says so (`gpu/chooser.py`).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from math import prod
from typing import Any, TypeVar

import torch
from torch import Tensor

from ..fused import Affine, Fused, Incoming, Result
from ..layer import Ints, Tied
from ..lazy import Lazy, Window
from ..pointwise import PLAIN, Family
from ..tape import one_instruction
from ..transposed import fold, fold_adjoint
from . import by_library, few_operands, tiles
from .few_operands import NARROW, WEIGHT, WIDE, Launch, Operation, activation, why_not_gradients, why_not_layer
from .few_operands import why_not as why_not

R = TypeVar("R")
Takes = Callable[[str, Tensor, Tied, "Ints | None"], bool]


def _check(reason: str | None) -> None:
    if reason is not None:
        raise ValueError(reason)


def _folded(weight: Tensor, factor: Ints | None) -> Tensor:
    if factor is None:
        return weight
    kernels = few_operands.folding(weight)
    return fold(weight, factor) if kernels is None else kernels.fold(weight, factor)


def _unfolded(total: Tensor, factor: Ints | None) -> Tensor:
    """The adjoint, of a float32 gradient."""
    if factor is None:
        return total
    kernels = few_operands.folding(total)
    return fold_adjoint(total, factor) if kernels is None else kernels.fold_adjoint(total, factor, total.dtype)


def _to(own: Operation, weight: Tensor, *, few: bool) -> tuple[Launch, int, int]:
    """A launch with a result of few or of many channels, the kernel, and the number of its tiles."""
    result = own.towards(few)
    cut = tiles.narrow(result) if few else tiles.wide(result)
    if cut is None:
        raise ValueError("the kernel does not fit into shared memory")
    return Launch(own, weight, cut, result), NARROW if few else WIDE, own.images * prod(result.tiles(cut.tile))


def _empty(like: Tensor, shape: Ints) -> Tensor:
    return torch.empty(shape, dtype=like.dtype, device=like.device, memory_format=torch.channels_last)


# ------------------------------------------------------------------------------------------- launchers


@one_instruction
def forward(
    y: Lazy,
    weight: Tensor,
    tied: Tied,
    shape: Ints,
    *,
    bias: Tensor | None = None,
    factor: Ints | None = None,
    act: str = "identity",
    args: tuple[Any, ...] = (),
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    keep: str = "a",
    d: Lazy | None = None,
    window: Window = None,
    source: bool = False,
    minus: Tensor | None = None,
) -> Result:
    """u = Wᵀ (y - bias) of `shape` (N, C_in, H, W), a = act(u · scale[c] + shift[c]); keeps "u", "a" or "nothing".

    y: (N, C_out, P, Q), or smaller by `factor`. d: compared with a, every value of which stands for a `window` of d.
    source: also a - minus[c], what the next reverse layer reads. Raises ValueError where `why_not` has a reason.
    """
    _check(why_not(y, weight, tied, shape, factor=factor, d=d, window=window))
    weight = _folded(weight, factor)
    own = Operation.of(weight, tied, shape, tuple(y.x.shape), factor, folded=True)
    made, kernel, count = _to(own, weight, few=own.few_is_large)
    p, to = made.params, made.params.to
    made.read(p.many if own.few_is_large else p.few, y, many=own.few_is_large, minus=bias)
    kept, to_source = (_empty(y.x, shape) if wanted else None for wanted in (keep != "nothing", source))
    blocks = count * (1 if own.few_is_large else -(-own.channels // (p.lanes * 16 // own.itemsize)))
    squares = None if d is None else y.x.new_empty(blocks, dtype=torch.float32)
    to.out, to.source, to.squares = made.hold(kept), made.hold(to_source), made.hold(squares)
    to.scale, to.shift, to.minus = (made.hold(t, wide=True) for t in (scale, shift, minus))
    to.act, to.p = activation(act, args, weight.dtype)
    to.keep_u = keep == "u"
    if d is not None:
        made.fill(to.d, d, many=not own.few_is_large)
        to.window, to.d_size = window or (1, 1), tuple(d.x.shape[2:])
    made.run(kernel)
    return Result(kept, None if squares is None else squares.sum(), to_source)


@one_instruction
def source_gradient(
    incoming: Incoming,
    weight: Tensor,
    tied: Tied,
    shape: Ints,
    *,
    factor: Ints | None = None,
    needs_source: bool = True,
    bias: bool = False,
) -> tuple[Tensor | None, Tensor | None]:
    """∂/∂y of `shape` (that of y, so smaller by `factor`) from g_u, and ∂/∂bias = -Σ ∂/∂y per channel, float32."""
    like = incoming.like
    _check(why_not_gradients(incoming, [], weight, tied, shape, factor))
    weight = _folded(weight, factor)
    own = Operation.of(weight, tied, tuple(like.shape), shape, factor, folded=True)
    made, kernel, count = _to(own, weight, few=not own.few_is_large)
    p = made.params
    made.read(p.few if own.few_is_large else p.many, incoming, many=not own.few_is_large)
    out = _empty(like, shape) if needs_source else None
    sums = like.new_empty(count, shape[1], dtype=torch.float32) if bias else None
    p.to.out, p.to.sums, p.to.keep_u = made.hold(out), made.hold(sums), 1
    made.run(kernel)
    return out, None if sums is None else sums.sum(0).neg_()


@one_instruction
def weight_gradient(
    weight: Tensor,
    tied: Tied,
    *,
    read: tuple[Lazy, Tensor] | None = None,
    reverse: tuple[Incoming, Lazy, Tensor | None] | None = None,
    factor: Ints | None = None,
) -> Tensor:
    """∂/∂W in the layout of the weight: the sum of what its use forward and its use in reverse give.

    read: what the operation read (N, C_in, H, W), and the gradient of what it gave (N, C_out, P, Q).
    reverse: the gradient of u (N, C_in, H, W), y and the bias. `factor`: y stands for itself repeated.
    """
    total: Tensor | None = None
    if reverse is not None:
        incoming, y, bias = reverse
        _check(why_not_gradients(incoming, [y], weight, tied, tuple(y.x.shape), factor))
        total = _unfolded(_sums(weight, tied, incoming, y, bias, factor), factor)
    if read is not None:
        p, g = read
        _check(why_not_gradients(Incoming(p.x), [p, Lazy(g)], weight, tied, tuple(g.shape)))
        own = _sums(weight, tied, p, Lazy(g), None, None)
        total = own if total is None else total.add_(own)
    if total is None:
        raise ValueError("one use of the weight is needed, read or reverse; got neither")
    return torch.empty_like(weight).copy_(total)


def _sums(
    weight: Tensor, tied: Tied, large: Incoming | Lazy, small: Lazy, bias: Tensor | None, factor: Ints | None
) -> Tensor:
    """Of one use, float32, with the taps of a folded weight where there is a factor."""
    shape = tuple(large.like.shape if isinstance(large, Incoming) else large.x.shape)
    own = Operation.of(weight, tied, shape, tuple(small.x.shape), factor, folded=False)
    result = own.towards()
    cut = tiles.weight(result)
    if cut is None:
        raise ValueError("the kernel does not fit into shared memory")
    made = Launch(own, weight, cut, result)
    p = made.params
    made.read(p.few if own.few_is_large else p.many, large, many=not own.few_is_large)
    made.read(p.many if own.few_is_large else p.few, small, many=own.few_is_large, minus=bias)
    p.rows, p.each = tiles.rows(result, cut, own.images)
    partials = weight.new_empty(p.rows, own.channels, own.few, *own.kernel, dtype=torch.float32)
    p.partials = made.hold(partials)
    made.run(WEIGHT)
    total = partials.sum(0)
    return total if own.few_is_large else total.transpose(0, 1).contiguous()


# ------------------------------------------------------------------------------------------- for a family


def fused(wanted: Takes | None = None, family: Family = PLAIN) -> Fused:
    """These kernels as a family's `fused`, where they serve and `wanted` wants them, by default everywhere.

    None from them, and the family goes its other way. family: computes, with a library, what there is no memory for.
    """

    def takes(pass_: str, weight: Tensor, tied: Tied, factor: Ints | None) -> bool:
        served = why_not_layer(weight, tied) is None
        return served and (wanted is None or wanted(pass_, weight, tied, factor))

    return Fused(
        takes,
        partial(_forward, _if_it_fits(forward, partial(by_library.forward, family))),
        partial(_source_gradient, _if_it_fits(source_gradient, partial(by_library.source_gradient, family))),
        partial(_weight_gradient, _if_it_fits(weight_gradient, partial(by_library.weight_gradient, family))),
    )


def _forward(
    launch: Callable[..., Result],
    y: Lazy,
    weight: Tensor,
    tied: Tied,
    shape: Ints,
    *,
    norm: Affine | None = None,
    **options: Any,
) -> Result | None:
    """A norm's statistics are left to the pointwise kernels."""
    asked = {name: options[name] for name in ("factor", "d", "window")}
    return None if why_not(y, weight, tied, shape, **asked) else launch(y, weight, tied, shape, **options)


def _source_gradient(
    launch: Callable[..., tuple[Tensor | None, Tensor | None]],
    incoming: Incoming,
    weight: Tensor,
    tied: Tied,
    shape: Ints,
    **options: Any,
) -> tuple[Tensor | None, Tensor | None] | None:
    if why_not_gradients(incoming, [], weight, tied, shape, options["factor"]):
        return None
    return launch(incoming, weight, tied, shape, **options)


def _weight_gradient(
    launch: Callable[..., Tensor],
    weight: Tensor,
    tied: Tied,
    *,
    reverse: tuple[Incoming, Lazy, Tensor | None],
    factor: Ints | None = None,
) -> Tensor | None:
    incoming, y, _ = reverse
    if why_not_gradients(incoming, [y], weight, tied, tuple(y.x.shape), factor):
        return None
    return launch(weight, tied, reverse=reverse, factor=factor)


def _if_it_fits(launch: Callable[..., R], instead: Callable[..., R]) -> Callable[..., R]:
    """`launch`, and `instead` where there is no memory for the sums of blocks beside the result.

    Both in one instruction: a replay (`tape.py`) comes to no other place where it could still go the other way.
    """

    @one_instruction
    def run(*args: Any, **kwargs: Any) -> R:
        try:
            return launch(*args, **kwargs)
        except torch.OutOfMemoryError:
            pass  # and not below this line: the exception holds what `launch` has allocated by then
        return instead(*args, **kwargs)

    return run
