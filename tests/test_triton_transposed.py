"""The fused transposed convolution in Triton against float64, on a GPU or, without one, in Triton's interpreter."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._pytree import tree_map_only

from racecar_kernels.activations import TABLE
from racecar_kernels.layer import Tied
from racecar_kernels.lazy import Lazy

pytest.importorskip("triton", reason="Triton is not installed")
from racecar_kernels.gpu import configs
from racecar_kernels.gpu import transposed as fused
from racecar_kernels.gpu.transposed_operands import kind_of

pytestmark = pytest.mark.usefixtures("interpreted", "poisoned", "without_tf32")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# Norm-wise, some roundings of the type: of what is read, of a folded weight, of what is stored.
EPS = {torch.float32: 1e-5, torch.bfloat16: 8e-3, torch.float16: 1e-3}


@dataclass(frozen=True)
class Case:
    """A convolution (N, C_in, H, W) to C_out channels, and how its reverse is asked for."""

    name: str
    shape: tuple[int, int, int, int]
    out: int
    kernel: tuple[int, int] = (3, 3)
    stride: tuple[int, int] = (1, 1)
    padding: tuple[tuple[int, int], tuple[int, int]] = ((1, 1), (1, 1))
    groups: int = 1
    factor: tuple[int, int] | None = None
    bias: bool = True
    act: tuple[str, tuple[Any, ...]] = ("relu", ())
    affine: bool = False  # of y, and of u
    keep: str = "a"
    window: tuple[int, int] | None = None
    ragged: tuple[int, int] = (0, 0)
    source: bool = True
    dtype: torch.dtype = torch.float32

    @property
    def tied(self) -> Tied:
        return Tied(self.stride, self.padding, (1, 1), self.groups)


NONE = ((0, 0), (0, 0))
CASES = [
    Case("plain", (2, 5, 7, 6), 20),
    Case("odd", (1, 33, 5, 4), 40, affine=True, keep="u"),
    Case("many", (1, 16, 4, 4), 48),
    Case("kept_u", (1, 3, 4, 5), 6, act=("selu", ()), keep="u"),
    Case("many_to_one", (1, 1, 5, 4), 48, act=("elu", (1.0,))),
    Case("wide_point", (2, 80, 3, 2), 32, (1, 1), padding=NONE),
    Case("one_channel", (2, 1, 6, 5), 3, bias=False, act=("tanh", ())),
    Case("to_three", (1, 3, 8, 8), 17, act=("leaky_relu", (0.2,)), source=False),
    Case("one_pixel", (3, 4, 1, 1), 18, (1, 1), padding=NONE, act=("sigmoid", ())),
    Case("point", (2, 20, 3, 5), 34, (1, 1), padding=NONE, affine=True, act=("elu", (1.3,))),
    Case("point_few", (1, 3, 4, 4), 1, (1, 1), padding=NONE, act=("softsign", ())),
    Case("point_stride", (1, 6, 5, 4), 7, (1, 1), (2, 2), NONE, act=("identity", ())),
    Case("stride", (2, 6, 7, 8), 19, stride=(2, 2), act=("relu6", ())),
    Case("stride_even", (1, 2, 9, 7), 18, (4, 4), (2, 2), act=("selu", ())),
    Case("stride_mixed", (1, 3, 8, 7), 4, (2, 3), (3, 1), ((0, 1), (2, 0)), act=("celu", (0.7,))),
    Case("groups", (1, 6, 5, 5), 40, groups=2),
    Case("groups_stride", (2, 4, 6, 6), 4, (2, 2), (2, 2), NONE, groups=2),
    Case("depthwise", (1, 4, 6, 5), 4, groups=4, act=("hardtanh", (-0.5, 0.7))),
    Case("same_even", (1, 3, 5, 6), 5, (2, 4), padding=((0, 1), (1, 2))),
    Case("wide_padding", (1, 2, 4, 4), 3, (3, 3), padding=((2, 3), (3, 2))),
    Case("folded", (2, 3, 6, 8), 20, factor=(2, 2)),
    Case("folded_rows", (1, 20, 6, 5), 18, factor=(2, 1)),
    Case("folded_five", (1, 2, 4, 4), 3, (5, 5), padding=((2, 2), (2, 2)), factor=(2, 2)),
    Case("pooled", (2, 5, 3, 3), 6, window=(2, 2), ragged=(1, 1)),
    Case("pooled_rows", (1, 3, 3, 4), 6, window=(2, 1), ragged=(1, 0), affine=True, keep="u"),
    Case("nothing_kept", (1, 5, 4, 4), 6, keep="nothing"),
    Case("bfloat16", (2, 5, 7, 6), 20, dtype=torch.bfloat16),
    Case("bfloat16_folded", (1, 3, 6, 6), 20, factor=(2, 2), dtype=torch.bfloat16, affine=True, keep="u"),
    Case("bfloat16_stride", (1, 18, 6, 6), 5, stride=(2, 2), dtype=torch.bfloat16),
    Case("float16", (2, 5, 4, 6), 20, dtype=torch.float16),
]
IDS = [c.name for c in CASES]


@pytest.fixture
def without_tf32(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


def random(*shape: int, dtype: torch.dtype, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    t = torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype).to(DEVICE)
    return t.to(memory_format=torch.channels_last) if len(shape) == 4 else t


def activate(act: tuple[str, tuple[Any, ...]], u: Tensor) -> Tensor:
    return u if act[0] == "identity" else TABLE[act[0]].forward(u, *act[1])


def value(lazy: Lazy) -> Tensor:
    """In float64, rounded to the lazy tensor's type as the kernels round it."""
    x = lazy.x.double()
    for t, how in ((lazy.scale, torch.mul), (lazy.shift, torch.add)):
        x = x if t is None else how(x, t.double().view(1, -1, 1, 1))
    return x if lazy.as_it_is else activate((lazy.act, lazy.args), x).to(lazy.x.dtype).double()


class Made:
    """Tensors of a case, and u and s in float64."""

    def __init__(self, case: Case):
        self.case, dtype = case, case.dtype
        n, c_in, h, w = case.shape
        p, q = case.tied.output_size((h, w), case.kernel)
        f = case.factor or (1, 1)
        self.weight = random(case.out, c_in // case.groups, *case.kernel, dtype=dtype, seed=1) * 0.5
        self.bias = random(case.out, dtype=dtype, seed=2) if case.bias else None
        affine = [random(c, dtype=torch.float32, seed=s) for s, c in ((3, case.out), (4, case.out))]
        own = affine if case.affine else [None, None]
        act = case.act if case.affine else ("identity", ())
        self.y = Lazy(random(n, case.out, p // f[0], q // f[1], dtype=dtype, seed=5), *own, *act)
        kh, kw = case.window or (1, 1)
        size = (n, c_in, h * kh + case.ragged[0], w * kw + case.ragged[1])
        shift = random(c_in, dtype=torch.float32, seed=6) if case.affine else None
        self.d = Lazy(random(*size, dtype=dtype, seed=7), None, shift, "relu" if case.affine else "identity")
        self.scale, self.shift = None, None
        if case.affine:
            self.scale, self.shift = (random(c_in, dtype=torch.float32, seed=s) for s in (8, 9))
        self.minus = random(c_in, dtype=torch.float32, seed=10) if case.bias else None
        self.g = random(*case.shape, dtype=dtype, seed=11)

    @property
    def s(self) -> Tensor:
        s = value(self.y)
        s = s if self.bias is None else (s - self.bias.double().view(1, -1, 1, 1)).to(self.case.dtype).double()
        for dim, f in enumerate(self.case.factor or ()):
            s = s.repeat_interleave(f, 2 + dim)
        return s

    def convolve(self, x: Tensor, weight: Tensor) -> Tensor:
        (top, bottom), (left, right) = self.case.padding
        return F.conv2d(F.pad(x, (left, right, top, bottom)), weight, None, self.case.stride, groups=self.case.groups)


def adjoint(made: Made, s: Tensor) -> Tensor:
    """u = Wᵀ s by the adjoint of the convolution itself."""
    x = torch.zeros(made.case.shape, dtype=torch.float64, device=DEVICE, requires_grad=True)
    return torch.autograd.grad(made.convolve(x, made.weight.double()), x, s)[0]


def undone(a: Tensor, case: Case, d: Tensor) -> Tensor:
    kh, kw = case.window or (1, 1)
    y, x = (torch.arange(n, device=DEVICE) for n in d.shape[2:])
    return a[:, :, (y // kh).clamp(max=a.shape[2] - 1)][:, :, :, (x // kw).clamp(max=a.shape[3] - 1)]


def close(got: Tensor, want: Tensor, dtype: torch.dtype, factor: float = 1.0) -> None:
    assert got.shape == want.shape
    assert torch.isfinite(got).all(), "not everything was written"
    error = (got.double() - want).norm() / want.norm().clamp_min(1e-30)
    assert error < factor * EPS[dtype], f"off by {error:.2e}"


def run(made: Made, **changed: Any) -> fused.Result:
    case = made.case
    given: dict[str, Any] = dict(
        bias=made.bias, factor=case.factor, act=case.act[0], args=case.act[1], scale=made.scale, shift=made.shift,
        keep=case.keep, d=made.d, window=case.window, source=case.source, minus=made.minus,
    )  # fmt: skip
    return fused.forward(made.y, made.weight, case.tied, case.shape, **{**given, **changed})


def same(a: fused.Result, b: fused.Result) -> bool:
    return all(x is y is None or torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("case", CASES, ids=IDS)
def test_forward(case: Case) -> None:
    made = Made(case)
    u = adjoint(made, made.s)
    a = u if made.scale is None else u * made.scale.double().view(1, -1, 1, 1) + made.shift.double().view(1, -1, 1, 1)
    a = activate(case.act, a)
    d = value(made.d)
    got = run(made)
    close(got.loss, ((d - undone(a, case, d)) ** 2).sum(), case.dtype)
    if case.keep == "nothing":
        assert got.kept is None
    else:
        close(got.kept, u if case.keep == "u" else a, case.dtype)
        assert got.kept.is_contiguous(memory_format=torch.channels_last)
    if case.source:
        close(got.source, a if made.minus is None else a - made.minus.double().view(1, -1, 1, 1), case.dtype)
    else:
        assert got.source is None


def incoming(made: Made) -> tuple[fused.Incoming, Tensor]:
    """g_u as the kernels are given it, and in float64: plain; through the activation; and with the residual."""
    case, dtype = made.case, made.case.dtype
    if case.window is not None:
        return fused.Incoming(made.g), made.g.double()
    kept = random(*case.shape, dtype=dtype, seed=12)
    u = kept.double().requires_grad_()
    a = activate(case.act, u)
    done = case.keep != "u"
    latent = Lazy(a.detach().to(dtype) if done else kept, None, None, *case.act, done=done)
    seen = a.detach().to(dtype).double()
    through = made.g.double() + 0.7 * (seen - value(made.d)) if case.bias else made.g.double()
    g_u = torch.autograd.grad(a, u, through)[0]
    if not case.bias:
        return fused.Incoming(made.g, latent), g_u
    return fused.Incoming(made.g, latent, made.d, torch.tensor(0.7, device=DEVICE)), g_u


@pytest.mark.parametrize("case", CASES, ids=IDS)
def test_source_gradient(case: Case) -> None:
    made = Made(case)
    given, g_u = incoming(made)
    want = made.convolve(g_u, made.weight.double())
    if case.factor is not None:
        want = F.avg_pool2d(want, case.factor, divisor_override=1)
    shape = tuple(made.y.x.shape)
    got, total = fused.source_gradient(given, made.weight, case.tied, shape, factor=case.factor, bias=case.bias)
    close(got, want, case.dtype, 2)
    if case.bias:
        close(total, -want.sum((0, 2, 3)), case.dtype, 4)


@pytest.mark.parametrize("case", CASES, ids=IDS)
def test_weight_gradient(case: Case) -> None:
    check_weight_gradient(case, ("read", "reverse"))


@pytest.mark.parametrize("use", ["read", "reverse"])
@pytest.mark.parametrize("name", ["stride", "folded"])
def test_weight_gradient_of_one_use(name: str, use: str) -> None:
    check_weight_gradient(CASES[IDS.index(name)], (use,))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("splits", [1, 3, 100])
def test_weight_gradient_split(monkeypatch: pytest.MonkeyPatch, splits: int, dtype: torch.dtype) -> None:
    monkeypatch.setattr(configs, "splits", lambda *given: splits)
    check_weight_gradient(Case("split", (2, 2, 11, 9), 5, dtype=dtype), ("read", "reverse"))


def check_weight_gradient(case: Case, uses: tuple[str, ...], layout: Tensor | None = None) -> None:
    made = Made(case)
    made.weight = made.weight if layout is None else layout
    given, g_u = incoming(made)
    n, c_in, h, w = case.shape
    shift = random(c_in, dtype=torch.float32, seed=13) if case.affine else None
    p = Lazy(random(*case.shape, dtype=case.dtype, seed=14), None, shift, "relu" if case.affine else "identity")
    g = random(n, case.out, *case.tied.output_size((h, w), case.kernel), dtype=case.dtype, seed=15)
    weight = made.weight.double().requires_grad_()
    want = torch.zeros_like(weight)
    pairs: dict[str, Any] = {}
    if "read" in uses:
        want = want + torch.autograd.grad(made.convolve(value(p), weight), weight, g.double())[0]
        pairs["read"] = (p, g)
    if "reverse" in uses:
        want = want + torch.autograd.grad(made.convolve(g_u, weight), weight, made.s)[0]
        pairs["reverse"] = (given, made.y, made.bias)
    got = fused.weight_gradient(made.weight, case.tied, factor=case.factor, **pairs)
    assert got.stride() == torch.empty_like(made.weight).stride() and got.dtype == made.weight.dtype
    close(got, want, case.dtype, 2)


def test_deterministic() -> None:
    made = Made(CASES[0])
    given, _ = incoming(made)
    for _ in range(2):
        first, again = (run(made) for _ in range(2))
        assert same(first, again)
    pair = dict(read=(Lazy(made.g), made.y.x), reverse=(given, made.y, made.bias))
    assert torch.equal(*(fused.weight_gradient(made.weight, made.case.tied, **pair) for _ in range(2)))


@pytest.mark.parametrize("name", ["plain", "stride", "stride_even"])
def test_nan_and_infinity_reach_what_they_reach_in_plain_pytorch(name: str) -> None:
    made = Made(CASES[IDS.index(name)])
    made.y.x[0, 1, 1, 2] = float("nan")
    made.y.x[0, 0, -1, 0] = float("inf")
    u = adjoint(made, made.s)
    got = run(made, keep="u", act="identity", args=()).kept
    finite = torch.isfinite(u)
    assert torch.equal(torch.isfinite(got), finite) and torch.equal(got.isnan(), u.isnan())
    close(got[finite], u[finite], torch.float32)


def test_images_may_lie_apart() -> None:
    made = Made(CASES[0])
    want = run(made)
    y, d = (torch.cat((t, t * float("nan")))[[0, 2, 1, 3]] for t in (made.y.x, made.d.x))
    y, d = (t.to(memory_format=torch.channels_last)[::2] for t in (y, d))
    made.y, made.d = made.y._replace(x=y), made.d._replace(x=d)
    assert same(run(made), want)


@pytest.mark.skipif(DEVICE != "cpu", reason="memory that nobody touches costs nothing on a CPU alone")
def test_offsets_beyond_32_bits() -> None:
    made = Made(Case("far", (2, 2, 3, 3), 3, dtype=torch.float16))
    want = run(made)
    n, c, h, w = made.y.x.shape
    far = 2**31 + 8
    lazily = torch.from_numpy(np.zeros(far + c * h * w, dtype=np.float16))
    y = lazily.as_strided((n, c, h, w), (far, 1, w * c, c)).copy_(made.y.x)
    made.y = Lazy(y)
    assert same(run(made), want)


WEIGHT = torch.zeros(4, 3, 3, 3)
Y, TIED, SHAPE = torch.zeros(1, 4, 5, 5).to(memory_format=torch.channels_last), CASES[0].tied, (1, 3, 5, 5)
REFUSED: list[tuple[str, dict[str, Any]]] = [
    ("one type of", dict(weight=WEIGHT.double())),
    ("dilation 1", dict(tied=Tied((1, 1), ((2, 2), (2, 2)), (2, 2)))),
    ("strides up to 4", dict(tied=Tied((5, 1), ((1, 1), (1, 1)), (1, 1)))),
    ("two-dimensional", dict(tied=Tied((1,), ((1, 1),), (1,)))),
    ("zero padding", dict(tied=Tied((1, 1), ((1, 1), (1, 1)), (1, 1), 1, "reflect"))),
    ("is folded into", dict(tied=Tied((2, 2), ((1, 1), (1, 1)), (1, 1)), factor=(2, 2))),
    ("become images of", dict(shape=(1, 3, 6, 5))),
    ("the weight has sizes", dict(shape=(1, 4, 5, 5))),
    ("not channels_last", dict(y=Y.contiguous())),
    ("is not computed from its output", dict(a=Lazy(Y, act="gelu", args=("none",)))),
    ("a pooling by up to", dict(d=Y, window=(3, 3))),
    ("does not turn into", dict(d=Y, window=(2, 2))),
]


def moved(given: dict[str, Any]) -> dict[str, Any]:
    """The arguments on the device of the kernels."""
    return tree_map_only(Tensor, lambda t: t.to(DEVICE), given)


@pytest.mark.parametrize(("sentence", "changed"), REFUSED, ids=[s for s, _ in REFUSED])
def test_why_not(sentence: str, changed: dict[str, Any]) -> None:
    served: dict[str, Any] = dict(y=Y, weight=WEIGHT, tied=TIED, shape=SHAPE)
    assert fused.why_not(**moved(served)) is None
    reason = fused.why_not(**moved({**served, **changed}))
    assert reason is not None and re.search(sentence, reason)


def test_why_not_gradient() -> None:
    g = torch.zeros(SHAPE)
    assert "left to the pointwise kernel" in str(fused.why_not_gradient(fused.Incoming(g, None, Lazy(g)), (2, 2)))
    assert "a norm's own gradients" in str(fused.why_not_gradient(fused.Incoming(g, Lazy(g, None, g[0, :, 0, 0]))))
    with pytest.raises(ValueError, match="the gradient of u needs g"):
        fused.source_gradient(fused.Incoming(None), WEIGHT, TIED, (1, 4, 5, 5))
    wrong = fused.Incoming(g.to(DEVICE), Lazy(torch.zeros(1, 3, 4, 5, device=DEVICE)))
    with pytest.raises(ValueError, match="need the size of u"):
        fused.source_gradient(wrong, WEIGHT.to(DEVICE), TIED, (1, 4, 5, 5))


@pytest.mark.parametrize("architecture", ["sm_80", "sm_90", "sm_100"])
def test_every_argument_of_what_is_shipped_is_known(architecture: str) -> None:
    for entry in fused.shipped(architecture):
        assert set(entry.signature) | set(entry.constants) == set(entry.kernel.arg_names)
        assert set(entry.aligned) <= set(entry.signature)


def test_a_weight_in_rows() -> None:
    """A contiguous weight, and one that is a slice."""
    made = Made(CASES[0])
    want = run(made)
    for weight in (made.weight.contiguous(), torch.cat((made.weight, made.weight), 1)[:, : made.weight.shape[1]]):
        made.weight = weight
        assert same(run(made), want)
        check_weight_gradient(CASES[0], ("read", "reverse"), weight)


def test_no_images() -> None:
    made = Made(CASES[0])
    y, d, shape = made.y._replace(x=made.y.x[:0]), made.d._replace(x=made.d.x[:0]), (0, *CASES[0].shape[1:])
    got = fused.forward(y, made.weight, CASES[0].tied, shape, d=d)
    assert got.kept.shape == shape and got.loss == 0
    given = fused.Incoming(made.g[:0])
    source, total = fused.source_gradient(given, made.weight, CASES[0].tied, tuple(y.x.shape), bias=True)
    assert source.shape == y.x.shape and not total.any()
    assert not fused.weight_gradient(made.weight, CASES[0].tied, reverse=(given, y, None)).any()


@pytest.mark.parametrize(("allowed", "kind"), [(True, "tf32"), (False, "ieee")])
def test_float32_is_multiplied_as_convolutions_are(monkeypatch: pytest.MonkeyPatch, allowed: bool, kind: str) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", allowed)
    assert kind_of(torch.zeros(1)) == kind
    assert kind_of(torch.zeros(1, dtype=torch.bfloat16)) == "half"
