"""Ways of using a chain that once gave something wrong: negated views, hooks that lay tensors out anew, tracing."""

from __future__ import annotations

import pytest
import torch
from chains import describe_chain, make
from torch import nn
from torch.fx.experimental.proxy_tensor import make_fx

import racecar_kernels as rk
from racecar_kernels import single_channel
from racecar_kernels.layer import Activation, Layer, Tied

CONV = Tied((1, 1), ((1, 1), (1, 1)), (1, 1))


@pytest.mark.parametrize("name", ["pooled", "mlp", "batch norm"])
@pytest.mark.parametrize("variant", ["full", "local"])
def test_a_negated_view_is_read_as_it_is_meant(name, variant):
    """PyTorch negates such a view when an operator is called; kernels that are called past that must not miss it."""
    sample = make(name)

    def gradients(x, sign):
        out, losses = rk.tied_chain(x, *sample.arguments[1:], last=sample.last, variant=variant)
        g = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out)
        g = torch._neg_view(-g) if sign else g
        return torch.autograd.grad([out, losses], sample.tensors[1:], [g, torch.ones_like(losses)])

    x = sample.x.detach()
    want = gradients(x, False)
    for ours in (gradients(x, True), gradients(torch._neg_view(-x), False)):
        for g, w in zip(ours, want, strict=True):
            torch.testing.assert_close(g, w)


@pytest.mark.parametrize("name", ["mlp", "pooled", "batch norm"])
@pytest.mark.parametrize("variant", ["full", "local"])
def test_hooks_may_lay_saved_tensors_out_anew(name, variant):
    def gradients():
        sample = make(name)
        out, losses = rk.tied_chain(*sample.arguments, last=sample.last, variant=variant)
        return torch.autograd.grad(out.square().sum() + losses.sum(), sample.tensors)

    want = gradients()
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: t.t().contiguous() if t.dim() == 2 else t, lambda t: t.t() if t.dim() == 2 else t
    ):
        ours = gradients()
    with torch.autograd.graph.save_on_cpu():
        moved = gradients()
    for g, again, w in zip(ours, moved, want, strict=True):
        torch.testing.assert_close(g, w)
        torch.testing.assert_close(again, w)


@pytest.mark.parametrize("name", ["conv", "mlp"])
@pytest.mark.parametrize("mode", ["real", "fake", "symbolic"])
def test_tracing(name, mode):
    sample = make(name)
    x, layers, weights, biases, params = sample.arguments

    def run(x):
        return rk.tied_chain(x, layers, weights, biases, params, last=sample.last)[1]

    with torch.no_grad():
        traced = make_fx(run, tracing_mode=mode, _allow_non_fake_inputs=True)(x.detach())
        torch.testing.assert_close(traced(x.detach()), run(x.detach()))


def test_parts_of_the_batch_cost_bfloat16_no_digits():
    torch.manual_seed(0)
    x, w = torch.randn(256, 3, 32, 32).bfloat16(), torch.randn(32, 3, 3, 3).bfloat16()

    def gradient(x, w, plain):
        w = w.clone().requires_grad_()
        if plain:
            out = torch.relu(torch.nn.functional.conv2d(x, w, padding=1))
        else:
            out, _ = rk.tied_chain(x, [Layer(CONV)], [w], [None], last=[Activation("relu")])
        return torch.autograd.grad(out, w, torch.ones_like(out))[0].double()

    want = gradient(x.double(), w.double(), True)
    plain, ours = ((gradient(x, w, kind) - want).norm() for kind in (True, False))
    assert ours <= 2 * plain


@pytest.mark.parametrize("backend", ["cpp", "reference"])
def test_a_bound_that_bfloat16_rounds_still_stops_the_gradient(backend):
    if rk.why_not(backend, rk.Query(Layer(Tied()), "cpu", torch.bfloat16)):
        pytest.skip("not served here")
    torch.manual_seed(0)
    x, w = torch.randn(64, 8).bfloat16(), torch.randn(5, 8).bfloat16()

    def gradient():
        leaf = w.clone().requires_grad_()
        last = [Activation("hardtanh", (-0.7, 0.7))]
        out, _ = rk.tied_chain(x, [Layer(Tied())], [leaf], [None], last=last, backend=backend)
        return torch.autograd.grad(out.sum(), leaf)[0].double()

    stopped = (x @ w.t()).double().abs() >= torch.tensor(0.7, dtype=torch.bfloat16).double()
    want = (~stopped).double().t() @ x.double()
    plain = ((~stopped).bfloat16().t() @ x).double()
    assert (gradient() - want).norm() <= 2 * (plain - want).norm()


def test_scale_of_a_norm_in_another_shape():
    sample = make("batch norm")
    x, layers, weights, biases, params = sample.arguments
    want = rk.tied_chain(x, layers, weights, biases, params, last=sample.last)
    column = [None if p is None else p.view(-1, 1) for p in params]
    for ours, theirs in zip(rk.tied_chain(x, layers, weights, biases, column, last=sample.last), want, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_one_channel_is_no_view_of_something_larger():
    s, w = torch.randn(1, 16, 70, 70).contiguous(memory_format=torch.channels_last), torch.randn(16, 1, 3, 1)
    tied = Tied((1, 1), ((0, 2), (0, 0)), (1, 1))
    u = single_channel.transposed(s, w, tied, (1, 1, 70, 70))
    assert u.untyped_storage().nbytes() == u.numel() * 4


@pytest.mark.parametrize("expanded", [False, True], ids=["dense", "expanded"])
@pytest.mark.parametrize("training", [False, True], ids=["eval", "batch"])
@pytest.mark.parametrize("backend", [None, "reference"])
@pytest.mark.parametrize("variant", ["full", "local"])
def test_the_gradient_that_arrives_at_a_norm_is_not_written_to(variant, backend, training, expanded):
    """Nothing acts on it before the norm's own backward, which works in place."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(2, 3, 1), nn.BatchNorm2d(3).train(training)).double()
    x, g = torch.randn(2, 2, 3, 2, dtype=torch.float64), torch.randn(2, 3, 3, 2, dtype=torch.float64)
    g = g[:1, :1, :1, :1].expand_as(g) if expanded else g
    sample, before = describe_chain(net, x), g.clone()
    parameters = list(net.parameters())
    want = torch.autograd.grad(net(x), parameters, g)
    out, _ = rk.tied_chain(*sample.arguments, last=sample.last, variant=variant, backend=backend)
    got = torch.autograd.grad(out, parameters, g)
    torch.testing.assert_close(got, want)
    assert torch.equal(g, before)
