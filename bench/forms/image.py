"""A convolution with few channels on one side: by the image kernels, or by a library. Bounds: `pointwise.py`,
`few_channels.py`.

They are lifted while the forms are timed, so that what lies beyond them is seen too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar
from unittest.mock import patch

import torch
from torch import Tensor
from torch.nn import functional as F

from racecar_kernels import chain, chain_backward, few_channels, pointwise
from racecar_kernels.lazy import Lazy
from racecar_kernels.pointwise import KERNELS, PLAIN, Family
from racecar_kernels.weight_gradient import Pair

from .timing import FACTOR, TIED, Row, Table, randn

MOST_FEW = 8  # beyond every bound, and fewer than the many of any shape
# few channels, many channels, batch, side
FEW_SHAPES = [
    (few, many, batch, side)
    for few in (1, 3, 4, MOST_FEW)
    for many in (16, 64, 128, 256, 512)
    for batch, side in ((64, 14), (64, 28), (16, 32), (4, 112), (1, 224))
]
# the same of first layers
FIRST_SHAPES = [
    (1, 64, 64, 28), (1, 128, 64, 28), (1, 256, 64, 28), (3, 16, 16, 32), (3, 64, 16, 32), (3, 128, 16, 32),
    (3, 256, 16, 32), (3, 512, 16, 32), (4, 64, 16, 32), (8, 64, 16, 32), (3, 64, 4, 112), (3, 64, 1, 224),
]  # fmt: skip
NO_BOUND = 1 << 40

Kernel = Callable[..., Any]
T = TypeVar("T")


@contextmanager
def lifted() -> Iterator[None]:
    """The image kernels take whatever they can compute."""
    most: dict[str, Any] = {"MOST_WEIGHTS": NO_BOUND, "MOST_CHANNELS": NO_BOUND, "MOST_CONVOLVED": NO_BOUND}
    with patch.multiple(pointwise, CONVOLVED=pointwise.DTYPES, **most), patch.object(few_channels, "FEW", MOST_FEW):
        yield


def describe(few: int, many: int, batch: int, side: int) -> str:
    return f"{few} and {many} channels, batch {batch}, {side}x{side}"


def few_rows(dtype: torch.dtype, few: int, many: int, batch: int, side: int) -> list[Row]:
    """All maps in which the image is read, or its gradient is."""
    image, wide = (randn(batch, c, side, side, dtype=dtype) for c in (few, many))
    up, down = randn(many, few, 3, 3, dtype=dtype), randn(few, many, 3, 3, dtype=dtype)
    shape = tuple(wide.shape)
    maps: dict[str, Callable[[Family], Tensor]] = {
        "W s, source gradient": lambda kernels: few_channels.source_gradient(kernels, image, up, TIED),
        "the same, 2x2 undone": lambda kernels: few_channels.source_gradient(kernels, image, up, TIED, FACTOR),
        "W^T s": lambda kernels: few_channels.forward(kernels, image, down, TIED, shape),
        "weight, few read": lambda kernels: few_channels.weight_gradient(kernels, Pair(image, wide), up, TIED),
        "weight, few given": lambda kernels: few_channels.weight_gradient(kernels, Pair(wide, image), down, TIED),
    }
    return [Row(what, _both(of), _taken(of)) for what, of in maps.items()]


def _both(of: Callable[[Family], Tensor]) -> dict[str, Callable[[], Tensor]]:
    strict = _with_image_kernels(lambda kernel: lambda *args, **kwargs: _there(kernel(*args, **kwargs)))
    return {"image": lambda: of(strict), "library": lambda: of(PLAIN)}


def _taken(of: Callable[[Family], Tensor]) -> str:
    """Which form the backend takes: the image kernels where one of them serves."""
    served = []

    def noted(kernel: Kernel) -> Kernel:
        def call(*args: Any, **kwargs: Any) -> Any:
            found = kernel(*args, **kwargs)
            served.append(found is not None)
            return found

        return call

    of(_with_image_kernels(noted))
    return "image" if any(served) else "library"


def _with_image_kernels(changed: Callable[[Kernel], Kernel]) -> Family:
    return KERNELS._replace(convolved=changed(KERNELS.convolved), grad_weight=changed(KERNELS.grad_weight))


def first_rows(dtype: torch.dtype, few: int, many: int, batch: int, side: int) -> list[Row]:
    """A first layer with relu, and 2x2 max pooling behind it: forward, and the gradient of its weight."""
    image = randn(batch, few, side, side, dtype=dtype)
    weight, bias = randn(many, few, 3, 3, dtype=dtype), torch.randn(many).to(dtype)
    c = F.conv2d(image, weight, bias, padding=1)
    d = Lazy(c, None, None, "relu", ())
    g = randn(batch, many, side // 2, side // 2, dtype=dtype)

    def fused(window: tuple[int, int] | None) -> Tensor | None:
        found = pointwise.convolved(image, weight, bias, TIED, "relu")
        return None if found is None else read(found, window)

    def read(lazy: Lazy, window: tuple[int, int] | None) -> Tensor:
        if window is None:
            return _there(pointwise.materialise(lazy)[0])
        return _there(pointwise.materialise(lazy, window, full=False, pooled=True)[1])

    def apart(window: tuple[int, int] | None) -> Tensor:
        given = Lazy(F.conv2d(image, weight, bias, padding=1), None, None, "relu", ())
        if window is None:
            return _there(pointwise.materialise(given, in_place=True)[0])
        return _there(pointwise.materialise(given, window, full=False, pooled=True)[1])

    def fused_weight() -> Tensor | None:
        found = pointwise.grad_weight(d, None, FACTOR, None, g, None, image, weight, TIED)
        return None if found is None else found[0]

    def weight_of(at: int, size: int) -> Tensor:
        of_c = pointwise.grad_forward(d.part(at, size), None, FACTOR, None, g.narrow(0, at, size), None).g
        return few_channels.weight_gradient(PLAIN, Pair(image.narrow(0, at, size), of_c), weight, TIED)

    def in_parts() -> Tensor:
        step = max(1, chain_backward.PART * batch // (c.numel() * c.element_size()))
        starts = range(step, batch, step)
        return sum((weight_of(at, min(step, batch - at)) for at in starts), weight_of(0, min(step, batch)))

    def row(what: str, of: Callable[[], Tensor | None], others: dict[str, Callable[[], Tensor]], else_: str) -> Row:
        return Row(what, {"fused": lambda: _there(of()), **others}, "fused" if of() is not None else else_)

    return [
        row("forward, pooled", lambda: fused(FACTOR), {"apart": lambda: apart(FACTOR)}, "apart"),
        Row(
            "pooled once more",
            {"computed again": lambda: _there(fused(FACTOR)), "read": lambda: read(d, FACTOR)},
            "computed again" if fused(FACTOR) is not None and few * 9 <= chain.MOST_AGAIN else "read",
        ),
        row("forward, not pooled", lambda: fused(None), {"apart": lambda: apart(None)}, "apart"),
        row(
            "weight gradient",
            fused_weight,
            {"in parts": in_parts, "apart": lambda: weight_of(0, batch)},
            "apart" if dtype == torch.bfloat16 else "in parts",
        ),
    ]


def _there(found: T | None) -> T:
    """What a kernel gave; a form that would be another one's numbers under its name is refused."""
    if found is None:
        raise ValueError("an image kernel does not serve what a table holds")
    return found


FEW_TABLE = Table(
    "few channels on one side, by the image kernels or a library", FEW_SHAPES, describe, few_rows, needs_extension=True
)
FIRST_TABLE = Table("the first layer in one pass or several", FIRST_SHAPES, describe, first_rows, needs_extension=True)
