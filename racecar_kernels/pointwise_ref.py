"""The pointwise family in plain PyTorch: every device, type and memory layout, and the oracle of the tests.

What a function computes is said in `pointwise.py`, beside the kernels that do it in one pass.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from . import undo
from .activations import TABLE, rounded
from .layer import Pool, Step, Upsample
from .lazy import BatchNorm, Gradient, Lazy, Window
from .transposed import padded


def channel_sum_ref(g: Tensor) -> Tensor:
    return _sum(g.to(_wide(g)))


def batch_norm_ref(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> BatchNorm:
    var, mean = torch.var_mean(x.to(_wide(x)), _others(x), correction=0)
    rstd = (var + eps).rsqrt_()
    scale = rstd if weight is None else rstd * weight.reshape(-1)
    return BatchNorm(mean, rstd, scale, -mean * scale if bias is None else bias.reshape(-1) - mean * scale)


def batch_norm_backward_ref_(g: Tensor, x: Tensor, norm: BatchNorm, total: Tensor, with_x: Tensor) -> Tensor:
    per = norm.scale / -(x.numel() / max(1, x.shape[1]))
    return norm_input_grad_ref_(g, x, norm.mean, norm.scale, with_x * norm.rstd.square() * per, total * per)


def norm_input_grad_ref_(g: Tensor, x: Tensor, mean: Tensor, k0: Tensor, k1: Tensor, k2: Tensor) -> Tensor:
    off = x.to(_wide(g)) - _along(mean, g)
    return g.copy_(_along(k0, g) * g.to(_wide(g)) + _along(k1, g) * off + _along(k2, g))


def materialise_ref(
    lazy: Lazy,
    window: Window = None,
    *,
    full: bool = True,
    pooled: bool = False,
    in_place: bool = False,
    minus: Tensor | None = None,
) -> tuple[Tensor | None, Tensor | None]:
    check_wanted(window, full, pooled, in_place)
    lazy = in_memory(lazy)
    value = _value(lazy)
    small = F.max_pool2d(value, window) if pooled and window is not None else None
    if not full:
        return None, small
    if minus is not None:
        value = _less(value, minus)
    return value if not in_place or value is lazy.x else lazy.x.copy_(value), small


def sum_of_squares_ref(d: Lazy, a: Lazy, window: Window = None) -> Tensor:
    d = in_memory(d)
    check_sizes(d, window, a=a.x)
    return undo.sum_of_squares(_value(d), _value(a), _pooling(window))


def compare_ref(d: Lazy, a: Lazy, window: Window = None, *, minus: Tensor | None = None) -> tuple[Tensor, Tensor]:
    d = in_memory(d)
    check_sizes(d, window, a=a.x)
    value = _value(a)
    source = value.clone(memory_format=torch.preserve_format) if minus is None else _less(value, minus)
    return undo.sum_of_squares(_value(d), value, _pooling(window)), source


def grad_reverse_ref(
    d: Lazy,
    a: Lazy,
    window: Window,
    c2: Tensor | None,
    g_in: Tensor | None,
    *,
    in_place: bool = False,
    sums: bool = False,
    loss: bool = False,
) -> Gradient:
    check_in_place(in_place, g_in, "g_in")
    d = in_memory(d)
    check_sizes(d, window, a=a.x, g_in=g_in)
    wide, value = _wide(a.x), _value(a)
    terms = [] if g_in is None else [g_in.to(wide)]
    if c2 is not None:
        steps, shape = _pooling(window), tuple(d.x.shape)
        off = undo.apply(value, steps, shape).to(wide) - _value(d)
        terms.append(c2 * (undo.adjoint(off, value.to(wide), steps, shape) if steps else off))
    found = sum_of_squares_ref(d, a, window) if loss else None
    return _through(a, value, _total(terms, value), g_in if in_place else None, sums, (g_in,))._replace(loss=found)


def grad_forward_ref(
    d: Lazy,
    a: Lazy | None,
    window: Window,
    c2: Tensor | None,
    g_pooled: Tensor | None,
    g_full: Tensor | None,
    *,
    in_place: bool = False,
    sums: bool = False,
) -> Gradient:
    check_in_place(in_place, g_full, "g_full")
    d = in_memory(d)
    check_sizes(d, window, a=None if a is None else a.x, g_pooled=g_pooled)
    check_sizes(d, None, g_full=g_full)
    wide, value = _wide(d.x), _value(d)
    terms = [] if g_full is None else [g_full.to(wide)]
    if g_pooled is not None and window is None:
        terms.append(g_pooled.to(wide))
    elif g_pooled is not None and window is not None:
        dense = value.contiguous() if not is_channels_last(value) else value
        up = undo.adjoint(g_pooled.to(wide), dense.to(wide), (Upsample(window),), tuple(g_pooled.shape))
        terms.append(up)
    if c2 is not None:
        if a is None:
            raise ValueError("c2 needs a, from which the residual is taken; got a = None")
        terms.append(c2 * (value.to(wide) - undo.apply(_value(a), _pooling(window), tuple(value.shape))))
    return _through(d, value, _total(terms, value), g_full if in_place else None, sums, (g_full, g_pooled))


def in_memory(lazy: Lazy) -> Lazy:
    """The same with x in memory."""
    if lazy.convolved is None:
        return lazy
    image, weight, bias, tied = lazy.convolved
    image, padding = padded(image, tied)
    c = F.conv2d(image, weight, bias, tied.stride, padding, tied.dilation)
    return lazy._replace(x=c, convolved=None)


def _value(lazy: Lazy) -> Tensor:
    """The tensor itself, computed in float32 or wider and rounded once."""
    if lazy.as_it_is:
        return lazy.x
    if lazy.act == "identity":
        return _before(lazy).to(lazy.x.dtype)
    return _activation(lazy)(_before(lazy), *lazy.args).to(lazy.x.dtype)


def _before(lazy: Lazy) -> Tensor:
    """What the activation is applied to."""
    u = lazy.x.to(_wide(lazy.x))
    if lazy.scale is not None:
        u = u * _along(lazy.scale, u)
    return u if lazy.shift is None else u + _along(lazy.shift, u)


def _activation(lazy: Lazy) -> Callable[..., Tensor]:
    if lazy.act not in TABLE or lazy.act == "prelu":
        names = ", ".join(["identity", *(name for name in TABLE if name != "prelu")])
        raise ValueError(f"act is one of {names}; got {lazy.act!r}")
    return TABLE[lazy.act].forward


def _through(
    lazy: Lazy, value: Tensor, g: Tensor, out: Tensor | None, sums: bool, given: tuple[Tensor | None, ...]
) -> Gradient:
    """The gradient taken through the activation and rounded, and its sums; never one of those that are `given`."""
    if lazy.act != "identity":
        row = TABLE[lazy.act]
        args = [rounded(bound, value) for bound in lazy.args] if lazy.act == "hardtanh" else lazy.args
        g = row.backward(g, value.to(g.dtype) if row.from_output(*args) else _before(lazy), *args)
    g = g.to(value.dtype) if out is None else out.copy_(g)
    if out is None and any(g is t for t in given):  # whoever asked may write over the result
        g = torch.empty_like(value).copy_(g)
    wide = _wide(g)
    if lazy.scale is None and lazy.shift is None:
        return Gradient(g, _sum(g.to(wide)) if sums else None)
    off = lazy.x.to(wide) if lazy.mean is None else lazy.x.to(wide) - _along(lazy.mean, g)
    return Gradient(g, _sum(g.to(wide)), _sum(g.to(wide) * off))


def _less(value: Tensor, minus: Tensor) -> Tensor:
    """value - minus[c], rounded once."""
    return (value.to(_wide(value)) - _along(minus, value)).to(value.dtype)


def _total(terms: list[Tensor], like: Tensor) -> Tensor:
    if not terms:
        return torch.zeros_like(like, dtype=_wide(like))
    return sum(terms[1:], terms[0])


def _pooling(window: Window) -> tuple[Step, ...]:
    return () if window is None else (Pool(window, window, (0, 0), (1, 1)),)


def check_wanted(window: Window, full: bool, pooled: bool, in_place: bool) -> None:
    """Raises ValueError where what `materialise` is to give contradicts itself."""
    if pooled and window is None:
        raise ValueError("pooled=True needs the window (kh, kw), got None")
    if not (full or pooled):
        raise ValueError("nothing is wanted: full and pooled are both False")
    if in_place and not full:
        raise ValueError("in_place=True writes the full size, so that full must be True")


def check_in_place(in_place: bool, g: Tensor | None, name: str) -> None:
    """Raises ValueError where there is nothing to write over."""
    if in_place and g is None:
        raise ValueError(f"in_place=True writes over {name}, got {name} = None")


def check_sizes(d: Lazy, window: Window, **small: Tensor | None) -> None:
    """Raises ValueError where a tensor has not the size that d has behind its pooling: it would be broadcast."""
    shape = tuple(d.x.shape)
    if window is not None:
        shape = (*shape[:2], *(n // k for n, k in zip(shape[2:], window, strict=True)))
    for name, t in small.items():
        if t is not None and tuple(t.shape) != shape:
            raise ValueError(f"{name} needs the shape {shape}, got {tuple(t.shape)}")


def is_channels_last(t: Tensor) -> bool:
    """Batch, spatial dimensions, channels, in this order in memory."""
    if t.dim() == 4:
        return t.is_contiguous(memory_format=torch.channels_last)
    return t.movedim(1, -1).is_contiguous() if t.dim() > 2 else t.is_contiguous()


def _wide(t: Tensor) -> torch.dtype:
    return torch.float64 if t.dtype == torch.float64 else torch.float32


def _others(t: Tensor) -> list[int]:
    return [d for d in range(t.dim()) if d != 1]


def _sum(t: Tensor) -> Tensor:
    return t.sum(_others(t))


def _along(v: Tensor, like: Tensor) -> Tensor:
    return v.to(_wide(like)).view(-1, *[1] * (like.dim() - 2))
