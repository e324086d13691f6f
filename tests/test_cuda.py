"""The operator and `wrap` on CUDA against the CPU. Imports nothing but PyTorch and pytest: see `make gpu`."""

from __future__ import annotations

import copy
import statistics

import oracle
import pytest
import torch
from cases import CASES, Case, Sample, make
from torch import Tensor, nn

import racecar
import racecar_kernels as rk

pytestmark = pytest.mark.gpu
POLICIES = [("full", "store"), ("full", "recompute"), ("local", "store"), ("local", "recompute"), ("local", "deferred")]


def to_cuda(sample: Sample) -> Sample:
    for module in (sample.op, *sample.latent):
        module.cuda()
    sample.y, sample.target = (t.detach().cuda().requires_grad_() for t in (sample.y, sample.target))
    return sample


def results(sample: Sample, **kwargs) -> list[Tensor]:
    """a, the loss and every gradient, on the CPU in float64."""
    op = sample.op
    a, loss = rk.reverse_layer(sample.y, sample.target, op.weight, op.bias, **sample.settings, **kwargs)
    weight = torch.randn(a.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(3)).to(a)
    grads = torch.autograd.grad(0.7 * loss + (a * weight).sum().to(loss.dtype), sample.tensors)
    return [t.detach().cpu().double() for t in (a, loss, *grads)]


@pytest.mark.parametrize("memory", ["store", "recompute"])
@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_equals_the_cpu(case: Case, memory: str) -> None:
    want = results(make(case), memory=memory)
    for got, w in zip(results(to_cuda(make(case)), memory=memory), want, strict=True):
        torch.testing.assert_close(got, w, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ["conv", "batch norm, relu", "pooled, cut", "up-sampled", "source pooled"])
def test_every_dtype_and_layout(name: str, dtype: torch.dtype, layout: torch.memory_format) -> None:
    """Norm-wise error of the gradients against float64, median of nine seeds: at most twice plain PyTorch's on CUDA."""
    case = next(c for c in CASES if c.name == name)
    our_errors, plain_errors = [], []
    for seed in range(9):
        exact, sample = make(case, seed=seed), to_cuda(make(case, dtype, seed=seed, layout=layout))
        for a, b in zip(exact.tensors, sample.tensors, strict=True):
            a.data.copy_(b.data)
        want = torch.autograd.grad(oracle.reverse_layer(exact)[1], exact.tensors)
        op = sample.op
        _, loss = rk.reverse_layer(sample.y, sample.target, op.weight, op.bias, **sample.settings)
        for errors, value in ((our_errors, loss), (plain_errors, oracle.reverse_layer(sample)[1])):
            errors.append(oracle.error([g.cpu() for g in torch.autograd.grad(value, sample.tensors)], want))
    assert statistics.median(our_errors) <= 2 * statistics.median(plain_errors)


def network() -> tuple[nn.Sequential, Tensor]:
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(4, 5, 3, padding=1), nn.Tanh(), nn.Upsample(scale_factor=2),
        nn.Conv2d(5, 3, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(192, 4),
    )  # fmt: skip
    return net.double(), torch.randn(3, 2, 8, 8, dtype=torch.float64)


@pytest.mark.parametrize(("variant", "memory"), POLICIES)
def test_wrap_equals_the_cpu(variant: str, memory: str) -> None:
    found = []
    for device in ("cpu", "cuda"):
        net, x = network()
        net, x = racecar.wrap(net.to(device), 0.3, variant=variant, memory=memory), x.to(device)
        (net(x).square().mean() + net.reverse_loss).backward()
        found.append([*[p.grad.cpu() for p in net.parameters()], *[v.cpu() for v in net.reverse_losses.values()]])
    for got, want in zip(*found, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_trains(dtype: torch.dtype) -> None:
    net, x = network()
    net, x = racecar.wrap(net.float().cuda(), 1e-3), x.float().cuda()
    with torch.autocast("cuda", dtype):
        loss = net(x).float().square().mean() + net.reverse_loss
    loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in net.parameters())


def test_reconstruct_leaves_the_random_state_of_the_gpu() -> None:
    net, x = network()
    net.insert(3, nn.Dropout(0.5))
    net, x = racecar.wrap(net.float().cuda(), 0.0), x.float().cuda()
    before, state = torch.cuda.get_rng_state(), copy.deepcopy(net.state_dict())
    assert net.reconstruct(x).shape == x.shape
    assert torch.equal(before, torch.cuda.get_rng_state())
    assert all(torch.equal(a, b) for a, b in zip(state.values(), net.state_dict().values(), strict=True))
