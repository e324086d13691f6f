"""Offsets beyond 32 bits in every Triton kernel: small tensors whose images, channels or rows lie 2^31 numbers apart.

The launchers' own calls are run on copies in memory that nobody touches between them, with the strides that they have
there; the results are the same, bit by bit.
"""

from __future__ import annotations

import pytest
import test_triton_linear
import test_triton_transposed
import torch
from pointwise_cases import functions, make

pytest.importorskip("triton", reason="Triton is not installed")
from launches import FarApart, replace_kernels

from racecar_kernels.fused import Affine
from racecar_kernels.gpu import linear, pointwise, transposed

pytestmark = [
    pytest.mark.usefixtures("interpreted"),
    pytest.mark.skipif(torch.cuda.is_available(), reason="would fill the GPU's memory"),
]
HALF = torch.float16


def check(monkeypatch, call, dimension: str = "n") -> set[str]:
    """The kernels that ran on memory far apart, with the results that they have without."""
    want = call()
    far = FarApart(dimension, HALF)
    with monkeypatch.context() as replaced:
        replace_kernels(replaced, far)
        got = call()
    assert len(got) == len(want)
    assert all(torch.equal(g, w) for g, w in zip(got, want, strict=True))
    return far.seen


POINTWISE = {
    "sums_kernel", "combine_kernel", "materialise_kernel", "compare_kernel", "grad_reverse_kernel",
    "grad_forward_kernel",
}  # fmt: skip
FULLEST = [
    "batch_norm", "norm_input_grad_", "materialise, both", "compare, minus", "grad_reverse with everything",
    "grad_forward with sums",
]  # fmt: skip


@pytest.mark.parametrize(("dimension", "layout"), [("n", "channels_last"), ("n", "contiguous"), ("c", "contiguous")])
def test_pointwise(monkeypatch, dimension: str, layout: str) -> None:
    """Images apart; channels apart, as in an image of more than 2^31 numbers."""
    s = make((2, 3, 5, 4), (2, 2), HALF, layout)
    every, seen = functions(pointwise.KERNELS), set()
    for name in FULLEST:
        seen |= check(monkeypatch, lambda name=name: every[name](s), dimension)
    assert seen >= POINTWISE


@pytest.mark.parametrize("name", ["plain", "stride", "folded", "pooled"])
def test_transposed(monkeypatch, name: str) -> None:
    t = test_triton_transposed
    case = t.CASES[t.IDS.index(name)]
    made = t.Made(t.Case(**{**vars(case), "dtype": HALF}))
    shape, tied = tuple(made.y.x.shape), case.tied
    size = tied.output_size(case.shape[2:], case.kernel)
    read = (made.y._replace(x=made.g), t.random(2, case.out, *size, dtype=HALF, seed=1))

    def call() -> list[torch.Tensor]:
        given, _ = t.incoming(made)
        pair = {"reverse": (given, made.y, made.bias), **({} if case.factor else {"read": read})}
        norm = transposed.forward(
            made.y, made.weight, tied, case.shape, factor=case.factor, keep="u", norm=Affine(None, None, 1e-5)
        )
        assert norm.norm is not None
        return [
            *t.run(made)[:3],
            norm.kept,
            *norm.norm,
            transposed.source_gradient(given, made.weight, tied, shape, factor=case.factor)[0],
            transposed.weight_gradient(made.weight, tied, factor=case.factor, **pair),
        ]

    assert check(monkeypatch, call) == {"transposed_kernel", "source_gradient_kernel", "weight_gradient_kernel"}


@pytest.mark.parametrize("fused", [True, False])
def test_linear(monkeypatch, fused: bool) -> None:
    s = test_triton_linear.make((2, 5, 2), HALF)

    def call() -> list[torch.Tensor]:
        y, a, loss = linear.tied(s.p, s.weight, s.bias, s.act, s.reverse_act, fused=fused)
        r = linear.Reversed(y, a, s.p, s.weight, s.bias, s.reverse_act, s.g_in, s.c2)
        g_c, bias = linear.grad_source(r, own=s.act, g_out=s.g_out)
        return [y, a, loss, g_c, bias, linear.grad_weight(r, g_c), linear.grad_input(g_c, r)]

    products = {"grad_source_kernel", "grad_weight_kernel", "grad_input_kernel"}
    first = {"tied_fwd_kernel"} if fused else {"linear_fwd_kernel", "reverse_fwd_kernel"}
    assert check(monkeypatch, call) == products | first
