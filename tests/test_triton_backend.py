"""Reverse layers and chains on the Triton backend: interpreted here on small tensors, compiled where there is a GPU."""

from __future__ import annotations

import copy
import statistics
from typing import Any

import oracle
import pytest
import torch
from cases import CASES, Sample, make
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


def at_most_twice(errors: list[tuple[float, float]]) -> None:
    """Our error and plain PyTorch's own, both against float64, in the median of seven seeds."""
    assert len(errors) == 7
    ours, plain = map(statistics.median, zip(*errors, strict=True))
    assert ours <= 2 * plain, f"an error of {ours:.2e}, plain PyTorch's is {plain:.2e}"


def copied(s: Sample, **to: Any) -> Sample:
    """The same numbers in another type or on another device."""
    s = copy.deepcopy(s)
    for module in (s.op, *s.latent):
        module.to(**to)
    s.target, s.y = (t.detach().to(**to).requires_grad_() for t in (s.target, s.y))
    return s


def check_layer(name: str, backend: str, **to: Any) -> None:
    """A reverse layer is at most twice as far off as plain PyTorch."""
    case = next(c for c in CASES if c.name == name)
    errors = []
    for seed in range(7):
        s = make(case, torch.float32, seed)
        exact, own = copied(s, dtype=torch.float64), copied(s, device=DEVICE, **to)
        want = torch.autograd.grad(oracle.reverse_layer(exact)[1], exact.tensors)
        plain = torch.autograd.grad(oracle.reverse_layer(s)[1], s.tensors)
        _, loss = rk.reverse_layer(own.y, own.target, own.op.weight, own.op.bias, **own.settings, backend=backend)
        ours = [g.cpu() for g in torch.autograd.grad(loss, own.tensors)]
        errors.append((oracle.error(ours, want), oracle.error(plain, want)))
    at_most_twice(errors)


@pytest.mark.parametrize("name", NAMES)
def test_a_reverse_layer_against_float64(name: str) -> None:
    check_layer(name, "triton")


def network(seed: int = 0, channels: tuple[int, int, int] = (2, 4, 3)) -> nn.Sequential:
    """channels: of the image, and of what its two convolutions give."""
    torch.manual_seed(seed)
    image, first, second = channels
    return nn.Sequential(
        nn.Conv2d(image, first, 3, padding=1), nn.BatchNorm2d(first), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(first, second, 3, padding=1), nn.Tanh(), nn.Flatten(), nn.Linear(4 * second, 2),
    ).to(memory_format=torch.channels_last)  # fmt: skip


def gradients(
    backend: str, dtype: torch.dtype, seed: int, channels: tuple[int, int, int] = (2, 4, 3), **policy: str
) -> list[torch.Tensor]:
    """Of the wrapped network's input and parameters."""
    net = racecar.wrap(network(seed, channels).to(DEVICE, dtype), 0.1, backend=backend, **policy)
    assert backend in str(net.plan)
    x = torch.randn(2, channels[0], 4, 5).to(DEVICE, dtype, memory_format=torch.channels_last).requires_grad_()
    (net(x).square().sum() + net.reverse_loss).backward()
    return [t.grad.cpu() for t in (x, *net.parameters())]


def check_network(backend: str, channels: tuple[int, int, int] = (2, 4, 3), **policy: str) -> None:
    """A wrapped network is at most twice as far off as plain PyTorch."""
    errors = []
    for seed in range(7):
        ours, plain, want = (
            gradients(name, dtype, seed, channels, **policy)
            for name, dtype in (
                (backend, torch.float32), ("reference", torch.float32), ("reference", torch.float64),
            )
        )  # fmt: skip
        errors.append((oracle.error(ours, want), oracle.error(plain, want)))
    at_most_twice(errors)


@pytest.mark.parametrize(("variant", "memory"), POLICIES)
def test_a_wrapped_network_against_float64(variant: str, memory: str) -> None:
    check_network("triton", variant=variant, memory=memory)


def test_it_is_not_chosen_for_float64_or_without_a_gpu(monkeypatch) -> None:
    from racecar_kernels.gpu import device

    assert "float64" in rk.why_not("triton", rk.Query(rk.Layer(rk.Tied()), "cpu", torch.float64))
    monkeypatch.setattr(device, "INTERPRETED", False)
    assert "run on a GPU" in rk.why_not("triton", rk.Query(rk.Layer(rk.Tied()), "cpu", torch.float32))
    with pytest.raises(ValueError, match="backend 'triton' cannot serve this layer: the Triton kernels run on a GPU"):
        racecar.wrap(network(), 0.1, backend="triton")(torch.randn(1, 2, 4, 4))
