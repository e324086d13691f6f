"""`python -m bench.overhead`: µs of processor time that a layer's forward and backward take where images are tiny.

What is left is what is spent around the kernels: by plain training, by a reverse layer beside it, and by that without
the tape (`racecar_kernels/tape.py`) that replays a step which came before. The time of a layer is a twelve-layer
network's less a four-layer one's, so that what a step costs once is not in it; that of a reverse layer is a wrapped
network's less plain training's. On a GPU the processor is timed, which runs ahead: it is not waited for.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

import racecar
from racecar.bench import machine
from racecar_kernels import extension, tape

FEW, MANY = 4, 12  # layers
CHANNELS, SIDE = 8, 4
WARMUP = 5  # the first steps are recorded, and kernels compiled
CONTESTANTS = ("plain training", "full, replayed", "full, by Python", "local, replayed", "local, by Python")


def step(contestant: str, layers: int, device: str) -> Callable[[], None]:
    """Forward and backward of one contestant."""
    torch.manual_seed(0)
    modules = [m for _ in range(layers) for m in (nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1), nn.ReLU())]
    net = nn.Sequential(*modules).to(device=device, memory_format=torch.channels_last)
    x = torch.randn(1, CHANNELS, SIDE, SIDE, device=device).to(memory_format=torch.channels_last)
    variant, _, how = contestant.partition(", ")
    reverse = variant in ("full", "local")
    net = racecar.wrap(net, lam=0.1, variant=variant) if reverse else net

    def run() -> None:
        net.zero_grad()
        tape.enabled = how == "replayed"
        try:
            loss = net(x).sum()
            (loss + net.reverse_loss if reverse else loss).backward()
        finally:
            tape.enabled = True

    return run


def measure(device: str, rounds: int) -> dict[str, Any]:
    """µs per layer of every contestant, and per reverse layer; medians, taken alternately."""
    runs = {(name, n): step(name, n, device) for name in CONTESTANTS for n in (FEW, MANY)}
    taken: dict[tuple[str, int], list[float]] = {key: [] for key in runs}
    for done in range(WARMUP + rounds):
        for key, run in runs.items():
            if device == "cuda":
                torch.cuda.synchronize()  # so that the queue is empty, and nothing waits for room in it
            start = time.process_time()
            run()
            if done >= WARMUP:
                taken[key].append((time.process_time() - start) * 1e6)
    steps = {key: statistics.median(samples) for key, samples in taken.items()}
    layer = {name: (steps[name, MANY] - steps[name, FEW]) / (MANY - FEW) for name in CONTESTANTS}
    plain = layer[CONTESTANTS[0]]
    return {
        "overhead": [
            {
                "contestant": name,
                "step_us": steps[name, MANY],
                "layer_us": us,
                "reverse_us": None if name == CONTESTANTS[0] else us - plain,
            }
            for name, us in layer.items()
        ]
    }


def table(found: dict[str, Any]) -> list[list[str]]:
    """Rows of cells for people."""
    keys = ("step_us", "layer_us", "reverse_us")
    return [
        [row["contestant"], *("" if row[key] is None else f"{row[key]:.0f}" for key in keys)]
        for row in found["overhead"]
    ]


HEAD = ["", f"µs per step of {MANY} layers", "µs per layer", "µs per reverse layer"]


def from_one(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"a whole number from 1 is needed, got {text!r}")
    return int(text)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.overhead", description=__doc__)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--rounds", type=from_one, default=50, help="steps of each (default: 50)")
    parser.add_argument("--json", type=Path, metavar="OUT", help="also write what was measured to this file")
    given = parser.parse_args(arguments)
    if given.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: PyTorch sees no GPU here")
    if given.json is not None and not given.json.absolute().parent.is_dir():
        parser.error(f"--json: {given.json} cannot be written, its folder does not exist")
    torch.set_num_threads(1)
    found = measure(given.device, given.rounds)
    if extension.load() is None:
        print(f"nothing is replayed: {extension.why_not()}")
    for cells in [HEAD, *table(found)]:
        print(f"{cells[0]:<18}" + "".join(f"{cell:>26}" for cell in cells[1:]))
    if given.json is not None:
        given.json.write_text(json.dumps({**machine.facts(), "device": given.device, **found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
