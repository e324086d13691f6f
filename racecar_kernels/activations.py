"""The one table of activations: forward, and backward from the input or, where that is enough, from the output.

A row that is differentiable from its output lets a reverse layer keep its result alone (In-place ABN, Rota Bulò et
al. 2018). To add an activation, add a row; `racecar.wrap` and the tests read this table.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

aten = torch.ops.aten

_SELU_ALPHA, _SELU_SCALE = 1.6732632423543772848170429916717, 1.0507009873554804934193349852946


@dataclass(frozen=True)
class Row:
    """`forward(u, *args)`; `backward(g, x, *args)`, where x is the output if `from_output(*args)`, else the input.

    The args are the module's attributes of the names in `settings`.
    """

    module: type[nn.Module]
    forward: Callable[..., Tensor]
    backward: Callable[..., Any]  # a tensor; for PReLU its two gradients
    settings: tuple[str, ...] = ()
    from_output: Callable[..., bool] = lambda *args: False

    def args(self, module: Any) -> tuple[Any, ...]:
        """Those of a module."""
        return tuple(getattr(module, name) for name in self.settings)


def _always(*args: Any) -> bool:
    return True


def _prelu_slope(slope: Tensor, u: Tensor) -> Tensor:
    """The slopes (1 or C values) in a shape that broadcasts against u (N, C, ...)."""
    return slope.view(1, -1, *[1] * (u.dim() - 2)) if u.dim() > 1 else slope


def prelu_backward(g: Tensor, u: Tensor, slope: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of PReLU with respect to its input and to its slopes; at 0 and for NaN the slope's side, as PyTorch."""
    positive = u > 0
    grad = torch.where(positive, g, g * _prelu_slope(slope, u))
    each = torch.where(positive, 0, u * g)
    if slope.numel() == 1:
        return grad, each.sum().view_as(slope)
    return grad, each.sum([d for d in range(u.dim()) if d != 1]).view_as(slope)


def rounded(bound: float, a: Tensor) -> float:
    """The bound in a's own type, since that is how a result that reached it was stored."""
    return float(torch.tensor(bound, dtype=a.dtype))


TABLE: dict[str, Row] = {
    "relu": Row(nn.ReLU, torch.relu, lambda g, a: aten.threshold_backward(g, a, 0), from_output=_always),
    "relu6": Row(nn.ReLU6, F.relu6, lambda g, a: aten.hardtanh_backward(g, a, 0.0, 6.0), from_output=_always),
    "leaky_relu": Row(
        nn.LeakyReLU,
        F.leaky_relu,
        lambda g, x, slope: aten.leaky_relu_backward(g, x, slope, slope > 0),
        ("negative_slope",),
        lambda slope: slope > 0,
    ),
    "prelu": Row(nn.PReLU, F.prelu, prelu_backward),
    "elu": Row(
        nn.ELU,
        F.elu,
        lambda g, x, alpha: aten.elu_backward(g, alpha, 1.0, 1.0, alpha > 0, x),
        ("alpha",),
        lambda alpha: alpha > 0,
    ),
    "selu": Row(
        nn.SELU, F.selu, lambda g, a: aten.elu_backward(g, _SELU_ALPHA, _SELU_SCALE, 1.0, True, a), from_output=_always
    ),
    "celu": Row(
        nn.CELU,
        F.celu,
        lambda g, x, alpha: aten.elu_backward(g, alpha, 1.0, 1.0 / alpha, alpha > 0, x),
        ("alpha",),
        lambda alpha: alpha > 0,
    ),
    "gelu": Row(
        nn.GELU,
        lambda u, approximate: F.gelu(u, approximate=approximate),
        lambda g, u, approximate: aten.gelu_backward(g, u, approximate=approximate),
        ("approximate",),
    ),
    "silu": Row(nn.SiLU, F.silu, aten.silu_backward),
    "mish": Row(nn.Mish, F.mish, aten.mish_backward),
    "tanh": Row(nn.Tanh, torch.tanh, aten.tanh_backward, from_output=_always),
    "sigmoid": Row(nn.Sigmoid, torch.sigmoid, aten.sigmoid_backward, from_output=_always),
    "log_sigmoid": Row(nn.LogSigmoid, F.logsigmoid, lambda g, u: torch.sigmoid(-u).mul_(g)),
    "hardtanh": Row(
        nn.Hardtanh,
        F.hardtanh,
        lambda g, a, low, high: aten.hardtanh_backward(g, a, rounded(low, a), rounded(high, a)),
        ("min_val", "max_val"),
        _always,
    ),
    "hardsigmoid": Row(nn.Hardsigmoid, F.hardsigmoid, aten.hardsigmoid_backward),
    "hardswish": Row(nn.Hardswish, F.hardswish, aten.hardswish_backward),
    "hardshrink": Row(nn.Hardshrink, F.hardshrink, aten.hardshrink_backward, ("lambd",)),
    "softshrink": Row(nn.Softshrink, F.softshrink, aten.softshrink_backward, ("lambd",)),
    "softplus": Row(nn.Softplus, F.softplus, aten.softplus_backward, ("beta", "threshold")),
    "softsign": Row(nn.Softsign, F.softsign, lambda g, a: (1 - a.abs()).square_().mul_(g), from_output=_always),
    "tanhshrink": Row(nn.Tanhshrink, F.tanhshrink, lambda g, u: torch.tanh(u).square_().mul_(g)),
    "threshold": Row(
        nn.Threshold,
        F.threshold,
        lambda g, u, threshold, value: aten.threshold_backward(g, u, threshold),
        ("threshold", "value"),
    ),
}

BY_MODULE = {row.module: name for name, row in TABLE.items()}
