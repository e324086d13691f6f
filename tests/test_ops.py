"""The operator against its definition: values, gradients, adjointness, layouts, dtypes, compilation."""

from __future__ import annotations

import statistics

import oracle
import pytest
import torch
from cases import BACKENDS, CASES, Case, Sample, make
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import racecar_kernels as rk
from racecar_kernels import describe, single_channel, transposed, weight_gradient
from racecar_kernels.layer import Segment, Tied, parse

BY_NAME = {case.name: case for case in CASES}
each_case = pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
each_backend = pytest.mark.parametrize("backend", BACKENDS)
REDUCTIONS = ("l2", "sum", "mean")


def ours(sample: Sample, **kwargs) -> tuple[Tensor, Tensor]:
    op = sample.op
    return rk.reverse_layer(sample.y, sample.target, op.weight, op.bias, **sample.settings, **kwargs)


def gradients(a: Tensor, loss: Tensor, tensors: list[Tensor]) -> list[Tensor]:
    """Of a sum that reaches both results, so that both paths back are there."""
    return torch.autograd.grad(0.7 * loss + (a * seeded(a)).sum(), tensors)


def seeded(a: Tensor) -> Tensor:
    """Random, the same for every memory layout and device of a."""
    return torch.randn(a.shape, dtype=a.dtype, generator=torch.Generator().manual_seed(3)).to(a.device)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("memory", ["store", "recompute"])
@each_backend
@pytest.mark.parametrize("layout", [None, torch.channels_last], ids=["contiguous", "channels_last"])
@each_case
def test_equals_its_definition(case: Case, layout, backend: str, memory: str) -> None:
    sample = make(case, layout=layout if len(case.shape) == 4 else None)
    reduction = REDUCTIONS[len(case.name) % 3]
    want_a, want_loss = oracle.reverse_layer(sample, reduction)
    a, loss = ours(sample, reduction=reduction, memory=memory, backend=backend)
    torch.testing.assert_close(a, want_a)
    torch.testing.assert_close(loss, want_loss)
    wanted = gradients(want_a, want_loss, sample.tensors)
    for got, want in zip(gradients(a, loss, sample.tensors), wanted, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-8, atol=1e-10)


@each_backend
@each_case
def test_the_loss_alone_has_the_right_gradient(case: Case, backend: str) -> None:
    sample = make(case, seed=1)
    wanted = torch.autograd.grad(oracle.reverse_layer(sample)[1], sample.tensors)
    for got, want in zip(torch.autograd.grad(ours(sample, backend=backend)[1], sample.tensors), wanted, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("name", ["linear", "batch norm, relu", "pooled, cut", "up-sampled", "source pooled", "prelu"])
def test_gradcheck(name: str) -> None:
    sample = make(BY_NAME[name])

    def run(*_: Tensor) -> tuple[Tensor, Tensor]:  # gradcheck changes the parameters where they are
        return ours(sample)

    assert torch.autograd.gradcheck(run, tuple(sample.tensors))


def test_opcheck_of_several_layers() -> None:
    """Layouts change from layer to layer: one channel, a 1x1 kernel, a padding mode, a folded pooling."""
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 8, 1), nn.ReLU(), nn.Conv2d(8, 2, 3, padding=1, padding_mode="circular"), nn.GELU(),
        nn.MaxPool2d(2), nn.Conv2d(2, 8, 3, padding=1), nn.BatchNorm2d(8),
        nn.MaxPool2d(2), nn.Conv2d(8, 1, 3, padding=1),
    )  # fmt: skip
    for layout in (torch.contiguous_format, torch.channels_last):
        net = net.to(memory_format=layout)
        d1 = torch.randn(6, 3, 16, 16).contiguous(memory_format=layout)
        d2 = net[1](net[0](d1))
        d3 = net[3](net[2](d2))
        d4 = net[6](net[5](net[4](d3)))
        y = net[8](net[7](d4)).detach().requires_grad_()
        targets = [d.detach().requires_grad_() for d in (d4, d3, d2, d1)]
        latents = [[net[6]], [net[3]], [net[1]], []]
        ops, pres = [net[8], net[5], net[2], net[0]], [[net[7]], [net[4]], [], []]
        steps = [[describe.latent_of(m) for m in modules] for modules in latents]
        layers = [
            rk.Layer(describe.tied_of(op), describe.steps_of(pre, 2), tuple(own))
            for op, pre, own in zip(ops, pres, steps, strict=True)
        ]
        params = [
            t
            for modules, own in zip(latents, steps, strict=True)
            for m, s in zip(modules, own, strict=True)
            for t in describe.latent_tensors(m, s)
        ]
        tensors = (y, targets, [op.weight for op in ops], [op.bias for op in ops], params)
        for keep in (True, False):
            torch.library.opcheck(
                torch.ops.racecar.reverse_layers.default, (*tensors, str(Segment(tuple(layers))), keep)
            )


OPCHECKED = ["linear", "conv", "same, even kernel", "3d", "batch norm, relu", "group norm", "prelu", "pooled, cut",
             "up-sampled", "source pooled", "source pooled, many pixels, few channels"]  # fmt: skip


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "permuted"])
@pytest.mark.parametrize("name", OPCHECKED)
def test_opcheck(name: str, layout: str) -> None:
    case = BY_NAME[name]
    images = len(case.shape) == 4
    sample = make(case, torch.float32, layout=torch.channels_last if images and layout == "channels_last" else None)
    y, target = sample.y, sample.target
    if layout == "permuted":  # strides that are neither
        y = y.detach().transpose(0, -1).contiguous().transpose(0, -1).requires_grad_()
        target = target.detach().transpose(0, 1).contiguous().transpose(0, 1).requires_grad_()
    segment, params = describe_sample(sample)
    tensors = (y, [target], [sample.op.weight], [sample.op.bias], params)
    # opcheck adds all results up, and that sum's gradient cancels in a norm: what is left there is rounding
    tolerance = dict(rtol=1.3e-6, atol=1e-4 if "norm" in name else 1e-5)
    for keep in (True, False):
        torch.library.opcheck(torch.ops.racecar.reverse_layers.default, (*tensors, str(segment), keep), **tolerance)


def describe_sample(sample: Sample) -> tuple[Segment, list[Tensor | None]]:
    """What `reverse_layer` makes of a sample before it calls the operator."""
    dims = sample.op.weight.dim() - 2
    steps = [describe.latent_of(m) for m in sample.latent]
    layer = rk.Layer(
        describe.tied_of(sample.op), describe.steps_of(sample.pre, dims), tuple(s for s in steps if s is not None)
    )
    params = [t for m, s in zip(sample.latent, steps, strict=True) for t in describe.latent_tensors(m, s)]
    return Segment((layer,), describe.steps_of(sample.undo, dims)), params


@each_case
def test_a_description_survives_being_a_string(case: Case) -> None:
    segment, _ = describe_sample(make(case))
    assert parse(str(segment)) == segment


def test_what_is_no_description_is_refused() -> None:
    with pytest.raises(ValueError, match="not a description of reverse layers"):
        parse('["Tied"]')


@pytest.mark.parametrize("name", ["conv", "pooled", "source pooled", "batch norm, relu", "strided, odd", "group norm"])
def test_channels_last_comes_back_channels_last(name: str) -> None:
    sample = make(BY_NAME[name], torch.float32, layout=torch.channels_last)
    a, loss = ours(sample)
    assert a.is_contiguous(memory_format=torch.channels_last) and not a.is_contiguous()
    for g, t in zip(torch.autograd.grad(loss, sample.tensors), sample.tensors, strict=True):
        assert g.stride() == t.stride()


@given(
    kernel=st.integers(1, 4), stride=st.integers(1, 3), padding=st.integers(0, 3), dilation=st.integers(1, 2),
    size=st.tuples(st.integers(4, 9), st.integers(4, 9)),
    mode=st.sampled_from(["zeros", "circular", "reflect", "replicate"]),
)  # fmt: skip
@settings(max_examples=60, deadline=None)
def test_the_transposed_convolution_is_the_exact_adjoint(kernel, stride, padding, dilation, size, mode) -> None:
    """⟨A x, y⟩ = ⟨x, Aᵀ y⟩ for whatever settings torch.nn accepts."""
    padding = min(padding, min(size) - 1) if mode != "zeros" else padding
    if dilation * (kernel - 1) + 1 > min(size) + 2 * padding:
        return
    op = nn.Conv2d(2, 3, kernel, stride, padding, dilation, bias=False, padding_mode=mode).double()
    x = torch.randn(2, 2, *size, dtype=torch.float64)
    ax = op(x)
    y = torch.randn_like(ax)
    back = transposed.forward(y, op.weight, describe.tied_of(op), tuple(x.shape))
    torch.testing.assert_close((ax * y).sum(), (x * back).sum())


@given(
    wide=st.integers(16, 20), kernel=st.tuples(st.integers(1, 4), st.integers(1, 4)), padding=st.integers(0, 3),
    dilation=st.integers(1, 2), size=st.tuples(st.integers(4, 9), st.integers(4, 9)), into=st.booleans(),
)  # fmt: skip
@settings(max_examples=60, deadline=None)
def test_one_channel_on_one_side(wide, kernel, padding, dilation, size, into) -> None:
    """The forms of `single_channel.py` against PyTorch's."""
    tied = Tied((1, 1), ((padding, padding),) * 2, (dilation, dilation))
    if any(dilation * (k - 1) + 1 > n + 2 * padding for k, n in zip(kernel, size, strict=True)):
        return
    weight = torch.randn(*((wide, 1) if into else (1, wide)), *kernel, dtype=torch.float64)
    op = nn.Conv2d(*weight.shape[1::-1], kernel, 1, padding, dilation, bias=False).double()
    op.weight.data.copy_(weight)
    x = torch.randn(2, weight.shape[1], *size, dtype=torch.float64).contiguous(memory_format=torch.channels_last)
    x.requires_grad_()
    y = op(x)
    g = torch.randn_like(y).contiguous(memory_format=torch.channels_last)
    want_x, want_w = torch.autograd.grad(y, (x, op.weight), g)
    assert single_channel.weight_gradient_serves(x, g, weight, tied) != into  # into many channels: of larger tensors
    torch.testing.assert_close(single_channel.weight_gradient(x.detach(), g, weight, tied), want_w)
    if into:
        torch.testing.assert_close(single_channel.transposed(g, weight, tied, tuple(x.shape)), want_x)
        assert not single_channel.transposed_serves(g, weight, tied)  # too few pixels
        strided = Tied((2, 3), tied.padding, tied.dilation)
        shape = (2, 1, *(n + 2 for n in size))
        if min(strided.output_size(shape[2:], kernel)) >= 1:
            s = torch.randn(2, wide, *strided.output_size(shape[2:], kernel), dtype=torch.float64)
            s = s.contiguous(memory_format=torch.channels_last)
            want = transposed.plain(s, weight, strided, shape)
            torch.testing.assert_close(single_channel.transposed(s, weight, strided, shape), want)


@given(
    factor=st.tuples(st.integers(1, 3), st.integers(1, 3)), kernel=st.integers(1, 5), padding=st.integers(0, 2),
    size=st.tuples(st.integers(1, 4), st.integers(1, 4)),
)  # fmt: skip
@settings(max_examples=60, deadline=None)
def test_the_folded_forms_are_the_plain_one(factor, kernel, padding, size) -> None:
    """Strided and polyphase, forward and backward, to float64's last digits (DESIGN 5.2)."""
    tied = Tied((1, 1), ((padding, padding),) * 2, (1, 1))
    big = [n * f for n, f in zip(size, factor, strict=True)]
    shape = (2, 3, *[n + kernel - 1 - 2 * padding for n in big])
    if min(shape) < 1:
        return
    weight = torch.randn(4, 3, kernel, kernel, dtype=torch.float64)
    small = torch.randn(2, 4, *size, dtype=torch.float64)
    repeated = small.repeat_interleave(factor[0], 2).repeat_interleave(factor[1], 3)
    want = transposed.plain(repeated, weight, tied, shape)
    wide = Tied(factor, tied.padding, tied.dilation)
    torch.testing.assert_close(transposed.plain(small, transposed.fold(weight, factor), wide, shape), want)
    torch.testing.assert_close(transposed.polyphase(small, weight, tied, shape, factor), want)
    g = torch.randn_like(want)
    grad_big, want_w = weight_gradient.backward(g, repeated, weight, tied)
    want_s = grad_big.unflatten(3, (size[1], factor[1])).sum(4).unflatten(2, (size[0], factor[0])).sum(3)
    grad_s, grad_w = weight_gradient.backward(g, small, weight, tied, factor)
    torch.testing.assert_close(grad_s, want_s)
    torch.testing.assert_close(grad_w, want_w)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "name",
    [
        "linear", "conv", "batch norm, relu", "pooled, cut", "up-sampled", "source pooled",
        "source pooled, many pixels", "source pooled, many pixels, few channels",
    ],
)  # fmt: skip
def test_as_exact_as_plain_pytorch(name: str, dtype: torch.dtype) -> None:
    """Norm-wise error against float64, median of nine seeds: at most twice plain PyTorch's in the same dtype."""

    our_errors, plain_errors = [], []
    for seed in range(9):
        exact, sample = make(BY_NAME[name], seed=seed), make(BY_NAME[name], dtype, seed=seed)
        for a, b in zip(exact.tensors, sample.tensors, strict=True):
            a.data.copy_(b.data)
        want = torch.autograd.grad(oracle.reverse_layer(exact)[1], exact.tensors)
        plain_errors.append(oracle.error(torch.autograd.grad(oracle.reverse_layer(sample)[1], sample.tensors), want))
        our_errors.append(oracle.error(torch.autograd.grad(ours(sample)[1], sample.tensors), want))
    assert statistics.median(our_errors) <= 2 * statistics.median(plain_errors)


def test_losses_are_wide() -> None:
    assert ours(make(BY_NAME["conv"], torch.bfloat16))[1].dtype == torch.float32
    assert ours(make(BY_NAME["conv"], torch.float64))[1].dtype == torch.float64


@pytest.mark.parametrize("name", ["conv", "batch norm, relu", "up-sampled", "source pooled", "linear"])
def test_compiles_into_one_graph(name: str) -> None:
    sample = make(BY_NAME[name], torch.float32)

    def run(y: Tensor, target: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return rk.reverse_layer(y, target, weight, bias, **sample.settings)[1]

    tensors = (sample.y, sample.target, sample.op.weight, sample.op.bias)
    want = torch.autograd.grad(run(*tensors), tensors)
    got = torch.autograd.grad(torch.compile(run, fullgraph=True, backend="aot_eager")(*tensors), tensors)
    for g, w in zip(got, want, strict=True):
        torch.testing.assert_close(g, w)


def test_large_residuals_are_summed_in_chunks() -> None:
    """More elements than one chunk holds, from every kind of undoing."""
    target = torch.randn(3, 8, 90, 70)
    for pre in ([], [nn.MaxPool2d(2)], [nn.MaxPool2d(4)]):
        op = nn.Conv2d(8, 4, 3, padding=1)
        y = torch.randn_like(op(nn.Sequential(*pre)(target)))
        sample = Sample(pre, op, [], [], target, y)
        torch.testing.assert_close(ours(sample)[1], oracle.reverse_layer(sample)[1])


def test_nothing_is_kept_without_gradients() -> None:
    sample = make(BY_NAME["batch norm, relu"])
    with torch.no_grad():
        a, loss = ours(sample)
    assert not a.requires_grad and not loss.requires_grad
    want = oracle.reverse_layer(sample)
    torch.testing.assert_close(loss, want[1])


def test_only_the_gradients_asked_for_are_computed() -> None:
    sample = make(BY_NAME["source pooled"])
    want = torch.autograd.grad(ours(sample)[1], [sample.op.weight])[0]
    sample.y.requires_grad_(False), sample.target.requires_grad_(False), sample.op.bias.requires_grad_(False)
    torch.testing.assert_close(torch.autograd.grad(ours(sample)[1], [sample.op.weight])[0], want)


def test_a_second_derivative_is_refused() -> None:
    sample = make(BY_NAME["linear"])
    grad = torch.autograd.grad(ours(sample)[1], sample.y, create_graph=True)[0]
    with pytest.raises(RuntimeError, match="first derivatives only"):
        grad.square().sum().backward()


def test_autocast_casts_as_for_a_convolution() -> None:
    sample = make(BY_NAME["conv"], torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        a, loss = ours(sample)
    assert a.dtype == torch.bfloat16 and loss.dtype == torch.float32
    grads = torch.autograd.grad(loss, sample.tensors)
    assert all(g.dtype == torch.float32 for g in grads)
