"""Every row of the table of activations, and the norms, against autograd."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from racecar_kernels import contract, describe, latent
from racecar_kernels.activations import TABLE
from racecar_kernels.layer import Layer, Tied

SETTINGS = {
    "leaky_relu": [(0.3,), (-0.2,), (0.0,)],
    "elu": [(0.7,), (-0.5,)],
    "celu": [(0.7,), (-0.5,)],
    "gelu": [("none",), ("tanh",)],
    "hardtanh": [(-0.4, 0.9)],
    "softplus": [(2.0, 1.0)],
    "threshold": [(0.2, -3.0)],
    "prelu": [(1,), (3,)],
}
MODULES = [TABLE[name].module(*args) for name in TABLE for args in SETTINGS.get(name, [()])]
CHAINS = [
    [nn.BatchNorm2d(3), nn.ReLU()],
    [nn.GroupNorm(3, 3), nn.PReLU(3), nn.BatchNorm2d(3, affine=False)],
    [nn.LayerNorm((4, 5)), nn.Dropout(0.5), nn.Tanh()],
    [nn.InstanceNorm2d(3, affine=True, track_running_stats=True).eval(), nn.Mish()],
]


@pytest.mark.parametrize("modules", [[m] for m in MODULES] + CHAINS, ids=str)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["contiguous", "channels_last"])
def test_forward_and_backward(modules: list[nn.Module], layout: torch.memory_format) -> None:
    torch.manual_seed(0)
    for module in modules:
        module.double()
        for p in module.parameters():
            nn.init.uniform_(p, 0.2, 1.2)
    u = torch.randn(4, 3, 4, 5, dtype=torch.float64).contiguous(memory_format=layout).requires_grad_()
    g = torch.randn(4, 3, 4, 5, dtype=torch.float64)
    h = u
    for module in modules:
        h = h if isinstance(module, nn.Dropout) else module(h)
    params = [p for module in modules for p in module.parameters()]
    wanted = torch.autograd.grad(h, [u, *params], g)

    steps = [describe.latent_of(module) for module in modules]
    tensors = [t for m, s in zip(modules, steps, strict=True) for t in describe.latent_tensors(m, s)]
    steps = tuple(s for s in steps if s is not None)
    with torch.no_grad():
        a, entries = latent.forward(u, steps, tensors)
        if contract.keeps_output(Layer(Tied(), (), steps)):
            entries = latent.from_output(a, steps)
        grad, grads = latent.backward(g, steps, tensors, entries)
    torch.testing.assert_close(a, h)
    torch.testing.assert_close(grad, wanted[0])
    got = [x for x, t in zip(grads, tensors, strict=True) if isinstance(t, nn.Parameter)]
    for one, other in zip(got, wanted[1:], strict=True):
        torch.testing.assert_close(one, other)


def test_every_deterministic_elementwise_activation_of_torch_is_here() -> None:
    """Found by what they do: shape-preserving modules of torch.nn.modules.activation that treat every element alike."""
    missing = []
    x = torch.randn(2, 4)
    for name in torch.nn.modules.activation.__all__:
        kind = getattr(nn, name)
        if name in ("MultiheadAttention", "RReLU"):
            continue  # with weights of its own; random
        module = nn.Threshold(0.1, 0.2) if name == "Threshold" else kind()
        try:
            elementwise = torch.equal(module(x)[:, :2], module(x[:, :2]))
        except (IndexError, RuntimeError, AssertionError, ValueError):
            continue  # wants another rank
        if elementwise and kind not in describe.ACTIVATIONS:
            missing.append(name)
    assert missing == []
