"""Who is measured against whom, and the check of everybody's gradients that comes before any figure."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from bench import plain
from bench.networks import Network

LAM = 1e-5
STD = "Std"

Forward = Callable[[], Tensor]


@dataclass(frozen=True)
class Contestant:
    """One way to train a network.

    Attributes:
        name: as in tables and JSON.
        variant: `full` or `local`; None for plain training.
        prepare: (network, input) -> one forward pass that returns the loss. The network is the contestant's own.
    """

    name: str
    variant: str | None
    prepare: Callable[[nn.Sequential, Tensor], Forward]


def task_loss(y: Tensor) -> Tensor:
    """Stands for any task: cheap, and its gradient reaches every output."""
    return y.square().mean()


def _std(net: nn.Sequential, x: Tensor) -> Forward:
    return lambda: task_loss(net(x))


def _plain(variant: str) -> Callable[[nn.Sequential, Tensor], Forward]:
    def prepare(net: nn.Sequential, x: Tensor) -> Forward:
        layers = plain.layers_of(net)

        def forward() -> Tensor:
            y, losses = plain.forward_and_losses(net, x, variant, layers=layers)
            return task_loss(y) + LAM * torch.stack(losses).sum()

        return forward

    return prepare


def _ours(variant: str, memory: str) -> Callable[[nn.Sequential, Tensor], Forward]:
    def prepare(net: nn.Sequential, x: Tensor) -> Forward:
        import racecar

        wrapped = racecar.wrap(net, lam=LAM, variant=variant, memory=memory)

        def forward() -> Tensor:
            y = wrapped(x)
            return task_loss(y) + wrapped.reverse_loss

        return forward

    return prepare


CONTESTANTS = [
    Contestant(STD, None, _std),
    Contestant("plain PyTorch, full", "full", _plain("full")),
    Contestant("plain PyTorch, local", "local", _plain("local")),
    Contestant("ours, full, store", "full", _ours("full", "store")),
    Contestant("ours, full, recompute", "full", _ours("full", "recompute")),
    Contestant("ours, local, store", "local", _ours("local", "store")),
    Contestant("ours, local, recompute", "local", _ours("local", "recompute")),
    Contestant("ours, local, deferred", "local", _ours("local", "deferred")),
]


REFERENCES = CONTESTANTS[1:3]  # the plain reverse passes, which the tests hold against the contract's oracle


class WrongGradientError(RuntimeError):
    """A contestant computes something else than it should; nothing about it is worth measuring."""


def gradients(contestant: Contestant, net: nn.Sequential, x: Tensor) -> list[Tensor]:
    """Gradients of the contestant's loss by every parameter of a copy of `net`, and by `x`."""
    net, x = copy.deepcopy(net), x.clone().requires_grad_()
    contestant.prepare(net, x)().backward()
    return [torch.zeros_like(t) if t.grad is None else t.grad for t in (*net.parameters(), x)]


def check_gradients(
    network: Network, contestants: Sequence[Contestant], device: torch.device | str = "cpu", *, narrow: bool = False
) -> None:
    """Holds every contestant in float64 against the plain reverse pass of its variant, on a tiny instance.

    The error is taken relative to the reverse pass's own share of the gradient, since that is what can be wrong:
    relative to the whole gradient it would hide behind the small lambda.

    Raises:
        WrongGradientError: names the contestant and how far off it is.
    """
    torch.manual_seed(0)
    net = network.model(narrow=narrow).double().to(device)
    x = network.inputs(2, tiny=True).double().to(device)
    without = gradients(CONTESTANTS[0], net, x)
    wanted = {c.variant: gradients(c, net, x) for c in REFERENCES}
    for contestant in contestants:
        if contestant.variant is None or contestant in REFERENCES:
            continue
        right = wanted[contestant.variant]
        share = _norm([r - w for r, w in zip(right, without, strict=True)])
        error = _norm([g - r for g, r in zip(gradients(contestant, net, x), right, strict=True)]) / share
        if not error < 1e-8:
            raise WrongGradientError(
                f"{contestant.name} on {network.title}: its gradient is off by {error:.1e} of the reverse pass's share "
                "in float64; no figure is reported for a contestant that is wrong"
            )


def _norm(tensors: list[Tensor]) -> float:
    return torch.stack([t.square().sum() for t in tensors]).sum().sqrt().item()
