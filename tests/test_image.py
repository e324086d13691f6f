"""The first layer in one pass, forward and weight gradient: against float64, and as exact as a library."""

from __future__ import annotations

import dataclasses
import random

import pytest
import torch

from racecar_kernels import extension, pointwise
from racecar_kernels.layer import Tied
from racecar_kernels.lazy import Convolved, Lazy

pytestmark = pytest.mark.skipif(extension.load() is None, reason="the extension is not built")
LAST = torch.channels_last
DTYPES = [torch.float32, torch.float64, torch.bfloat16]


@dataclasses.dataclass
class Case:
    """One call of `grad_weight`, drawn from a seed."""

    d: Lazy
    a: Lazy | None
    window: tuple[int, int] | None
    c2: torch.Tensor | None
    g_pooled: torch.Tensor | None
    g_full: torch.Tensor | None
    image: torch.Tensor
    weight: torch.Tensor
    tied: Tied

    @property
    def incoming(self):
        return self.d, self.a, self.window, self.c2, self.g_pooled, self.g_full

    def expected(self):
        """The library's kernel in float64 on what `grad_forward` writes."""
        g = pointwise.grad_forward(*self.incoming, sums=True)
        settings = (list(self.tied.stride), [p for p, _ in self.tied.padding], list(self.tied.dilation))
        operands = (t.double() for t in (g.g, self.image, self.weight))
        rest = (False, [0, 0], 1, [False, True, False])
        return torch.ops.aten.convolution_backward(*operands, None, *settings, *rest)[1], g.total


def drawn(seed: int, dtype: torch.dtype) -> Case:
    pick = random.Random(seed).choice
    torch.manual_seed(seed)

    def random_tensor(*shape):
        return torch.randn(*shape, dtype=dtype).to(memory_format=torch.channels_last)

    batch, c_in, c_out = pick([1, 3]), pick([1, 2, 3, 4]), pick([16, 32, 48, 512])
    while True:
        kernel, stride, dilation, padding = (
            [pick(of), pick(of)] for of in ([1, 2, 3], [1, 2, 3], [1, 2], [0, 1, 2, 4])
        )
        size = [pick([5, 8, 9, 17, 28]), pick([5, 8, 9, 17, 28])]
        tied = Tied(tuple(stride), tuple((p, p) for p in padding), tuple(dilation))
        out = tied.output_size(tuple(size), tuple(kernel))
        if min(out) > 0 and c_in * kernel[0] * kernel[1] <= pointwise.MOST_WEIGHTS:
            break
    window = pick([w for w in (None, (2, 2), (3, 2), (1, 1)) if w is None or (w[0] <= out[0] and w[1] <= out[1])])
    small = out if window is None else tuple(n // k for n, k in zip(out, window, strict=True))
    a = Lazy(random_tensor(batch, c_out, *small)) if pick([True, True, False]) else None
    g_full = random_tensor(batch, c_out, *out) if window is None or pick([True, False]) else None
    weight = random_tensor(c_out, c_in, *kernel)
    return Case(
        Lazy(random_tensor(batch, c_out, *out), None, None, pick(["relu", "identity", "tanh"])),
        a,
        window,
        None if a is None else torch.tensor(0.3),
        None if window is None else random_tensor(batch, c_out, *small),
        g_full,
        random_tensor(batch, c_in, *size),
        weight if pick([True, False]) else weight.contiguous(),
        tied,
    )


@pytest.fixture(params=["avx512", "avx2", "baseline"])
def _level(request):
    module = extension.load()
    before = module.simd_level()
    if request.param not in module.simd_levels():
        pytest.skip(f"this processor has no {request.param}")
    module.set_simd_level(request.param)
    yield
    module.set_simd_level(before)


@pytest.mark.usefixtures("_level")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("seed", range(24))
def test_against_float64(seed, dtype):
    case = drawn(seed, dtype)
    found = pointwise.grad_weight(*case.incoming, case.image, case.weight, case.tied, sums=True)
    assert found is not None
    expected, total = case.expected()
    bound = {torch.float32: 2e-6, torch.float64: 2e-14, torch.bfloat16: 4e-3}[dtype]  # a sum's own, or one rounding
    assert (found[0].double() - expected).norm() <= bound * expected.norm() + torch.finfo(dtype).tiny
    assert found[0].dtype == dtype and found[0].stride() == case.weight.stride()
    assert (found[1] - total).norm() <= torch.finfo(total.dtype).eps * total.norm()  # from other blocks


def convolved(case: Case, seed: int) -> Lazy | None:
    """What the kernels compute of the image, where they read it."""
    bias = torch.randn(case.weight.shape[0], dtype=case.weight.dtype) if seed % 3 else None
    return pointwise.convolved(case.image, case.weight, bias, case.tied, case.d.act)


@pytest.mark.usefixtures("_level", "poisoned")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("seed", range(24))
def test_the_convolution_against_float64(seed, dtype):
    case = drawn(seed, dtype)
    lazy = convolved(case, seed)
    if case.weight.shape[0] > 128:
        assert lazy is None
        return
    assert lazy.x.is_meta and not lazy.as_it_is and lazy.x.shape == case.d.x.shape
    found = pointwise.materialise(lazy)[0]
    expected = pointwise.materialise_ref(lazy._replace(convolved=in_double(lazy.convolved)))[0]
    bound = {torch.float32: 2e-6, torch.float64: 2e-14}[dtype]
    assert (found.double() - expected).norm() <= bound * expected.norm()
    assert found.dtype == dtype and found.is_contiguous(memory_format=torch.channels_last)


def in_double(own: Convolved) -> Convolved:
    image, weight, bias = (None if t is None else t.double() for t in own[:3])
    return Convolved(image, weight, bias, own.tied)


@pytest.mark.usefixtures("_level", "poisoned")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("seed", range(24))
def test_every_kernel_reads_it_as_it_reads_a_tensor(seed, dtype):
    """Bit by bit: the backward finds the same largest values as the forward."""
    case = drawn(seed, dtype)
    lazy = convolved(case, seed)
    if lazy is None:
        return
    c = pointwise.materialise(lazy._replace(act="identity"))[0]
    stored = Lazy(c, None, None, case.d.act)
    minus, window = torch.randn(c.shape[1], dtype=dtype), case.window
    a = case.a or Lazy(torch.randn_like(c if case.g_pooled is None else case.g_pooled))
    c2 = torch.tensor(0.3)
    calls = [
        lambda d: pointwise.materialise(d, minus=minus),
        lambda d: pointwise.materialise(d, window, full=True, pooled=window is not None),
        lambda d: pointwise.materialise(d, window, full=window is None, pooled=window is not None),
        lambda d: (pointwise.sum_of_squares(d, a, window),),
        lambda d: pointwise.compare(d, a, window, minus=minus),
        lambda d: pointwise.grad_reverse(d, a, window, c2, None, sums=True, loss=True),
        lambda d: pointwise.grad_forward(d, a, window, c2, case.g_pooled, case.g_full, sums=True),
        lambda d: pointwise.grad_weight(
            d, a, window, c2, case.g_pooled, case.g_full, case.image, case.weight, case.tied, sums=True
        ),
    ]
    for call in calls:
        for ours, theirs in zip(call(lazy), call(stored), strict=True):
            assert (ours is None and theirs is None) or torch.equal(ours, theirs)


def test_what_the_kernels_do_not_serve_is_computed_first():
    """A convolution read beside a contiguous tensor: by plain PyTorch."""
    case = drawn(1, torch.float64)
    lazy = convolved(case, 1)
    a = Lazy(torch.randn(lazy.x.shape, dtype=torch.float64))
    assert pointwise.why_not(lazy, a) is not None
    c = pointwise.materialise(lazy)[0]
    torch.testing.assert_close(pointwise.sum_of_squares(lazy, a), (c - a.x).square().sum())


def test_plain_pytorch_pads_as_the_kernels_do():
    tied = Tied((1, 1), ((0, 1), (0, 1)), (1, 1))
    image, weight = (torch.randn(*s, dtype=torch.float64).to(memory_format=LAST) for s in ((2, 1, 6, 5), (16, 1, 2, 2)))
    lazy = pointwise.convolved(image, weight, None, tied)
    torch.testing.assert_close(pointwise.materialise_ref(lazy)[0], pointwise.materialise(lazy)[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_as_exact_as_a_library(dtype):
    ours, theirs = [], []
    for seed in range(24, 36):
        case = drawn(seed, dtype)
        expected, _ = case.expected()
        found = pointwise.grad_weight(*case.incoming, case.image, case.weight, case.tied)[0]
        g = pointwise.grad_forward(*case.incoming).g
        settings = (list(case.tied.stride), [p for p, _ in case.tied.padding], list(case.tied.dilation))
        rest = (False, [0, 0], 1, [False, True, False])
        plain = torch.ops.aten.convolution_backward(g, case.image, case.weight, None, *settings, *rest)[1]
        for errors, value in ((ours, found), (theirs, plain)):
            errors.append(float((value.double() - expected).norm() / expected.norm()))
    assert sorted(ours)[6] <= 2 * sorted(theirs)[6]


def test_repeats_itself():
    case = drawn(3, torch.float32)
    first, second = (pointwise.grad_weight(*case.incoming, case.image, case.weight, case.tied)[0] for _ in range(2))
    assert torch.equal(first, second)


@pytest.mark.parametrize(
    "change",
    [
        {"tied": Tied((1, 1), ((1, 1), (1, 1)), (1, 1), padding_mode="reflect")},
        {"tied": Tied((1, 1), ((1, 1), (1, 1)), (1, 1), groups=2)},
        {"image": torch.randn(2, 38, 12, 12)},
        {"weight": torch.randn(16, 5, 3, 3)},
        {"weight": torch.randn(17, 1, 3, 3)},
        {"weight": torch.randn(528, 1, 3, 3)},
        {"weight": torch.randn(16, 1, 3, 3, dtype=torch.float64)},
        {"d": Lazy(torch.randn(2, 16, 12, 12))},
        {"d": Lazy(torch.randn(2, 16, 12, 12).to(memory_format=torch.channels_last), None, torch.ones(16))},
    ],
    ids=[
        "padding mode",
        "groups",
        "wide image",
        "wide weight",
        "17 channels",
        "528 channels",
        "two types",
        "contiguous",
        "affine",
    ],
)
def test_what_is_not_served_is_left_to_others(change):
    def last(*shape):
        return torch.randn(*shape).to(memory_format=torch.channels_last)

    given = {
        "d": Lazy(last(2, 16, 12, 12)),
        "image": last(2, 1, 12, 12),
        "weight": last(16, 1, 3, 3),
        "tied": Tied((1, 1), ((1, 1), (1, 1)), (1, 1)),
    }
    call = {"a": None, "window": None, "c2": None, "g_pooled": None, "g_full": last(2, 16, 12, 12)}
    assert pointwise.grad_weight(**call, **given) is not None
    assert pointwise.grad_weight(**call, **{**given, **change}) is None


def test_plain_pytorch_has_none():
    assert pointwise.PLAIN.grad_weight(*[None] * 9) is None
