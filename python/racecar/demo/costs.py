"""What a training step of phase I costs every contestant, side by side in one process."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..baselines import autoencoder_stages
from ..experiments.contestants import Contestant, chosen
from ..experiments.tasks import Task
from ..measure import kept_bytes, peak_bytes, ratios, step_times
from .results import Cost
from .settings import Settings

Forward = Callable[[], Tensor]


def measure_costs(
    task: Task,
    network: Callable[[int], nn.Sequential],
    settings: Settings,
    *,
    device: torch.device,
    rounds: int,
    progress: Callable[[int], None] | None = None,
) -> dict[str, Cost]:
    """Step time (forward, backward, Adam), bytes kept and peak bytes, as ratios to the first contestant.

    Layer-wise pretraining has one step per layer: its time is their sum, its bytes those of the largest.

    Args:
        task: its first batch is what the steps run on.
        network: seed -> fresh network.
        settings: λ, factors, batch size.
        device: where the steps run.
        rounds: timed steps of each contestant; they alternate.
        progress: called with the number of finished rounds after each of them.
    """
    x, y = task.train_x[: settings.batch_size].to(device), task.train_y[: settings.batch_size].to(device)
    contestants = chosen(settings.models)
    kept: dict[str, int] = {}
    peak: dict[str, int] = {}
    steps: dict[str, Callable[[], object]] = {}
    for contestant in contestants:
        parts = parts_of(contestant, network(0).to(device), settings, x, y)
        single = [step_of(run, torch.optim.Adam(parameters)) for run, parameters in parts]
        steps[contestant.name] = one_after_another(single)
        peak[contestant.name] = max(peak_bytes(step, device=device) for step in single)
        kept[contestant.name] = max(kept_bytes(run, parameters) for run, parameters in parts)
    times = step_times(steps, rounds=rounds, device=device, progress=progress)
    base = contestants[0].name
    return {
        name: Cost(
            milliseconds=1e3 * times[name].median,
            p20=1e3 * times[name].p20,
            p80=1e3 * times[name].p80,
            time_ratio=ratio.median,
            kept=kept[name],
            kept_ratio=kept[name] / kept[base],
            peak=peak[name],
            peak_ratio=peak[name] / peak[base],
        )
        for name, ratio in ratios(times, base).items()
    }


def parts_of(
    contestant: Contestant, network: nn.Sequential, settings: Settings, x: Tensor, y: Tensor
) -> list[tuple[Forward, list[nn.Parameter]]]:
    """Forward passes of phase I, each to its loss, with the parameters that it trains."""
    if contestant.greedy:
        stages = autoencoder_stages(network, x[:1], seed=0)
        return [(partial(stage.loss, x), list(stage.trained_parameters())) for stage in stages]
    penalty = contestant.penalty(settings)
    prepared: Any = contestant.prepare(network, settings)

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
