"""The reverse of a layer straight from its definition, for the tests: no formula of ours, no thought for speed.

The transposed operation is what autograd says the forward's adjoint is; everything else is written element by element.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from racecar_kernels import describe


def error(got: list[Tensor], want: list[Tensor]) -> float:
    """Norm-wise relative error over all tensors, in float64."""
    off = sum((g.double() - w).square().sum() for g, w in zip(got, want, strict=True))
    return (off / sum(w.square().sum() for w in want)).sqrt().item()


def transposed(op: nn.Module, s: Tensor, shape: torch.Size) -> Tensor:
    """Wᵀ s: the vector-Jacobian product of the operation at any point (it is affine)."""
    at = s.new_zeros(shape, requires_grad=True)
    with torch.enable_grad():
        return torch.autograd.grad(op(at), at, s, create_graph=True)[0]


def undo(pre: list[nn.Module], h: Tensor, shapes: list[torch.Size]) -> Tensor:
    """Pooling: repeat by the stride, cut or continued at the edge; up-sampling: max pooling; dropout: nothing."""
    for module, shape in zip(reversed(pre), reversed(shapes), strict=True):
        if isinstance(module, nn.Dropout):
            continue
        if isinstance(module, nn.Upsample):
            pool = {3: F.max_pool1d, 4: F.max_pool2d, 5: F.max_pool3d}[h.dim()]
            h = pool(h, [a // b for a, b in zip(h.shape[2:], shape[2:], strict=True)])
            continue
        dims = h.dim() - 2
        stride = module.stride if isinstance(module.stride, tuple) else (module.stride,) * dims
        for i in range(dims):
            index = (torch.arange(shape[2 + i], device=h.device) // stride[i]).clamp_max(h.shape[2 + i] - 1)
            h = h.index_select(2 + i, index)
    return h


def shapes_through(pre: list[nn.Module], shape: torch.Size) -> list[torch.Size]:
    """Shapes that every module of `pre` receives, and last the one that the operation does."""
    h, shapes = torch.zeros(shape), [torch.Size(shape)]
    for module in pre:
        h = h if isinstance(module, nn.Dropout) else module(h)
        shapes.append(h.shape)
    return shapes


def apply_latent(latent: list[nn.Module], h: Tensor, norm: str = "batch") -> Tensor:
    """Norms and activations; running statistics are read and never written, dropout does nothing."""
    for module in latent:
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            batch = module.training and norm == "batch"
            stats = (None, None) if batch else (module.running_mean, module.running_var)
            h = F.batch_norm(h, *stats, module.weight, module.bias, batch, 0.0, module.eps)
        elif not isinstance(module, nn.Dropout):
            h = module(h)
    return h


def reverse_layer(sample, reduction: str = "l2") -> tuple[Tensor, Tensor]:
    """a and the loss of one of `cases.py`'s samples."""
    target = sample.target
    shapes = shapes_through(sample.pre, target.shape)
    full = sample.op(target.new_zeros(shapes[-1])).shape
    y = undo(sample.undo, sample.y, shapes_through(sample.undo, full)[:-1])
    bias = sample.op.bias
    if bias is not None:
        y = y - (bias if describe.is_a(sample.op, (nn.Linear,)) else bias.view(-1, *[1] * (y.dim() - 2)))
    a = apply_latent(sample.latent, transposed(sample.op, y, shapes[-1]))
    residual = target - undo(sample.pre, a, shapes[:-1])
    total = residual.square().sum()
    return a, {"l2": total / 2, "sum": total, "mean": total / residual.numel()}[reduction]


def chain_losses(
    layers: list[tuple[list[nn.Module], nn.Module, list[nn.Module]]],
    x: Tensor,
    *,
    variant: str = "full",
    norm: str = "batch",
) -> list[Tensor]:
    """½·Σ(d_m - d'_m)² of every (pre, op, latent), m = 1 first."""
    d = [x]
    for pre, op, latent in layers:
        d.append(apply_latent(latent, op(nn.Sequential(*pre)(d[-1]))))
    y, losses = d[-1], []
    for m in reversed(range(len(layers))):
        pre, op, _ = layers[m]
        source = d[m + 1] if variant == "local" else y
        shapes = shapes_through(pre, d[m].shape)
        if op.bias is not None:
            source = source - (op.bias if isinstance(op, nn.Linear) else op.bias.view(-1, *[1] * (source.dim() - 2)))
        h = transposed(op, source, shapes[-1])
        y = undo(pre, apply_latent(layers[m - 1][2], h, norm) if m else h, shapes[:-1])
        losses.append((d[m] - y).square().sum() / 2)
    return losses[::-1]
