"""One reverse layer of a linear operation in the kernels of `linear.py`, as `fused.py` asks for it.

Tensors of any number of dimensions, the features last, are taken as matrices. What the kernels do not serve is None.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..fused import Incoming, Result
from ..layer import Ints
from ..lazy import Lazy, Window
from . import linear
from .linear import IDENTITY, Act, Reversed


def forward(
    y: Lazy,
    weight: Tensor,
    shape: Ints,
    *,
    bias: Tensor | None,
    factor: Ints | None,
    act: str,
    args: tuple[Any, ...],
    keep: str,
    d: Lazy | None,
    window: Window,
    source: bool = False,
    minus: Tensor | None = None,
    tf32: bool = False,
) -> Result | None:
    """a (or u, where that is kept) of `shape`, and Σ (a - d)²; the next source is left to the kernel that reads it.

    A residual that would need what is not kept, or d as it is not in memory, is left to the pointwise kernel.
    """
    if not y.as_it_is or window is not None or factor is not None:
        return None
    own: Act = (act, args) if keep == "a" else IDENTITY
    compared = d is not None and d.as_it_is and own == (act, args)
    p = _rows(d.x) if d is not None and compared else None
    bias = None if bias is None else bias.contiguous()
    if linear.why_not(_rows(y.x), weight, p, bias=bias, acts=[own]) is not None:
        return None
    found, loss = linear.reverse(_rows(y.x), weight, bias, own, p, tf32=tf32)
    return Result(found.view(shape), loss, None)


def source_gradient(
    incoming: Incoming,
    weight: Tensor,
    shape: Ints,
    *,
    factor: Ints | None = None,
    needs_source: bool = True,
    bias: bool = False,
    tf32: bool = False,
) -> tuple[Tensor | None, Tensor | None] | None:
    """∂/∂y of `shape`, and ∂/∂bias = -Σ ∂/∂y."""
    r = _reversed(incoming, weight)
    if r is None or factor is not None or linear.why_not(r.a, r.p, r.g_in, weight, acts=[r.act]) is not None:
        return None
    g_y, total = linear.grad_source(r, needs_y=needs_source, needs_bias=bias, tf32=tf32)
    return None if g_y is None else g_y.view(shape), total


def weight_gradient(
    weight: Tensor, reverse: tuple[Incoming, Lazy, Tensor | None], *, tf32: bool = False
) -> Tensor | None:
    """∂/∂W of the weight's use in reverse."""
    incoming, y, bias = reverse
    r = _reversed(incoming, weight)
    if r is None or not y.as_it_is:
        return None
    r = r._replace(y=_rows(y.x), bias=None if bias is None else bias.contiguous())
    if linear.why_not(r.y, r.a, r.p, r.g_in, weight, bias=r.bias, acts=[r.act]) is not None:
        return None
    return linear.grad_weight(r, tf32=tf32)


def _reversed(incoming: Incoming, weight: Tensor) -> Reversed | None:
    """The gradient of u as the kernels make it, without its source; None where a or d are not in memory."""
    a, d = incoming.a or Lazy(incoming.like), incoming.d
    if not a.as_it_is or (d is not None and not d.as_it_is):
        return None
    g, p = (None if t is None else _rows(t) for t in (incoming.g, None if d is None else d.x))
    c2 = None if incoming.c2 is None or p is None else incoming.c2.float()
    return Reversed(None, _rows(a.x), p, weight, None, (a.act, a.args), g, c2)


def _rows(t: Tensor) -> Tensor:
    return t.reshape(-1, t.shape[-1])
