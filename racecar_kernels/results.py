"""What the operators promise of their results: wide losses, gradients like their inputs, no second derivatives."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def loss_dtype(*tensors: Tensor) -> torch.dtype:
    """Losses are accumulated and reported in float32, or in float64 where anything is."""
    return torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32


def as_gradient(g: Tensor | None, x: Tensor) -> Tensor:
    """g, or zeros, in the shape, dtype and memory layout of the input x, as the fake implementations promise."""
    if g is None:
        return torch.zeros_like(x)
    if g.shape != x.shape:
        g = g.reshape(x.shape)
    same = g.dtype == x.dtype and g.stride() == x.stride()
    return g if same else torch.empty_like(x).copy_(g)


class NoSecondDerivative(torch.autograd.Function):
    """Refuses to differentiate gradients again, rather than to leave out what they depend on."""

    @staticmethod
    def forward(ctx: Any, count: int, *tensors: Tensor | None) -> tuple[Tensor, ...]:
        return tuple(g.detach() for g in tensors[:count] if g is not None)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        raise RuntimeError(
            "the reverse pass has first derivatives only; keep reverse_loss out of a loss that differentiates "
            "gradients (create_graph=True), for example by wrapping the model with lam=0 for that part"
        )
