"""The pointwise family: the C++ kernels, on every level of SIMD instructions here, against plain PyTorch."""

from __future__ import annotations

import statistics
from collections import defaultdict

import oracle
import pytest
import torch
from pointwise_cases import ACTS, LAYOUTS, Sample, functions, given, make
from torch.nn import functional as F

from racecar_kernels import extension, pointwise
from racecar_kernels.pointwise import Lazy, Window

C = extension.load()
LEVELS = C.simd_levels() if C is not None else ["none"]
# Windows that divide and that leave rests, channels around the widths of registers, one pixel, one image, matrices.
SHAPES: list[tuple[tuple[int, ...], Window]] = [
    ((2, 8, 8, 6), (2, 2)), ((2, 3, 7, 5), (2, 2)), ((1, 17, 7, 9), (3, 2)), ((3, 1, 9, 8), (2, 3)),
    ((1, 64, 5, 5), (2, 2)), ((2, 1, 7, 5), (2, 2)), ((1, 3, 3, 70), (1, 2)), ((2, 5, 70, 3), (2, 1)),
    ((2, 4, 5, 5), (5, 5)), ((1, 2, 5, 1400), (2, 4)), ((2, 17, 5, 7), None), ((3, 1, 29, 31), None),
    ((1, 64, 6, 5), None), ((2, 3, 1, 1), None), ((1, 2000, 2, 2), (2, 2)), ((37, 19), None), ((5, 1), None),
    ((3, 7, 11), None), ((2, 3, 3, 4, 5), None),
]  # fmt: skip

each_level = pytest.mark.parametrize("level", LEVELS)
pytestmark = pytest.mark.skipif(C is None, reason=str(extension.why_not()))


@pytest.fixture(autouse=True)
def _poisoned_and_best_level():
    """Uninitialised memory is full of NaN, so that an element which is never written shows."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    best = C.simd_level()
    yield
    C.set_simd_level(best)
    torch.use_deterministic_algorithms(False)


OURS, PLAIN = functions(pointwise.KERNELS), functions(pointwise.PLAIN)


def served(s: Sample) -> bool:
    return pointwise.why_not(s.d, s.a, s.g_full, s.g_small, window=s.window) is None


@each_level
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("shape", "window"), SHAPES, ids=str)
def test_equals_plain_pytorch(shape, window, layout: str, level: str) -> None:
    C.set_simd_level(level)
    for affine in (True, False):
        s = make(shape, window, layout=layout, affine=affine, act=("tanh", ()) if affine else ("identity", ()))
        assert served(s)
        for name, ours in OURS.items():
            for got, want in zip(ours(s), PLAIN[name](s), strict=True):
                torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-11, msg=lambda m, name=name: f"{name}: {m}")


@each_level
@pytest.mark.parametrize(("act", "args"), ACTS)
def test_every_activation(act: str, args: tuple, level: str) -> None:
    C.set_simd_level(level)
    for affine in (True, False):
        s = make((2, 5, 7, 5), (2, 2), act=(act, args), affine=affine)
        assert served(s)
        for name, ours in OURS.items():
            for got, want in zip(ours(s), PLAIN[name](s), strict=True):
                torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("act", [("tanh", ()), ("elu", (0.8,)), ("sigmoid", ()), ("relu", ())], ids=lambda a: a[0])
def test_at_most_twice_the_error_of_plain_pytorch(act, layout: str, dtype: torch.dtype) -> None:
    ours, plain = defaultdict(list), defaultdict(list)
    for seed in range(7):
        s = make((3, 17, 23, 21), (2, 2), dtype, layout, act, seed=seed)
        assert served(s)
        for name, reference in PLAIN.items():
            if name == "grad_forward, nothing":  # it is 0
                continue
            want = reference(s.double())
            plain[name].append(oracle.error(reference(s), want))
            for level in LEVELS:
                C.set_simd_level(level)
                ours[name, level].append(oracle.error(OURS[name](s), want))
    for (name, level), errors in ours.items():
        assert statistics.median(errors) <= 2 * statistics.median(plain[name]), (name, level)


@each_level
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("window", [(2, 2), (3, 2), (2, 3)], ids=str)
def test_ties_go_where_max_pool2d_sends_them(window, layout: str, dtype: torch.dtype, level: str) -> None:
    C.set_simd_level(level)
    for channels in (1, 3, 64):
        s = make((2, channels, 7, 9), window, dtype, layout, act=("relu", ()))
        s.d.x.copy_((s.d.x * 2).round())
        s.d.x[0, 0, :2, :2] = float("nan")
        s.d.x[1, 0, :4, :4] = -torch.inf
        for lazy in (Lazy(s.d.x), s.d):
            value = pointwise.materialise(lazy)[0].clone().requires_grad_()
            pooled = F.max_pool2d(value, window)
            torch.testing.assert_close(
                pointwise.materialise(lazy, window, full=False, pooled=True)[1],
                pooled.detach(), rtol=0, atol=0, equal_nan=True,
            )  # fmt: skip
            want = torch.autograd.grad(pooled, value, s.g_small)[0]
            if lazy.act == "relu":
                want = torch.where(value <= 0, 0, want)
            got = pointwise.grad_forward(lazy, None, window, None, s.g_small, None)[0]
            torch.testing.assert_close(got, want, rtol=0, atol=0)


@each_level
@pytest.mark.parametrize(("act", "args"), ACTS)
def test_special_values_and_units_in_the_last_place(act: str, args: tuple, level: str) -> None:
    C.set_simd_level(level)
    if act == "identity":
        return
    tiny = torch.logspace(-30, 2.5, 4001, dtype=torch.float64)
    finite = torch.cat([torch.linspace(-200, 200, 8001, dtype=torch.float64), tiny, -tiny, torch.zeros(2)])
    special = torch.tensor([torch.inf, -torch.inf, torch.nan, 3e38, -3e38], dtype=torch.float64)
    row = pointwise.TABLE[act]
    for dtype in (torch.float32, torch.float64):
        x = finite.to(dtype)
        got = pointwise.materialise(Lazy(x.view(1, -1), None, None, act, args))[0].view(-1)
        want = row.forward(x.double(), *args)
        info = torch.finfo(dtype)
        ulp = info.eps * want.abs().clamp_min(info.tiny / info.eps) / 2  # half a unit in the last place, or more
        assert ((got.double() - want).abs() / ulp).max() <= (6 if dtype == torch.float32 else 10)
        x = special.to(dtype)
        got = pointwise.materialise(Lazy(x.view(1, -1), None, None, act, args))[0].view(-1)
        torch.testing.assert_close(got, row.forward(x, *args), equal_nan=True)


@each_level
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("window", [None, (2, 2)], ids=str)
def test_the_number_of_threads_changes_no_bit(window, layout: str, level: str) -> None:
    C.set_simd_level(level)
    threads = torch.get_num_threads()
    s = make((4, 17, 64, 64), window, torch.float32, layout)
    results = []
    try:
        for n in (1, 2, 2):
            torch.set_num_threads(n)
            results.append({name: ours(s) for name, ours in OURS.items()})
    finally:
        torch.set_num_threads(threads)
    for name, first in results[0].items():
        for again in results[1:]:
            assert all(map(torch.equal, first, again[name])), name


@each_level
def test_statistics_keep_their_digits(level: str) -> None:
    """A mean far from 0, and a first value that is far from the mean."""
    C.set_simd_level(level)
    x = torch.randn(16, 5, 40, 41, dtype=torch.float64) * torch.logspace(-3, 3, 5).view(1, -1, 1, 1) + 1e4
    x[0, :, 0, 0] = -1e6
    for t in (x, x.float(), x.float().contiguous(memory_format=torch.channels_last)):
        var, mean = torch.var_mean(t.double(), (0, 2, 3), correction=0)
        got = pointwise.batch_norm(t, None, None, 0.0)
        torch.testing.assert_close(got.mean.double(), mean, rtol=1e-7, atol=0)
        torch.testing.assert_close(got.rstd.double(), var.rsqrt(), rtol=1e-7, atol=0)
    assert pointwise.batch_norm(torch.full((3, 2), 7.3), None, None, 0.0).rstd.tolist() == [torch.inf] * 2
    assert pointwise.batch_norm(torch.tensor([[torch.inf], [1.0]]), None, None, 0.0).mean.item() == torch.inf


def test_in_place_reuses_the_memory() -> None:
    s = make((2, 8, 6, 6), (2, 2), torch.float32)
    assert pointwise.grad_forward(s.d, s.a, (2, 2), s.c2, s.g_small, s.g_full, in_place=True)[0] is s.g_full
    assert pointwise.grad_reverse(s.d, s.a, (2, 2), s.c2, s.g_small, in_place=True)[0] is s.g_small
    assert pointwise.materialise(s.d, in_place=True)[0] is s.d.x
    assert pointwise.materialise(Lazy(s.d.x), (2, 2), pooled=True)[0] is s.d.x
    assert pointwise.norm_input_grad_(s.g_full, s.d.x, *s.k) is s.g_full
    assert pointwise.materialise(s.d, minus=s.k[0], in_place=True)[0] is s.d.x


@pytest.mark.parametrize("layout", LAYOUTS)
def test_in_place_gives_the_same(layout: str) -> None:
    s = make((2, 17, 7, 5), (2, 2), torch.float32, layout)
    for f, g, args in (
        (pointwise.grad_forward, s.g_full, (s.d, s.a, (2, 2), s.c2, s.g_small)),
        (pointwise.grad_reverse, s.g_small, (s.d, s.a, (2, 2), s.c2)),
    ):
        want = f(*args, g)
        assert all(map(torch.equal, given(f(*args, g.clone(), in_place=True)), given(want)))
    assert torch.equal(
        pointwise.materialise(s.d._replace(x=s.d.x.clone()), in_place=True)[0], pointwise.materialise(s.d)[0]
    )


def test_what_is_not_served_goes_to_plain_pytorch() -> None:
    s = make((2, 3, 6, 6), (2, 2))
    strided = torch.randn(2, 3, 6, 12, dtype=torch.float64)[..., ::2]
    cases = {
        "channels_last": Sample(s.d._replace(x=strided), *list(vars(s).values())[1:]),
        "not served: gelu": make((2, 3, 6, 6), (2, 2), act=("gelu", ("none",))),
        "not served: leaky_relu": make((2, 3, 6, 6), (2, 2), act=("leaky_relu", (-0.1,))),
    }
    for reason, case in cases.items():
        assert reason in pointwise.why_not(case.d, case.a)
        for name, ours in OURS.items():
            for got, want in zip(ours(case), PLAIN[name](case), strict=True):
                torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-11)
    assert "one type" in pointwise.why_not(s.d.x, s.d.x.float())
    assert "one type" in pointwise.why_not(s.d.x.half())
    assert "pooling" in pointwise.why_not(s.d.x[0], window=(2, 2))
    assert "CPU" in pointwise.why_not(s.d.x.to("meta"))
    assert "channel dimension" in pointwise.why_not(torch.zeros(3))


def test_gradients_are_those_of_autograd() -> None:
    """The whole family at once, from the loss down to both raw inputs, their scales and shifts."""
    for act in ACTS:
        s = make((2, 5, 7, 5), (2, 2), act=act)
        leaves = [t.clone().requires_grad_() for lazy in (s.d, s.a) for t in lazy[:3]]
        d, a = Lazy(*leaves[:3], *act), Lazy(*leaves[3:], *act)
        full, pooled = pointwise.materialise_ref(d, s.window, pooled=True)
        index = [(torch.arange(n) // 2).clamp_max(n // 2 - 1) for n in full.shape[2:]]
        undone = pointwise.materialise_ref(a)[0][:, :, index[0]][..., index[1]]
        loss = s.c2 / 2 * (full - undone).square().sum() + (full * s.g_full).sum() + (pooled * s.g_small).sum()
        want = torch.autograd.grad(loss, leaves)
        g, shift, scale, _ = pointwise.grad_forward(s.d, s.a, s.window, s.c2, s.g_small, s.g_full)
        along = s.d.scale.view(-1, 1, 1)
        got = [g * along, scale + s.d.mean * shift, shift]
        g, shift, scale, _ = pointwise.grad_reverse(s.d, s.a, s.window, s.c2, None)
        got += [g * s.a.scale.view(-1, 1, 1), scale + s.a.mean * shift, shift]
        for ours, theirs in zip(got, want, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10, msg=lambda m, act=act: f"{act}: {m}")


@pytest.mark.filterwarnings("ignore:var_mean")
def test_empty_tensors() -> None:
    s = make((0, 3, 6, 6), (2, 2))
    for name, ours in OURS.items():
        for got, want in zip(ours(s), PLAIN[name](s), strict=True):
            torch.testing.assert_close(got, want, equal_nan=True)


def test_errors_are_sentences() -> None:
    s = make((2, 3, 6, 6), (2, 2))
    for call, message in (
        (lambda: pointwise.sum_of_squares(s.d, s.d, (2, 2)), "a needs the shape"),
        (lambda: pointwise.sum_of_squares(s.d, s.a, (7, 2)), "does not fit an image of 6 x 6"),
        (lambda: pointwise.materialise(s.d._replace(shift=s.d.shift[:2])), "shift needs 3 values, one per channel"),
        (lambda: C.set_simd_level("mmx"), "no SIMD level mmx"),
        (lambda: C.channel_sum(s.d.x[..., ::2]), "all contiguous|need to be contiguous"),
    ):
        with pytest.raises(RuntimeError, match=message):
            call()
    for call, message in (
        (lambda: pointwise.materialise(s.d, pooled=True), "needs the window"),
        (lambda: pointwise.materialise(s.d, full=False), "nothing is wanted"),
        (lambda: pointwise.materialise(s.d, (2, 2), full=False, pooled=True, in_place=True), "full must be True"),
        (lambda: pointwise.grad_reverse(s.d, s.a, (2, 2), s.c2, None, in_place=True), "writes over g_in"),
        (lambda: pointwise.grad_forward(s.d, None, (2, 2), None, None, None, in_place=True), "writes over g_full"),
        (lambda: pointwise.grad_forward_ref(s.d, None, (2, 2), s.c2, None, None), "c2 needs a"),
        (lambda: pointwise.materialise(s.d._replace(act="prelu")), "act is one of"),
    ):
        with pytest.raises(ValueError, match=message):
            call()


def test_a_batch_norm_is_that_of_pytorch() -> None:
    s = make((4, 5, 7, 6), affine=False)
    x, weight, bias = s.d.x.clone().requires_grad_(), s.k[0].clone().requires_grad_(), s.k[1].clone().requires_grad_()
    want = F.batch_norm(x, None, None, weight, bias, training=True, eps=0.1)
    norm = pointwise.batch_norm(s.d.x, s.k[0], s.k[1], 0.1)
    lazy = Lazy(s.d.x, norm.scale, norm.shift, mean=norm.mean)
    torch.testing.assert_close(pointwise.materialise(lazy)[0], want.detach())
    g, total, with_x, _ = pointwise.grad_forward(lazy, None, None, None, None, s.g_full)
    got = [pointwise.batch_norm_backward_(g, s.d.x, norm, total, with_x), with_x * norm.rstd, total]
    for ours, theirs in zip(got, torch.autograd.grad(want, (x, weight, bias), s.g_full), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)
