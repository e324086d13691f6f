"""The CUDA kernels between few and many channels against float64: on a GPU, and their source on the CPU (cuda_host.py).

A CPU test goes through the launchers that ship: only the launch itself is another one.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass, replace
from statistics import median
from typing import Any

import numpy
import pytest
import torch
from cuda_host import ALONE, LAST_FIRST, Folding, compiled, launch_few_channels, threads
from torch import Tensor
from torch.nn import functional as F

from racecar_kernels.activations import TABLE
from racecar_kernels.cuda import few_channels, few_operands, parameters
from racecar_kernels.fused import Incoming
from racecar_kernels.layer import Tied
from racecar_kernels.lazy import Lazy

pytestmark = pytest.mark.usefixtures("poisoned")
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
SEEDS = range(7)
FLOOR = 2.0**-24  # one rounding of a float32 number: plain PyTorch's error counts as no less, by luck, in a loss


@dataclass(frozen=True)
class Case:
    """A convolution (N, C_in, H, W) to C_out channels, and how its reverse is asked for."""

    name: str
    shape: tuple[int, int, int, int]
    out: int
    kernel: tuple[int, int] = (3, 3)
    stride: tuple[int, int] = (1, 1)
    padding: tuple[tuple[int, int], tuple[int, int]] = ((1, 1), (1, 1))
    dilation: tuple[int, int] = (1, 1)
    factor: tuple[int, int] | None = None
    bias: bool = True
    act: tuple[str, tuple[Any, ...]] = ("relu", ())
    affine: bool = False  # of y, and of u
    keep: str = "a"
    window: tuple[int, int] | None = None
    ragged: tuple[int, int] = (0, 0)
    dtype: torch.dtype = torch.float32

    @property
    def tied(self) -> Tied:
        return Tied(self.stride, self.padding, self.dilation)


NONE = ((0, 0), (0, 0))
CASES = [
    Case("one", (2, 1, 7, 6), 20),
    Case("two", (1, 2, 9, 5), 33, act=("tanh", ())),
    Case("three", (2, 3, 20, 19), 64, affine=True, keep="u"),
    Case("four", (1, 4, 6, 6), 70, act=("elu", (1.3,)), bias=False),
    Case("few_on_both", (1, 3, 4, 4), 2, act=("sigmoid", ())),
    Case("one_pixel", (3, 3, 1, 1), 18, (1, 1), padding=NONE, act=("softsign", ())),
    Case("point", (2, 2, 3, 5), 34, (1, 1), padding=NONE, act=("hardtanh", (-0.5, 0.7))),
    Case("stride", (2, 3, 7, 8), 19, stride=(2, 2), act=("relu6", ())),
    Case("stem", (1, 3, 21, 18), 24, (7, 7), (2, 2), ((3, 3), (3, 3)), affine=True),
    Case("stride_mixed", (1, 3, 8, 7), 12, (2, 3), (3, 1), ((0, 1), (2, 0)), act=("celu", (0.7,))),
    Case("dilation", (1, 1, 11, 9), 9, dilation=(2, 3), padding=((2, 2), (3, 3)), act=("leaky_relu", (0.2,))),
    Case("same_even", (1, 3, 5, 6), 5, (2, 4), padding=((0, 1), (1, 2)), act=("identity", ())),
    Case("wide_padding", (1, 2, 4, 4), 3, padding=((2, 3), (3, 2)), act=("selu", ())),
    Case("folded", (2, 3, 12, 16), 24, factor=(2, 2), affine=True),
    Case("folded_rows", (1, 1, 6, 5), 18, factor=(3, 1)),
    Case("pooled", (2, 3, 3, 3), 16, window=(2, 2), ragged=(1, 1)),
    Case("nothing_kept", (1, 4, 4, 4), 8, keep="nothing"),
    Case("from_one", (2, 20, 7, 6), 1),
    Case("from_two", (1, 33, 5, 9), 2, affine=True, keep="u", act=("elu", (1.0,))),
    Case("from_three", (1, 72, 6, 6), 3, stride=(2, 1), act=("tanh", ())),
    Case("from_three_pooled", (1, 8, 4, 3), 3, (5, 5), padding=((2, 2), (2, 2)), window=(2, 1), ragged=(1, 0)),
    Case("from_four_folded", (1, 12, 6, 8), 4, factor=(2, 2)),
    Case("bfloat16", (2, 3, 9, 12), 64, dtype=torch.bfloat16, affine=True),
    Case("bfloat16_from", (1, 24, 6, 6), 3, dtype=torch.bfloat16, keep="u"),
    Case("bfloat16_ragged", (1, 1, 6, 6), 13, factor=(2, 2), dtype=torch.bfloat16),
    Case("float16", (2, 3, 6, 6), 40, dtype=torch.float16),
    Case("float16_from", (1, 10, 6, 7), 1, stride=(2, 2), dtype=torch.float16),
]
IDS = [c.name for c in CASES]
FOLDING = Folding()


@pytest.fixture
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "cpu":
        monkeypatch.setattr(few_operands, "DEVICES", ["cpu"])
        monkeypatch.setattr(few_operands, "launch", launch_few_channels)
        monkeypatch.setattr(few_operands, "folding", lambda like: FOLDING)
    else:
        monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    return request.param


def test_both_sides_lay_the_parameters_out_alike() -> None:
    size = compiled("few_channels").size_of_parameters
    size.restype = ctypes.c_int64
    assert size() == ctypes.sizeof(parameters.FewParams)


@pytest.mark.parametrize("struct", ["source", "operand", "epilogue", "parameters"])
def test_both_sides_have_every_field_in_the_same_place(struct: str) -> None:
    own = parameters.FewParams if struct == "parameters" else getattr(parameters, struct.title())
    want = [getattr(own, name).offset for name, _ in own._fields_]
    found = (ctypes.c_int64 * len(want))()
    getattr(compiled("few_channels"), f"offsets_of_{struct}")(found)
    assert list(found) == want


class Made:
    """Tensors of a case; `made.double()` has the same numbers in float64."""

    def __init__(self, case: Case, seed: int, device: str):
        self.case, self.generator = case, torch.Generator().manual_seed(seed)
        n, c_in, h, w = case.shape
        p, q = case.tied.output_size((h, w), case.kernel)
        f, (kh, kw) = case.factor or (1, 1), case.window or (1, 1)
        wide = torch.float32

        def random(*shape: int, dtype: torch.dtype = case.dtype) -> Tensor:
            t = torch.randn(shape, generator=self.generator, dtype=torch.float64).to(dtype).to(device)
            return t.to(memory_format=torch.channels_last) if len(shape) == 4 else t

        self.weight = random(case.out, c_in, *case.kernel) * 0.5
        self.bias = random(case.out) if case.bias else None
        act = case.act if case.affine else ("identity", ())
        affine = [random(case.out, dtype=wide) for _ in range(2)] if case.affine else [None, None]
        self.y = Lazy(random(n, case.out, p // f[0], q // f[1]), *affine, *act)
        shift = random(c_in, dtype=wide) if case.affine else None
        size = (h * kh + case.ragged[0], w * kw + case.ragged[1])
        self.d = Lazy(random(n, c_in, *size), None, shift, "relu" if case.affine else "identity")
        self.scale, self.shift = (random(c_in, dtype=wide) if case.affine else None for _ in range(2))
        self.minus = random(c_in, dtype=wide) if case.bias else None
        self.g, kept = random(*case.shape), random(*case.shape)
        self.p, self.gp = Lazy(random(*case.shape), None, shift, self.d.act), random(n, case.out, p, q)
        done = case.keep != "u"
        self.latent = Lazy(activate(case.act, kept) if done else kept, None, None, *case.act, done=done)
        self.c2 = torch.tensor(0.7, device=device)

    @property
    def incoming(self) -> Incoming:
        if self.case.window is not None:
            return Incoming(self.g)
        return Incoming(self.g, self.latent, self.d, self.c2) if self.case.bias else Incoming(self.g, self.latent)


def activate(act: tuple[str, tuple[Any, ...]], u: Tensor) -> Tensor:
    return u if act[0] == "identity" else TABLE[act[0]].forward(u, *act[1])


def per_channel(t: Tensor | None, like: torch.dtype) -> Tensor | None:
    return None if t is None else t.to(like).view(1, -1, 1, 1)


class Plain:
    """The same in plain PyTorch: in float64 what is to come out, in the case's own type how well PyTorch does it."""

    def __init__(self, made: Made, dtype: torch.dtype):
        self.made, self.case, self.dtype = made, made.case, dtype

    def value(self, lazy: Lazy) -> Tensor:
        x = lazy.x.to(self.dtype)
        if lazy.done:
            return x
        x = x if lazy.scale is None else x * per_channel(lazy.scale, self.dtype)
        x = x if lazy.shift is None else x + per_channel(lazy.shift, self.dtype)
        return activate((lazy.act, lazy.args), x)

    @property
    def s(self) -> Tensor:
        s = self.value(self.made.y)
        s = s if self.made.bias is None else s - per_channel(self.made.bias, self.dtype)
        for dim, f in enumerate(self.case.factor or ()):
            s = s.repeat_interleave(f, 2 + dim)
        return s

    def convolve(self, x: Tensor, weight: Tensor) -> Tensor:
        (top, bottom), (left, right) = self.case.padding
        padded = F.pad(x, (left, right, top, bottom))
        return F.conv2d(padded, weight, None, self.case.stride, dilation=self.case.dilation)

    @property
    def weight(self) -> Tensor:
        return self.made.weight.to(self.dtype)

    def forward(self) -> dict[str, Tensor]:
        made, case = self.made, self.case
        x = torch.zeros(case.shape, dtype=self.dtype, device=made.g.device, requires_grad=True)
        u = torch.autograd.grad(self.convolve(x, self.weight), x, self.s)[0]
        a = u if made.scale is None else u * per_channel(made.scale, u.dtype) + per_channel(made.shift, u.dtype)
        a = activate(case.act, a)
        d = self.value(made.d)
        kh, kw = case.window or (1, 1)
        rows, columns = (torch.arange(n, device=d.device) for n in d.shape[2:])
        undone = a[:, :, (rows // kh).clamp(max=a.shape[2] - 1)][:, :, :, (columns // kw).clamp(max=a.shape[3] - 1)]
        minus = per_channel(made.minus, u.dtype)
        found = {
            "loss": (d - undone).float().square().sum() if self.dtype != torch.float64 else (d - undone).square().sum()
        }
        found["source"] = a if minus is None else a - minus
        return found if case.keep == "nothing" else {**found, "kept": u if case.keep == "u" else a}

    def g_u(self) -> Tensor:
        given, case = self.made.incoming, self.case
        g = given.g.to(self.dtype)
        if given.a is None:
            return g
        x = given.a.x.to(self.dtype)
        a = x if given.a.done else activate(case.act, x)
        if given.d is not None:
            g = g + 0.7 * (a - self.value(given.d))
        if case.act[0] == "identity":
            return g
        return TABLE[case.act[0]].backward(g, a, *case.act[1])

    def gradients(self) -> dict[str, Tensor]:
        made, case, g_u = self.made, self.case, self.g_u()
        weight = self.weight.requires_grad_()
        source = self.convolve(g_u, weight.detach())
        if case.factor is not None:
            source = F.avg_pool2d(source, case.factor, divisor_override=1)
        forward = torch.autograd.grad(self.convolve(self.value(made.p), weight), weight, made.gp.to(self.dtype))[0]
        reverse = torch.autograd.grad(self.convolve(g_u, weight), weight, self.s)[0]
        found = {"source": source, "weight": forward + reverse, "forward": forward, "reverse": reverse}
        return {**found, "bias": -source.sum((0, 2, 3))} if case.bias else found

    def reverse(self) -> dict[str, Tensor]:
        return {name: t for name, t in self.gradients().items() if name not in ("weight", "forward")}


def forward(made: Made, **changed: Any) -> dict[str, Tensor]:
    case = made.case
    given: dict[str, Any] = dict(
        bias=made.bias, factor=case.factor, act=case.act[0], args=case.act[1], scale=made.scale, shift=made.shift,
        keep=case.keep, d=made.d, window=case.window, source=True, minus=made.minus,
    )  # fmt: skip
    got = few_channels.forward(made.y, made.weight, case.tied, case.shape, **{**given, **changed})
    return {name: t for name, t in got._asdict().items() if t is not None}


def gradients(made: Made) -> dict[str, Tensor]:
    case, given, w = made.case, made.incoming, made.weight
    shape = tuple(made.y.x.shape)
    source, bias = few_channels.source_gradient(given, w, case.tied, shape, factor=case.factor, bias=case.bias)
    read, reverse = (made.p, made.gp), (given, made.y, made.bias)
    found = {
        "source": source,
        "weight": few_channels.weight_gradient(w, case.tied, read=read, reverse=reverse, factor=case.factor),
        "forward": few_channels.weight_gradient(w, case.tied, read=read),
        "reverse": few_channels.weight_gradient(w, case.tied, reverse=reverse, factor=case.factor),
    }
    return {**found, "bias": bias} if case.bias else found


def off(got: Tensor, want: Tensor) -> float:
    assert got.shape == want.shape
    assert torch.isfinite(got).all(), "not everything was written"
    return float((got.double() - want).norm() / want.norm())


def compare(case: Case, device: str, ours: Any, plain: str) -> None:
    """At most twice plain PyTorch's own error, in the median of seeds."""
    errors: dict[str, list[tuple[float, float]]] = {}
    for seed in SEEDS:
        made = Made(case, seed, device)
        want, other = (getattr(Plain(made, dtype), plain)() for dtype in (torch.float64, case.dtype))
        for name, got in ours(made).items():
            errors.setdefault(name, []).append((off(got, want[name]), off(other[name], want[name])))
    assert errors.keys() == want.keys()
    for name, both in errors.items():
        own, theirs = (median(column) for column in zip(*both, strict=True))
        assert own <= 2 * max(theirs, FLOOR), f"{name}: off by {own:.2e}, plain PyTorch by {theirs:.2e}"


@pytest.mark.parametrize("device", DEVICES, indirect=True)
@pytest.mark.parametrize("case", CASES, ids=IDS)
def test_forward(case: Case, device: str) -> None:
    compare(case, device, forward, "forward")


@pytest.mark.parametrize("device", DEVICES, indirect=True)
@pytest.mark.parametrize("case", CASES, ids=IDS)
def test_gradients(case: Case, device: str) -> None:
    compare(case, device, gradients, "gradients")


@pytest.mark.parametrize("device", ["cpu"], indirect=True)
@pytest.mark.parametrize("name", ["one", "folded", "from_four_folded"])
def test_weights_are_folded_by_the_kernel(name: str, device: str) -> None:
    """Forward, for the source, and for one of the weight's two uses; its gradient alone once more."""
    made = Made(CASES[IDS.index(name)], 0, device)
    FOLDING.calls.clear()
    forward(made)
    gradients(made)
    assert FOLDING.calls == ({"fold": 2, "fold_adjoint": 2} if made.case.factor else {})


@pytest.mark.parametrize("device", DEVICES, indirect=True)
@pytest.mark.parametrize("case", CASES, ids=IDS)
def test_a_repeated_run_gives_the_same_bits(case: Case, device: str) -> None:
    """Every kernel on every case, and nothing of PyTorch's: what `make gpu` runs under compute-sanitizer."""
    made = Made(case, 0, device)
    first, second = ({**forward(made), **gradients(made)} for _ in range(2))
    assert first.keys() == second.keys()
    assert all(torch.equal(t, second[name]) and torch.isfinite(t).all() for name, t in first.items())


@pytest.mark.parametrize("device", ["cpu"], indirect=True)
@pytest.mark.parametrize("order", [LAST_FIRST, ALONE])
@pytest.mark.parametrize("name", ["two", "same_even", "folded_rows", "pooled", "from_four_folded", "bfloat16_ragged"])
def test_no_thread_waits_for_another_within_a_step(name: str, order: int, device: str) -> None:
    made = Made(CASES[IDS.index(name)], 0, device)
    first = {**forward(made), **gradients(made)}
    with threads(compiled("few_channels"), order):
        second = {**forward(made), **gradients(made)}
    assert all(torch.equal(t, second[key]) for key, t in first.items())


@pytest.mark.parametrize("device", DEVICES, indirect=True)
@pytest.mark.parametrize("name", ["three", "stride", "from_one", "from_three"])
def test_nan_and_infinity_reach_what_they_reach_in_plain_pytorch(name: str, device: str) -> None:
    made = Made(CASES[IDS.index(name)], 0, device)
    made.y.x[0, 0, 1, 2] = float("nan")
    made.y.x[0, 0, -1, 0] = float("inf")
    made.y = Lazy(made.y.x)
    x = torch.zeros(made.case.shape, dtype=torch.float64, device=device, requires_grad=True)
    plain = Plain(made, torch.float64)
    u = torch.autograd.grad(plain.convolve(x, plain.weight), x, plain.s)[0]
    got = forward(made, keep="u", act="identity", args=())["kept"]
    assert torch.equal(torch.isfinite(got), torch.isfinite(u)) and torch.equal(got.isnan(), u.isnan())


@pytest.mark.parametrize("device", DEVICES, indirect=True)
def test_images_may_lie_apart(device: str) -> None:
    made = Made(CASES[0], 0, device)
    want = forward(made)
    y, d = (torch.cat((t, t * float("nan")))[[0, 2, 1, 3]] for t in (made.y.x, made.d.x))
    y, d = (t.to(memory_format=torch.channels_last)[::2] for t in (y, d))
    made.y, made.d = made.y._replace(x=y), made.d._replace(x=d)
    assert all(torch.equal(got, want[name]) for name, got in forward(made).items())


FAR = 2**31 + 64


@pytest.mark.skipif(torch.cuda.is_available(), reason="would fill the GPU's memory")
@pytest.mark.parametrize("device", ["cpu"], indirect=True)
@pytest.mark.parametrize("name", ["float16", "stem", "from_one", "folded", "pooled"])
def test_offsets_beyond_32_bits(name: str, device: str) -> None:
    """Images that lie more than 2^31 numbers apart, in memory that nobody touches between them: the same bits."""
    case = CASES[IDS.index(name)]
    case = replace(case, shape=(2, *case.shape[1:]), dtype=torch.float16)
    made = Made(case, 0, device)
    want = {**forward(made), **gradients(made)}
    memory, used = torch.from_numpy(numpy.zeros(FAR + 2**20, numpy.uint16)).view(torch.float16), 0

    def far(t: Tensor) -> Tensor:
        nonlocal used
        apart = memory[used:].as_strided(t.shape, (FAR, *t.stride()[1:]))
        used += t[0].numel() + 16
        return apart.copy_(t)

    for operand in ("y", "d", "p", "latent"):
        setattr(made, operand, getattr(made, operand)._replace(x=far(getattr(made, operand).x)))
    made.g, made.gp = far(made.g), far(made.gp)
    got = {**forward(made), **gradients(made)}
    assert got.keys() == want.keys() and all(torch.equal(t, want[key]) for key, t in got.items())


WEIGHT, TIED = torch.zeros(8, 3, 3, 3), CASES[0].tied
Y, SHAPE = torch.zeros(1, 8, 5, 5).to(memory_format=torch.channels_last), (1, 3, 5, 5)
REFUSED: list[tuple[str, dict[str, Any]]] = [
    ("one type of", dict(weight=WEIGHT.double())),
    ("1 to 4 channels", dict(weight=torch.zeros(8, 5, 3, 3), shape=(1, 5, 5, 5))),
    ("one group", dict(tied=Tied((1, 1), ((1, 1), (1, 1)), (1, 1), 3))),
    ("zero padding", dict(tied=Tied((1, 1), ((1, 1), (1, 1)), (1, 1), 1, "reflect"))),
    ("is folded into", dict(tied=Tied((2, 2), ((1, 1), (1, 1)), (1, 1)), factor=(2, 2))),
    ("do not become", dict(shape=(1, 3, 6, 5))),
    ("does not turn into", dict(d=Lazy(torch.zeros(1, 3, 9, 10).to(memory_format=torch.channels_last)), window=(2, 2))),
    ("not channels_last", dict(y=Y.contiguous())),
    ("not computed from its output", dict(y=Lazy(Y, act="gelu", args=("none",)))),
    ("nothing to compute", dict(y=Y[:0], shape=(0, 3, 5, 5))),
    ("shared memory", dict(weight=torch.zeros(8, 3, 30, 30), tied=Tied((1, 1), ((15, 14),) * 2, (1, 1)))),
]


@pytest.mark.parametrize("device", ["cpu"], indirect=True)
@pytest.mark.parametrize(("reason", "changed"), REFUSED, ids=[r for r, _ in REFUSED])
def test_refused(reason: str, changed: dict[str, Any], device: str) -> None:
    given = {"y": Y, "weight": WEIGHT, "tied": TIED, "shape": SHAPE, **changed}
    assert reason in (few_channels.why_not(**given) or "served")
    y = given.pop("y")
    with pytest.raises(ValueError, match=reason):
        few_channels.forward(y if isinstance(y, Lazy) else Lazy(y), **given)


def test_without_a_gpu() -> None:
    assert "need an NVIDIA GPU" in (few_channels.why_not(Y, WEIGHT, TIED, SHAPE) or "")
    assert few_operands.folding(WEIGHT) is None


@pytest.mark.parametrize("device", ["cpu"], indirect=True)
def test_a_family_gets_the_same_or_none(device: str) -> None:
    case = CASES[IDS.index("stride")]
    made, fused = Made(case, 0, device), few_channels.fused()
    assert fused.takes("forward", made.weight, case.tied, None)
    assert not fused.takes("forward", torch.zeros(8, 5, 3, 3), case.tied, None)
    options = dict(factor=None, d=made.d, window=None, keep="u")
    got = fused.forward(made.y, made.weight, case.tied, case.shape, **options)
    assert torch.equal(got.kept, forward(made, keep="u", bias=None)["kept"])
    want = gradients(made)
    shape, reverse = tuple(made.y.x.shape), (made.incoming, made.y, made.bias)
    source, _ = fused.source_gradient(made.incoming, made.weight, case.tied, shape, factor=None)
    assert torch.equal(source, want["source"])
    assert torch.equal(fused.weight_gradient(made.weight, case.tied, reverse=reverse), want["reverse"])
    wrong = made.weight.double()
    assert fused.forward(made.y, wrong, case.tied, case.shape, **options) is None
    assert fused.source_gradient(made.incoming, wrong, case.tied, shape, factor=None) is None
    assert fused.weight_gradient(wrong, case.tied, reverse=reverse) is None
