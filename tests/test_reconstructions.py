"""What comes back at the input from any depth."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import racecar
from racecar.analysis import MutualInformationPlane, reconstructions, reversibility
from racecar.analysis.reconstructions import fit
from racecar.demo.network import fresh_network


def orthogonal_chain(n: int = 3, width: int = 6) -> nn.Sequential:
    torch.manual_seed(0)
    net = nn.Sequential(*(nn.Linear(width, width) for _ in range(n))).double()
    for layer in net:
        nn.init.orthogonal_(layer.weight)
    return net


def test_an_orthogonal_chain_gives_everything_back_from_every_depth():
    x = torch.randn(7, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    found = reconstructions(orthogonal_chain(), x, batch_size=3)
    assert found.depths == (1, 2, 3) and found.names == ("0", "1", "2")
    np.testing.assert_array_equal(found.inputs, x)
    for image in found.images:  # six products of rounded numbers in each of six steps
        np.testing.assert_allclose(image, x, atol=1e-14)
    np.testing.assert_allclose(found.gain, 1.0, rtol=1e-14)
    assert found.error.max() < 1e-14 and found.error_with_gain.max() < 1e-14


def test_depths_are_those_computed_by_hand():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.Tanh(), nn.MaxPool2d(2), nn.Conv2d(4, 5, 3), nn.ReLU())
    net = net.double()
    x = torch.rand(5, 1, 8, 8, dtype=torch.float64)
    found = reconstructions(net, x, depths=[2, 1])
    assert net.training and type(net) is nn.Sequential and found.names == ("3", "0")
    with torch.no_grad():
        d2 = net[:2](x)
        d3 = net[2:](d2)
        conv1, conv2 = net[0], net[3]
        up = F.conv_transpose2d(d3 - conv2.bias.view(-1, 1, 1), conv2.weight)
        up = F.interpolate(torch.tanh(up), scale_factor=2)
        want = [F.conv_transpose2d(y - conv1.bias.view(-1, 1, 1), conv1.weight, padding=1) for y in (up, d2)]
    for image, other, at in zip(found.images, want, (0, 1), strict=True):
        np.testing.assert_allclose(image, other, rtol=1e-10, atol=1e-13)
        assert (found.gain[at], found.error[at], found.error_with_gain[at]) == pytest.approx(fit(x, other))


def test_the_last_depth_is_the_whole_reverse_and_the_network_stays_plain():
    network = fresh_network((1, 8, 8), 10, 0)
    x = torch.rand(5, 1, 8, 8)
    found = reconstructions(network, x, batch_size=2)
    assert found.images.shape == (3, 5, 1, 8, 8) and type(network) is nn.Sequential and network.training
    net = racecar.wrap(network, lam=0.0)
    torch.testing.assert_close(torch.from_numpy(found.images[-1]), net.eval().reconstruct(x))
    np.testing.assert_allclose(found.error_with_gain[-1], reversibility(net, x)[0].full, rtol=1e-5)
    np.testing.assert_allclose(found.error_with_gain[0], reversibility(net, x)[0].local, rtol=1e-5)
    again = reconstructions(net, x, batch_size=2)
    np.testing.assert_array_equal(again.images, found.images)


def test_a_flatten_in_front_belongs_to_the_input():
    net = nn.Sequential(nn.Flatten(), nn.Linear(12, 8), nn.ReLU(), nn.Linear(8, 4))
    found = reconstructions(net, torch.rand(3, 1, 3, 4))
    assert found.inputs.shape == (3, 1, 3, 4) and found.images.shape == (2, 3, 1, 3, 4)


def test_bfloat16_comes_back_as_float32():
    found = reconstructions(nn.Sequential(nn.Linear(4, 4)).bfloat16(), torch.rand(3, 4).bfloat16())
    assert found.images.dtype == found.inputs.dtype == np.float32


def test_gain_and_errors():
    x = torch.rand(5, 1, 3, 3)
    assert fit(x, 4 * x) == pytest.approx((0.25, 3.0, 0.0), abs=1e-6)
    assert fit(x, torch.zeros_like(x)) == pytest.approx((0.0, 1.0, 1.0))
    assert fit(torch.zeros(3), torch.zeros(3)) == (0.0, 0.0, 0.0)
    assert fit(torch.zeros(3), torch.ones(3)) == (0.0, math.inf, 0.0)
    assert all(map(math.isnan, fit(x, x * math.nan)))


def test_bad_input():
    net, x = orthogonal_chain(), torch.rand(2, 6, dtype=torch.float64)
    for depths, error, message in (
        ([4], ValueError, r"depths must be from 1 to 3, .* got \[4\]"),
        ([], ValueError, r"depths must be from 1 to 3"),
        ([0], ValueError, "a depth must be at least 1, got 0"),
        ([1.0], TypeError, "a depth must be a whole number"),
    ):
        with pytest.raises(error, match=message):
            reconstructions(net, x, depths=depths)
    assert type(net) is nn.Sequential and net.training
    with pytest.raises(TypeError, match="a tensor, got ndarray"):
        reconstructions(net, x.numpy())
    with pytest.raises(ValueError, match=r"at least one sample, got x of shape \(0, 6\)"):
        reconstructions(net, x[:0])
    with pytest.raises(ValueError, match="batch_size must be at least 1"):
        reconstructions(net, x, batch_size=0)
    with pytest.raises(ValueError, match="Bilinear has nothing to run backwards"):
        reconstructions(nn.Bilinear(2, 2, 2), x)
    with pytest.raises(ValueError, match=r"'net' is wrapped already|its part '0' is wrapped already"):
        reconstructions(nn.Sequential(racecar.wrap(orthogonal_chain(), lam=0.1)), x)


class Functional(nn.Module):
    """The layers of `chain`, called as functions, with a head behind them that no reverse reaches."""

    def __init__(self, chain, fork):
        super().__init__()
        self.first, self.second, self.head, self.fork = chain[0], chain[3], nn.Linear(5, 2).double(), fork

    def forward(self, x):
        d = torch.tanh(self.first(x))
        y = F.relu(self.second(F.max_pool2d(d, 2)))
        return self.head(y.mean((2, 3))) + (d.mean() if self.fork else 0.0)


def test_a_model_of_any_form_gives_what_the_chain_gives():
    torch.manual_seed(0)
    chain = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.Tanh(), nn.MaxPool2d(2), nn.Conv2d(4, 5, 3), nn.ReLU())
    chain, x = chain.double(), torch.rand(5, 1, 8, 8, dtype=torch.float64)
    net = Functional(chain, fork=False)
    for variant in (None, "full", "local"):
        model = net if variant is None else racecar.wrap(net, lam=0.1, variant=variant)
        found = reconstructions(model, x)
        assert found.names == ("first", "second")
        np.testing.assert_allclose(found.images, reconstructions(chain, x).images, rtol=1e-12, atol=1e-14)
        np.testing.assert_allclose(reversibility(model, x).local, reversibility(chain, x).local, rtol=1e-9)
        np.testing.assert_allclose(reversibility(model, x).full, reversibility(chain, x).full, rtol=1e-9)
        planes = [MutualInformationPlane(x, torch.arange(5) % 2, bins=2) for _ in range(2)]
        for plane, other in zip(planes, (model, chain), strict=True):
            plane.record(other, 0)
        np.testing.assert_array_equal(planes[0].result.about_x, planes[1].result.about_x)
        np.testing.assert_array_equal(planes[0].result.about_y, planes[1].result.about_y)
        if variant is not None:
            model.unwrap()
    forked = Functional(chain, fork=True)
    for look in (reconstructions, reversibility):
        with pytest.raises(ValueError, match="needs a unique path from output to input, but .*wrap a chain inside"):
            look(forked, x)
    assert type(forked) is Functional and forked.training
