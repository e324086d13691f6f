"""What the launchers of `few_channels.py` compute, by a library's convolution and the pointwise kernels of a family.

For where the kernels' sums of blocks do not fit into memory: the arguments are theirs, the results have the shapes,
types and strides of theirs, so that whoever recorded a call (`tape.py`) can go on with either. No argument is changed.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import few_channels
from ..fused import Incoming, Result
from ..layer import Ints, Tied
from ..lazy import Lazy, Window, made
from ..pointwise import Family
from ..weight_gradient import Pair


def forward(
    kernels: Family,
    y: Lazy,
    weight: Tensor,
    tied: Tied,
    shape: Ints,
    *,
    bias: Tensor | None = None,
    factor: Ints | None = None,
    act: str = "identity",
    args: tuple[Any, ...] = (),
    keep: str = "a",
    d: Lazy | None = None,
    window: Window = None,
    source: bool = False,
    minus: Tensor | None = None,
) -> Result:
    """u = Wᵀ (y - bias), a = act(u), Σ (d - undo(a))²; and with `source`, which needs d, a - minus."""
    s = made(kernels.materialise(y, minus=bias)[0])
    u = _last(few_channels.forward(kernels, s, weight, tied, shape, factor))
    del s
    a = Lazy(u, None, None, act, args)
    if keep == "a":
        a = a._replace(x=made(kernels.materialise(a, in_place=True)[0]), done=True)
    loss: Tensor | None = None
    below: Tensor | None = None
    if d is not None and source:
        loss, below = kernels.compare(d, a, window, minus=minus)
        below = _last(below)
    elif d is not None:
        loss = kernels.sum_of_squares(d, a, window)
    return Result(None if keep == "nothing" else a.x, loss, below)


def source_gradient(
    kernels: Family,
    incoming: Incoming,
    weight: Tensor,
    tied: Tied,
    shape: Ints,
    *,
    factor: Ints | None = None,
    needs_source: bool = True,
    bias: bool = False,
) -> tuple[Tensor | None, Tensor | None]:
    """∂/∂y of `shape` from g_u, and ∂/∂bias = -Σ ∂/∂y per channel, float32."""
    g_s = few_channels.source_gradient(kernels, _written(kernels, incoming), weight, tied, factor)
    return _last(g_s) if needs_source else None, kernels.channel_sum(g_s).neg_() if bias else None


def weight_gradient(
    kernels: Family,
    weight: Tensor,
    tied: Tied,
    *,
    reverse: tuple[Incoming, Lazy, Tensor | None],
    factor: Ints | None = None,
) -> Tensor:
    """∂/∂W in the layout of the weight, of its use in reverse: the gradient of u, y and the bias."""
    incoming, y, bias = reverse
    pair = Pair(_written(kernels, incoming), made(kernels.materialise(y, minus=bias)[0]))
    return torch.empty_like(weight).copy_(few_channels.weight_gradient(kernels, pair, weight, tied, factor))


def _written(kernels: Family, incoming: Incoming) -> Tensor:
    """g_u in memory of its own, where it is not there already: g may be read by another kernel after this one."""
    g, a, d, c2 = incoming
    if a is None:
        return made(g)
    compared = d is not None and c2 is not None
    written: Tensor = kernels.grad_reverse(d if compared else a, a, None, c2 if compared else None, g).g
    return written


def _last(t: Tensor) -> Tensor:
    return t.contiguous(memory_format=torch.channels_last)
