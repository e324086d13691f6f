"""A reverse layer's convolutions with everything around them in one kernel, where a backend has such kernels.

    u = Wᵀ (undo(y) - b),   a = φ(u),   loss = Σ (d - undo_pre(a))²,   next source = a - minus

What a kernel does not serve, or a chooser leaves to a library, is None; `reverse.py` then goes the other way.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor

from .lazy import Lazy


class Result(NamedTuple):
    """What was kept (u or a), Σ (d - undo(a))² and a - minus; each None where it was not asked for."""

    kept: Tensor | None
    loss: Tensor | None
    source: Tensor | None


class Incoming(NamedTuple):
    """g_u = act_a'(a) · (g + c2 · (a - d)), computed where it is read; g_u = g without a. At the size of u."""

    g: Tensor | None
    a: Lazy | None = None
    d: Lazy | None = None
    c2: Tensor | None = None

    @property
    def like(self) -> Tensor:
        """A tensor of u's shape and type."""
        found = self.g if self.g is not None else None if self.a is None else self.a.x
        if found is None:
            raise ValueError("the gradient of u needs g, or a, d and c2; got neither")
        return found


class Fused(NamedTuple):
    """The kernels; their arguments are those of `gpu/transposed.py`."""

    forward: Callable[..., Result | None]
    source_gradient: Callable[..., tuple[Tensor | None, Tensor | None] | None]
    weight_gradient: Callable[..., Tensor | None]
