"""The mutual-information plane, against distributions whose information is known."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import nn

import racecar
from racecar.analysis import MutualInformationPlane, binned_information
from racecar.bench.networks import mlp

PATTERNS = torch.tensor([[i >> b & 1 for b in (2, 1, 0)] for i in range(8)], dtype=torch.float32)
PARITY = PATTERNS.sum(1).long() % 2


def identity(n: int = 3) -> nn.Linear:
    layer = nn.Linear(n, n, bias=False)
    nn.init.eye_(layer.weight)
    return layer


# --- the estimator


def test_eight_equally_likely_patterns_are_three_bits():
    assert binned_information(PATTERNS, PARITY) == (3.0, 1.0)
    assert binned_information(np.full((8, 4), 0.3), PARITY) == (0.0, 0.0)
    assert binned_information(PATTERNS[:, :1], PARITY) == (1.0, 0.0)  # one bit of three says nothing of the parity
    assert binned_information(PATTERNS[:, :1], PATTERNS[:, 0].long()) == (1.0, 1.0)
    assert binned_information(PARITY[:, None], PARITY) == (1.0, 1.0)


def test_a_noisy_channel():
    """Y is T with one of four flipped: I(T; Y) = 1 − H(1/4)."""
    t, y = np.repeat([0, 1], 4), np.array([0, 0, 0, 1, 1, 1, 1, 0])
    about_x, about_y = binned_information(t[:, None], y)
    assert about_x == 1.0 and about_y == pytest.approx(1 + 0.25 * math.log2(0.25) + 0.75 * math.log2(0.75), abs=1e-15)


def test_against_the_sum_over_the_joint_distribution():
    rng = np.random.default_rng(0)
    values, y = rng.integers(0, 3, size=(200, 2)), rng.integers(-2, 2, size=200)
    about_x, about_y = binned_information(values, y, bins=3)
    t = values[:, 0] * 3 + values[:, 1]
    joint = np.zeros((9, 4))
    np.add.at(joint, (t, y + 2), 1 / 200)
    p, q = joint.sum(1, keepdims=True), joint.sum(0, keepdims=True)
    filled = joint > 0
    assert about_y == pytest.approx((joint * np.log2(np.where(filled, joint, 1) / (p * q)))[filled].sum(), rel=1e-12)
    assert about_x == pytest.approx(-(p[p > 0] * np.log2(p[p > 0])).sum(), rel=1e-12)


def test_intervals_are_equal_and_the_last_has_both_ends():
    edges = np.linspace(-1, 1, 31)
    middles = (edges[:-1] + edges[1:]) / 2
    y = np.zeros(60, int)
    twice = np.concatenate([middles, middles + 0.03])[:, None]  # each a second time, in the same interval of 1/15
    assert binned_information(twice, y, 30, (-1, 1))[0] == pytest.approx(math.log2(30))
    assert binned_information(twice, y, 60, (-1, 1))[0] > math.log2(30)
    assert binned_information([[-1.0], [1.0], [0.999]], np.zeros(3, int), 30, (-1, 1))[0] == pytest.approx(
        math.log2(3) - 2 / 3
    )
    many = np.arange(1000.0)[:, None]  # more intervals than a byte counts
    assert binned_information(many, np.zeros(1000, int), bins=1000)[0] == pytest.approx(math.log2(1000))


def test_bad_values_are_refused():
    y = np.zeros(3, int)
    for values, labels, bins, limits, error, message in (
        ([[math.nan], [1], [2]], y, 30, None, ValueError, "1 of 3 values are not finite"),
        ([[math.inf], [1], [2]], y, 30, (0, 9), ValueError, "1 of 3 values are not finite"),
        ([[0], [1], [2]], y, 1, None, ValueError, "bins must be at least 2, got 1"),
        ([[0], [1], [2]], y, 2.0, None, TypeError, "bins must be a whole number of at least 2, got 2.0"),
        ([[0], [1], [2]], y[:2], 30, None, ValueError, r"one per sample, of shape \(3,\), got \(2,\)"),
        ([[0], [1], [2]], y[None], 30, None, ValueError, r"of shape \(3,\), got \(1, 3\)"),
        ([[0], [1], [2]], y * 0.5, 30, None, TypeError, "labels must be whole numbers, got float64"),
        ([[0], [1], [2]], None, 30, None, TypeError, "labels are needed"),
        ([[0], [1], [2]], y, 30, (0, 1), ValueError, "from 0 to 2, outside the limits 0 and 1"),
        ([[0], [1], [2]], y, 30, (2, 0), ValueError, "two finite numbers, the lower first"),
        ([[0], [1], [2]], y, 30, (0, math.inf), ValueError, "two finite numbers"),
        (np.zeros((0, 3)), y, 30, None, ValueError, r"there are no values, got an array of shape \(0, 3\)"),
    ):
        with pytest.raises(error, match=message):
            binned_information(values, labels, bins, limits)


# --- the plane


@pytest.mark.parametrize("wrapped", [False, True])
def test_layers_whose_information_is_known(wrapped):
    first, blind = nn.Linear(3, 2, bias=False), nn.Linear(2, 4)
    first.weight.data = torch.tensor([[1.0, 0, 0], [0, 1, 0]])  # two of three bits
    nn.init.zeros_(blind.weight)
    net = nn.Sequential(identity(), nn.Tanh(), first, nn.ReLU(), blind)
    labels = PATTERNS[:, 1].long() * 7
    model = racecar.wrap(net, lam=0.1) if wrapped else net
    plane = MutualInformationPlane(PATTERNS, labels, batch_size=3)
    plane.record(model, 0)
    assert model.training and (type(model) is nn.Sequential) != wrapped
    with torch.no_grad():
        net[2].weight[1] = 0.0  # forgets what the label is
    plane.record(model, 2.5)
    found = plane.result
    assert found.names == ("D1", "D2", "D3", "D4") and found.epochs.tolist() == [0.0, 2.5]
    assert found.about_x.tolist() == [[3.0, 3.0, 2.0, 0.0], [3.0, 3.0, 1.0, 0.0]]
    assert found.about_y.tolist() == [[1.0, 1.0, 1.0, 0.0], [1.0, 1.0, 0.0, 0.0]]


def test_tanh_is_binned_over_its_bounds_and_relu_over_its_range():
    """Eight values within one interval of [−1, 1]: the range tells them apart, the bounds do not."""
    x = torch.linspace(0.001, 0.008, 8)[:, None]
    for activation, bits in ((nn.Tanh(), 0.0), (nn.ReLU(), 3.0), (nn.Hardtanh(0.0, 0.01), 3.0), (nn.Hardtanh(), 0.0)):
        plane = MutualInformationPlane(x, torch.arange(8))
        plane.record(nn.Sequential(identity(1), activation), 0)
        assert plane.result.about_x.tolist() == [[3.0, bits]], activation
    plane = MutualInformationPlane(x, torch.arange(8), limits={"D2": (0, 0.01)})
    plane.record(nn.Sequential(identity(1), nn.Tanh()), 0)
    assert plane.result.about_x.tolist() == [[3.0, 3.0]]


class Fork(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.twice, self.pair = nn.Linear(3, 3), nn.Sigmoid(), nn.ReLU(), nn.LSTM(3, 3)

    def forward(self, x):
        self.pair(x)
        return self.b(self.a(x)) + self.twice(self.twice(x))


def test_named_modules_of_any_model():
    net = Fork()
    plane = MutualInformationPlane(PATTERNS, PARITY, layers=["a", "b"], batch_size=5)
    plane.record(net, 1)
    with torch.no_grad():
        a = net.a(PATTERNS)
        want = [binned_information(a, PARITY), binned_information(a.sigmoid(), PARITY, 30, (0, 1))]
    assert plane.result.names == ("a", "b")
    assert list(zip(plane.result.about_x[0], plane.result.about_y[0], strict=True)) == want
    for layers, error, message in (
        (["c"], ValueError, "Fork has no modules named 'c'"),
        (["twice"], ValueError, "layer 'twice' did not give one value per sample, .* it ran 2 times in 1 batches"),
        (["pair"], TypeError, "layer 'pair' gives a tuple, not one tensor"),
    ):
        with pytest.raises(error, match=message):
            MutualInformationPlane(PATTERNS, PARITY, layers=layers).record(net, 0)
    assert net.training and not any(module._forward_hooks for module in net.modules())
    with pytest.raises(ValueError, match="needs a unique path from output to input"):
        MutualInformationPlane(PATTERNS, PARITY).record(net, 0)


def test_a_module_that_changes_its_input_in_place_is_seen_before_it_does():
    net = nn.Sequential(nn.Linear(3, 3), nn.ReLU(inplace=True))
    nn.init.eye_(net[0].weight)
    nn.init.constant_(net[0].bias, -5.0)
    plane = MutualInformationPlane(PATTERNS, PARITY, layers=["0", "1"])
    plane.record(net, 0)
    assert plane.result.about_x.tolist() == [[3.0, 0.0]]


def test_bad_input():
    for arguments, options, error, message in (
        ((PATTERNS, None), {}, TypeError, "labels are needed, one whole number per sample, got None"),
        ((PATTERNS, PARITY[:5]), {}, ValueError, r"one per sample, of shape \(8,\), got \(5,\)"),
        ((PATTERNS, PARITY.float()), {}, TypeError, "labels must be whole numbers, got float32"),
        ((PATTERNS.numpy(), PARITY), {}, TypeError, "a tensor, got ndarray"),
        ((PATTERNS[:0], PARITY[:0]), {}, ValueError, "at least one sample"),
        ((PATTERNS, PARITY), {"bins": 1}, ValueError, "bins must be at least 2, got 1"),
        ((PATTERNS, PARITY), {"bins": True}, TypeError, "bins must be a whole number"),
        ((PATTERNS, PARITY), {"batch_size": 0}, ValueError, "batch_size must be at least 1"),
        ((PATTERNS, PARITY), {"layers": []}, ValueError, "layers must be a list of names"),
        ((PATTERNS, PARITY), {"layers": "0"}, ValueError, "layers must be a list of names"),
        ((PATTERNS, PARITY), {"limits": {"D1": (1, 1)}}, ValueError, "limits of 'D1' must be two finite numbers"),
    ):
        with pytest.raises(error, match=message):
            MutualInformationPlane(*arguments, **options)


def test_bad_recordings_leave_the_plane_as_it_was():
    net = nn.Sequential(identity(), nn.Tanh())
    plane = MutualInformationPlane(PATTERNS, PARITY)
    with pytest.raises(RuntimeError, match="nothing was recorded yet"):
        plane.plot()
    plane.record(net, 3)
    for epoch in (3, 2, math.nan):
        with pytest.raises(ValueError, match=f"larger than 3, the last one recorded, got {epoch}"):
            plane.record(net, epoch)
    with pytest.raises(ValueError, match="the recordings so far are of D1, D2, this model gives D1, D2, D3"):
        plane.record(nn.Sequential(identity(), identity()), 4)
    broken = nn.Sequential(identity(), nn.Tanh())
    nn.init.constant_(broken[0].weight, math.nan)
    with pytest.raises(ValueError, match="layer 'D2' at epoch 4: 24 of 24 values are not finite"):
        plane.record(broken, 4)
    with pytest.raises(ValueError, match="limits name 'D7'; the layers are D1, D2"):
        MutualInformationPlane(PATTERNS, PARITY, limits={"D7": (0, 1)}).record(net, 0)
    with pytest.raises(TypeError, match="model must be an nn.Module"):
        plane.record(net.forward, 4)
    assert plane.result.epochs.tolist() == [3.0]


def test_training_moves_the_last_layer_towards_the_label():
    """The 4096 patterns of 12 bits of the study, with its network; whether more than half of the bits are set."""
    x = torch.tensor([[i >> b & 1 for b in range(12)] for i in range(4096)], dtype=torch.float32)
    y = (x.sum(1) > 6).long()
    torch.manual_seed(0)
    net = mlp(1)
    optimizer = torch.optim.Adam(net.parameters(), 0.01)
    plane = MutualInformationPlane(x, y)
    plane.record(net, 0)
    for _ in range(60):
        optimizer.zero_grad()
        nn.functional.cross_entropy(4 * net(x), y).backward()
        optimizer.step()
    plane.record(net, 60)
    found = plane.result
    p = y.double().mean().item()
    entropy = -p * math.log2(p) - (1 - p) * math.log2(1 - p)
    assert found.names == tuple(f"D{m}" for m in range(1, 8))
    assert found.about_x[:, 0].tolist() == [12.0, 12.0] and found.about_x.max() <= 12.0
    np.testing.assert_allclose(found.about_y[:, 0], entropy, rtol=1e-12)
    assert (found.about_y <= entropy + 1e-12).all() and (found.about_y <= found.about_x + 1e-12).all()
    assert found.about_y[0, -1] < 0.5 * entropy and found.about_y[1, -1] > 0.9 * entropy
