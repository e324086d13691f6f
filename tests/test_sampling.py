"""A cheaper reverse pass: its mean over all that may be drawn is the whole one."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import graphs
import pytest
import torch
from torch import nn

import racecar
from racecar.sampling import Drawn


def chain() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3), nn.Sigmoid())


class Branches(nn.Module):
    """No norm, whose statistics would be those of a block; a cell of its own for every kind of call."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.three = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.three(x + torch.tanh(self.two(torch.tanh(self.one(x)))))


def every(layers: int, batch: int) -> list[Drawn]:
    """Everything that may be drawn, each as likely as the other."""
    return [Drawn(g, layers, (b + 0.5) / batch, batch) for g in range(layers) for b in range(batch)]


def run(net, x: torch.Tensor, drawn: Drawn | None = None) -> tuple[torch.Tensor, list[torch.Tensor]]:
    engine = net.__dict__["_racecar_engine"]
    if drawn is not None:
        engine.sampler = SimpleNamespace(draw=lambda: drawn)
    y = net(x)
    loss = y.square().sum() + net.reverse_loss
    return net.reverse_loss.detach(), list(torch.autograd.grad(loss, list(net.parameters())))


@pytest.mark.parametrize("reduction", ["l2", "mean"])
@pytest.mark.parametrize(("layers", "batch"), [(3, 1), (2, 1), (1, 3), (2, 2)])
@pytest.mark.parametrize(
    ("model", "variant", "memory"),
    [
        (chain, "local", "store"), (chain, "local", "recompute"), (chain, "local", "deferred"),
        (chain, "full", "store"), (chain, "full", "recompute"),
        (Branches, "local", "store"), (Branches, "local", "deferred"),
    ],
)  # fmt: skip
def test_the_mean_over_all_draws_is_the_whole(model, variant, memory, layers, batch, reduction) -> None:
    if variant == "full" and layers > 1:
        layers = 1
    torch.manual_seed(0)
    net, x = model().double(), torch.randn(7, 6, dtype=torch.float64)
    given = dict(variant=variant, memory=memory, reduction=reduction)
    whole = racecar.wrap(copy.deepcopy(net), [0.3, 0.5, 0.7], **given)
    sampled = racecar.wrap(net, [0.3, 0.5, 0.7], sample=racecar.Sample(layers, batch), **given)
    _, want = run(whole, x)
    found = [run(sampled, x, drawn) for drawn in every(layers, batch)]
    for i, w in enumerate(want):
        torch.testing.assert_close(torch.stack([grads[i] for _, grads in found]).mean(0), w)
    if memory != "deferred":
        torch.testing.assert_close(torch.stack([loss for loss, _ in found]).mean(), run(whole, x)[0])


def test_what_is_drawn_is_all_that_runs_and_all_that_is_reported() -> None:
    net = racecar.wrap(chain(), 0.1, variant="local", sample=racecar.Sample(layers=3))
    assert str(net.plan).endswith("as one node")
    seen = set()
    for _ in range(30):
        net(torch.randn(4, 6))
        seen.add(tuple(net.reverse_losses))
    assert seen == {("0",), ("2",), ("4",)}


def test_draws_repeat_with_the_seed_and_leave_pytorchs_random_state() -> None:
    def names(seed: int) -> list[str]:
        net, x = (
            racecar.wrap(chain(), 0.1, variant="local", sample=racecar.Sample(layers=3, seed=seed)),
            torch.randn(4, 6),
        )
        state = torch.get_rng_state()
        found = []
        for _ in range(8):
            net(x)
            found += [*net.reverse_losses]
        assert torch.equal(torch.get_rng_state(), state)
        return found

    assert names(1) == names(1) != names(2)


def test_a_chain_runs_layer_by_layer_on_a_part_of_the_batch() -> None:
    net = racecar.wrap(chain(), 0.1, sample=racecar.Sample(batch=2))
    assert "the reverse runs on a part of the batch" in str(net.plan)
    net(torch.randn(1, 6))  # fewer images than blocks: what is there
    assert net.reverse_loss > 0


def test_a_model_with_norms_trains() -> None:
    model, x = graphs.made("residual")
    net = racecar.wrap(model, 0.1, sample=racecar.Sample(layers=2, batch=3))
    for _ in range(4):
        (net(x).sum() + net.reverse_loss).backward()
    assert all(torch.isfinite(p.grad).all() for p in net.parameters())


@pytest.mark.parametrize(
    ("given", "error", "says"),
    [
        (lambda: racecar.Sample(layers=0), ValueError, "1/layers: at least 1, got 0"),
        (lambda: racecar.Sample(batch=0.5), TypeError, "batch of a Sample must be a whole number, got 0.5"),
        (lambda: racecar.wrap(chain(), 1.0, sample=2), TypeError, "racecar.Sample, got int"),
        (
            lambda: racecar.wrap(chain(), 1.0, variant="full", sample=racecar.Sample(layers=2)),
            ValueError,
            "variant='local'",
        ),
    ],
    ids=["none", "half", "number", "full"],
)
def test_refused(given, error, says) -> None:
    with pytest.raises(error, match=says):
        given()


def test_refused_under_compile() -> None:
    net = racecar.wrap(chain(), 0.1, variant="local", sample=racecar.Sample(layers=2))
    with pytest.raises(Exception, match="draws anew in every forward.*schedules.every"):
        torch.compile(net, fullgraph=True, backend="eager")(torch.randn(2, 6))


def test_refused_under_a_checkpoint() -> None:
    net = racecar.wrap(chain(), 0.1, variant="local", sample=racecar.Sample(layers=2))
    y = torch.utils.checkpoint.checkpoint(net, torch.randn(2, 6), use_reentrant=False)
    with pytest.raises(RuntimeError, match="draws anew in every forward, and an activation checkpoint"):
        (y.sum() + net.reverse_loss).backward()
