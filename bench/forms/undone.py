"""A transposed convolution behind an undone 2x2 pooling: plain, strided, polyphase. Bounds: `transposed.py`."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from racecar_kernels import single_channel, transposed, undo, weight_gradient

from .timing import FACTOR, POOLING, TIED, Row, Table, randn

# batch, channels of the source y, channels of the result u, side of the source
SHAPES = [
    (64, 64, 1, 14), (64, 64, 3, 14), (64, 64, 8, 14), (64, 1, 64, 7), (64, 64, 64, 7), (64, 64, 64, 14),
    (16, 64, 64, 16), (16, 128, 128, 8), (16, 256, 256, 4), (16, 512, 512, 2), (16, 512, 512, 1),
    (1, 64, 64, 112), (1, 128, 128, 56), (1, 256, 256, 28), (1, 512, 512, 14),
]  # fmt: skip


def describe(batch: int, c_y: int, c_u: int, side: int) -> str:
    return f"batch {batch}, {c_y} -> {c_u} channels, source {side}x{side}"


def rows(dtype: torch.dtype, batch: int, c_y: int, c_u: int, side: int) -> list[Row]:
    """Forward, gradient of the source and gradient of the weight."""
    weight = randn(c_y, c_u, 3, 3, dtype=dtype)
    y = randn(batch, c_y, side, side, dtype=dtype)
    g = randn(batch, c_u, 2 * side, 2 * side, dtype=dtype)
    big, shape = (batch, c_y, 2 * side, 2 * side), tuple(g.shape)
    strided = replace(TIED, stride=FACTOR)

    def source() -> Tensor:
        return undo.apply(y, POOLING, big)

    def plain_source_gradient() -> Tensor:
        return undo.adjoint(transposed.source_gradient(g, weight, TIED), y, POOLING, big)

    def weight_of(pair: weight_gradient.Pair, factor: tuple[int, ...] | None = None) -> Tensor:
        return weight_gradient.weight_gradient(pair, weight, TIED, factor)

    pays = transposed.folding_pays(tuple(y.shape), tuple(weight.shape), FACTOR)
    forward = "plain"
    if pays:
        single = single_channel.transposed_serves(y, weight, strided)
        forward = "polyphase" if transposed.polyphase_pays(weight, TIED) and not single else "strided"
    gradient = "folded" if pays else "plain"
    return [
        Row("forward", {
            "plain": lambda: transposed.plain(source(), weight, TIED, shape),
            "strided": lambda: transposed.plain(y, transposed.fold(weight, FACTOR), strided, shape),
            "polyphase": lambda: transposed.polyphase(y, weight, TIED, shape, FACTOR),
        }, forward),
        Row("source gradient", {
            "plain": plain_source_gradient,
            "folded": lambda: transposed.source_gradient(g, weight, TIED, FACTOR),
        }, gradient),
        Row("weight gradient", {
            "plain": lambda: weight_of(weight_gradient.Pair(g, source())),
            "folded": lambda: weight_of(weight_gradient.Pair(g, y), FACTOR),
        }, gradient),
    ]  # fmt: skip


TABLE = Table("a transposed convolution behind an undone 2x2 pooling", SHAPES, describe, rows, needs_extension=False)
