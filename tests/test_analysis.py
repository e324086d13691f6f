"""How well each layer comes back, against a computation by hand."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import racecar
from racecar.analysis import reversibility


def small_chain():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(4, 5, 3, padding=1),
        nn.Tanh(),
    ).double()


def error(d, back):
    gain = (d * back).sum() / back.square().sum()
    return ((d - gain * back).norm() / d.norm()).item(), gain.item()


def test_errors_are_those_computed_by_hand():
    net = small_chain()
    x = torch.rand(7, 1, 6, 6, dtype=torch.float64)
    net(x)  # gives the norm running statistics of its own
    found = reversibility(net, x, batch_size=3)
    assert net.training and type(net) is nn.Sequential
    net.eval()
    with torch.no_grad():
        d2 = net[:3](x)
        d3 = net[3:](d2)
        conv1, norm, conv2 = net[0], net[1], net[4]

        def up(y):
            u = F.conv_transpose2d(y - conv2.bias.view(-1, 1, 1), conv2.weight, padding=1)
            return F.interpolate(F.relu(norm(u)), scale_factor=2)

        def down(y):
            return F.conv_transpose2d(y - conv1.bias.view(-1, 1, 1), conv1.weight, padding=1)

        want = [error(x, down(d2)), error(x, down(up(d3))), error(d2, up(d3)), error(d2, up(d3))]
    got = [(layer.local, layer.local_gain) for layer in found], [(layer.full, layer.full_gain) for layer in found]
    for ours, theirs in zip([got[0][0], got[1][0], got[0][1], got[1][1]], want, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-9)
    assert [layer.name for layer in found] == ["0", "4"]


def test_a_wrapped_model_stays_as_it_was():
    net = racecar.wrap(small_chain(), lam=0.1)
    x = torch.rand(4, 1, 6, 6, dtype=torch.float64)
    net[1].eval()
    loss = (net(x).sum() + net.reverse_loss).detach()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    reverse = net.reverse_loss
    found = reversibility(net, x)
    assert net.training and not net[1].training and net.reverse_loss.equal(reverse) and math.isfinite(loss)
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert found == reversibility(net.unwrap(), x)


def test_orthogonal_layers_come_back_whole():
    net = nn.Sequential(nn.Linear(6, 6, bias=False), nn.Linear(6, 6, bias=False)).double()
    for layer in net:
        nn.init.orthogonal_(layer.weight)
        layer.weight.data *= 3.0  # a scale is no loss
    for layer in reversibility(net, torch.rand(5, 6, dtype=torch.float64)):
        assert layer.local == pytest.approx(0.0, abs=1e-7) and layer.full == pytest.approx(0.0, abs=1e-7)
        assert layer.local_gain == pytest.approx(1 / 9)


def test_what_cannot_be_compared():
    with pytest.raises(ValueError, match=r"at least one sample, got x of shape \(0, 6\)"):
        reversibility(nn.Sequential(nn.Linear(6, 6)), torch.zeros(0, 6))
    zero = reversibility(nn.Sequential(nn.Linear(6, 6)), torch.zeros(2, 6))
    assert zero[0].local == 0.0
    broken = nn.Sequential(nn.Linear(6, 6))
    nn.init.constant_(broken[0].weight, math.nan)
    found = reversibility(broken, torch.ones(2, 6))
    assert math.isnan(found[0].local) and math.isnan(found[0].full_gain)
    with pytest.raises(ValueError, match="Bilinear has no reverse here"):
        reversibility(nn.Bilinear(2, 2, 2), torch.zeros(2, 2))
