"""The pointwise family of a chain: affine, activation, pooling and its undoing, residual, sums, and their gradients.

Every function exists twice: `f` runs the C++ kernels where `why_not` has nothing to say against it, and `f_ref` is
the same in plain PyTorch (`pointwise_ref.py`). `KERNELS` and `PLAIN` hold all of either kind, for who lets a backend
choose. What a `Lazy` tensor and a window are, says `lazy.py`; undoing a pooling repeats every value, continued at the
edge: i comes from min(i // kh, h - 1).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from math import prod
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import extension
from .activations import TABLE
from .fused import Fused
from .layer import Tied
from .lazy import BatchNorm, Convolved, Gradient, Lazy, Window
from .pointwise_ref import (
    batch_norm_backward_ref_,
    batch_norm_ref,
    channel_sum_ref,
    check_in_place,
    check_wanted,
    compare_ref,
    grad_forward_ref,
    grad_reverse_ref,
    is_channels_last,
    materialise_ref,
    norm_input_grad_ref_,
    sum_of_squares_ref,
)

# The C++ kernels' activations: number and parameters, as csrc/pointwise.h defines them.
_SELU = (1.6732632423543772848170429916717, 1.0507009873554804934193349852946)
_NAN = float("nan")
_KERNELS: dict[str, Callable[..., tuple[int, float, float, float]]] = {
    "identity": lambda: (0, 0.0, 0.0, 0.0),
    "relu": lambda: (1, 0.0, _NAN, 0.0),
    "relu6": lambda: (1, 0.0, 6.0, 0.0),
    "hardtanh": lambda low, high: (1, low, high, 0.0),
    "leaky_relu": lambda slope: (2, slope, 0.0, 0.0),
    "elu": lambda alpha: (3, alpha, 1.0, 1.0),
    "selu": lambda: (3, _SELU[0] * _SELU[1], _SELU[1], 1.0),
    "celu": lambda alpha: (3, alpha, 1.0, 1.0 / alpha),
    "tanh": lambda: (4, 0.0, 0.0, 0.0),
    "sigmoid": lambda: (5, 0.0, 0.0, 0.0),
    "softsign": lambda: (6, 0.0, 0.0, 0.0),
}
DTYPES = (torch.float32, torch.float64, torch.bfloat16)
# Where the image kernels stop: `python -m bench.forms` times them beside a library, with --only few and --only first.
MOST_WEIGHTS = 36  # of an output channel, in `grad_weight` and `convolved`
MOST_CHANNELS = 512  # of c in `grad_weight`: its sums, one of every weight per block, are not to grow larger than c
MOST_CONVOLVED = 128  # channels of c in `convolved`
CONVOLVED = (torch.float32, torch.float64)  # types in which `convolved` pays


def why_not(*operands: Lazy | Tensor | None, window: Window = None) -> str | None:
    """None where the C++ kernels serve these operands together, else a sentence that says why not."""
    tensors = [_read(o) if isinstance(o, Lazy) else o for o in operands if o is not None]
    first = tensors[0]
    if not all(t.is_cpu for t in tensors):
        return f"the C++ kernels run on the CPU, got tensors on {_listed(t.device for t in tensors)}"
    if first.dtype not in DTYPES or any(t.dtype != first.dtype for t in tensors):
        return f"one type of {_listed(DTYPES)} is needed, got {_listed(t.dtype for t in tensors)}"
    if window is not None and first.dim() != 4:
        return f"pooling is served for (N, C, H, W), got {first.dim()} dimensions"
    if first.dim() < 2:
        return "tensors need a channel dimension"
    free = not any(isinstance(o, Lazy) and o.convolved is not None for o in operands)
    if not (free and all(t.is_contiguous() for t in tensors)) and not all(map(is_channels_last, tensors)):
        return "the tensors are neither all contiguous nor all channels_last"
    for lazy in operands:
        if isinstance(lazy, Lazy) and not served(lazy.act, lazy.args):
            return f"not served: {lazy.act}{lazy.args or ''} is not computed from its output in C++"
    return extension.why_not()


def served(act: str, args: tuple[Any, ...]) -> bool:
    """Whether the C++ kernels know this activation: those that are differentiable from their output."""
    return act in _KERNELS and (act == "identity" or TABLE[act].from_output(*args))


def channel_sum(g: Tensor) -> Tensor:
    """Σ g per channel, accumulated in double, the same for any number of threads; float32, or float64 for float64."""
    module = _module(g)
    return channel_sum_ref(g) if module is None else module.channel_sum(g)


def batch_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> BatchNorm:
    """The statistics that a batch norm takes of x, and the affine that it then is: one pass over x.

    Accumulated in double; float32, or float64 for float64.
    """
    module = _module(x)
    return (
        batch_norm_ref(x, weight, bias, eps) if module is None else BatchNorm(*module.batch_norm(x, weight, bias, eps))
    )


def batch_norm_backward_(g: Tensor, x: Tensor, norm: BatchNorm, total: Tensor, with_x: Tensor) -> Tensor:
    """g, the gradient of a batch norm's result, becomes the gradient of its input x: one pass over both.

    total and with_x are Σ g and Σ g·(x - mean), as `grad_reverse` and `grad_forward` give them.
    """
    module = _module(g, x)
    if module is None:
        return batch_norm_backward_ref_(g, x, norm, total, with_x)
    done: Tensor = module.batch_norm_backward_(g, x, norm.scale, norm.mean, norm.rstd, total, with_x)
    return done


def norm_input_grad_(g: Tensor, x: Tensor, mean: Tensor, k0: Tensor, k1: Tensor, k2: Tensor) -> Tensor:
    """g = k0[c] · g + k1[c] · (x - mean[c]) + k2[c] in place."""
    module = _module(g, x)
    given = (g, x, mean, k0, k1, k2)
    return norm_input_grad_ref_(*given) if module is None else module.norm_input_grad_(*given)


def materialise(
    lazy: Lazy,
    window: Window = None,
    *,
    full: bool = True,
    pooled: bool = False,
    in_place: bool = False,
    minus: Tensor | None = None,
) -> tuple[Tensor | None, Tensor | None]:
    """The tensor that `lazy` stands for and its max pooling, each if wanted, in one pass.

    `minus` (one value per channel) is taken off the full size alone. `in_place` writes the full size over lazy.x. What
    is nothing but x is given back as x, without a copy.
    """
    check_wanted(window, full, pooled, in_place)
    nothing = lazy.as_it_is and minus is None
    if nothing and not pooled:
        return lazy.x, None
    module = _module(lazy, window=window)
    if module is None:
        return materialise_ref(lazy, window, full=full, pooled=pooled, in_place=in_place, minus=minus)
    out = lazy.x if in_place and not nothing else None
    whole, small = module.materialise(_handed(lazy), window, full and not nothing, pooled, out, minus)
    return lazy.x if full and nothing else whole, small


def sum_of_squares(d: Lazy, a: Lazy, window: Window = None) -> Tensor:
    """Σ (d - undo(a))² as a 0-d tensor, float32, or float64 for float64; a at pooled size."""
    module = _module(d, a, window=window)
    if module is None:
        return sum_of_squares_ref(d, a, window)
    total: Tensor = module.compare(_handed(d), _handed(a), window, False, None)[0]
    return total


def compare(d: Lazy, a: Lazy, window: Window = None, *, minus: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """`sum_of_squares`, and in the same pass a - minus[c], a fresh tensor: what the next reverse layer begins with."""
    module = _module(d, a, window=window)
    if module is None:
        return compare_ref(d, a, window, minus=minus)
    found: tuple[Tensor, Tensor] = module.compare(_handed(d), _handed(a), window, True, minus)
    return found


def grad_reverse(
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
    """g = act_a'(·) · (g_in + c2 · Σ_window (undo(a) - d)) at a's size.

    c2 is twice the gradient of `sum_of_squares` (0-d). Either term may be None. g is not yet multiplied by the scale;
    Σ g and Σ g·(a.x - mean) come with an affine, as the gradients of the norm need them, Σ g also with `sums`. `loss`:
    also Σ (d - undo(a))², in the same pass. `in_place` writes g over g_in.
    """
    check_in_place(in_place, g_in, "g_in")
    module = _module(d, a, g_in, window=window)
    if module is None:
        return grad_reverse_ref(d, a, window, c2, g_in, in_place=in_place, sums=sums, loss=loss)
    return Gradient(*module.grad_reverse(_handed(d), _handed(a), window, c2, g_in, in_place, sums, loss))


def grad_forward(
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
    """g = act_d'(·) · (unpool(g_pooled) + g_full + c2 · (d - undo(a))) at d's size.

    The sums are those of `grad_reverse`, with d.x. Each term may be None; without c2, so may a. unpool sends the
    gradient to the first largest value of every window, found again from d as `max_pool2d` finds it (NaN is largest).
    `in_place` writes g over g_full.
    """
    check_in_place(in_place, g_full, "g_full")
    module = _module(d, a, g_pooled, g_full, window=window)
    if module is None:
        return grad_forward_ref(d, a, window, c2, g_pooled, g_full, in_place=in_place, sums=sums)
    other = None if a is None else _handed(a)
    found = module.grad_forward(_handed(d), other, window, c2, g_pooled, g_full, in_place, sums)
    return Gradient(*found)


def grad_weight(
    d: Lazy,
    a: Lazy | None,
    window: Window,
    c2: Tensor | None,
    g_pooled: Tensor | None,
    g_full: Tensor | None,
    image: Tensor,
    weight: Tensor,
    tied: Tied,
    *,
    sums: bool = False,
) -> tuple[Tensor, Tensor | None] | None:
    """∂/∂W of the convolution of `image` that gave d.x, and with `sums` that of its bias; None where not served.

    What `grad_forward` would give, g, is never written: a few of its pixels at a time are multiplied with the image.
    Served are few input channels, where a library spends its time with moving g, in channels_last.
    """
    if d.shift is not None or not _of_few_channels(image, weight, tied) or weight.dtype != d.x.dtype:
        return None
    module = _module(d, a, image, g_pooled, g_full, window=window)
    read = (_read(d), None if a is None else a.x, image, g_pooled, g_full)
    if module is None or not all(t is None or is_channels_last(t) for t in read):
        return None
    before = [first for first, _ in tied.padding]
    other = None if a is None else _handed(a)
    given = (_handed(d), other, window, c2, g_pooled, g_full, image, weight)
    found: tuple[Tensor, Tensor | None] = module.grad_weight(*given, tied.stride, before, tied.dilation, sums)
    return found


def grad_weight_ref(*_: Any, **__: Any) -> None:
    """Plain PyTorch has no way around writing g."""


def convolved(
    image: Tensor, weight: Tensor, bias: Tensor | None, tied: Tied, act: str = "identity", args: tuple[Any, ...] = ()
) -> Lazy | None:
    """act(W image + b), computed wherever it is read; None where not served.

    A matter of shapes, types and strides alone, so that the backward and a trace come to what the forward came to.
    """
    if not _of_few_channels(image, weight, tied) or numbered(act, args) is None or min(image.shape) == 0:
        return None
    if image.dtype not in CONVOLVED or weight.shape[0] > MOST_CONVOLVED:  # there a library is faster
        return None
    size = tied.output_size(tuple(image.shape[2:]), tuple(weight.shape[2:]))
    if min(size) < 1 or weight.dtype != image.dtype or weight.device != image.device or not is_channels_last(image):
        return None
    if not image.is_cpu or extension.load() is None:
        return None
    shape = (image.shape[0], weight.shape[0], *size)
    x = torch.empty(shape, dtype=image.dtype, device="meta", memory_format=torch.channels_last)
    return Lazy(x, None, None, act, args, convolved=Convolved(image, weight, bias, tied))


def convolved_ref(*_: Any, **__: Any) -> None:
    """A library's convolution writes what it gives before anything else reads it."""


def _of_few_channels(image: Tensor, weight: Tensor, tied: Tied) -> bool:
    """Whether a convolution is one of those where a library spends its time with moving numbers, and is served here."""
    return (
        tied.dims == 2
        and tied.groups == 1
        and tied.padding_mode == "zeros"
        and 0 < prod(weight.shape[1:]) <= MOST_WEIGHTS
        and weight.shape[0] % 16 == 0
        and weight.shape[0] <= MOST_CHANNELS
    )


class Family(NamedTuple):
    """All functions of the family, of one kind."""

    channel_sum: Callable[..., Tensor]
    batch_norm: Callable[..., BatchNorm]
    batch_norm_backward_: Callable[..., Tensor]
    norm_input_grad_: Callable[..., Tensor]
    materialise: Callable[..., tuple[Tensor | None, Tensor | None]]
    sum_of_squares: Callable[..., Tensor]
    compare: Callable[..., tuple[Tensor, Tensor]]
    grad_reverse: Callable[..., Gradient]
    grad_forward: Callable[..., Gradient]
    grad_weight: Callable[..., tuple[Tensor, Tensor | None] | None]
    convolved: Callable[..., Lazy | None]
    fused: Fused | None = None


KERNELS = Family(
    channel_sum,
    batch_norm,
    batch_norm_backward_,
    norm_input_grad_,
    materialise,
    sum_of_squares,
    compare,
    grad_reverse,
    grad_forward,
    grad_weight,
    convolved,
)
PLAIN = Family(
    channel_sum_ref,
    batch_norm_ref,
    batch_norm_backward_ref_,
    norm_input_grad_ref_,
    materialise_ref,
    sum_of_squares_ref,
    compare_ref,
    grad_reverse_ref,
    grad_forward_ref,
    grad_weight_ref,
    convolved_ref,
)


def _module(*operands: Lazy | Tensor | None, window: Window = None) -> Any:
    """The extension where it serves these operands, as `why_not` explains it, else None."""
    module = extension.load()
    if module is None:
        return None
    tensors, free = [], True
    for operand in operands:
        if isinstance(operand, Lazy):
            if numbered(operand.act, operand.args) is None:
                return None
            tensors.append(_read(operand))
            free = free and operand.convolved is None
        elif operand is not None:
            tensors.append(operand)
    if not free and not all(map(is_channels_last, tensors)):  # what is computed of an image comes in channels_last
        return None
    return module if module.serves(tensors, window is not None) else None


def _read(lazy: Lazy) -> Tensor:
    """The tensor in memory that it is computed from."""
    return lazy.x if lazy.convolved is None else lazy.convolved.image


def _handed(lazy: Lazy) -> tuple[Any, ...]:
    """As the C++ functions take it."""
    number, parameters = numbered(lazy.act, lazy.args) or (0, ())
    own: tuple[Any, ...] | None = None
    if lazy.convolved is not None:
        image, weight, bias, tied = lazy.convolved
        own = image, weight, bias, tied.stride, [first for first, _ in tied.padding], tied.dilation
    return lazy.x, lazy.scale, lazy.shift, lazy.mean, number, lazy.done, parameters, own


@lru_cache(maxsize=4096)
def numbered(act: str, args: tuple[Any, ...]) -> tuple[int, tuple[float, ...]] | None:
    """Number and parameters of an activation as csrc/pointwise.h defines them; None where it is not among them."""
    if not served(act, args):
        return None
    number, *parameters = _KERNELS[act](*args)
    return number, tuple(map(float, parameters))


def _listed(values: Any) -> str:
    return ", ".join(dict.fromkeys(map(str, values)))
