"""What `racecar.wrap` refuses: each with what was given and what would be right, and nothing left behind."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch import nn

import racecar


def mlp(*sizes: int) -> nn.Sequential:
    return nn.Sequential(*[m for a, b in pairwise(sizes) for m in (nn.Linear(a, b), nn.Tanh())])


@pytest.mark.parametrize(
    ("model", "kwargs", "error", "says"),
    [
        (nn.Softmax(1), {}, ValueError, "Softmax has nothing to run backwards: its forward calls no linear layer"),
        (nn.Sequential(nn.ReLU(), nn.Flatten()), {}, ValueError, "nn.Linear, nn.Conv1d"),
        (
            nn.Sequential(nn.MaxPool2d(2), nn.ReLU(), nn.Conv2d(2, 2, 1)),
            {},
            ValueError,
            "between pooling and the first",
        ),
        (nn.Sequential(nn.Linear(2, 2), nn.RReLU()), {}, ValueError, "layer '1'.*random slopes"),
        (nn.Sequential(nn.LazyLinear(2)), {}, ValueError, "run one forward before wrapping"),
        ("a model", {}, TypeError, "must be an nn.Module, got str"),
        (mlp(2, 2), dict(input_activation="relu"), TypeError, "a module such as nn.ReLU"),
        (mlp(2, 2), dict(input_activation=nn.PReLU()), ValueError, "without parameters"),
        (mlp(2, 2), dict(input_activation=nn.Softmax(1)), ValueError, "Softmax"),
        (mlp(2, 2), dict(lam=[True]), TypeError, r"lam\[0\] must be a number, got bool"),
        (mlp(2, 2), dict(lam={"0": "x"}), TypeError, r"lam\['0'\] must be a number"),
        (mlp(2, 2), dict(lam=float("inf")), ValueError, "finite"),
        (mlp(2, 2), dict(lam=None), TypeError, "got NoneType"),
        (mlp(2, 2), dict(layers=True), TypeError, "whole number from 1 to 1"),
        (mlp(2, 2), dict(layers=2), ValueError, "from 1 to 1.*got 2"),
        (mlp(2, 2), dict(backend="abacus"), ValueError, "no backend 'abacus'"),
    ],
    ids=lambda v: str(v)[:30],
)
def test_refused(model, kwargs, error, says) -> None:
    hooks = [len(m._forward_pre_hooks) for m in model.modules()] if isinstance(model, nn.Module) else []
    with pytest.raises(error, match=says):
        racecar.wrap(model, **{"lam": 1.0, **kwargs})
    if isinstance(model, nn.Module):
        assert type(model).__name__ in ("Softmax", "Sequential")
        assert [len(m._forward_pre_hooks) for m in model.modules()] == hooks


def test_wrapping_twice_is_refused() -> None:
    net = racecar.wrap(mlp(3, 2, 1), 1.0)
    with pytest.raises(ValueError, match=r"wrapped already.*unwrap"):
        racecar.wrap(net, 1.0)
    with pytest.raises(ValueError, match="part '1' is wrapped already"):
        racecar.wrap(nn.Sequential(nn.Linear(2, 3), net), 1.0)


def test_attributes_of_the_model_are_not_hidden() -> None:
    class Mine(nn.Sequential):
        plan = "of mine"

    with pytest.raises(ValueError, match=r"Mine has attributes of its own named plan"):
        racecar.wrap(Mine(nn.Linear(2, 2)), 1.0)


def test_a_bad_lambda_leaves_the_old_one() -> None:
    net = racecar.wrap(mlp(3, 2, 1), {"2": 0.5})
    assert net.lam == [0.0, 0.5]
    with pytest.raises(ValueError, match="negative|at least 0"):
        net.lam = [-1.0, 1.0]
    assert net.lam == [0.0, 0.5]
    net.lam = 2
    assert net.lam == [2.0, 2.0]


def test_reverse_loss_before_any_forward() -> None:
    net = racecar.wrap(mlp(3, 2), 1.0)
    with pytest.raises(AttributeError, match="call the model first"):
        _ = net.reverse_loss
    assert not hasattr(net, "reverse_loss")
    assert net.reverse_losses == {}


@pytest.mark.parametrize("memory", ["store", "recompute", "deferred"])
@pytest.mark.parametrize("watched", [False, True], ids=["as one node", "layer by layer"])
@pytest.mark.parametrize("kind", ["conv", "linear"])
def test_an_input_on_another_device_is_refused(kind: str, watched: bool, memory: str) -> None:
    op = nn.Conv2d(3, 2, 1) if kind == "conv" else nn.Linear(3, 2)
    net = racecar.wrap(nn.Sequential(op, nn.ReLU()), 1.0, variant="local", memory=memory)
    if watched:
        net[1].register_forward_hook(lambda *_: None)
    x = torch.randn(2, 3, 4, 3)
    with pytest.raises(ValueError, match="layer '0' received a tensor on meta, its weight is on cpu; move the model"):
        net(x.to("meta"))
    assert net(x).shape == op(x).shape  # nothing is left behind
    with pytest.raises(ValueError, match="layer ('0' received|1: weight is on meta, x is on cpu)"):
        net.to("meta")(x)


def test_empty_batches_are_refused() -> None:
    with pytest.raises(ValueError, match=r"at least one; layer '0' received \(0, 3\)"):
        racecar.wrap(mlp(3, 2), 1.0)(torch.randn(0, 3))
    net = racecar.wrap(nn.Sequential(nn.Conv2d(1, 2, 3)), 1.0)
    with pytest.raises(ValueError, match=r"needs batches.*received \(1, 8, 8\).*unsqueeze"):
        net(torch.randn(1, 8, 8))
    assert net.eval()(torch.randn(1, 8, 8)).shape == (2, 6, 6)
