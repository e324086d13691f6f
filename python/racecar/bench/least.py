"""The fewest multiplications that training with a reverse pass can take, as a multiple of plain training's.

Plain training multiplies three times per tied operation: forward, gradient of the weight, gradient of the input (which
the first one does not need). A reverse layer multiplies three times as well: the transposed operation, the gradient of
its source and of the weight, all three of the same size. That makes twice plain training, but for what folding saves:
a transposed convolution of a source that was up-sampled by f, which is how a pooling is undone, is a strided one of the
small source whose kernel holds every distinct offset s·i + d·j (0 ≤ i < f, 0 ≤ j < k; stride s, dilation d): k + f - 1
per dimension where s = d = 1. A full reverse has such sources wherever the network pools; a local one starts from what
the layer gave and has none. A network's own nearest up-sampling in front of a convolution folds likewise, forwards.

Only products of tied operations count: no norm, no activation, no memory traffic. It is a bound on arithmetic done
directly; a Winograd or FFT convolution multiplies less still.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .plain import POOLS, TIED, Layer, layers_of
from .residual import parts_of

Shape = tuple[int, ...]


def multiply_adds(op: Any, output: Shape) -> int:
    """Products of one call of a tied operation, without its bias."""
    if isinstance(op, nn.Linear):
        return math.prod(output) * op.in_features
    return math.prod(output) * (op.in_channels // op.groups) * math.prod(op.kernel_size)


def folded(op: Any, small: Shape, factor: Sequence[int]) -> int:
    """Products of an operation on one side of which `small` was, or is to be, repeated `factor` times.

    `small` has the batch and the spatial sizes of the small side, without channels.
    """
    taps = [
        len({stride * i + dilation * j for i in range(f) for j in range(kernel)})
        for f, stride, dilation, kernel in zip(factor, op.stride, op.dilation, op.kernel_size, strict=True)
    ]
    return math.prod(small) * op.out_channels * (op.in_channels // op.groups) * math.prod(taps)


def least_ratio(net: nn.Module, x: Tensor, variant: str) -> float:
    """Multiplications of training with a reverse pass, in the best form, to those of plain training.

    Args:
        net: a network of `networks.py`; it is not run but on PyTorch's device without data.
        x: its input; only the shape counts.
        variant: `full` or `local`.
    """
    shapes = shapes_of(net, x)
    forward: dict[nn.Module, float] = {op: multiply_adds(op, output) for op, (_, output) in shapes.items()}
    first = next(iter(forward.values()))
    plain = 3 * sum(forward.values()) - first
    best = dict(forward)
    reverse = 0.0
    for layers in (layers_of(part.chain(net)) for part in parts_of(net)):
        for m, layer in enumerate(layers):
            own = layer.op
            best[own] = min(best[own], _forward_folded(layer, shapes[own]))
            products = forward[own]
            if variant == "full" and m + 1 < len(layers):
                products = min(products, _reverse_folded(layer, layers[m + 1], shapes[layers[m + 1].op][0]))
            reverse += products
    first_best = next(iter(best.values()))
    return (3 * sum(best.values()) - first_best + 3 * reverse) / plain


def _reverse_folded(layer: Layer, above: Layer, received: Shape) -> float:
    """The reverse of a layer whose source is what the layer above sees, up-sampled."""
    undone = [module for module in above.pre if not isinstance(module, nn.Dropout)]
    if len(undone) != 1 or not isinstance(undone[0], POOLS) or isinstance(layer.op, nn.Linear):
        return math.inf
    return folded(layer.op, (received[0], *received[2:]), _per_dimension(undone[0].stride, len(received) - 2))


def _forward_folded(layer: Layer, shapes: tuple[Shape, Shape]) -> float:
    """The forward of a layer behind an up-sampling; its stride spoils the fold unless it is 1."""
    steps = [module for module in layer.pre if not isinstance(module, nn.Dropout)]
    op: Any = layer.op
    if len(steps) != 1 or not isinstance(steps[0], nn.Upsample) or isinstance(op, nn.Linear) or set(op.stride) != {1}:
        return math.inf
    received = shapes[0]
    factor = _per_dimension(steps[0].scale_factor, len(received) - 2)
    small = [size // f for size, f in zip(received[2:], factor, strict=True)]
    return folded(op, (received[0], *small), factor)


def _per_dimension(value: Any, dims: int) -> list[int]:
    return [int(v) for v in value] if isinstance(value, (tuple, list)) else [int(value)] * dims


def shapes_of(net: nn.Module, x: Tensor) -> dict[nn.Module, tuple[Shape, Shape]]:
    """Tied operation -> shapes of its input and output, in the order in which they run."""
    originals = [module for module in net.modules() if isinstance(module, TIED)]
    shadow = copy.deepcopy(net).to("meta")
    copies: list[nn.Module] = [module for module in shadow.modules() if isinstance(module, TIED)]
    found: dict[nn.Module, tuple[Shape, Shape]] = {}

    def hook(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        found[originals[copies.index(module)]] = tuple(args[0].shape), tuple(output.shape)

    for module in copies:
        module.register_forward_hook(hook)
    shadow(torch.empty_like(x, device="meta"))
    return found
