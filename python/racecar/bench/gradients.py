"""The check of everybody's gradients that comes before any figure: a contestant that is wrong gets none."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from racecar.measure import Spread

from .contestants import CONTESTANTS, LAM, REFERENCES, CannotRunError, Contestant, Forward
from .networks import Network

SEEDS = 7
EXACT = 1e-8
SINGLE = 2.0  # times what plain PyTorch's own float32 gradient is off


class WrongGradientError(RuntimeError):
    """A contestant computes something else than it should; nothing about it is worth measuring."""


class Prepared:
    """A contestant on its own copy of a network, whose parameters and input can be drawn anew.

    Prepared once per dtype, so that what is compiled is compiled once.
    """

    def __init__(self, contestant: Contestant, net: nn.Module, x: Tensor, lam: float) -> None:
        self.net, self.x = copy.deepcopy(net), x.clone().requires_grad_()
        self.leaves = [*self.net.parameters(), self.x]
        self.forward: Forward = contestant.prepare(self.net, self.x, lam)

    def gradients(self, values: Sequence[Tensor], *, by_input: bool = True) -> list[Tensor]:
        """Of the contestant's loss by every parameter and by the input, at these values of theirs, in float64.

        Without `by_input` the input asks for no gradient, as in a step that is measured, and the list ends before it.
        """
        self.x.requires_grad_(by_input)
        with torch.no_grad():
            for leaf, value in zip(self.leaves, values, strict=True):
                leaf.copy_(value)
                leaf.grad = None
        torch.manual_seed(1)  # dropout draws the same for everybody
        self.forward().backward()
        asked = self.leaves if by_input else self.leaves[:-1]
        return [torch.zeros_like(t).double() if t.grad is None else t.grad.double() for t in asked]


def gradients(contestant: Contestant, net: nn.Module, x: Tensor, lam: float = LAM) -> list[Tensor]:
    """Gradients of the contestant's loss by every parameter of a copy of `net`, and by `x`."""
    return Prepared(contestant, net, x, lam).gradients([*net.parameters(), x])


def ways(contestant: Contestant) -> tuple[bool, ...]:
    """Whether the input asks for a gradient: both, since other code may run where it does not, as in a measured step.

    What is compiled is checked as it is measured: its compiler would work once more for the other way.
    """
    return (False,) if contestant.compiled else (True, False)


def check_gradients(
    network: Network,
    contestants: Sequence[Contestant],
    device: torch.device | str = "cpu",
    *,
    narrow: bool = False,
    single: bool = True,
) -> dict[str, str]:
    """Holds every contestant against the plain reverse pass of its variant, on a small instance.

    Both where the input asks for a gradient and where, as in a measured step, it does not (see `ways`). In float64 the
    two must agree, if the contestant computes in it; the error is taken relative to the reverse pass's own share of the
    gradient, since that is what can be wrong: relative to the whole gradient it would hide behind the small λ. In
    float32 (`single`), with λ = 1 for the same reason, a contestant may be off from the float64 gradient by at most
    twice what plain PyTorch's float32 is off, norm-wise, over seven draws of all parameters and inputs: its median,
    against plain PyTorch's 80th percentile. Median and percentile are close but for deep chains of batch norms, where
    now and then a ReLU falls on the other side of zero in float32, and the error is a hundred times that of other
    draws, for anybody.

    Returns:
        contestant -> why it cannot run here, for those that cannot.

    Raises:
        WrongGradientError: names the contestant and how far off it is.
    """
    torch.manual_seed(0)
    net = (network.checked() if narrow else network.model()).double().to(device)
    x = network.inputs(4, tiny=True).double().to(device)
    skipped: dict[str, str] = {}
    without = gradients(CONTESTANTS[0], net, x)
    for reference in REFERENCES:
        if reference.variant not in network.variants:
            continue
        judged = [c for c in contestants if c.variant == reference.variant and c.name != reference.name]
        if not judged:
            continue
        right = gradients(reference, net, x)
        for contestant in judged:
            try:
                if contestant.double:
                    _check_double(network, contestant, net, x, right, without)
                else:
                    Prepared(contestant, copy.deepcopy(net).float(), x.float(), LAM)
            except CannotRunError as reason:
                skipped[contestant.name] = str(reason)
        if single:
            _check_single(network, reference, [c for c in judged if c.name not in skipped], net, x)
    return skipped


def _check_double(
    network: Network, contestant: Contestant, net: nn.Module, x: Tensor, right: list[Tensor], without: list[Tensor]
) -> None:
    """float64 against `right`, of the plain reverse pass; `without`: of no reverse pass."""
    prepared = Prepared(contestant, net, x, LAM)
    for by_input in ways(contestant):
        got = prepared.gradients([*net.parameters(), x], by_input=by_input)
        share = _distance(right[: len(got)], without[: len(got)])
        off = _distance(got, right[: len(got)]) / share
        if not off < EXACT:
            raise WrongGradientError(
                f"{_called(contestant, network, by_input)}: its gradient is off by {off:.1e} of the reverse pass's "
                "share in float64; no figure is reported for a contestant that is wrong"
            )


def _check_single(
    network: Network, reference: Contestant, judged: Sequence[Contestant], net: nn.Module, x: Tensor
) -> None:
    """float32 against the float64 truth, beside what plain PyTorch's float32 makes of it."""
    plain, truth = (Prepared(reference, copy.deepcopy(net).to(t), x.to(t), 1.0) for t in (torch.float32, torch.float64))
    everybody = [(c, Prepared(c, copy.deepcopy(net).float(), x.float(), 1.0)) for c in judged]
    own: dict[bool, list[float]] = {True: [], False: []}
    errors: dict[tuple[str, bool], list[float]] = {(c.name, way): [] for c in judged for way in ways(c)}
    for seed in range(SEEDS):
        values = _drawn(network, net, x, seed)
        right, theirs = truth.gradients(values), plain.gradients(values)
        for by_input in own:
            own[by_input].append(_relative(theirs if by_input else theirs[:-1], right))
        for contestant, prepared in everybody:
            for by_input in ways(contestant):
                got = prepared.gradients(values, by_input=by_input)
                errors[contestant.name, by_input].append(_relative(got, right))
    for contestant in judged:
        for by_input in ways(contestant):
            error, usual = Spread(tuple(errors[contestant.name, by_input])).median, Spread(tuple(own[by_input])).p80
            if not error <= SINGLE * usual:
                raise WrongGradientError(
                    f"{_called(contestant, network, by_input)}: its float32 gradient is off by {error:.1e}, plain "
                    f"PyTorch's by {usual:.1e}, and at most twice that is allowed; no figure is reported for a "
                    "contestant that is wrong"
                )


def _called(contestant: Contestant, network: Network, by_input: bool) -> str:
    return f"{contestant.name} on {network.title}" + ("" if by_input else ", whose input asks for no gradient")


def _drawn(network: Network, net: nn.Module, x: Tensor, seed: int) -> list[Tensor]:
    """Parameters near those of `net` and an input, exact in float32, so that both dtypes see the same numbers."""
    generator = torch.Generator().manual_seed(seed)
    drawn = []
    for leaf in (*net.parameters(), x):
        noise = torch.randn(leaf.shape, generator=generator, dtype=torch.float32)
        near = 0.1 * noise * float(leaf.detach().abs().mean()) + leaf.detach().cpu() if leaf is not x else noise
        drawn.append(near.float().to(leaf.device))
    return drawn


def _relative(got: Sequence[Tensor], right: Sequence[Tensor]) -> float:
    """How far off, of what there is of `right`."""
    return _distance(got, right[: len(got)]) / _norm(right[: len(got)])


def _distance(a: Sequence[Tensor], b: Sequence[Tensor]) -> float:
    return _norm([left - right for left, right in zip(a, b, strict=True)])


def _norm(tensors: Sequence[Tensor]) -> float:
    return torch.stack([t.square().sum() for t in tensors]).sum().sqrt().item()
