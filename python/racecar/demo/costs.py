"""What a training step of phase I costs every contestant, side by side in one process."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from ..experiments.contestants import chosen
from ..experiments.steps import one_after_another, parts_of, step_of
from ..experiments.tasks import Task
from ..measure import kept_bytes, peak_bytes, ratios, step_times
from .results import Cost
from .settings import Settings


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
