"""The Triton kernels of the pointwise family against float64: compiled for a GPU, else interpreted on the CPU."""

from __future__ import annotations

import statistics

import numpy
import oracle
import pytest
import torch
from pointwise_cases import ACTS, functions, make

from racecar_kernels import pointwise
from racecar_kernels.lazy import Lazy

pytest.importorskip("triton", reason="Triton is not installed")
from racecar_kernels.gpu import pointwise as triton_pointwise
from racecar_kernels.gpu import pointwise_kernels

pytestmark = pytest.mark.usefixtures("interpreted", "poisoned")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
OURS, PLAIN = functions(triton_pointwise.KERNELS), functions(pointwise.PLAIN)
NAMES = [name for name in PLAIN if name != "grad_forward, nothing"]  # that is 0
FULLEST = [
    "channel_sum", "batch_norm", "norm_input_grad_", "materialise, both", "compare, minus",
    "grad_reverse with everything", "grad_forward with sums",
]  # fmt: skip

# Masks at every edge, windows that divide and that leave rests, one pixel, one image, one and three channels, matrices.
SHAPES = [
    ((2, 8, 6, 4), (2, 2)), ((1, 17, 7, 5), (3, 2)), ((2, 1, 5, 4), (2, 2)), ((1, 3, 3, 9), (1, 2)),
    ((1, 2, 3, 3), (3, 3)), ((2, 17, 3, 5), None), ((3, 1, 5, 7), None), ((2, 3, 1, 1), None), ((1, 130, 2, 2), (2, 2)),
    ((37, 19), None), ((3, 7, 11), None),
]  # fmt: skip


def moved(s):
    """The sample on the device of the kernels."""

    def own(t):
        if isinstance(t, torch.Tensor):
            return t.to(DEVICE)
        if isinstance(t, Lazy):
            return Lazy(*map(own, t))
        return [own(v) for v in t] if isinstance(t, list) else t

    return type(s)(*(own(getattr(s, name)) for name in s.__dataclass_fields__))


def served(s) -> bool:
    return triton_pointwise.why_not(s.d, s.a, s.g_full, s.g_small, window=s.window) is None


def errors(s, names) -> dict[str, tuple[float, float]]:
    """Of every function that is named: our error and plain PyTorch's, against float64."""
    here, exact, found = moved(s), s.double(), {}
    assert served(here)
    for name in names:
        want = PLAIN[name](exact)
        found[name] = oracle.error([t.cpu() for t in OURS[name](here)], want), oracle.error(PLAIN[name](s), want)
    return found


ONE_NUMBER = torch.finfo(torch.float32).eps / 4  # less than rounding a single result to float32 costs on average


def check(*shape_and_window, names=NAMES, **settings) -> None:
    """At most twice plain PyTorch's own error, in the median of seven seeds.

    Where a result is a number or two, such as a loss, that median scatters by itself by more than a factor of two: what
    is beyond the bound in seven seeds is judged by forty-nine.
    """
    off = beyond_the_bound(shape_and_window, names, range(7), **settings)
    off = beyond_the_bound(shape_and_window, list(off), range(49), **settings) if off else off
    assert not off, ", ".join(
        f"{name}: an error of {a:.2e}, plain PyTorch's is {b:.2e}" for name, (a, b) in off.items()
    )


def beyond_the_bound(shape_and_window, names, seeds, **settings) -> dict[str, tuple[float, float]]:
    """Medians of our error and plain PyTorch's, of the functions whose error is too large."""
    found = [errors(make(*shape_and_window, seed=seed, **settings), names) for seed in seeds]
    medians = {name: tuple(statistics.median(of[name][i] for of in found) for i in range(2)) for name in names}
    return {name: (ours, plain) for name, (ours, plain) in medians.items() if not ours <= max(2 * plain, ONE_NUMBER)}


@pytest.mark.slow
@pytest.mark.parametrize(("shape", "window"), SHAPES[:2] + SHAPES[5:6], ids=str)
def test_contiguous(shape, window) -> None:
    settings = dict(layout="contiguous", act=("identity", ()), affine=False)
    check(shape, window, names=FULLEST, dtype=torch.float32, **settings)


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["channels_last", "contiguous"])
@pytest.mark.parametrize(("shape", "window"), SHAPES, ids=str)
def test_every_function_in_every_shape(shape, window, layout: str) -> None:
    if layout == "contiguous" and len(shape) == 4:  # a program has one channel there: two show how they are told apart
        shape = (shape[0], min(shape[1], 2), *shape[2:])
    check(shape, window, dtype=torch.float32, layout=layout)


@pytest.mark.parametrize(("act", "args"), ACTS)
def test_every_activation(act: str, args: tuple) -> None:
    names = ("materialise, both", "compare, minus", "grad_reverse with everything", "grad_forward with sums")
    for affine in (True, False):
        check((2, 5, 5, 4), (2, 2), names=names, dtype=torch.float32, act=(act, args), affine=affine)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_every_function(dtype: torch.dtype) -> None:
    check((2, 9, 5, 4), (2, 2), dtype=dtype, act=("sigmoid", ()))


@pytest.mark.parametrize(("act", "args"), ACTS[1:])
def test_units_in_the_last_place(act: str, args: tuple) -> None:
    """Values alone, from the smallest to where an activation has reached its limit: four units at most."""
    size = torch.cat([torch.logspace(-37, 1.5, 2001, dtype=torch.float64), torch.linspace(0, 3, 6001).double()])
    x = torch.cat([size, -size]).float()
    got = triton_pointwise.materialise(Lazy(x.view(1, -1).to(DEVICE), None, None, act, args))[0].view(-1).cpu()
    want = pointwise.TABLE[act].forward(x.double(), *args)
    unit = 2.0 ** (want.abs().clamp_min(2**-126).log2().floor() - 23)
    assert ((got.double() - want).abs() / unit).max() <= 4


@pytest.mark.parametrize("origin", [0.0, 1e3, 1e6])
def test_the_variance_of_what_lies_far_from_0_or_begins_with_an_outlier(origin: float) -> None:
    x = torch.randn(1000, 5, generator=torch.Generator().manual_seed(0)) + origin
    x[0] += 1000
    got = triton_pointwise.batch_norm(x.to(DEVICE), None, None, 0.1)
    want, plain = pointwise.batch_norm_ref(x.double(), None, None, 0.1), pointwise.batch_norm_ref(x, None, None, 0.1)
    for name in ("mean", "rstd"):
        own, theirs, exact = (getattr(norm, name) for norm in (got, plain, want))
        assert oracle.error([own.cpu()], [exact]) <= 2 * oracle.error([theirs], [exact]) + 2**-24, name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_ties_and_nan_go_where_max_pool2d_sends_them(dtype: torch.dtype) -> None:
    s = make((2, 3, 7, 5), (2, 2), dtype, act=("identity", ()), affine=False)
    s.d.x.copy_((s.d.x * 2).round())
    s.d.x[0, 0, :2, :2] = float("nan")
    s.d.x[1, 0, :4, :4] = -torch.inf
    d = Lazy(s.d.x.to(DEVICE))
    value = d.x.clone().requires_grad_()
    pooled = torch.nn.functional.max_pool2d(value, (2, 2))
    torch.testing.assert_close(
        triton_pointwise.materialise(d, (2, 2), full=False, pooled=True)[1],
        pooled.detach(),
        rtol=0,
        atol=0,
        equal_nan=True,
    )
    pooled.backward(s.g_small.to(DEVICE))
    found = triton_pointwise.grad_forward(d, None, (2, 2), None, s.g_small.to(DEVICE), None).g
    torch.testing.assert_close(found, value.grad, rtol=0, atol=0)


def test_without_terms_the_gradient_is_0() -> None:
    s = moved(make((2, 3, 5, 4), (2, 2), torch.float32))
    assert not any(t.any() for t in OURS["grad_forward, nothing"](s))


def test_infinity_comes_out_as_in_plain_pytorch() -> None:
    x = torch.tensor([[torch.inf, -torch.inf, torch.nan, 0.0, 1e30, -1e30]]).repeat(2, 1)
    for act, args in ACTS:
        lazy = Lazy(x.to(DEVICE), None, None, act, args)
        got = triton_pointwise.materialise(lazy)[0].cpu()
        want = pointwise.materialise_ref(Lazy(x, None, None, act, args))[0]
        torch.testing.assert_close(got, want, equal_nan=True, msg=lambda m, act=act: f"{act}: {m}")


def test_repeats_itself() -> None:
    s = moved(make((3, 5, 9, 8), (2, 2), torch.float32))
    first, second = (OURS["grad_reverse with everything"](s) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        ((Lazy(torch.zeros(2, 3, dtype=torch.float64)),), "one type of"),
        ((Lazy(torch.zeros(2, 3)), Lazy(torch.zeros(2, 3, dtype=torch.bfloat16))), "one type of"),
        ((Lazy(torch.zeros(3)),), "channel dimension"),
        ((Lazy(torch.zeros(2, 3, 8, 8)[:, :, ::2]),), "neither all contiguous"),
        ((Lazy(torch.zeros(2, 3), None, None, "gelu", ("none",)),), "gelu"),
        ((Lazy(torch.zeros(2, 3, device="meta")),), "meta"),
    ],
)
def test_what_is_not_served_says_why(given, reason: str) -> None:
    moved = [lazy._replace(x=lazy.x.to(DEVICE)) if lazy.x.device.type == "cpu" else lazy for lazy in given]
    assert reason in triton_pointwise.why_not(*moved)


def test_a_window_that_is_too_large_is_left_to_pytorch() -> None:
    d = Lazy(torch.randn(1, 2, 9, 9, device=DEVICE))
    assert "64 values" in triton_pointwise.why_not(d, window=(9, 9))
    pooled = triton_pointwise.materialise(d, (9, 9), full=False, pooled=True)[1]
    assert torch.equal(pooled, d.x.amax((2, 3), keepdim=True))


def test_empty_tensors() -> None:
    d = Lazy(torch.zeros(0, 3, 4, 4, device=DEVICE), None, None, "relu")
    assert triton_pointwise.materialise(d, (2, 2), pooled=True)[1].shape == (0, 3, 2, 2)
    assert triton_pointwise.sum_of_squares(d, d) == 0


@pytest.mark.skipif(DEVICE == "cuda", reason="would fill the GPU's memory")
def test_offsets_beyond_32_bits() -> None:
    """Two images that lie 2^31 numbers apart, in memory that is not touched between them."""
    apart = 2**31 + 8
    memory = torch.from_numpy(numpy.empty(apart + 4, numpy.float16))
    memory[:4], memory[apart:] = torch.arange(4.0), torch.arange(4.0) + 10
    partials = torch.empty(1, 2, 4)
    pointwise_kernels.sums_kernel[(1, 1)](
        memory, partials, 2, 1, 1, apart, 4, 4, 1, 4, SQUARES=False, FLAT=True, BLOCK_Q=2, BLOCK_C=4
    )
    assert partials[0, 0].tolist() == [10.0, 12.0, 14.0, 16.0]
