"""What a training step of phase I costs every contestant, side by side in one process."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from ..measure import kept_bytes, ratios, step_times
from .contestants import CONTESTANTS, Contestant, fresh_network
from .results import Cost
from .training import Task


def measure_costs(
    task: Task,
    image_shape: tuple[int, int, int],
    *,
    lam: float,
    batch_size: int,
    device: torch.device,
    rounds: int,
    progress: Callable[[int], None] | None = None,
) -> dict[str, Cost]:
    """Step time (forward, backward, Adam) and bytes kept for the backward pass, as ratios to the first contestant.

    Args:
        task: its first batch is what the steps run on.
        image_shape: (channels, height, width).
        lam: λ of the contestants with a reverse loss.
        batch_size: images per step.
        device: where the steps run.
        rounds: timed steps of each contestant; they alternate.
        progress: called with the number of finished rounds after each of them.
    """
    x, y = task.train_x[:batch_size].to(device), task.train_y[:batch_size].to(device)
    classes = int(task.train_y.max()) + 1
    kept: dict[str, int] = {}
    steps: dict[str, Callable[[], object]] = {}
    for contestant in CONTESTANTS:
        network = fresh_network(image_shape, classes, seed=0).to(device)
        run = forward_of(contestant, network, lam, x, y)
        kept[contestant.name] = kept_bytes(run, network.parameters())
        steps[contestant.name] = step_of(run, torch.optim.Adam(network.parameters()))
    times = step_times(steps, rounds=rounds, device=device, progress=progress)
    base = CONTESTANTS[0].name
    return {
        name: Cost(
            milliseconds=1e3 * times[name].median,
            p20=1e3 * times[name].p20,
            p80=1e3 * times[name].p80,
            time_ratio=ratio.median,
            kept=kept[name],
            kept_ratio=kept[name] / kept[base],
        )
        for name, ratio in ratios(times, base).items()
    }


def forward_of(
    contestant: Contestant, network: torch.nn.Sequential, lam: float, x: Tensor, y: Tensor
) -> Callable[[], Tensor]:
    """One forward pass of phase I, to its loss."""
    prepared = contestant.prepare(network, lam)

    def run() -> Tensor:
        loss = F.cross_entropy(prepared(x), y)
        return loss + prepared.reverse_loss if contestant.reverse else loss  # type: ignore[operator]

    return run


def step_of(run: Callable[[], Tensor], optimiser: torch.optim.Optimizer) -> Callable[[], object]:
    """One whole training step."""

    def step() -> None:
        optimiser.zero_grad(set_to_none=True)
        run().backward()
        optimiser.step()

    return step
