"""Samples and calls of the pointwise family, for every set of kernels that has one."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from racecar_kernels.lazy import BatchNorm, Lazy, Window
from racecar_kernels.pointwise import Family

TENSORS = ("x", "scale", "shift", "mean")
LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
# celu's alpha is a power of 2: PyTorch's own backward rounds 1 / alpha to float32, whatever the type.
ACTS = [
    ("identity", ()), ("relu", ()), ("relu6", ()), ("hardtanh", (-0.5, 0.7)), ("leaky_relu", (0.1,)), ("elu", (0.8,)),
    ("selu", ()), ("celu", (2.0,)), ("tanh", ()), ("sigmoid", ()), ("softsign", ()),
]  # fmt: skip


@dataclass
class Sample:
    """Inputs of all functions: d and what has its size, a and what has the pooled size, values per channel."""

    d: Lazy
    a: Lazy
    window: Window
    g_full: Tensor
    g_small: Tensor
    c2: Tensor
    k: list[Tensor]

    def double(self) -> Sample:
        return Sample(
            *(
                lazy._replace(**{n: t if (t := getattr(lazy, n)) is None else t.double() for n in TENSORS})
                for lazy in (self.d, self.a)
            ),
            self.window,
            self.g_full.double(),
            self.g_small.double(),
            self.c2.double(),
            [k.double() for k in self.k],
        )


def make(shape, window=None, dtype=torch.float64, layout="channels_last", act=("tanh", ()), affine=True, seed=0):
    gen = torch.Generator().manual_seed(seed)
    small = (*shape[:2], *(n // k for n, k in zip(shape[2:], window, strict=True))) if window else shape

    def random(size, shift=0.0):
        t = (torch.randn(size, generator=gen, dtype=torch.float64) + shift).to(dtype)
        if len(size) == 4:
            return t.contiguous(memory_format=LAYOUTS[layout])
        return t if layout == "contiguous" else t.movedim(1, -1).contiguous().movedim(-1, 1)

    def per_channel():
        v = torch.randn(shape[1], generator=gen, dtype=torch.float64) / 3 + 1
        return v.to(torch.float64 if dtype == torch.float64 else torch.float32)

    def lazy(size):
        if not affine:
            return Lazy(random(size, 0.3), None, None, *act)
        return Lazy(random(size, 0.3), per_channel(), per_channel() - 1, *act, mean=per_channel() - 1)

    c2 = torch.tensor(0.7, dtype=torch.float64 if dtype == torch.float64 else torch.float32)
    k = [per_channel() for _ in range(4)]
    return Sample(lazy(shape), lazy(small), window, random(shape), random(small), c2, k)


def functions(family: Family):
    """Every function of a sample, as a list of the tensors that it gives."""
    p = family._asdict()

    def reverse(loss=True, incoming=True, **wanted):
        return lambda s: given(p["grad_reverse"](
            s.d, s.a, s.window, s.c2 if loss else None, s.g_small.clone() if incoming else None, **wanted,
        ))  # fmt: skip

    def forward(loss=True, pooled=True, full=True, **wanted):
        return lambda s: given(p["grad_forward"](
            s.d, s.a if loss else None, s.window, s.c2 if loss else None,
            s.g_small if pooled else None, s.g_full if full else None, **wanted,
        ))  # fmt: skip

    def done(lazy):  # the same numbers, taken for what the activation gave
        return lazy._replace(x=lazy.x.sigmoid() - 0.5, scale=None, shift=None, done=True)

    return {
        "channel_sum": lambda s: [p["channel_sum"](s.d.x)],
        "batch_norm": lambda s: given(p["batch_norm"](s.d.x, s.k[0], s.k[1], 0.1)),
        "batch_norm without affine": lambda s: given(p["batch_norm"](s.d.x, None, None, 0.1)),
        "batch_norm_backward_": lambda s: [
            p["batch_norm_backward_"](s.g_full.clone(), s.d.x, BatchNorm(*s.k), s.k[3] * 9, s.k[2] * 7)
        ],
        "materialise, minus": lambda s: given(
            p["materialise"](s.d, s.window, pooled=s.window is not None, minus=s.k[0])
        ),
        "materialise, minus, in place": lambda s: given(
            p["materialise"](Lazy(s.d.x.clone()), in_place=True, minus=s.k[0])
        ),
        "compare": lambda s: given(p["compare"](s.d, s.a, s.window)),
        "compare, minus": lambda s: given(p["compare"](s.d, s.a, s.window, minus=s.k[0])),
        "compare, done": lambda s: given(p["compare"](done(s.d), done(s.a), s.window, minus=s.k[0])),
        "grad_reverse with everything": reverse(sums=True, loss=True),
        "grad_reverse, done": lambda s: given(
            p["grad_reverse"](done(s.d), done(s.a), s.window, s.c2, s.g_small, sums=True)
        ),
        "grad_forward with sums": forward(sums=True),
        "grad_forward, done": lambda s: given(
            p["grad_forward"](done(s.d), done(s.a), s.window, s.c2, s.g_small, s.g_full)
        ),
        "norm_input_grad_": lambda s: [p["norm_input_grad_"](s.g_full.clone(), s.d.x, *s.k)],
        "materialise": lambda s: given(p["materialise"](s.d, s.window)),
        "materialise, both": lambda s: given(p["materialise"](s.d, s.window, pooled=s.window is not None)),
        "materialise, in place": lambda s: given(
            p["materialise"](s.d._replace(x=s.d.x.clone()), s.window, in_place=True)
        ),
        "sum_of_squares": lambda s: [p["sum_of_squares"](s.d, s.a, s.window)],
        "grad_reverse": reverse(),
        "grad_reverse of the loss": reverse(incoming=False),
        "grad_reverse without loss": reverse(loss=False),
        "grad_forward": forward(),
        "grad_forward of the loss": forward(pooled=False, full=False),
        "grad_forward, pooled": forward(loss=False, full=False),
        "grad_forward, full": forward(loss=False, pooled=False),
        "grad_forward, pooled and loss": forward(full=False),
        "grad_forward, nothing": forward(loss=False, pooled=False, full=False),
    }


def given(results):
    return [t for t in results if t is not None]
