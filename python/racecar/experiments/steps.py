"""One step of phase I of every contestant, to be timed or measured."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..baselines import autoencoder_stages
from .contestants import Contestant, Factors

Forward = Callable[[], Tensor]


def parts_of(
    contestant: Contestant, network: nn.Module, factors: Factors, x: Tensor, y: Tensor
) -> list[tuple[Forward, list[nn.Parameter]]]:
    """Forward passes of phase I, each to its loss, with the parameters that it trains."""
    if contestant.greedy:
        stages = autoencoder_stages(network, x[:1], seed=0)
        return [(partial(stage.loss, x), list(stage.trained_parameters())) for stage in stages]
    penalty = contestant.penalty(factors)
    prepared: Any = contestant.prepare(network, factors)

    def run() -> Tensor:
        loss = F.cross_entropy(prepared(x), y)
        if contestant.reverse:
            loss = loss + prepared.reverse_loss
        return loss if penalty is None else loss + penalty(prepared)

    return [(run, list(network.parameters()))]


def step_of(run: Forward, optimiser: torch.optim.Optimizer) -> Callable[[], object]:
    """One whole training step."""

    def step() -> None:
        optimiser.zero_grad(set_to_none=True)
        run().backward()
        optimiser.step()

    return step


def one_after_another(steps: Iterable[Callable[[], object]]) -> Callable[[], object]:
    """All of them as one."""

    def run() -> None:
        for step in steps:
            step()

    return run
