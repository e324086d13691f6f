"""Where a plan ends at an addition, or at what a trace does not look into: what is refused there, and what runs."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import racecar
from racecar_kernels.activations import TABLE

each_how = pytest.mark.parametrize("how", ["traced", "run"])


class Net(nn.Module):
    """Its forward is a function that a test may change after wrapping."""

    def __init__(self, way: Callable[[Net, Tensor], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)
        self.n = nn.BatchNorm2d(4)
        self.way = way
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        return self.way(self, x)


def image() -> Tensor:
    torch.manual_seed(1)
    return torch.randn(2, 3, 6, 6, dtype=torch.float64)


def wrapped(net: nn.Module, how: str = "traced", **given):
    return racecar.wrap(net, 0.1, example=image() if how == "run" else None, **given)


def norm_behind_an_addition(net: Net, x: Tensor) -> Tensor:
    h = F.relu(net.a(x))
    return net.b(net.n(h + 1)) + 1


def norm_and_relu_behind_an_addition(net: Net, x: Tensor) -> Tensor:
    h = F.relu(net.a(x))
    return net.b(F.relu(net.n(h + 1))) + 1


def sum_of_two(net: Net, x: Tensor) -> Tensor:
    h = F.relu(net.a(x))
    return net.b(h + x.mean(1, keepdim=True)) + 1


def activation_behind_the_sum(net: Net, x: Tensor) -> Tensor:
    h = F.relu(net.a(x))
    return net.b(torch.tanh(h + x.mean(1, keepdim=True))) + 1


@each_how
@pytest.mark.parametrize("less_first", [True, False])
def test_other_norms_and_activations_in_front_of_a_layer(less_first: bool, how: str) -> None:
    ways = [norm_behind_an_addition, norm_and_relu_behind_an_addition]
    then, now = ways if less_first else ways[::-1]
    net = wrapped(Net(then), how, variant="local")
    net(image())
    net.way = now
    with pytest.raises(RuntimeError, match="what leads to layer 'b'"):
        net(image())


def same_type(net: Net, x: Tensor) -> Tensor:
    """A call that gives its input back: the plan ends there, and the tensor does not show it."""
    return net.b(F.relu(net.a(x)).double()) + 1


def beside_the_same_type(net: Net, x: Tensor) -> Tensor:
    h = F.relu(net.a(x))
    return net.b(h) + h.double().mean()


def two_readers(net: Net, x: Tensor) -> Tensor:
    h = net.a(x)
    return net.b(F.relu(h)) + h


@each_how
@pytest.mark.parametrize("way", [same_type, beside_the_same_type, two_readers, sum_of_two])
def test_what_was_planned_runs(way, how: str) -> None:
    net = wrapped(Net(way), how, variant="local")
    for _ in range(2):
        net(image())
        assert net.reverse_loss > 0


class Block(nn.Module):
    """A module of PyTorch's own that a trace does not look into, and a run does."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(8, 8), nn.Linear(8, 8)
        self.block = nn.TransformerEncoderLayer(8, 2, 8, batch_first=True, norm_first=True, dropout=0.0)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.block(self.first(x)))


@each_how
def test_norms_inside_a_module_that_a_trace_does_not_look_into(how: str) -> None:
    x = torch.randn(2, 3, 8)
    net = racecar.wrap(Block(), 0.1, variant="local", example=x if how == "run" else None)
    net(x)
    assert net.reverse_loss > 0


@each_how
def test_an_activation_behind_an_addition_of_two_tensors(how: str) -> None:
    net = wrapped(Net(sum_of_two), how, variant="local")
    net(image())
    net.way = activation_behind_the_sum
    with pytest.raises(RuntimeError, match="what leads to layer 'b'"):
        net(image())


@torch.fx.wrap
def normalised(x: Tensor) -> Tensor:
    return torch.tanh(F.layer_norm(x, (8,)))


class Wrapped(Block):
    def forward(self, x: Tensor) -> Tensor:
        return self.last(normalised(self.first(x)))


def test_norms_inside_a_function_that_a_trace_does_not_look_into() -> None:
    net = racecar.wrap(Wrapped(), 0.1, variant="local")
    net(torch.randn(2, 3, 8))
    assert net.reverse_loss > 0


class LeavesOut(Net):
    """Stochastic depth in Python: a block, and the addition behind it, do not run in every step."""

    skip = False

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.a(x))
        if not self.skip:
            h = h + torch.tanh(self.n(h))
        return self.b(h)


@each_how
def test_a_block_that_is_left_out_with_its_addition(how: str) -> None:
    net = wrapped(LeavesOut(sum_of_two), how, variant="local")
    for skip in (False, True, False):
        net.skip = skip
        net(image())
        assert all(loss > 0 for loss in net.reverse_losses.values())


@each_how
@pytest.mark.parametrize(
    ("then", "now"),
    [
        (F.relu, torch.tanh),
        (nn.ReLU6(), F.relu),
        (lambda h: F.max_pool2d(h, 2), lambda h: F.avg_pool2d(h, 2)),
        (nn.BatchNorm2d(4).double(), lambda h: F.instance_norm(h)),
        (nn.GroupNorm(2, 4).double(), torch.sigmoid),
    ],
)
def test_another_function_in_the_place_of_the_planned_one(
    then: Callable[[Tensor], Tensor], now: Callable[[Tensor], Tensor], how: str
) -> None:
    def way(net: Net, x: Tensor) -> Tensor:
        return net.b(net.made(net.a(x)))

    net = Net(way)
    net.made = then
    net = wrapped(net, how, variant="local")
    net(image())
    if "made" in net._modules:
        del net.made
    net.made = now
    with pytest.raises(RuntimeError, match="what leads to layer 'b' is not what it was .* now"):
        net(image())


@each_how
@pytest.mark.parametrize(
    "made",
    [nn.Hardtanh(0.0, 6.0), nn.Threshold(0.1, 0.2), nn.GroupNorm(2, 4), nn.InstanceNorm2d(4), nn.LayerNorm(6)]
    + [row.module() for row in TABLE.values() if row.module is not nn.Threshold],
    ids=lambda made: type(made).__name__,
)
def test_a_function_has_one_name_however_it_is_called(made: nn.Module, how: str) -> None:
    net = Net(lambda net, x: net.b(net.made(net.a(x))))
    net.made = made.double()
    assert torch.isfinite(wrapped(net, how)(image())).all()


def relu_as_a_statement(net: Net, x: Tensor) -> Tensor:
    h = net.a(x)
    F.relu_(h)
    return net.b(h)


def relu_method_as_a_statement(net: Net, x: Tensor) -> Tensor:
    h = net.a(x)
    h.relu_()
    return net.b(h)


def relu_with_a_flag(net: Net, x: Tensor) -> Tensor:
    h = net.a(x)
    F.relu(h, inplace=True)
    return net.b(h)


def relu_assigned(net: Net, x: Tensor) -> Tensor:
    return net.b(F.relu(net.a(x)))


def factor_as_a_statement(net: Net, x: Tensor) -> Tensor:
    h = net.a(x)
    h.mul_(2.0)
    torch.relu_(h)
    return net.b(net.n(h))


def factor_assigned(net: Net, x: Tensor) -> Tensor:
    return net.b(net.n(F.relu(net.a(x) * 2.0)))


@each_how
@pytest.mark.parametrize("variant", ["local", "full"])
@pytest.mark.parametrize(
    ("statement", "assigned"),
    [
        (relu_as_a_statement, relu_assigned),
        (relu_method_as_a_statement, relu_assigned),
        (relu_with_a_flag, relu_assigned),
        (factor_as_a_statement, factor_assigned),
    ],
)
def test_in_place_statements(statement: Callable, assigned: Callable, variant: str, how: str) -> None:
    nets = [wrapped(Net(way), how, variant=variant) for way in (statement, assigned)]
    for _ in range(2):  # the first forward shows what is changed in place
        for net in nets:
            net.zero_grad()
            (net(image()).square().mean() + net.reverse_loss).backward()
        torch.testing.assert_close(nets[0].reverse_loss, nets[1].reverse_loss)
        for one, other in zip(nets[0].parameters(), nets[1].parameters(), strict=True):
            torch.testing.assert_close(one.grad, other.grad)
