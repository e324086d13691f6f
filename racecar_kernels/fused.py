"""A reverse layer's convolutions with everything around them in one kernel, where a backend has such kernels.

    u = Wᵀ (undo(y) - b),   a = φ(u),   loss = Σ (d - undo_pre(a))²,   next source = a - minus

What a kernel does not serve, or a chooser leaves to a library, is None; `reverse.py` then goes the other way.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from torch import Tensor

from .layer import Ints, Tied
from .lazy import BatchNorm, Lazy


class Affine(NamedTuple):
    """A batch norm that takes its statistics of the batch: scale and shift, if any, and eps."""

    weight: Tensor | None
    bias: Tensor | None
    eps: float


class Result(NamedTuple):
    """What was kept (u or a), Σ (d - undo(a))², a - minus, u's batch norm; each None where it was not asked for."""

    kept: Tensor | None
    loss: Tensor | None
    source: Tensor | None
    norm: BatchNorm | None = None


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
    """The kernels; their arguments are those of `gpu/transposed.py`.

    A `norm` that `forward` is asked for it may leave out of its result: then it is taken from what was kept.

    `takes(pass, weight, operation, factor)`: whether the chooser wants forward, source or weight of a layer fused.
    """

    takes: Callable[[str, Tensor, Tied, Ints | None], bool]
    forward: Callable[..., Result | None]
    source_gradient: Callable[..., tuple[Tensor | None, Tensor | None] | None]
    weight_gradient: Callable[..., Tensor | None]


def joined(every: Sequence[Fused]) -> Fused:
    """Kernels of several kinds as one: the first kind that takes a pass of a layer, and serves it, computes it."""

    def takes(pass_: str, weight: Tensor, tied: Tied, factor: Ints | None) -> bool:
        return any(own.takes(pass_, weight, tied, factor) for own in every)

    def by_first(pass_: str, weight: Tensor, tied: Tied, factor: Ints | None, ask: Callable[[Fused], Any]) -> Any:
        found = (ask(own) for own in every if own.takes(pass_, weight, tied, factor))
        return next((result for result in found if result is not None), None)

    def forward(y: Lazy, weight: Tensor, tied: Tied, shape: Ints, *, factor: Ints | None, **options: Any) -> Any:
        def ask(own: Fused) -> Result | None:
            return own.forward(y, weight, tied, shape, factor=factor, **options)

        return by_first("forward", weight, tied, factor, ask)

    def source_gradient(
        incoming: Incoming, weight: Tensor, tied: Tied, shape: Ints, *, factor: Ints | None, **options: Any
    ) -> Any:
        def ask(own: Fused) -> tuple[Tensor | None, Tensor | None] | None:
            return own.source_gradient(incoming, weight, tied, shape, factor=factor, **options)

        return by_first("source", weight, tied, factor, ask)

    def weight_gradient(weight: Tensor, tied: Tied, *, factor: Ints | None = None, **options: Any) -> Any:
        def ask(own: Fused) -> Tensor | None:
            return own.weight_gradient(weight, tied, factor=factor, **options)

        return by_first("weight", weight, tied, factor, ask)

    return Fused(takes, forward, source_gradient, weight_gradient)
