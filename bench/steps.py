"""Step time, kept bytes and peak bytes of every contestant on one network, and their ratios to plain training.

A step is forward and backward pass with fresh gradients; the optimiser's update, the same for all, is left out.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from bench.contestants import CONTESTANTS, STD, Contestant, Forward, check_gradients
from bench.networks import Network
from racecar.measure import Spread, Timing, kept_bytes, peak_bytes, ratios, step_times


@dataclass(frozen=True)
class Result:
    """One contestant on one network; ratios are to plain training in the same run."""

    contestant: str
    time: Timing
    time_ratio: Spread
    kept: int
    kept_ratio: float
    peak: int
    peak_ratio: float

    def as_json(self) -> dict[str, Any]:
        return {
            "contestant": self.contestant,
            "step_seconds": _spread(self.time),
            "step_ratio": _spread(self.time_ratio),
            "kept_bytes": self.kept,
            "kept_ratio": self.kept_ratio,
            "peak_bytes": self.peak,
            "peak_ratio": self.peak_ratio,
        }


def measure_network(
    network: Network,
    contestants: Sequence[Contestant] = CONTESTANTS,
    *,
    batch: int | None = None,
    rounds: int = 15,
    warmup: int = 2,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    tiny: bool = False,
    progress: Callable[[int], None] | None = None,
) -> list[Result]:
    """Checks the gradients, then measures; plain training is always among the contestants, as their base.

    `tiny` takes narrow networks and small inputs, to see that everything runs.

    Raises:
        bench.contestants.WrongGradientError: before anything is measured.
    """
    std = CONTESTANTS[0]
    chosen = [std, *(c for c in contestants if c.name != STD)]
    check_gradients(network, chosen, device, narrow=tiny)
    torch.manual_seed(0)
    net = network.model(narrow=tiny).to(device, dtype)
    x = network.inputs(batch or network.batch, tiny=tiny).to(device, dtype)
    kept, peak, steps = {}, {}, {}
    for contestant in chosen:
        own = copy.deepcopy(net)
        forward = contestant.prepare(own, x)
        steps[contestant.name] = _step(own, forward)
        steps[contestant.name]()  # what is allocated once and for all is no one's cost per step
        kept[contestant.name] = kept_bytes(forward, own.parameters())
        peak[contestant.name] = peak_bytes(steps[contestant.name], device=device)
    times = step_times(steps, rounds=rounds, warmup=warmup, device=device, progress=progress)
    relative = ratios(times, STD)
    return [
        Result(
            contestant=name,
            time=times[name],
            time_ratio=relative[name],
            kept=kept[name],
            kept_ratio=kept[name] / kept[STD],
            peak=peak[name],
            peak_ratio=peak[name] / peak[STD],
        )
        for name in steps
    ]


def table(title: str, results: Sequence[Result]) -> str:
    """Plain text: times in ms (20th to 80th percentile), bytes in MB, and the three ratios."""
    head = f"{'':24} {'ms per step':>24} {'x Std':>7} {'kept MB':>9} {'x Std':>7} {'peak MB':>9} {'x Std':>7}"
    lines = [title, head, "-" * len(head)]
    for r in results:
        spread = f"{r.time.median * 1e3:.2f} ({r.time.p20 * 1e3:.2f}-{r.time.p80 * 1e3:.2f})"
        lines.append(
            f"{r.contestant:24} {spread:>24} {r.time_ratio.median:7.2f} {r.kept / 1e6:9.3f} {r.kept_ratio:7.2f} "
            f"{r.peak / 1e6:9.3f} {r.peak_ratio:7.2f}"
        )
    return "\n".join(lines)


def markdown(title: str, results: Sequence[Result]) -> str:
    """The ratios of `table` as a Markdown table, for the documentation."""
    lines = [f"| {title} | step | kept | peak |", "|---|---|---|---|"]
    lines += [
        f"| {r.contestant} | {r.time_ratio.median:.2f} | {r.kept_ratio:.2f} | {r.peak_ratio:.2f} |" for r in results
    ]
    return "\n".join(lines)


def _step(net: nn.Sequential, forward: Forward) -> Callable[[], None]:
    def step() -> None:
        net.zero_grad(set_to_none=True)
        forward().backward()

    return step


def _spread(spread: Spread) -> dict[str, float]:
    return {"median": spread.median, "p20": spread.p20, "p80": spread.p80}
