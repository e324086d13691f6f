"""`python -m bench.forms`: the forms of a transposed convolution behind an undone 2x2 pooling, shape by shape.

One thread and the least of several runs in its own CPU time, so that a busy machine disturbs little. The bounds in
`racecar_kernels/transposed.py` come from this table.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Mapping
from dataclasses import replace

import torch
from torch import Tensor

from racecar_kernels import transposed, undo, weight_gradient
from racecar_kernels.layer import Pool, Tied

# batch, channels of the source y, channels of the result u, side of the source
SHAPES = [
    (64, 64, 1, 14), (64, 64, 3, 14), (64, 64, 8, 14), (64, 1, 64, 7), (64, 64, 64, 7), (64, 64, 64, 14),
    (16, 64, 64, 16), (16, 128, 128, 8), (16, 256, 256, 4), (16, 512, 512, 2), (16, 512, 512, 1),
    (1, 64, 64, 112), (1, 128, 128, 56), (1, 256, 256, 28), (1, 512, 512, 14),
]  # fmt: skip
FACTOR = (2, 2)
TIED = Tied((1, 1), ((1, 1), (1, 1)), (1, 1))
POOLING = (Pool(FACTOR, FACTOR, (0, 0), (1, 1)),)


def least(runs: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Least CPU time in ms of every run, taken alternately."""
    best = {name: float("inf") for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            start = time.thread_time()
            run()
            best[name] = min(best[name], (time.thread_time() - start) * 1e3)
    return best


def forms(batch: int, c_y: int, c_u: int, side: int) -> dict[str, dict[str, Callable[[], object]]]:
    """Forward, gradient of the source and gradient of the weight, in every form that is written."""
    last = torch.channels_last
    weight = torch.randn(c_y, c_u, 3, 3).to(memory_format=last)
    y = torch.randn(batch, c_y, side, side).to(memory_format=last)
    g = torch.randn(batch, c_u, 2 * side, 2 * side).to(memory_format=last)
    big, shape = (batch, c_y, 2 * side, 2 * side), tuple(g.shape)
    wide = replace(TIED, stride=FACTOR)

    def source() -> Tensor:
        return undo.apply(y, POOLING, big)

    def plain_backward(**needs: bool) -> object:
        grad_s, grad_w = weight_gradient.backward(g, source(), weight, TIED, **needs)
        return grad_w if grad_s is None else undo.adjoint(grad_s, y, POOLING, big)

    no_weight, no_source = {"needs_weight": False}, {"needs_source": False}
    return {
        "forward": {
            "plain": lambda: transposed.plain(source(), weight, TIED, shape),
            "strided": lambda: transposed.plain(y, transposed.fold(weight, FACTOR), wide, shape),
            "polyphase": lambda: transposed.polyphase(y, weight, TIED, shape, FACTOR),
        },
        "source gradient": {
            "plain": lambda: plain_backward(**no_weight),
            "folded": lambda: weight_gradient.backward(g, y, weight, TIED, FACTOR, **no_weight),
        },
        "weight gradient": {
            "plain": lambda: plain_backward(**no_source),
            "folded": lambda: weight_gradient.backward(g, y, weight, TIED, FACTOR, **no_source),
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.forms", description=__doc__)
    parser.add_argument("--rounds", type=int, default=7, help="runs of each form; the least counts (default: 7)")
    rounds = parser.parse_args().rounds
    torch.set_num_threads(1)
    torch.manual_seed(0)
    for shape in SHAPES:
        print(f"batch {shape[0]}, {shape[1]} -> {shape[2]} channels, source {shape[3]}x{shape[3]}, ms:")
        for what, runs in forms(*shape).items():
            times = least(runs, rounds)
            chosen = ", ".join(f"{name} {ms:.2f}" for name, ms in times.items())
            print(f"  {what:<16} {chosen}")


if __name__ == "__main__":
    main()
