"""When a wrapped model's chain runs as one node, what it then leaves behind, and what sends it back to the hooks."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import racecar


def network(*, dropout: float = 0.0) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Sequential(nn.Conv2d(2, 4, 3, padding=1), nn.BatchNorm2d(4, momentum=0.3), nn.ReLU(inplace=True)),
        nn.Dropout(dropout),
        nn.MaxPool2d(2),
        nn.Conv2d(4, 3, 3, padding=1),
        nn.BatchNorm2d(3, momentum=None),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(27, 5),
    ).double()


def step(net: nn.Module, x: torch.Tensor):
    """Output, losses and gradients of one step."""
    out = net(x)
    g = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out)
    total = (out * g).sum() + net.reverse_loss
    grads = torch.autograd.grad(total, list(net.parameters()))
    return [out.detach(), *net.reverse_losses.values(), *grads, *net.buffers()]


@pytest.mark.parametrize(
    "options",
    [
        dict(variant="full"),
        dict(variant="full", memory="recompute", layers=1),
        dict(variant="local"),
        dict(variant="local", memory="deferred"),
        dict(variant="local", layers=1, reduction="mean"),
        dict(variant="local", layers=1, memory="deferred", input_activation=nn.Tanh()),
    ],
)
def test_one_node_gives_what_the_hooks_give(options):
    x = torch.randn(4, 2, 7, 6, dtype=torch.float64)
    whole = racecar.wrap(network(), lam=0.3, **options)
    assert str(whole.plan).endswith("forward and reverse run as one node")
    hooked = racecar.wrap(network(), lam=0.3, **options)
    hooked[3].register_forward_hook(lambda *_: None)
    assert str(hooked.plan).endswith("layer by layer: a Conv2d in it has hooks")
    for _ in range(2):  # the second step begins with other running statistics
        for ours, theirs in zip(step(whole, x), step(hooked, x), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-10)
    assert int(whole[4].num_batches_tracked) == 2


def test_less_is_kept_than_plain_training_keeps():
    from racecar.measure import kept_bytes

    net, x = network(), torch.randn(8, 2, 6, 6, dtype=torch.float64)
    plain = kept_bytes(lambda: net(x).sum(), net.parameters())
    wrapped = racecar.wrap(copy.deepcopy(net), lam=0.1)
    assert kept_bytes(lambda: wrapped(x).sum() + wrapped.reverse_loss, wrapped.parameters()) < plain


@pytest.mark.parametrize(
    ("build", "change", "reason"),
    [
        (lambda: network(dropout=0.5), lambda net: None, "a Dropout in it does more than its reverse knows"),
        (network, lambda net: net[0].register_forward_pre_hook(lambda *_: None), "a Sequential in it has hooks"),
        (network, lambda net: net.append(nn.ReLU()), "the model was changed after wrapping"),
        (lambda: nn.Sequential(nn.AvgPool2d(2, count_include_pad=False), nn.Conv2d(2, 3, 1)), lambda net: None,
         "the average pooling in front of '1' counts in its own way"),
        (lambda: nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(4, 3))), lambda net: None,
         "the weight of '0' is parametrised"),
    ],
)  # fmt: skip
def test_what_sends_it_back_to_the_hooks(build, change, reason):
    net = racecar.wrap(build(), lam=0.1)
    change(net)
    assert net.plan.layer_by_layer == reason
    assert str(net.plan).endswith(f"layer by layer: {reason}")


def nested() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Sequential(nn.Linear(5, 4), nn.Tanh()), nn.Linear(4, 3)).double()


def test_what_changes_between_steps_is_seen():
    """Nothing that is looked at once may hide a new parameter, another λ, or a module that was replaced."""
    x = torch.randn(6, 5, dtype=torch.float64)
    net, other = racecar.wrap(nested(), lam=0.3), racecar.wrap(nested(), lam=0.3)
    other[1].register_forward_hook(lambda *_: None)

    def assert_same() -> None:
        for ours, theirs in zip(step(net, x), step(other, x), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-10)

    assert_same()
    for model in (net, other):
        model.lam = [0.1, 0.7]
    assert_same()
    for model in (net, other):
        model[1].weight = nn.Parameter(model[1].weight.detach() * 2)
    assert_same()
    for model in (net, other):
        nn.utils.parametrizations.weight_norm(model[1])
    assert_same()
    assert net.plan.layer_by_layer is None
    net[0][1] = nn.ReLU()
    assert net.plan.layer_by_layer == "the model was changed after wrapping"


def test_a_copy_has_its_own_lam():
    net, x = racecar.wrap(nested(), lam=0.3), torch.randn(6, 5, dtype=torch.float64)
    net(x)
    twin = copy.deepcopy(net)
    for lam in (0.2, 0.4):  # as often as the original's was set, and once more
        twin.lam = lam
    twin(x)
    net(x)
    torch.testing.assert_close(twin.reverse_loss * 0.3, net.reverse_loss * 0.4)


def test_frozen_norms_and_eval_dropout_are_no_obstacle():
    net = racecar.wrap(network(dropout=0.5), lam=0.1)
    net[1].eval()
    net[4].eval()
    before = net[4].running_mean.clone()
    net(torch.randn(4, 2, 7, 6, dtype=torch.float64))
    assert net.plan.layer_by_layer is None and torch.equal(net[4].running_mean, before)


def test_autocast_goes_layer_by_layer():
    net = racecar.wrap(network().float(), lam=0.1)
    with torch.autocast("cpu", torch.bfloat16):
        out = net(torch.randn(4, 2, 7, 6))
    assert out.dtype == torch.bfloat16 and net.reverse_loss.dtype == torch.float32


def test_running_norms_go_layer_by_layer():
    net = racecar.wrap(network(), lam=0.1, norm="running")
    assert net.plan.layer_by_layer == "a BatchNorm2d in it does more than its reverse knows"


def test_one_value_per_channel_is_refused_as_plain_training_refuses_it():
    net = racecar.wrap(nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.ReLU(), nn.Linear(5, 3)), lam=1.0)
    with pytest.raises(ValueError, match="Expected more than 1 value per channel when training"):
        net(torch.randn(1, 6))
    assert int(net[1].num_batches_tracked) == 0
