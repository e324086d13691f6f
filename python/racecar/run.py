"""What belongs to one forward of a wrapped model: what the reverse pass has seen of it, and what the user reads."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

from torch import Tensor


class Report(Protocol):
    """Where a deferred layer's loss is found once a backward pass has run."""

    @property
    def ran(self) -> bool: ...

    @property
    def loss(self) -> Tensor | None: ...


@dataclass
class Run:
    """One forward under way: what the hooks have seen so far; `shapes`: of d_1 .. d_{n+1}, where they
    matter and no hook saw them."""

    reconstruct: bool = False
    targets: list[Tensor] = field(default_factory=list)
    versions: list[int] = field(default_factory=list)
    y: Tensor | None = None
    sums: list[Tensor] = field(default_factory=list)
    reports: Sequence[Report] = field(default_factory=list)
    calls: dict[int, int] = field(default_factory=dict)
    shapes: list[tuple[int, ...]] = field(default_factory=list)


@dataclass
class Result:
    """What the user reads of the last forward; `sums` and `weights` have one entry per compared layer, m = 1 first."""

    total: Tensor
    sums: Tensor | None = None
    factors: list[float] = field(default_factory=list)
    weights: Tensor | None = None
    reports: Sequence[Report] = field(default_factory=list)

    def weights_of_layers(self) -> list[Tensor]:
        """λ_m times the factor of the reduction, one scalar per compared layer."""
        return [] if self.weights is None else list(self.weights.unbind())

    def known_sums(self) -> list[Tensor | None]:
        """Σ(·)² of every compared layer; None until, and where, a deferred backward has run."""
        if not self.reports:
            return [] if self.sums is None else list(self.sums.unbind())
        ran = any(report.ran for report in self.reports) or not self.total.requires_grad
        return [report.loss if ran else None for report in self.reports]
