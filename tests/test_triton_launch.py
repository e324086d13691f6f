"""A dry run of every Triton launcher at the sizes of a GPU: tensors without memory, kernels that only note their call.

What is launched is compared with what is compiled ahead of time: no argument missing or unknown, none of another type,
grids that CUDA takes, and no tile that was not compiled.
"""

from __future__ import annotations

import itertools
from functools import lru_cache
from typing import Any, NamedTuple

import pytest
import torch
from pointwise_cases import Sample, functions
from torch import Tensor

from racecar_kernels.fused import Affine
from racecar_kernels.layer import Tied
from racecar_kernels.lazy import Lazy

pytest.importorskip("triton", reason="Triton is not installed")
from launches import Launch, Table, is_whole, replace_kernels

from racecar_kernels.gpu import configs, device, linear, pointwise, shipped, transposed
from racecar_kernels.gpu.device import Device

SMS = {"sm_80": 108, "sm_90": 132, "sm_100": 148}
DTYPES = [torch.float32, torch.bfloat16]


@lru_cache
def table(architecture: str) -> Table:
    return Table(shipped.everything(int(architecture.removeprefix("sm_"))))


@pytest.fixture(params=SMS)
def launched(request, monkeypatch) -> list[Launch]:
    """Every launch of the test, each checked against what is compiled for this architecture."""
    noted: list[Launch] = []
    compiled = table(request.param)

    def take(launch: Launch, kernel: Any) -> None:
        compiled.check(launch)
        noted.append(launch)

    monkeypatch.setattr(device, "why_not", lambda kind: None)
    monkeypatch.setattr(device, "of", lambda t: Device(request.param, SMS[request.param]))
    replace_kernels(monkeypatch, take)
    return noted


def empty(*shape: int, dtype: torch.dtype = torch.float32, last: bool = True) -> Tensor:
    t = torch.empty(shape, dtype=dtype, device="meta")
    return t.contiguous(memory_format=torch.channels_last) if last and len(shape) == 4 else t


# ------------------------------------------------------------------------------------------- pointwise

IMAGES: list[tuple[tuple[int, ...], tuple[int, int] | None]] = [
    ((1024, 1, 28, 28), None), ((1024, 64, 28, 28), (2, 2)), ((1024, 64, 7, 7), (2, 2)), ((512, 3, 32, 32), None),
    ((512, 128, 32, 32), (2, 2)), ((512, 512, 4, 4), None), ((64, 3, 224, 224), None), ((64, 64, 224, 224), (2, 2)),
    ((64, 512, 14, 14), (2, 2)), ((64, 512, 15, 13), (3, 2)), ((64, 1, 225, 223), (2, 2)), ((64, 48, 31, 31), (8, 8)),
    ((64, 64, 1024, 1024), None), ((64, 64, 1025, 1024), (2, 2)), ((7, 3, 16384, 16384), None),
    ((1, 96, 8192, 8192), None), ((1024, 784), None), ((65536, 10), None), ((2**20, 4096), None),
    ((512, 197, 768), None), ((2, 70_000, 3, 3), None), ((2, 70_000, 30), None), ((4, 32, 64, 128, 128), None),
]  # fmt: skip


def sample(shape, window, dtype: torch.dtype, last: bool) -> Sample:
    small = (*shape[:2], *(n // k for n, k in zip(shape[2:], window, strict=True))) if window else shape

    def lazy(size) -> Lazy:
        return Lazy(empty(*size, dtype=dtype, last=last), *(empty(shape[1]) for _ in range(2)), "elu", (0.8,), k[0])

    k = [empty(shape[1]) for _ in range(4)]
    full, pooled = (empty(*size, dtype=dtype, last=last) for size in (shape, small))
    return Sample(lazy(shape), lazy(small), window, full, pooled, empty(), k)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("shape", "window"), IMAGES, ids=str)
def test_pointwise(launched, shape, window, dtype: torch.dtype) -> None:
    for last in (True, False) if len(shape) == 4 else (False,):
        s = sample(shape, window, dtype, last)
        if pointwise.why_not(s.d, s.a, window=window) is not None:
            assert not last and shape[1] > 65535
            continue
        for function in functions(pointwise.KERNELS).values():
            function(s)
        names = {launch.name for launch in launched}
        assert names >= {"sums_kernel", "materialise_kernel", "compare_kernel", "grad_reverse_kernel", "combine_kernel"}
        assert names >= {"grad_forward_kernel", "finish_sums_kernel", "finish_norm_kernel"}
        launched.clear()


# ------------------------------------------------------------------------------------------- transposed convolution


class Conv(NamedTuple):
    """A convolution of (N, C_in, H, W) to C_out channels. whole: its tiles are launched exactly as compiled."""

    shape: tuple[int, int, int, int]
    out: int
    kernel: tuple[int, int] = (3, 3)
    stride: tuple[int, int] = (1, 1)
    padding: int = 1
    groups: int = 1
    factor: tuple[int, int] | None = None
    window: tuple[int, int] | None = None
    whole: bool = False
    last: bool = True  # of the weight

    @property
    def tied(self) -> Tied:
        return Tied(self.stride, ((self.padding,) * 2,) * 2, (1, 1), self.groups)

    @property
    def given(self) -> tuple[int, ...]:
        """The shape of y."""
        size = self.tied.output_size(self.shape[2:], self.kernel)
        return (self.shape[0], self.out, *(n // f for n, f in zip(size, self.factor or (1, 1), strict=True)))


CONVS = [
    Conv((1024, 1, 28, 28), 64), Conv((1024, 1, 28, 28), 64, factor=(2, 2)), Conv((1024, 64, 14, 14), 64, whole=True),
    Conv((1024, 64, 14, 14), 64, last=False), Conv((64, 3, 224, 224), 64, last=False),
    Conv((1024, 64, 28, 28), 64, factor=(2, 2)), Conv((512, 3, 32, 32), 64), Conv((512, 128, 16, 16), 256, whole=True),
    Conv((512, 512, 4, 4), 512, window=(2, 2), whole=True), Conv((64, 3, 224, 224), 64),
    Conv((64, 64, 224, 224), 64, window=(2, 2), whole=True), Conv((64, 512, 14, 14), 512, factor=(2, 2)),
    Conv((64, 256, 28, 28), 512, (1, 1), padding=0, whole=True), Conv((64, 100, 28, 28), 36), Conv((64, 5, 9, 9), 7),
    Conv((64, 64, 57, 57), 128, stride=(2, 2)), Conv((64, 8, 56, 56), 16, (4, 4), (2, 2)),
    Conv((64, 3, 224, 224), 64, (7, 7), (4, 4), 3), Conv((64, 512, 14, 14), 512, groups=512),
    Conv((64, 96, 28, 28), 192, groups=3), Conv((64, 64, 15, 13), 64, window=(2, 2)),
    Conv((64, 64, 1024, 1024), 64, whole=True), Conv((32, 3, 4096, 4096), 32), Conv((1, 30, 8192, 8192), 1),
    Conv((64, 4096, 8, 8), 4096, (1, 1), padding=0, groups=4096), Conv((1, 2**20, 1, 1), 16, (1, 1), padding=0),
]  # fmt: skip


@pytest.mark.parametrize("precision", ["bfloat16", "tf32", "ieee"])
@pytest.mark.parametrize("conv", CONVS, ids=str)
def test_transposed(launched, monkeypatch, conv: Conv, precision: str) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", precision == "tf32")
    dtype = torch.bfloat16 if precision == "bfloat16" else torch.float32
    n, c_in, h, w = conv.shape
    kh, kw = conv.window or (1, 1)
    y, d = Lazy(empty(*conv.given, dtype=dtype)), Lazy(empty(n, c_in, h * kh + kh - 1, w * kw, dtype=dtype), act="tanh")
    weight = empty(conv.out, c_in // conv.groups, *conv.kernel, dtype=dtype, last=conv.last)
    bias = empty(conv.out)
    scale, shift, minus = (empty(c_in) for _ in range(3))
    for keep, source in (("a", True), ("u", False), ("nothing", True)):
        transposed.forward(
            y, weight, conv.tied, conv.shape, bias=bias, factor=conv.factor, act="elu", args=(0.8,), scale=scale,
            shift=shift, keep=keep, d=d, window=conv.window, source=source, minus=minus if source else None,
        )  # fmt: skip
    for norm in (Affine(empty(c_in), empty(c_in), 1e-5), Affine(None, None, 1e-5)):
        transposed.forward(y, weight, conv.tied, conv.shape, bias=bias, factor=conv.factor, keep="u", norm=norm)
    g = empty(*conv.shape, dtype=dtype)
    incoming = transposed.Incoming(g, Lazy(g, act="relu", done=True), Lazy(g), empty())
    transposed.source_gradient(incoming, weight, conv.tied, conv.given, factor=conv.factor, bias=True)
    read = (Lazy(g), empty(n, conv.out, *conv.tied.output_size((h, w), conv.kernel), dtype=dtype))
    transposed.weight_gradient(weight, conv.tied, factor=conv.factor, reverse=(incoming, y, bias))
    if conv.factor is None:  # a forward's pair alone is in no launch that the package makes
        transposed.weight_gradient(weight, conv.tied, read=read, reverse=(incoming, y, bias))
    names = {launch.name for launch in launched}
    assert names >= {"transposed_kernel", "source_gradient_kernel", "weight_gradient_kernel", "sum_partials_kernel"}
    parts = [launch.given["norm_parts"].shape[0] for launch in launched if launch.given.get("norm_parts") is not None]
    ends = [launch.given["programs"] for launch in launched if launch.name == "finish_norm_kernel"]
    assert len(parts) == len(ends) == 2 and all(0 < end <= configs.MOST_PARTS for end in ends)
    assert ("combine_parts_kernel" in names) == (parts[0] > configs.MOST_PARTS)
    if conv.whole:
        check_whole(launched)


def check_whole(launched: list[Launch]) -> None:
    """Every tile of a product is launched exactly as it was compiled."""
    architecture = device.of(empty(1)).architecture
    for launch in launched:
        if "PRECISION" in launch.given:
            assert is_whole(launch, table(architecture).entries[launch.name]), (launch.name, launch.blocks)


def test_what_32_bits_cannot_number_is_refused(launched) -> None:
    wide = Conv((2**27, 1, 1, 1), 1, (1, 1), padding=2)  # 25 pixels of y for each of u
    reason = transposed.why_not(empty(*wide.given), empty(1, 1, 1, 1), wide.tied, wide.shape)
    assert "the number of pixels" in str(reason)
    assert "values a channel" in str(pointwise.why_not(empty(2**31, 1)))
    assert "up to 65535 channels" in str(pointwise.why_not(empty(1, 65536, 2)))
    assert pointwise.why_not(empty(1, 65535, 2)) is None and pointwise.why_not(empty(1, 65536)) is None


# ------------------------------------------------------------------------------------------- tied linear

# Rows, input and output features; whole as above.
LINEARS = [
    ((1024, 784, 128), True), ((1024, 784, 64), True), ((65536, 4096, 4096), True), ((1024, 784, 10), False),
    ((512, 12, 10), False), ((4096, 1000, 1001), False), ((512, 4096, 1), False), ((1, 4096, 4096), False),
    ((2**21, 2048, 128), True), ((2**21, 2048, 256), True), ((2**30, 3, 2), False), ((64, 25088, 4096), False),
]  # fmt: skip


@pytest.mark.parametrize("precision", ["bfloat16", "tf32", "ieee"])
@pytest.mark.parametrize(("shape", "whole"), LINEARS, ids=str)
def test_linear(launched, shape: tuple[int, int, int], whole: bool, precision: str) -> None:
    rows, inputs, outputs = shape
    dtype, tf32 = torch.bfloat16 if precision == "bfloat16" else torch.float32, precision == "tf32"
    p, weight, bias = empty(rows, inputs, dtype=dtype), empty(outputs, inputs, dtype=dtype), empty(outputs)
    g_in, g_out = empty(rows, inputs, dtype=dtype), empty(rows, outputs, dtype=dtype)
    act, reverse_act = ("elu", (0.8,)), ("relu", ())
    for fused in {False, linear.fits(weight)}:
        y, a, _ = linear.tied(p, weight, bias, act, reverse_act, tf32=tf32, fused=fused)
    r = linear.Reversed(y, a, p, weight, bias, reverse_act, g_in, empty())
    g_c, _ = linear.grad_source(r, own=act, g_out=g_out, tf32=tf32)
    linear.grad_source(r._replace(g_in=None), needs_y=False, tf32=tf32)
    for both, splits in itertools.product((True, False), (None, 1)):
        linear.grad_weight(r, g_c, reverse=both, splits=splits, tf32=tf32)
    linear.grad_input(g_c, r, tf32=tf32)
    names = {launch.name for launch in launched}
    assert names >= {"linear_fwd_kernel", "reverse_fwd_kernel", "grad_source_kernel", "grad_weight_kernel"}
    assert names >= {"grad_input_kernel", "sum_partials_kernel"} and ("tied_fwd_kernel" in names) == linear.fits(weight)
    if whole:
        check_whole(launched)
