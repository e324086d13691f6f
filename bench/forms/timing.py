"""One product in all forms that are written, checked against each other and timed."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from racecar_kernels.layer import Pool, Tied

FACTOR = (2, 2)
TIED = Tied((1, 1), ((1, 1), (1, 1)), (1, 1))  # 3x3, the size stays
POOLING = (Pool(FACTOR, FACTOR, (0, 0), (1, 1)),)
# Relative to the norm. Forms round in different orders, bfloat16 ones some of their sums as well.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-4, torch.bfloat16: 5e-2}

Run = Callable[[], Tensor]


class DifferentError(Exception):
    """Two forms of one product give different numbers."""


@dataclass(frozen=True)
class Row:
    """One product: its forms by name, and which of them the backend takes."""

    what: str
    forms: Mapping[str, Run]
    chosen: str


class Table(NamedTuple):
    """Rows for every shape; `describe` turns a shape into words."""

    title: str
    shapes: Sequence[tuple[int, ...]]
    describe: Callable[..., str]
    rows: Callable[..., list[Row]]
    needs_extension: bool


@dataclass(frozen=True)
class Timed:
    """Least CPU time in ms of every form."""

    table: str
    shape: str
    what: str
    ms: dict[str, float]
    chosen: str

    @property
    def missed(self) -> float:
        """How many times the fastest form's time the chosen one takes."""
        return self.ms[self.chosen] / min(self.ms.values())

    def as_json(self) -> dict[str, Any]:
        return {
            "table": self.table, "shape": self.shape, "what": self.what, "ms": self.ms, "chosen": self.chosen
        }  # fmt: skip


def check(row: Row) -> None:
    """Raises DifferentError where a form differs from the first one."""
    (first, run), *others = row.forms.items()
    expected = run()
    for name, other in others:
        off = float((other() - expected).double().norm() / expected.double().norm())
        if not off <= TOLERANCE[expected.dtype]:
            raise DifferentError(f"{row.what}: {name!r} differs from {first!r} by {off:.1e} of its norm")


def least(runs: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Least CPU time in ms of every run, taken alternately."""
    best = {name: float("inf") for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            start = time.thread_time()
            run()
            best[name] = min(best[name], (time.thread_time() - start) * 1e3)
    return best


def randn(*shape: int, dtype: torch.dtype) -> Tensor:
    """Random numbers in channels_last."""
    return torch.randn(*shape).to(dtype=dtype, memory_format=torch.channels_last)
