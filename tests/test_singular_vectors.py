"""A layer's right singular vectors, and the data's."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import nn

import racecar
from racecar.analysis import data_modes, layer_modes, singular_vectors
from racecar.demo.network import fresh_network

SHAPE = (2, 4, 5)


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (nn.Conv2d(2, 5, 3, padding=1), SHAPE),
        (nn.Conv2d(2, 4, 3, stride=2, padding=1, padding_mode="circular"), SHAPE),
        (nn.Conv2d(2, 4, 2, padding="same", groups=2), SHAPE),
        (nn.Conv2d(2, 4, 2, padding=1, padding_mode="reflect"), SHAPE),
        (nn.Conv1d(2, 3, 3, dilation=2), (2, 9)),
        (nn.Conv3d(1, 2, 2), (1, 3, 2, 3)),
        (nn.Linear(40, 7), SHAPE),
        (nn.Linear(5, 3), SHAPE),  # along the last dimension
    ],
    ids=str,
)
def test_modes_are_the_right_singular_vectors_of_the_whole_layer(layer, shape):
    x = torch.zeros(1, *shape)
    taken = x.flatten(1) if isinstance(layer, nn.Linear) and layer.in_features == x.numel() else x
    matrix = torch.func.jacrev(lambda d: layer(d).flatten())(taken).reshape(-1, x.numel()).detach().double()
    values = torch.linalg.svdvals(matrix)
    modes = layer_modes(layer, shape, count=3)
    np.testing.assert_allclose(modes.singular_values, values[:3], rtol=1e-4, atol=1e-5)
    ours = torch.from_numpy(modes.images).flatten(1).double()
    torch.testing.assert_close((matrix @ ours.T).norm(dim=0), values[:3], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(ours @ ours.T, torch.eye(3, dtype=torch.float64), atol=1e-5, rtol=0)
    assert modes.images.shape == (3, *shape)
    assert (ours.amax(1) >= -ours.amin(1) - 1e-6).all()  # symmetric patterns have their largest entry several times


def test_modes_of_a_matrix_known_beforehand():
    turn = torch.linalg.qr(torch.randn(4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0)))[0]
    layer = nn.Linear(4, 3).double()
    layer.weight.data = torch.diag(torch.tensor([1.0, 5.0, 3.0]).double()) @ turn[:3]
    modes = layer_modes(layer, (4,), count=9)  # there are no more than four
    np.testing.assert_allclose(modes.singular_values, [5, 3, 1, 0], atol=1e-6)
    overlap = torch.from_numpy(modes.images).double() @ turn.T
    torch.testing.assert_close(overlap[:3, [1, 2, 0]].abs(), torch.eye(3).double(), atol=1e-6, rtol=0)


def test_data_modes_hold_most_of_the_energy():
    x = torch.rand(30, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    best = data_modes(x, count=4)
    values = torch.linalg.svdvals(x.flatten(1))
    assert best.energy(x) == pytest.approx(float(values[:4].square().sum() / values.square().sum()), rel=1e-5)
    assert data_modes(x, count=16).energy(x) == pytest.approx(1.0)
    assert best.energy(torch.zeros(2, 1, 4, 4)) == 0.0


def test_large_images_take_the_iterative_way_to_the_same_patterns(monkeypatch):
    layer = fresh_network((3, 8, 8), 10, 0)[0]
    x = torch.rand(30, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    exact = layer_modes(layer, (3, 8, 8), 4), data_modes(x, 4)
    monkeypatch.setattr("racecar.analysis.modes.LARGEST_MATRIX", 10)
    for ours, want in zip((layer_modes(layer, (3, 8, 8), 4), data_modes(x, 4)), exact, strict=True):
        np.testing.assert_allclose(ours.singular_values, want.singular_values, rtol=1e-4)
        overlap = np.square(ours.images.reshape(4, -1) @ want.images.reshape(4, -1).T).sum(1)
        np.testing.assert_allclose(overlap, 1, atol=1e-2)


class Residual(nn.Module):
    """No chain; its layers stand in another order than they run in."""

    def __init__(self):
        super().__init__()
        self.last = nn.Linear(6, 2)
        self.inner = nn.Linear(6, 6)
        self.never = nn.Linear(6, 6)

    def forward(self, x):
        return self.last(x + torch.relu(self.inner(x)))


@pytest.mark.parametrize("wrapped", [False, True])
def test_the_first_layer_that_runs_beside_the_data(wrapped):
    net = nn.Sequential(nn.Flatten(), nn.Linear(12, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Linear(5, 3))
    x = torch.rand(11, 1, 3, 4)
    model = racecar.wrap(net, lam=0.1) if wrapped else net
    if wrapped:
        model(x)
        loss = model.reverse_loss
    before = {name: value.clone() for name, value in model.state_dict().items()}
    found = singular_vectors(model, x, count=4, batch_size=3)
    assert found.name == "1" and model.training and (type(model) is nn.Sequential) != wrapped
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    if wrapped:
        assert model.reverse_loss.equal(loss) and loss > 0
    np.testing.assert_array_equal(found.samples, x[:4])
    np.testing.assert_array_equal(found.data.images, data_modes(x, 4).images)
    np.testing.assert_array_equal(found.layer.images, layer_modes(net[1], (1, 3, 4), 4).images)
    assert found.data_energy == data_modes(x, 4).energy(x) >= found.layer_energy == found.layer.energy(x) > 0
    deeper = singular_vectors(model, x, layer="4", count=2)
    model.eval()
    with torch.no_grad():
        np.testing.assert_allclose(deeper.samples, nn.Sequential(*list(net)[:4]).eval()(x)[:2], rtol=1e-6)


def test_any_model_will_do():
    net, x = Residual(), torch.rand(5, 6)
    assert singular_vectors(net, x).name == "inner"
    assert singular_vectors(net, x, layer="last").layer.images.shape == (6, 6)
    assert not any(module._forward_pre_hooks for module in net.modules())
    with pytest.raises(ValueError, match="did not run layer 'never'"):
        singular_vectors(net, x, layer="never")
    with pytest.raises(ValueError, match=r"no layer is named 'first'; .* are last, inner, never"):
        singular_vectors(net, x, layer="first")
    with pytest.raises(RuntimeError):
        singular_vectors(net, torch.rand(5, 7))
    assert not any(module._forward_pre_hooks for module in net.modules()) and net.training


class Changing(nn.Module):
    """Another layer runs first from batch to batch."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x):
        return self.a(self.b(x)) if len(x) == 2 else self.b(self.a(x))


def test_a_first_layer_that_changes_has_to_be_named():
    x = torch.rand(3, 6)
    with pytest.raises(ValueError, match="a and b ran first in different batches; name one of them with layer="):
        singular_vectors(Changing(), x, batch_size=2)
    assert singular_vectors(Changing(), x, layer="b", batch_size=2).name == "b"


def test_what_cannot_be_decomposed():
    x = torch.rand(5, 6)
    with pytest.raises(ValueError, match="ReLU has no Linear or ConvNd"):
        singular_vectors(nn.ReLU(), x)
    with pytest.raises(TypeError, match="only a Linear or ConvNd can be decomposed, got Tanh"):
        layer_modes(nn.Tanh(), (6,))
    with pytest.raises(TypeError, match="model must be an nn.Module, got str"):
        singular_vectors("net", x)
    with pytest.raises(TypeError, match="a tensor, got list"):
        singular_vectors(nn.Linear(6, 2), [1.0])
    with pytest.raises(ValueError, match=r"at least one sample, got x of shape \(0, 6\)"):
        data_modes(torch.zeros(0, 6))
    with pytest.raises(ValueError, match="the data are not finite"):
        data_modes(torch.full((2, 6), math.nan))
    with pytest.raises(ValueError, match="count must be at least 1, got 0"):
        data_modes(x, 0)
    with pytest.raises(TypeError, match="count must be a whole number of at least 1, got 2.5"):
        layer_modes(nn.Linear(6, 2), (6,), 2.5)
    with pytest.raises(ValueError, match=r"Linear\(in_features=6.* does not take inputs of shape \(7,\)"):
        layer_modes(nn.Linear(6, 2), (7,))
    with pytest.raises(ValueError, match=r"Conv2d\(3, .* does not take inputs of shape \(1, 8, 8\)"):
        layer_modes(nn.Conv2d(3, 4, 3), (1, 8, 8))
    broken = nn.Linear(6, 2)
    nn.init.constant_(broken.weight, math.inf)
    with pytest.raises(ValueError, match="weight is not finite"):
        layer_modes(broken, (6,))
    with pytest.raises(ValueError, match=r"patterns of shape \(6,\) do not fit x of shape \(5, 7\)"):
        data_modes(x).energy(torch.rand(5, 7))
