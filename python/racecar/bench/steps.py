"""Step time, kept bytes and peak bytes of every contestant on one network, and their ratios to plain training.

A step is forward and backward pass with fresh gradients; the optimiser's update, the same for all, is left out.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from racecar.measure import Spread, Timing, kept_bytes, peak_bytes, ratios, step_times

from .contestants import CONTESTANTS, LAM, STD, CannotRunError, Contestant, Forward
from .gradients import check_gradients
from .least import least_ratio
from .networks import Network


@dataclass(frozen=True)
class Quantiles:
    """Median, and 20th and 80th percentile."""

    median: float
    p20: float
    p80: float

    @classmethod
    def of(cls, spread: Spread) -> Quantiles:
        """Of the samples of a measurement."""
        return cls(spread.median, spread.p20, spread.p80)

    def as_json(self) -> dict[str, float]:
        return {"median": self.median, "p20": self.p20, "p80": self.p80}


@dataclass(frozen=True)
class Result:
    """One contestant on one network; ratios are to plain training in the same run.

    Attributes:
        contestant: its name.
        time: seconds of a step.
        time_ratio: the same, round by round as a multiple of plain training's.
        kept, kept_ratio: bytes alive between forward and backward pass.
        peak, peak_ratio: high-water mark of a step in bytes.
        least: the fewest multiplications that a step of its variant takes, as a multiple of plain training's.
    """

    contestant: str
    time: Quantiles
    time_ratio: Quantiles
    kept: int
    kept_ratio: float
    peak: int
    peak_ratio: float
    least: float | None = None

    def as_json(self) -> dict[str, Any]:
        return {
            "contestant": self.contestant,
            "step_seconds": self.time.as_json(),
            "step_ratio": self.time_ratio.as_json(),
            "least_ratio": self.least,
            "kept_bytes": self.kept,
            "kept_ratio": self.kept_ratio,
            "peak_bytes": self.peak,
            "peak_ratio": self.peak_ratio,
        }

    @classmethod
    def from_json(cls, entry: Mapping[str, Any]) -> Result:
        """Raises KeyError or TypeError where `entry` is something else."""
        return cls(
            contestant=str(entry["contestant"]),
            time=Quantiles(**entry["step_seconds"]),
            time_ratio=Quantiles(**entry["step_ratio"]),
            kept=int(entry["kept_bytes"]),
            kept_ratio=float(entry["kept_ratio"]),
            peak=int(entry["peak_bytes"]),
            peak_ratio=float(entry["peak_ratio"]),
            least=entry.get("least_ratio"),
        )


@dataclass(frozen=True)
class Measured:
    """One network: everybody's results, plain training's first, and who could not run, with the reason."""

    title: str
    batch: int
    results: list[Result]
    tiny: bool = False
    skipped: dict[str, str] = field(default_factory=dict)

    @property
    def heading(self) -> str:
        return f"{self.title}, batch {self.batch}" + (" (tiny input)" if self.tiny else "")

    def of(self, contestant: str) -> Result | None:
        """The result of the contestant of this name."""
        return next((r for r in self.results if r.contestant == contestant), None)

    def as_json(self) -> dict[str, Any]:
        results = [r.as_json() for r in self.results]
        return {
            "title": self.title, "batch": self.batch, "tiny": self.tiny, "results": results, "skipped": self.skipped
        }  # fmt: skip

    @classmethod
    def from_json(cls, entry: Mapping[str, Any]) -> Measured:
        """Raises KeyError or TypeError where `entry` is something else."""
        return cls(
            title=str(entry.get("title", "")),
            batch=int(entry["batch"]),
            results=[Result.from_json(r) for r in entry["results"]],
            tiny=bool(entry.get("tiny", False)),
            skipped=dict(entry.get("skipped", {})),
        )


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
    stage: Callable[[str], None] = lambda words: None,
    progress: Callable[[int], None] | None = None,
) -> Measured:
    """Checks the gradients, then measures; plain training is always among the contestants, as their base.

    Args:
        network: what is trained.
        contestants: who trains it; those of a variant that the network does not have are left out.
        batch: samples per step; the network's own by default.
        rounds: timed steps of each.
        warmup: untimed steps of each before.
        device, dtype: where, and in what.
        tiny: narrow networks and small inputs, to see that everything runs.
        stage: told in words what begins.
        progress: told the number of finished rounds.

    Raises:
        racecar.bench.gradients.WrongGradientError: before anything is measured.
    """
    chosen = [CONTESTANTS[0], *(c for c in contestants if c.name != STD and c.variant in network.variants)]
    torch.compiler.reset()  # so many compiled steps are kept at most, and others' are of no use here
    stage("checking gradients")
    skipped = check_gradients(network, chosen, device, narrow=True)
    torch.manual_seed(0)
    net = network.model(narrow=tiny).to(device, dtype)
    x = network.inputs(batch or network.batch, tiny=tiny).to(device, dtype)
    prepared: dict[str, Prepared] = {}
    for contestant in chosen:
        if contestant.name in skipped:
            continue
        stage(contestant.name)
        try:
            prepared[contestant.name] = prepare(contestant, net, x, device)
        except CannotRunError as reason:
            skipped[contestant.name] = str(reason)
    stage("timing")
    steps = {name: own.step for name, own in prepared.items()}
    times = step_times(steps, rounds=rounds, warmup=warmup, device=device, progress=progress)
    return Measured(network.title, x.shape[0], results_of(prepared, times), tiny, skipped)


@dataclass(frozen=True)
class Prepared:
    """A contestant's step, and what is known of it before it is timed: bytes, and the least multiplications."""

    step: Callable[[], None]
    kept: int
    peak: int
    least: float | None


def prepare(contestant: Contestant, net: nn.Module, x: Tensor, device: torch.device | str) -> Prepared:
    """Runs the contestant's step on a copy of the network; raises CannotRunError where it cannot."""
    own = copy.deepcopy(net)
    forward = contestant.prepare(own, x, LAM)
    step = _step(own, forward)
    step()  # what is allocated once and for all is no one's cost per step
    return Prepared(
        step,
        kept=kept_bytes(forward, own.parameters()),
        peak=peak_bytes(step, device=device),
        least=None if contestant.variant is None else least_ratio(net, x, contestant.variant),
    )


def results_of(prepared: Mapping[str, Prepared], times: Mapping[str, Timing]) -> list[Result]:
    """Everybody's figures, and their ratios to plain training's."""
    relative, std = ratios(times, STD), prepared[STD]
    base = max(1, std.peak)  # 0 where the old gradients, let go as a step begins, outweigh a tiny input's everything
    return [
        Result(
            contestant=name,
            time=Quantiles.of(times[name]),
            time_ratio=Quantiles.of(relative[name]),
            kept=own.kept,
            kept_ratio=own.kept / std.kept,
            peak=own.peak,
            peak_ratio=own.peak / base,
            least=own.least,
        )
        for name, own in prepared.items()
    ]


def _step(net: nn.Module, forward: Forward) -> Callable[[], None]:
    def step() -> None:
        net.zero_grad(set_to_none=True)
        forward().backward()

    return step
