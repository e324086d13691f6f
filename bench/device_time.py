"""Time that the device takes, and what it can do at best: the bandwidth of a copy and the rate of a matrix product."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping

import torch

Run = Callable[[], object]

FLUSH_BYTES = 2 << 30  # beyond every L2; and long enough to write that the launches are queued when timing begins
COPIED_BYTES = 1 << 30
SIDE = 8192  # of the matrices


def medians(runs: Mapping[str, Run], device: str, rounds: int, warmup: int = 3) -> dict[str, float]:
    """Median microseconds of each, taken alternately in this process, with nothing of theirs left in the L2 cache.

    On CUDA between two events on the stream. While the cache is written over, the device is busy and the launches of
    what is timed gather behind it: launch overhead does not count as long as it is shorter than that.
    """
    for run in runs.values():
        for _ in range(warmup):
            run()
    flush = torch.empty(FLUSH_BYTES, dtype=torch.int8, device=device) if device == "cuda" else None
    taken: dict[str, list[float]] = {name: [] for name in runs}
    for done in range(rounds):
        for name in list(runs) if done % 2 == 0 else list(runs)[::-1]:
            taken[name].append(_microseconds(runs[name], flush))
    return {name: statistics.median(samples) for name, samples in taken.items()}


def _microseconds(run: Run, flush: torch.Tensor | None) -> float:
    if flush is None:
        start = time.perf_counter()
        run()
        return (time.perf_counter() - start) * 1e6
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    flush.fill_(1)
    flush.sum()  # read again, so that nothing is left to be written back while the run is timed
    begin.record()
    run()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) * 1e3


def ceilings(device: str, rounds: int, *, tiny: bool = False) -> dict[str, float]:
    """GB/s of copying a large tensor (read plus written), and TFLOP/s of a matrix product by precision."""
    source = torch.randn((1 << 12 if tiny else COPIED_BYTES) // 2, device=device, dtype=torch.bfloat16)
    target = torch.empty_like(source)
    copied = medians({"copy": lambda: target.copy_(source)}, device, rounds)["copy"]
    found = {"copy_gb_s": 2 * source.nbytes / copied / 1e3}
    side = 32 if tiny else SIDE
    for name, dtype, tf32 in (
        ("bfloat16", torch.bfloat16, True), ("tf32", torch.float32, True), ("float32", torch.float32, False),
    ):  # fmt: skip
        found[f"{name}_tflop_s"] = 2 * side**3 / _product_us(side, dtype, tf32, device, rounds) / 1e6
    return found


def _product_us(side: int, dtype: torch.dtype, tf32: bool, device: str, rounds: int) -> float:
    a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = tf32
    try:
        return medians({"product": lambda: a @ b}, device, rounds)["product"]
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


def relative_error(got: torch.Tensor, right: torch.Tensor) -> float:
    """‖got - right‖ / ‖right‖ in float64; infinite for what is not finite or has another shape."""
    if got.shape != right.shape or not bool(torch.isfinite(got).all()):
        return float("inf")
    off, norm = (got.double() - right.double()).norm(), right.double().norm()
    return float(off / norm.clamp_min(1e-30))
