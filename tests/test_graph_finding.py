"""How `racecar.wrap` finds the layers of a graph: it changes nothing on the way, and names what it leaves out."""

from __future__ import annotations

import copy

import graphs
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import racecar

each_way = pytest.mark.parametrize("how", ["traced", "run"])


class CountingNorm(nn.BatchNorm2d):
    """As the norms of timm: a forward of its own, which a tracer runs while it looks."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.training:
            self.num_batches_tracked.add_(1)
        torch.rand(1)
        return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, self.training)


@each_way
def test_wrapping_changes_no_buffer_and_no_random_state(how: str) -> None:
    net, x = graphs.made("residual")
    net.one.bn1 = CountingNorm(4).double()
    before, random = copy.deepcopy(net.state_dict()), torch.get_rng_state()
    wrapped = racecar.wrap(net, 0.1, example=x if how == "run" else None)
    assert torch.equal(torch.get_rng_state(), random)
    assert all(torch.equal(value, before[key]) for key, value in wrapped.state_dict().items())
    wrapped(x)
    assert net.one.bn1.num_batches_tracked == 1


def test_lazy_modules_are_named() -> None:
    class Lazy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm = nn.LazyConv2d(3, 1), nn.LazyBatchNorm2d()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + self.norm(self.conv(x))

    with pytest.raises(ValueError, match="layer 'conv' is lazy and has no weight yet; run one forward"):
        racecar.wrap(Lazy(), 0.1)
