"""The CUDA kernel that folds weights, and its number types, on the CPU (see cuda_host.py) against plain PyTorch."""

from __future__ import annotations

from dataclasses import dataclass
from statistics import median
from typing import Any

import pytest
import torch
from cuda_host import NUMBERS, call, compiled, fold
from torch import Tensor

from racecar_kernels import transposed

DTYPES = tuple(NUMBERS)
SEEDS = range(7)


@dataclass(frozen=True)
class Case:
    """A weight (outputs, inputs, rows, columns), and by which factors its source is repeated."""

    shape: tuple[int, int, int, int]
    factor: tuple[int, int]
    channels_last: bool = False


CASES = [
    Case((5, 3, 3, 3), (2, 2)),
    Case((5, 3, 3, 3), (2, 2), channels_last=True),
    Case((1, 1, 1, 1), (1, 1)),
    Case((4, 1, 1, 1), (4, 3)),
    Case((2, 7, 5, 4), (3, 1)),
    Case((6, 2, 2, 7), (1, 4), channels_last=True),
    Case((40, 33, 3, 3), (2, 2)),  # several blocks, the last one in part
    Case((0, 3, 3, 3), (2, 2)),
]


def random(case: Case, seed: int, dtype: torch.dtype) -> Tensor:
    """Spread over thousands, so that the order of a sum shows."""
    generator = torch.Generator().manual_seed(seed)
    t = torch.randn(case.shape, generator=generator) * 10 ** (3 * torch.rand(case.shape, generator=generator))
    return t.to(dtype).contiguous(memory_format=layout(case))


def layout(case: Case) -> torch.memory_format:
    return torch.channels_last if case.channels_last else torch.contiguous_format


def folded(w: Tensor, case: Case, **how: Any) -> Tensor:
    return fold(w, case.factor, **how)


def off(got: Tensor, want: Tensor) -> float:
    assert torch.isfinite(got).all(), "not everything was written"
    return float((got.double() - want).norm() / want.norm()) if want.numel() else 0.0


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_fold(case: Case, dtype: torch.dtype) -> None:
    own, plain = [], []
    for seed in SEEDS:
        w = random(case, seed, dtype)
        want = transposed.fold(w.double(), case.factor)
        own.append(off(folded(w, case), want))
        plain.append(off(transposed.fold(w, case.factor), want))
    assert median(own) <= 2 * median(plain) + 1e-9  # a single number is exact in plain PyTorch


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_adjoint(case: Case, dtype: torch.dtype) -> None:
    own, plain = [], []
    for seed in SEEDS:
        wide = transposed.fold(random(case, seed, torch.float32), case.factor)
        g = wide.contiguous(memory_format=layout(case))
        want = transposed.fold_adjoint(g.double(), case.factor)
        own.append(off(folded(g, case, adjoint=True, dtype=dtype), want))
        plain.append(off(transposed.fold_adjoint(g, case.factor).to(dtype), want))
    assert median(own) <= 2 * median(plain) + 1e-9


def test_the_adjoint_is_one() -> None:
    """<fold(w), g> = <w, adjoint(g)>."""
    case = Case((3, 2, 3, 4), (3, 2))
    w = random(case, 0, torch.float32)
    g = torch.randn(3, 2, 5, 5, generator=torch.Generator().manual_seed(1))
    left = (folded(w, case).double() * g).sum()
    right = (w.double() * folded(g, case, adjoint=True)).sum()
    torch.testing.assert_close(left, right, rtol=1e-5, atol=0)


def test_nan_and_infinity() -> None:
    case = Case((1, 1, 3, 3), (2, 2))
    w = torch.ones(case.shape)
    w[0, 0, 0, 0], w[0, 0, 2, 1] = torch.nan, torch.inf
    torch.testing.assert_close(folded(w, case), transposed.fold(w, case.factor), equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_every_half_number(dtype: torch.dtype) -> None:
    numbers = torch.arange(65536, dtype=torch.int32).to(torch.uint16).view(dtype)
    wide, back = torch.empty(65536), torch.empty(65536, dtype=dtype)
    call(compiled("fold").to_float, NUMBERS[dtype], numbers, wide, 65536)
    torch.testing.assert_close(wide, numbers.float(), rtol=0, atol=0, equal_nan=True)
    call(compiled("fold").from_float, NUMBERS[dtype], wide, back, 65536)
    same = back.view(torch.uint16) == numbers.view(torch.uint16)
    assert bool((same | (numbers.isnan() & back.isnan())).all())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rounding(dtype: torch.dtype) -> None:
    """Random floats of all sizes; every middle between two neighbours, and one bit to either side of it."""
    generator = torch.Generator().manual_seed(0)
    bits = [torch.randint(-(2**31), 2**31, (1 << 18,), generator=generator, dtype=torch.int64).to(torch.int32)]
    if dtype != torch.float32:
        halves = torch.arange(65536, dtype=torch.int32).to(torch.uint16).view(dtype).float()
        halves = halves[halves.isfinite()].sort().values
        middle = ((halves[1:].double() + halves[:-1].double()) / 2).float().view(torch.int32)
        bits += [middle + nudge for nudge in (-1, 0, 1)]
    x = torch.cat(bits).view(torch.float32)
    got = torch.empty(x.numel(), dtype=dtype)
    call(compiled("fold").from_float, NUMBERS[dtype], x, got, x.numel())
    torch.testing.assert_close(got, x.to(dtype), rtol=0, atol=0, equal_nan=True)
