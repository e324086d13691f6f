"""`python -m bench.sampling`: what a cheaper reverse pass costs and what it does, on the demo's handwritten digits.

Every way trains the demo's network on task A over some seeds, then from there on the few labels of task B, the motion
blurred images. Its cost is a step of phase I with Adam, the mean of four, timed alternately with the others.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import racecar
from racecar.bench import machine
from racecar.data import load_images
from racecar.demo.network import fresh_network
from racecar.demo.settings import Settings
from racecar.demo.tasks import tasks_of
from racecar.experiments.tasks import Task, labelled
from racecar.measure import ratios, step_times
from racecar.schedules import LamSchedule, constant, every
from racecar.transfer import new_head

BATCH = 64


@dataclass(frozen=True)
class Way:
    """One way of running the reverse pass in phase I."""

    name: str
    variant: str | None = None
    sample: racecar.Sample | None = None
    every: int = 1

    def prepare(self, net: nn.Module) -> tuple[Any, LamSchedule | None]:
        """The network, wrapped where it runs backwards, and what sets its λ."""
        if self.variant is None:
            return net, None
        wrapped = racecar.wrap(net, lam=1.0, variant=self.variant, reduction="mean", sample=self.sample)
        return wrapped, LamSchedule(wrapped, every(self.every) if self.every > 1 else constant())


WAYS = (
    Way("Std"),
    Way("RR", "full"),
    Way("RR, every 4th step", "full", every=4),
    Way("RR, half of the batch", "full", racecar.Sample(batch=2)),
    Way("RR, a quarter of the batch", "full", racecar.Sample(batch=4)),
    Way("RR local", "local"),
    Way("RR local, one layer", "local", racecar.Sample(layers=3)),
    Way("RR local, one layer, half of the batch", "local", racecar.Sample(layers=3, batch=2)),
)


def train(net: Any, schedule: LamSchedule | None, task: Task, epochs: int, seed: int) -> None:
    """Adam on cross-entropy and, where there is a schedule, the reverse loss."""
    optimiser = torch.optim.Adam(net.parameters(), lr=1e-3)
    order, step = torch.Generator().manual_seed(seed), 0
    net.train()
    for _ in range(epochs):
        for chosen in torch.randperm(len(task.train_y), generator=order).split(BATCH):
            train_step(net, schedule, optimiser, task.train_x[chosen], task.train_y[chosen], step)
            step += 1


def train_step(
    net: Any, schedule: LamSchedule | None, optimiser: torch.optim.Optimizer, x: Tensor, y: Tensor, step: int
) -> None:
    if schedule is not None:
        schedule.set(step)
    optimiser.zero_grad()
    loss = F.cross_entropy(net(x), y)
    (loss if schedule is None else loss + net.reverse_loss).backward()
    optimiser.step()


@torch.no_grad()
def accuracy(net: nn.Module, task: Task) -> float:
    return (net.eval()(task.test_x).argmax(1) == task.test_y).float().mean().item()


def accuracies(way: Way, tasks: dict[str, Task], seed: int, epochs: int, labels: int) -> tuple[float, float]:
    """After phase I on task A, and after phase II on task B."""
    a, b = tasks["A"], labelled(tasks["B"], labels, seed)
    torch.manual_seed(seed)
    net = fresh_network(tuple(a.train_x.shape[1:]), int(a.train_y.max()) + 1, seed)  # type: ignore[arg-type]
    wrapped, schedule = way.prepare(net)
    train(wrapped, schedule, a, epochs, seed)
    first = accuracy(net, a)
    if schedule is not None:
        wrapped.unwrap()
    new_head(net, int(a.train_y.max()) + 1, seed=seed)
    train(net, None, b, epochs, seed + 1000)
    return first, accuracy(net, b)


def steps_of(task: Task) -> dict[str, Callable[[], object]]:
    """Four steps of phase I each: what every 4th step does differently is in it."""
    x, y = task.train_x[:BATCH], task.train_y[:BATCH]
    steps: dict[str, Callable[[], object]] = {}
    for way in WAYS:
        net, schedule = way.prepare(fresh_network(tuple(x.shape[1:]), int(task.train_y.max()) + 1, 0))  # type: ignore[arg-type]
        optimiser = torch.optim.Adam(net.parameters(), lr=1e-3)

        def four(net: Any = net, schedule: LamSchedule | None = schedule, optimiser: Any = optimiser) -> None:
            for step in range(4):
                train_step(net, schedule, optimiser, x, y, step)

        steps[way.name] = four
    return steps


def measure(seeds: int, epochs: int, rounds: int, tell: Callable[[str], None]) -> dict[str, Any]:
    data = load_images("digits")
    settings = Settings().filled(data)
    tasks = tasks_of(data, settings)
    times = ratios(step_times(steps_of(tasks["A"]), rounds=rounds), WAYS[0].name)
    rows = []
    for way in WAYS:
        found = []
        for seed in range(seeds):
            found.append(accuracies(way, tasks, seed, epochs, settings.labels))
            tell(f"{way.name}, seed {seed}: A {found[-1][0]:.3f}, B {found[-1][1]:.3f}")
        rows.append(
            {"way": way.name, "step": times[way.name].median, "a": [a for a, _ in found], "b": [b for _, b in found]}
        )
    return {"seeds": seeds, "epochs": epochs, "rounds": rounds, "machine": machine.facts(), "rows": rows}


def table(found: dict[str, Any]) -> str:
    """Markdown: step time × Std, mean ± standard deviation of both accuracies."""
    lines = ["| phase I | step × Std | A→A | A→B |", "|---|---|---|---|"]
    for row in found["rows"]:
        a, b = (
            f"{statistics.mean(v):.3f} ± {statistics.stdev(v) if len(v) > 1 else 0:.3f}" for v in (row["a"], row["b"])
        )
        lines.append(f"| {row['way']} | {row['step']:.2f} | {a} | {b} |")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.sampling", description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--epochs", type=int, default=40)
    parser.add_argument("--rounds", type=int, default=30, help="of the timing")
    parser.add_argument("--out", type=Path, help="write the figures as JSON, too")
    given = parser.parse_args(arguments)
    if min(given.seeds, given.epochs, given.rounds) < 1:
        parser.error("--seeds, --epochs and --rounds must be at least 1")
    found = measure(given.seeds, given.epochs, given.rounds, lambda line: print(line, file=sys.stderr))
    print(table(found))
    if given.out is not None:
        given.out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
