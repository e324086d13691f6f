"""The weight gradient of both uses of a weight, in one product or in two. Bounds: `weight_gradient.py`."""

from __future__ import annotations

import torch
from torch import Tensor

from racecar_kernels.weight_gradient import Pair, by_convolution, by_product, joined, joining_pays, product_pays

from .timing import TIED, Row, Table, randn

# batch, channels on both sides, side
SHAPES = [
    (64, 64, 14), (64, 64, 7), (16, 128, 16), (16, 128, 4), (16, 256, 8), (16, 256, 4), (16, 512, 4), (16, 512, 2),
    (16, 512, 1), (4, 512, 4), (1, 128, 56), (1, 256, 28), (1, 256, 14), (1, 512, 28), (1, 512, 14), (1, 512, 7),
]  # fmt: skip


def describe(batch: int, channels: int, side: int) -> str:
    return f"batch {batch}, {channels} channels, {side}x{side}"


def rows(dtype: torch.dtype, batch: int, channels: int, side: int) -> list[Row]:
    """Both uses' sum."""
    weight = randn(channels, channels, 3, 3, dtype=dtype)
    a, b = (Pair(*(randn(batch, channels, side, side, dtype=dtype) for _ in range(2))) for _ in range(2))

    def apart_by_convolution() -> Tensor:
        return by_convolution(a, weight, TIED).add_(by_convolution(b, weight, TIED))

    def apart_by_product() -> Tensor:
        return by_product(b, weight, TIED, by_product(a, weight, TIED))

    chosen = "convolution, joined" if joining_pays(a, weight, TIED) else "convolution, apart"
    forms = {
        "convolution, apart": apart_by_convolution,
        "convolution, joined": lambda: by_convolution(joined(a, b), weight, TIED),
        "product, apart": apart_by_product,
        "product, joined": lambda: by_product(joined(a, b), weight, TIED),
    }
    return [Row("weight gradient", forms, "product, apart" if product_pays(a, weight, TIED) else chosen)]


TABLE = Table("the weight gradient of both uses, joined or apart", SHAPES, describe, rows, needs_extension=False)
