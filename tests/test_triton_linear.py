"""The Triton kernels of the tied linear layer against float64: compiled for a GPU, else interpreted on the CPU."""

from __future__ import annotations

import itertools
import statistics
from dataclasses import dataclass, field

import numpy
import oracle
import pytest
import torch
from torch import Tensor

from racecar_kernels.activations import TABLE

pytest.importorskip("triton", reason="Triton is not installed")
from racecar_kernels.gpu import configs, device, linear
from racecar_kernels.gpu.linear import Reversed

pytestmark = pytest.mark.usefixtures("interpreted", "poisoned")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
EPS = {torch.float32: 2**-24, torch.bfloat16: 2**-9, torch.float16: 2**-12}
RELU, LEAKY, TANH, NONE = ("relu", ()), ("leaky_relu", (0.1,)), ("tanh", ()), ("identity", ())
ACTS = [
    NONE, RELU, ("relu6", ()), ("hardtanh", (-0.5, 0.7)), LEAKY, ("elu", (0.8,)), ("selu", ()),
    ("celu", (2.0,)), TANH, ("sigmoid", ()), ("softsign", ()),
]  # fmt: skip
# Rows, input and output features: one of each, fewer than a block, a block, ragged masks, several tiles across and
# down, more than one group of block rows, more output features than one kernel takes; aligned and not.
SHAPES = [
    (1, 1, 1), (1, 3, 2), (5, 3, 1), (16, 16, 16), (37, 21, 5), (70, 33, 17), (33, 70, 40), (290, 34, 5),
    (9, 20, 130), (40, 36, 129), (70, 48, 80), (17, 32, 144),
]  # fmt: skip


@dataclass
class Sample:
    """A layer and what its results receive. y: the source of a reverse that is not the layer's own output."""

    p: Tensor
    weight: Tensor
    bias: Tensor | None
    y: Tensor
    g_in: Tensor
    g_out: Tensor
    c2: Tensor = field(default_factory=lambda: torch.tensor(0.7))
    act: linear.Act = LEAKY
    reverse_act: linear.Act = TANH

    def to(self, where: torch.dtype | str) -> Sample:
        moved = {n: t.to(where) for n, t in vars(self).items() if isinstance(t, Tensor) and n != "c2"}
        c2 = self.c2.to(where) if isinstance(where, str) else self.c2
        return Sample(**{**vars(self), **moved, "c2": c2})


def make(shape, dtype=torch.float32, bias=True, seed=0, **acts) -> Sample:
    rows, inputs, outputs = shape
    torch.manual_seed(seed)
    sizes = [(rows, inputs), (outputs, inputs), (outputs,), (rows, outputs), (rows, inputs), (rows, outputs)]
    p, weight, b, y, g_in, g_out = (torch.randn(size).to(dtype) for size in sizes)
    weight = (weight.float() / inputs**0.5).to(dtype)
    return Sample(p, weight, b if bias else None, y, g_in, g_out, **acts)


def forward_of(act: linear.Act, u: Tensor) -> Tensor:
    return u if act == NONE else TABLE[act[0]].forward(u, *act[1])


def plain(s: Sample, own: bool) -> dict[str, Tensor]:
    """Results and gradients by autograd, in the sample's own type. own: y is the layer's output."""
    p, weight, y = (t.clone().requires_grad_() for t in (s.p, s.weight, s.y))
    bias = None if s.bias is None else s.bias.clone().requires_grad_()
    source = forward_of(s.act, torch.nn.functional.linear(p, weight, bias)) if own else y
    a = forward_of(s.reverse_act, (source if bias is None else source - bias) @ weight)
    wide = torch.promote_types(s.p.dtype, torch.float32)
    squares = (a.to(wide) - p.to(wide)).square().sum()
    total = s.c2.to(wide) / 2 * squares + (a * s.g_in).to(wide).sum()
    if own:
        total = total + (source * s.g_out).to(wide).sum()
    total.backward()
    found = {"a": a, "loss": squares, "weight": weight.grad}
    found |= {"y": source, "p": p.grad} if own else {"source": y.grad}
    if bias is not None:
        found["bias"] = bias.grad
    return {name: t.detach() for name, t in found.items()}


def ours(s: Sample, own: bool, fused: bool | None = None, splits: int | None = None) -> dict[str, Tensor]:
    """The same from the kernels."""
    s = s.to(DEVICE)
    if own:
        y, a, loss = linear.tied(s.p, s.weight, s.bias, s.act, s.reverse_act, fused=fused)
    else:
        y = s.y
        a, loss = linear.reverse(y, s.weight, s.bias, s.reverse_act, s.p)
    r = Reversed(y, a, s.p, s.weight, s.bias, s.reverse_act, s.g_in, s.c2)
    found = {"a": a, "loss": loss}
    if own:
        g_c, bias = linear.grad_source(r, own=s.act, g_out=s.g_out)
        found |= {"y": y, "weight": linear.grad_weight(r, g_c, splits=splits), "p": linear.grad_input(g_c, r)}
    else:
        found["source"], bias = linear.grad_source(r)
        found["weight"] = linear.grad_weight(r, splits=splits)
    if bias is not None:
        found["bias"] = bias
    return {name: t.cpu() for name, t in found.items()}


def check(s: Sample, *, own: bool, **how) -> None:
    """Every result against float64: at most four times plain PyTorch's own error, or a few roundings."""
    got, want, usual = ours(s, own, **how), plain(s.to(torch.float64), own), plain(s, own)
    assert got.keys() == want.keys()
    for name, right in want.items():
        limit = 4 * oracle.error([usual[name]], [right]) + 4 * EPS[s.p.dtype]
        assert oracle.error([got[name]], [right]) <= limit, name


@pytest.mark.parametrize("shape", [s for s in SHAPES if s[2] <= linear.MOST_OUTPUTS], ids=str)
def test_one_kernel(shape) -> None:
    check(make(shape), own=True, fused=True)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_two_kernels(shape) -> None:
    check(make(shape), own=True, fused=False)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_reverse_of_any_tensor(shape) -> None:
    check(make(shape), own=False)


@pytest.mark.parametrize("own", [True, False])
def test_no_bias(own: bool) -> None:
    check(make((20, 21, 5), bias=False), own=own)


@pytest.mark.parametrize("act", ACTS, ids=str)
def test_every_activation(act: linear.Act) -> None:
    check(make((18, 19, 5), act=act, reverse_act=act), own=True)


def test_sums_of_splits_may_cancel() -> None:
    """What is left of large ones is what they do not have in common."""
    g_c = torch.zeros(96, 2, device=DEVICE)
    g_c[[0, 32, 64], 0] = torch.tensor([2.0**25, 1, -(2.0**25)], device=DEVICE)
    p, weight = torch.ones(96, 3, device=DEVICE), torch.ones(2, 3, device=DEVICE)
    found = linear.grad_weight(linear.Reversed(None, p, p, weight), g_c, reverse=False, splits=3)
    assert found.tolist() == [[1.0] * 3, [0.0] * 3]


@pytest.mark.parametrize("splits", [1, 2, 3, 7])
def test_rows_are_split(splits: int) -> None:
    check(make((100, 20, 6)), own=True, splits=splits)


@pytest.mark.parametrize("fused", [True, False], ids=["one kernel", "two kernels"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_at_most_twice_the_error_of_plain_pytorch(dtype: torch.dtype, fused: bool) -> None:
    errors: dict[str, list[tuple[float, float]]] = {}
    for seed in range(7):
        s = make((37, 33, 17), dtype, seed=seed)
        got, want, usual = ours(s, True, fused=fused), plain(s.to(torch.float64), True), plain(s, True)
        for name, right in want.items():
            pair = (oracle.error([got[name]], [right]), oracle.error([usual[name]], [right]))
            errors.setdefault(name, []).append(pair)
    for name, pairs in errors.items():
        own, other = (statistics.median(e) for e in zip(*pairs, strict=True))
        assert own <= 2 * other + EPS[dtype] / 8, name


def test_tf32_is_accepted() -> None:
    s = make((20, 21, 5)).to(DEVICE)
    exact, quick = (linear.tied(s.p, s.weight, s.bias, tf32=tf32) for tf32 in (False, True))
    torch.testing.assert_close(quick.a, exact.a, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("missing", ["g_in", "c2"])
def test_one_gradient_alone(missing: str) -> None:
    s = make((20, 21, 5))
    nothing = {"g_in": torch.zeros_like(s.g_in), "c2": torch.zeros(())}[missing]
    y, a, _ = linear.tied(*(t.to(DEVICE) for t in (s.p, s.weight, s.bias)))
    here = s.to(DEVICE)
    full = Reversed(y, a, here.p, here.weight, here.bias, NONE, here.g_in, here.c2)
    without, with_nothing = full._replace(**{missing: None}), full._replace(**{missing: nothing.to(DEVICE)})
    for f in (linear.grad_source, linear.grad_weight):
        torch.testing.assert_close(f(without), f(with_nothing))
    torch.testing.assert_close(linear.grad_input(y, without._replace(c2=None)), y @ here.weight)


def test_only_what_is_asked_for() -> None:
    s = make((20, 21, 5)).to(DEVICE)
    a, loss = linear.reverse(s.y, s.weight, s.bias)
    assert loss is None
    r = Reversed(s.y, a, s.p, s.weight, s.bias, NONE, s.g_in)
    nothing, bias = linear.grad_source(r, needs_y=False)
    assert nothing is None
    torch.testing.assert_close(bias, -(s.g_in @ s.weight.T).sum(0))
    torch.testing.assert_close(linear.grad_weight(r, s.g_out, reverse=False), s.g_out.T @ s.p)


def sliced(t: Tensor) -> Tensor:
    """The same values, unaligned and with a gap between the rows."""
    wide = t.new_full((t.shape[0], t.shape[1] + 3), float("nan"))
    wide[:, 1:-2] = t
    return wide[:, 1:-2]


def test_rows_with_gaps() -> None:
    s = make((37, 21, 5))
    apart = Sample(**{n: sliced(t) if isinstance(t, Tensor) and t.dim() == 2 else t for n, t in vars(s).items()})
    for own in (True, False):
        got, want = ours(apart, own), ours(s, own)
        assert all(torch.equal(got[n], want[n]) for n in want)


@pytest.mark.skipif(DEVICE == "cuda", reason="would fill the GPU's memory")
def test_offsets_beyond_32_bits() -> None:
    """Two rows that lie 2^31 numbers apart, in memory that is not touched between them."""
    apart = 2**31 + 8
    memory = torch.from_numpy(numpy.empty(apart + 3, numpy.float16))
    far = memory.as_strided((2, 3), (apart, 1))
    near = torch.randn(2, 3).half()
    far.copy_(near)
    other = torch.randn(4, 3).half()
    for p, weight in ((far, other), (other, far)):
        got = linear.tied(p, weight, fused=True)
        want = linear.tied(p.contiguous(), weight.contiguous(), fused=True)
        assert all(torch.equal(g, w) for g, w in zip(got, want, strict=True))


def test_nan_and_infinity_stay_in_their_row() -> None:
    s = make((18, 5, 3), act=NONE, reverse_act=RELU).to(DEVICE)
    s.p[0, 0], s.p[1, 1], s.p[17, 2] = float("nan"), float("inf"), -float("inf")
    for fused in (True, False):
        y, a, loss = linear.tied(s.p, s.weight, s.bias, s.act, s.reverse_act, fused=fused)
        want = s.p @ s.weight.T + s.bias
        torch.testing.assert_close(y, want, equal_nan=True)
        torch.testing.assert_close(a, torch.relu((want - s.bias) @ s.weight), equal_nan=True)
        assert loss.isnan()


def test_repeats_itself() -> None:
    s = make((70, 20, 6))
    first, second = (ours(s, True, splits=5) for _ in range(2))
    assert all(torch.equal(first[n], second[n]) for n in first)


ONE = torch.ones(2, 3)


@pytest.mark.parametrize(
    ("matrices", "reason"),
    [
        ((ONE.double(),), "one type of"),
        ((ONE, ONE.bfloat16()), "one type of"),
        ((ONE[0],), "1 dimensions"),
        ((ONE.T,), "beside each other"),
        ((ONE[:0],), r"\(0, 3\)"),
    ],
)
def test_what_is_not_served_says_why(matrices, reason: str) -> None:
    here = [t.to(DEVICE) for t in matrices]
    assert linear.why_not(*here) is not None
    with pytest.raises(ValueError, match=reason):
        linear._serve(*here, bias=None, acts=[])


def test_other_things_that_are_not_served() -> None:
    here, bias = ONE.to(DEVICE), torch.zeros(6, device=DEVICE)
    assert linear.why_not(here) is None
    assert "2147418112" in str(linear.why_not(here[:1, :1].expand(2**31, 1)))
    assert "gelu" in str(linear.why_not(here, acts=[("gelu", ("none",))]))
    assert "float64" in str(linear.why_not(here, bias=bias.double()))
    assert "in one piece" in str(linear.why_not(here, bias=bias[::2]))
    assert "meta" in str(linear.why_not(here.to("meta")))
    assert "several devices" in str(linear.why_not(here, bias=bias.to("meta")))


def test_errors() -> None:
    s = make((4, 3, 2)).to(DEVICE)
    with pytest.raises(ValueError, match=r"p should be \(4, 3\) beside a weight of \(2, 3\), got \(4, 2\)"):
        linear.linear(s.y, s.weight)
    with pytest.raises(ValueError, match=r"bias should be \(2,\)"):
        linear.linear(s.p, s.weight, torch.zeros(3, device=DEVICE))
    with pytest.raises(ValueError, match="up to 128 output features, got 130"):
        linear.tied(s.p, torch.zeros(130, 3, device=DEVICE), fused=True)
    r = Reversed(s.y, s.p, None, s.weight, g_in=s.g_in)
    with pytest.raises(ValueError, match="c2 is one number"):
        linear.grad_source(r._replace(c2=s.c2))
    with pytest.raises(ValueError, match="g_c needs p"):
        linear.grad_weight(r, s.g_out)
    with pytest.raises(ValueError, match="needs its activation"):
        linear.grad_source(r, g_out=s.g_out)


@pytest.mark.parametrize("architecture", ["sm_75", "sm_80", "sm_89", "sm_90", "sm_100", "sm_103", "sm_121"])
def test_tiles_cover_every_shape(architecture: str) -> None:
    on = device.Device(architecture, 132)
    for math, aligned in itertools.product(("half", "tf32", "ieee"), (True, False)):
        for rows, inputs, outputs in [*SHAPES, (4096, 784, 512), (65536, 4096, 4096)]:
            blocks, (tiles,), _ = configs.linear("product", math, rows, outputs, inputs, on, aligned)
            assert tiles * blocks["BLOCK_R"] * blocks["BLOCK_C"] >= rows * outputs
            assert all(size >= 16 and size & (size - 1) == 0 for n, size in blocks.items() if n != "GROUP")
            blocks, (tiles, splits), each, _ = configs.linear_weight(math, rows, inputs, outputs, on, aligned, None)
            assert (splits - 1) * each < rows <= splits * each
            assert tiles * blocks["BLOCK_O"] * blocks["BLOCK_I"] >= inputs * outputs


@pytest.mark.parametrize("architecture", ["sm_80", "sm_90", "sm_100"])
def test_every_shipped_config_names_every_argument(architecture: str) -> None:
    entries = list(linear.shipped(architecture))
    for names in ({"weight"}, {"a", "g_c"}):
        own = [entry.signature for entry in entries if names <= entry.signature.keys()]
        assert {types[min(names)] for types in own} == {"*fp32", "*bf16"}
    for entry in entries:
        assert entry.signature.keys() | entry.constants.keys() == set(entry.kernel.arg_names)
        assert entry.options.keys() == {"num_warps", "num_stages"}
