"""What stands in front of a tied operation, forwards: pooling and up-sampling, and their backward from d alone.

Where the maxima were taken from is found again, never kept. The way back through the reverse pass is `undo.py`'s.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor
from torch.nn import functional as F

from . import undo
from .layer import Pool, Step, Upsample
from .lazy import Window

aten = torch.ops.aten

_MAX_POOL = {1: F.max_pool1d, 2: F.max_pool2d, 3: F.max_pool3d}
_AVG_POOL = {1: F.avg_pool1d, 2: F.avg_pool2d, 3: F.avg_pool3d}
_AVG_POOL_BACKWARD = {2: aten.avg_pool2d_backward, 3: aten.avg_pool3d_backward}
_MAX_POOL_INDICES = {2: aten.max_pool2d_with_indices, 3: aten.max_pool3d_with_indices}
_MAX_POOL_BACKWARD = {2: aten.max_pool2d_with_indices_backward, 3: aten.max_pool3d_with_indices_backward}


def before(d: Tensor, steps: tuple[Step, ...]) -> Tensor:
    """What the tied operation receives: d pooled and up-sampled."""
    for step in steps:
        dims = len(step.kernel if isinstance(step, Pool) else step.factor)
        if not isinstance(step, Pool):
            d = F.interpolate(d, scale_factor=step.factor, mode="nearest")
        elif step.mode == "max":
            d = _MAX_POOL[dims](d, step.kernel, step.stride, step.padding, step.dilation, step.ceil_mode)
        else:
            d = _AVG_POOL[dims](d, step.kernel, step.stride, step.padding, step.ceil_mode)
    return d


def before_adjoint(g: Tensor, d: Tensor, steps: tuple[Step, ...]) -> Tensor:
    """∂/∂d from the gradient of what `before` gives."""
    received = [d]
    for step in steps[:-1]:
        received.append(before(received[-1], (step,)))
    for step, x in zip(reversed(steps), reversed(received), strict=False):
        g = undo.sum_over_blocks(g, step.factor, x) if isinstance(step, Upsample) else pool_adjoint(g, x, step)
    return g


def pool_adjoint(g: Tensor, d: Tensor, step: Pool) -> Tensor:
    """The gradient of pooling's input: to the first maximum of every window, or to all of it alike."""
    if len(step.kernel) == 1:
        wide = replace(
            step,
            kernel=(1, *step.kernel),
            stride=(1, *step.stride),
            padding=(0, *step.padding),
            dilation=(1, *step.dilation),
        )
        return pool_adjoint(g.unsqueeze(-2), d.unsqueeze(-2), wide).squeeze(-2)
    dims = len(step.kernel)
    if step.mode != "max":
        settings = (step.kernel, step.stride, step.padding, step.ceil_mode, True, None)
        return _AVG_POOL_BACKWARD[dims](g, d, *settings)
    window = (step.kernel, step.stride, step.padding, step.dilation, step.ceil_mode)
    places = _MAX_POOL_INDICES[dims](d, *window)[1]
    return _MAX_POOL_BACKWARD[dims](g, d, *window, places)


def window_of(steps: tuple[Step, ...]) -> tuple[bool, Window]:
    """Whether the pointwise kernels know these steps, and the window of their pooling; (True, None): there are none.

    They know one 2d max pooling without overlap and padding, that leaves out what its window does not cover.
    """
    if not steps:
        return True, None
    step = steps[0]
    known = (
        len(steps) == 1
        and isinstance(step, Pool)
        and step.mode == "max"
        and len(step.kernel) == 2
        and step.kernel == step.stride
        and step.padding == (0, 0)
        and step.dilation == (1, 1)
        and not step.ceil_mode
    )
    return (True, (step.kernel[0], step.kernel[1])) if known and isinstance(step, Pool) else (False, None)
