"""φ, the norms and activations behind a tied operation, as the pointwise kernels read it, and its backward.

The kernels know a batch norm, an activation that is differentiable from its output, or the one behind the other. What
they read is the tied operation's own result: φ of it is computed where it is read (`Lazy`). Every other φ is applied
by PyTorch, and the kernels read what it gave.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from . import latent
from .contract import Params
from .fused import Affine
from .layer import Activation, Latent, Norm
from .lazy import BatchNorm, Gradient, Lazy
from .pointwise import Family, served

_CHEAP = ("identity", "relu", "relu6", "hardtanh", "leaky_relu")


class Parts(NamedTuple):
    """A φ that the kernels know; either part may be missing."""

    norm: Norm | None
    act: Activation | None


class Reading(NamedTuple):
    """φ(c): as the kernels read it; the statistics of its batch norm; what the backward of any other φ reads."""

    lazy: Lazy
    norm: BatchNorm | None = None
    entries: list[latent.Entry] | None = None


@lru_cache(maxsize=4096)
def parts(own: tuple[Latent, ...]) -> Parts | None:
    """φ as the kernels know it, None where they do not."""
    rest = list(own)
    norm = rest.pop(0) if rest and isinstance(rest[0], Norm) and rest[0].kind == "batch" else None
    act = rest.pop(0) if rest and isinstance(rest[0], Activation) and served(rest[0].name, rest[0].args) else None
    return None if rest else Parts(norm, act)  # type: ignore[arg-type]


def measures(step: Latent) -> bool:
    """Whether a step takes statistics of the batch, which running statistics are updated with."""
    return isinstance(step, Norm) and step.kind == "batch" and not step.running


def measured(own: tuple[Latent, ...]) -> int:
    """The number of tensors of statistics that φ takes: two for every norm that takes any."""
    return 2 * sum(map(measures, own))


def writes_result(own: tuple[Latent, ...], *, pooled: bool) -> bool:
    """Whether φ's result is written over what φ is applied to, and kept instead of it.

    A norm needs its input. Where the result is pooled before anything else reads it whole, a cheap activation is
    computed where it is read: that saves writing it.
    """
    known = parts(own)
    if known is None or known.norm is not None:
        return False
    return not pooled or (known.act is not None and known.act.name not in _CHEAP)


def affine_of(own: tuple[Latent, ...], params: Params) -> Affine | None:
    """The batch norm that φ begins with, where a kernel may take its statistics while it writes what φ is applied to.

    None where there is none, its statistics are running ones, or float64 takes part.
    """
    known = parts(own)
    if known is None or known.norm is None or known.norm.running:
        return None
    weight, bias, *_ = params
    if any(t is not None and t.dtype == torch.float64 for t in (weight, bias)):
        return None
    return Affine(weight, bias, known.norm.eps)


def read(
    kernels: Family,
    c: Tensor,
    own: tuple[Latent, ...],
    params: Params,
    stats: Sequence[Tensor] = (),
    *,
    done: bool,
    norm: BatchNorm | None = None,
) -> Reading:
    """φ(c). `stats`: mean and 1/deviation, where they are known already; `done`: c is φ's result.

    `norm`: the batch norm of c that φ begins with (see `affine_of`), where the kernel that wrote c found it.
    """
    known = parts(own)
    if known is None:
        a, entries = latent.forward(c, own, params)
        return Reading(Lazy(a), None, entries)
    name, args = ("identity", ()) if known.act is None else (known.act.name, known.act.args)
    if known.norm is None:
        return Reading(Lazy(c, None, None, name, args, done=done))
    if norm is None:
        norm = _batch_norm(kernels, c, known.norm, params, stats)
    return Reading(Lazy(c, norm.scale, norm.shift, name, args, mean=norm.mean), norm)


def _batch_norm(kernels: Family, c: Tensor, step: Norm, params: Params, stats: Sequence[Tensor]) -> BatchNorm:
    weight, bias, mean, var = params
    if not step.running and not stats:
        return kernels.batch_norm(c, weight, bias, step.eps)
    wide = torch.float64 if c.dtype == torch.float64 else torch.float32
    if stats:
        mean, rstd = stats
    elif mean is None or var is None:
        raise ValueError("a norm with running statistics needs their mean and variance, got None")
    else:
        mean, rstd = mean.to(wide), (var.to(wide) + step.eps).rsqrt()
    scale = rstd if weight is None else rstd * weight.reshape(-1)
    return BatchNorm(mean, rstd, scale, -mean * scale if bias is None else bias.reshape(-1) - mean * scale)


def stats_of(reading: Reading, own: tuple[Latent, ...]) -> list[Tensor]:
    """Mean and 1/deviation of every norm of φ that takes them of the batch, in turn."""
    if reading.entries is None:
        taken = reading.norm is not None and any(map(measures, own))
        return [reading.norm.mean, reading.norm.rstd] if taken and reading.norm is not None else []
    found: list[Tensor] = []
    for step, entry in zip(own, reading.entries, strict=True):
        if measures(step) and entry.mean is not None and entry.rstd is not None:
            found += [entry.mean, entry.rstd]
    return found


def backward(
    kernels: Family, grad: Gradient, c: Tensor, own: tuple[Latent, ...], params: Params, reading: Reading
) -> tuple[Tensor, list[Tensor | None], Tensor | None]:
    """From the gradient that a kernel gave (already through the activation, where it knows φ) that of c.

    Returns:
        ∂/∂c, in the memory of `grad.g` where the kernels know φ; the gradients of `params`; and Σ ∂/∂c per channel,
        the gradient of a bias in c, where it comes for free.
    """
    if reading.entries is not None:
        g, grads = latent.backward(grad.g, own, params, reading.entries)
        return g, grads, None
    norm = reading.norm
    if norm is None or grad.total is None or grad.with_x is None:  # without a norm there is no affine
        return grad.g, [], grad.total
    own_grads: list[Tensor | None] = [
        None if params[0] is None else grad.with_x * norm.rstd,
        None if params[1] is None else grad.total,
        None,
        None,
    ]
    if any(map(measures, own)):  # what is the same for the whole batch does not get through the norm: the sum is 0
        g = kernels.batch_norm_backward_(grad.g, c, norm, grad.total, grad.with_x)
        return g, own_grads, torch.zeros_like(grad.total)
    zero = torch.zeros_like(norm.scale)
    g = kernels.norm_input_grad_(grad.g, c, norm.mean, norm.scale, zero, zero)
    return g, own_grads, grad.total * norm.scale
