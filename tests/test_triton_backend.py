"""Reverse layers and chains on the Triton backend: interpreted here on small tensors, compiled where there is a GPU."""

from __future__ import annotations

import oracle
import pytest
import torch
from cases import CASES, make
from torch import nn

import racecar
import racecar_kernels as rk

pytest.importorskip("triton", reason="Triton is not installed")
pytestmark = pytest.mark.usefixtures("interpreted", "poisoned", "without_tf32")
NAMES = ["linear", "conv", "batch norm, relu", "pooled, cut", "source pooled", "strided, odd"]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
POLICIES = [("full", "store"), ("full", "recompute"), ("local", "store"), ("local", "deferred")]


@pytest.fixture
def without_tf32(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


@pytest.mark.parametrize("name", NAMES)
def test_a_reverse_layer_against_float64(name: str) -> None:
    case = next(c for c in CASES if c.name == name)
    exact, ours, plain = make(case), make(case, torch.float32), make(case, torch.float32)
    for module in (ours.op, *ours.latent):
        module.to(DEVICE)
    ours.y, ours.target = (t.detach().to(DEVICE).requires_grad_() for t in (ours.y, ours.target))
    want = torch.autograd.grad(oracle.reverse_layer(exact)[1], exact.tensors)
    _, loss = rk.reverse_layer(ours.y, ours.target, ours.op.weight, ours.op.bias, **ours.settings, backend="triton")
    got = [g.cpu() for g in torch.autograd.grad(loss, ours.tensors)]
    theirs = torch.autograd.grad(oracle.reverse_layer(plain)[1], plain.tensors)
    assert oracle.error(got, want) <= 2 * oracle.error(theirs, want) + 2**-22


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(4, 3, 3, padding=1), nn.Tanh(), nn.Flatten(), nn.Linear(12, 2),
    ).to(memory_format=torch.channels_last)  # fmt: skip


@pytest.mark.parametrize(("variant", "memory"), POLICIES)
def test_a_wrapped_network_equals_the_reference(variant: str, memory: str) -> None:
    x = torch.randn(2, 2, 4, 5).to(memory_format=torch.channels_last)
    found = {}
    for backend, dtype in (("triton", torch.float32), ("reference", torch.float64)):
        net = racecar.wrap(network().to(DEVICE, dtype), 0.1, variant=variant, memory=memory, backend=backend)
        assert backend in str(net.plan)
        own = x.to(DEVICE, dtype, copy=True).requires_grad_()
        (net(own).square().sum() + net.reverse_loss).backward()
        found[backend] = [p.grad.double() for p in (own, *net.parameters())]
    assert oracle.error(found["triton"], found["reference"]) < 2e-5


def test_it_is_not_chosen_for_float64_or_without_a_gpu(monkeypatch) -> None:
    from racecar_kernels.gpu import device

    assert "float64" in rk.why_not("triton", rk.Query(rk.Layer(rk.Tied()), "cpu", torch.float64))
    monkeypatch.setattr(device, "INTERPRETED", False)
    assert "run on a GPU" in rk.why_not("triton", rk.Query(rk.Layer(rk.Tied()), "cpu", torch.float32))
    with pytest.raises(ValueError, match="backend 'triton' cannot serve this layer: the Triton kernels run on a GPU"):
        racecar.wrap(network(), 0.1, backend="triton")(torch.randn(1, 2, 4, 4))
