"""What belongs to one forward of a wrapped model: what the reverse pass has seen of it, and what the user reads."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from .sampling import Drawn


def current_thread() -> int:
    """A number of its own; 0 while torch.compile traces, which does so in one."""
    return 0 if torch.compiler.is_compiling() else threading.get_ident()


class Report(Protocol):
    """Where a deferred layer's loss is found once a backward pass has run."""

    @property
    def ran(self) -> bool: ...

    @property
    def loss(self) -> Tensor | None: ...


@dataclass(frozen=True)
class Known:
    """The report of a layer whose loss is not deferred, or that did not run."""

    loss: Tensor | None
    ran: bool = False


@dataclass
class Run:
    """One forward under way: what has been seen so far.

    `shapes`: of d_1 .. d_{n+1}, where they matter and nobody saw them; `sizes`: numbers of elements, where `targets`
    holds parts; `found`: by layer, what its local reverse gave. `drawn`: which layers and what part of the batch are
    reversed, `blocks`: of how many parts, by layer. `thread`: in which it runs; 0 under torch.compile.
    """

    reconstruct: bool = False
    targets: list[Any] = field(default_factory=list)
    versions: list[int] = field(default_factory=list)
    y: Tensor | None = None
    sums: list[Tensor] = field(default_factory=list)
    reports: Sequence[Report] = field(default_factory=list)
    calls: dict[int, int] = field(default_factory=dict)
    shapes: list[tuple[int, ...]] = field(default_factory=list)
    found: dict[int, tuple[Tensor, Report | None]] = field(default_factory=dict)
    sizes: list[int] = field(default_factory=list)
    drawn: Drawn | None = None
    blocks: dict[int, int] = field(default_factory=dict)
    thread: int = field(default_factory=current_thread)


@dataclass
class Result:
    """What the user reads of the last forward; `sums` and `weights` have one entry per compared layer, m = 1 first;
    `chosen`: which of them were reversed, where not all were."""

    total: Tensor
    sums: Tensor | None = None
    factors: list[float] = field(default_factory=list)
    weights: Tensor | None = None
    reports: Sequence[Report] = field(default_factory=list)
    chosen: list[bool] | None = None

    def weights_of_layers(self) -> list[Tensor]:
        """λ_m times the factor of the reduction, one scalar per compared layer."""
        return [] if self.weights is None else list(self.weights.unbind())

    def known_sums(self) -> list[Tensor | None]:
        """Σ(·)² of every compared layer; None until, and where, a deferred backward has run."""
        if not self.reports:
            sums: list[Tensor | None] = [] if self.sums is None else list(self.sums.unbind())
            return sums if self.chosen is None else [s if c else None for s, c in zip(sums, self.chosen, strict=True)]
        ran = any(report.ran for report in self.reports) or not self.total.requires_grad
        chosen = self.chosen or [True] * len(self.reports)
        return [report.loss if ran and c else None for report, c in zip(self.reports, chosen, strict=True)]
