"""The latent φ in plain PyTorch: norms and activations in their forward order, and their backward.

Everything is written with ATen's own backward kernels, so that no autograd graph is needed inside the operator.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .activations import TABLE, prelu_backward
from .contract import Params
from .layer import Activation, Latent, Norm

aten = torch.ops.aten


class Entry(NamedTuple):
    """What the backward of one step reads: its input or output, and the statistics of a norm."""

    x: Tensor
    mean: Tensor | None = None
    rstd: Tensor | None = None


def forward(u: Tensor, latent: tuple[Latent, ...], params: Params) -> tuple[Tensor, list[Entry]]:
    """a = φ(u), and one entry per step for `backward`."""
    entries = []
    h = u
    for step, own in zip(latent, split(latent, params), strict=True):
        x = h
        if isinstance(step, Activation):
            row = TABLE[step.name]
            slope = [_given(own[0]).to(x.dtype)] if own else []
            h = row.forward(x, *slope, *step.args)
            entries.append(Entry(h if row.from_output(*step.args) else x))
        else:
            h, mean, rstd = _norm_forward(x, step, own)
            entries.append(Entry(x, mean, rstd))
    return h, entries


def from_output(a: Tensor, latent: tuple[Latent, ...]) -> list[Entry]:
    """The entries of a latent whose output was kept instead of its input."""
    return [Entry(a) for _ in latent]


def backward(
    g: Tensor, latent: tuple[Latent, ...], params: Params, entries: list[Entry]
) -> tuple[Tensor, list[Tensor | None]]:
    """∂/∂u from ∂/∂a, and the gradients of `params` (None for statistics)."""
    grads: list[Tensor | None] = []
    for step, own, entry in reversed(list(zip(latent, split(latent, params), entries, strict=True))):
        if isinstance(step, Norm):
            g, *mine = _norm_backward(g, step, own, entry)
            grads = [*mine, None, None, *grads]
        elif step.name == "prelu":
            g, grad = prelu_backward(g, entry.x, _given(own[0]).to(g.dtype))
            grads = [grad, *grads]
        else:
            g = TABLE[step.name].backward(g, entry.x, *step.args)
    return g, grads


def split(latent: tuple[Latent, ...], params: Params) -> list[Params]:
    """The tensors of every step."""
    parts, at = [], 0
    for step in latent:
        parts.append(params[at : at + step.tensors])
        at += step.tensors
    return parts


def _given(t: Tensor | None) -> Tensor:
    if t is None:
        raise ValueError("PReLU needs its slopes: a tensor with 1 value or one per channel, got None")
    return t


def _cast(t: Tensor | None, like: Tensor) -> Tensor | None:
    return None if t is None else t.to(like.dtype)


def _dense(u: Tensor) -> Tensor:
    """Group norm's kernels take dense input only: contiguous or channels_last."""
    if u.dim() == 4 and u.is_contiguous(memory_format=torch.channels_last):
        return u
    return u.contiguous()


def _dense_params(params: Params) -> list[Tensor | None]:
    """ATen's norm kernels below torch.nn.functional take it for granted that values per channel lie side by side."""
    return [None if t is None else t.contiguous() for t in params]


def _norm_forward(u: Tensor, step: Norm, params: Params) -> tuple[Tensor, Tensor, Tensor]:
    weight, bias, mean, var = _dense_params(params)
    if step.kind == "batch":
        return aten.native_batch_norm(u, weight, bias, mean, var, not step.running, 0.0, step.eps)
    weight, bias = _cast(weight, u), _cast(bias, u)  # under autocast the parameters are wider
    if step.kind == "layer":
        return aten.native_layer_norm(u, step.shape, weight, bias, step.eps)
    n, c = u.shape[:2]
    return aten.native_group_norm(_dense(u), weight, bias, n, c, u.numel() // (n * c), step.groups, step.eps)


def _norm_backward(g: Tensor, step: Norm, params: Params, entry: Entry) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Gradients of the input, the scale and the shift."""
    weight, bias, mean, var = _dense_params(params)
    mask = [True, weight is not None, bias is not None]
    u = entry.x
    if step.kind == "batch":
        if g.stride() != u.stride():  # on CPUs ATen misreads a g whose dimensions of size 1 have strides of their own
            g = torch.empty_like(u).copy_(g)
        return aten.native_batch_norm_backward(
            g, u, weight, mean, var, entry.mean, entry.rstd, not step.running, step.eps, mask
        )
    weight, bias = _cast(weight, u), _cast(bias, u)
    if step.kind == "layer":
        return aten.native_layer_norm_backward(g, u, step.shape, entry.mean, entry.rstd, weight, bias, mask)
    n, c = u.shape[:2]
    u = _dense(u)
    g = g.contiguous(memory_format=torch.channels_last) if not u.is_contiguous() else g.contiguous()
    return aten.native_group_norm_backward(
        g, u, entry.mean, entry.rstd, weight, n, c, u.numel() // (n * c), step.groups, mask
    )
