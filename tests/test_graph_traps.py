"""What a planner of graphs is easily wrong about: each of these once gave another loss without a word."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import racecar


class Base(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.f = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 4, 3, padding=1))
        self.drop = nn.Identity()
        self.double()


class ReluOutside(Base):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.relu(self.f(x))


class OneByOne(Base):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for module in self.f:
            x = module(x)
        return x


class OptionalMask(Base):
    def forward(self, x: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        h = F.relu(self.f[0](x))
        if mask is not None:
            h = h * mask
        return self.f[2](h)


class DropsInPlace(Base):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.f[2](F.dropout(F.relu(self.f[0](x)), 0.5, True, self.drop is None))


def losses(net: nn.Module, x: torch.Tensor, **given) -> list[torch.Tensor]:
    wrapped = racecar.wrap(net, 0.1, **given)
    torch.manual_seed(1)
    wrapped(x)
    return [*wrapped.reverse_losses.values()]


@pytest.mark.parametrize("how", ["traced", "run"])
@pytest.mark.parametrize(("model", "relu"), [(ReluOutside, True), (OneByOne, False), (OptionalMask, False)])
def test_the_same_as_its_chain(model: type[Base], relu: bool, how: str) -> None:
    x = torch.randn(2, 3, 6, 6, dtype=torch.float64)
    net = model()
    want = losses(nn.Sequential(*Base().f, *[nn.ReLU()] * relu), x, variant="full")
    got = losses(net, x, variant="full", example=x if how == "run" else None)
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize("variant", ["full", "local"])
def test_d_is_what_was_there_before_a_dropout_in_place(variant: str) -> None:
    x = torch.randn(2, 3, 6, 6, dtype=torch.float64)
    want = losses(DropsInPlace(), x, variant=variant)
    net = DropsInPlace()
    net.drop = None
    torch.testing.assert_close(losses(net, x, variant=variant), want)
