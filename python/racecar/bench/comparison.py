"""Two files of results against each other: which figures moved, and by more than the noise."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from .results import Report, ResultsError
from .steps import Measured, Quantiles, Result

BYTES = 1e-3  # share of kept or peak bytes that comes and goes with the allocator
HEAD = ["network, contestant", "figure", "A", "B", "B / A", ""]


class Difference(NamedTuple):
    """One figure in both files; `moved`: by more than the spread of the samples, for a figure that has one."""

    network: str
    contestant: str
    figure: str
    a: float
    b: float
    moved: bool

    @property
    def ratio(self) -> float:
        """B / A."""
        return self.b / self.a if self.a else float("nan") if self.b == self.a else float("inf")


def compare(a: Report, b: Report, names: tuple[Path, Path]) -> tuple[list[Difference], list[str]]:
    """Every figure of every case that both hold, and what stands in the way of comparing them.

    A case is a network with the same batch and size of input, and a contestant. Step times and their ratios have moved
    when the ranges from 20th to 80th percentile do not overlap; bytes, which have almost no noise, when they differ by
    more than a thousandth.

    Raises:
        ResultsError: they share no case.
    """
    found: list[Difference] = []
    remarks = [
        f"A and B differ in {key}: {a.machine.get(key)} and {b.machine.get(key)}"
        for key in ("processor", "threads", "torch", "commit")
        if a.machine.get(key) != b.machine.get(key)
    ]
    for name in a.networks.keys() & b.networks.keys():
        mine, theirs = a.networks[name], b.networks[name]
        if (mine.batch, mine.tiny) != (theirs.batch, theirs.tiny) or a.dtype != b.dtype:
            remarks.append(f"{name} is not compared: {_case(mine, a)} in A, {_case(theirs, b)} in B")
    for name, mine in a.networks.items():
        theirs_or_none = b.networks.get(name)
        if theirs_or_none is None or _case(mine, a) != _case(theirs_or_none, b):
            continue
        for result in mine.results:
            other = theirs_or_none.of(result.contestant)
            if other is not None:
                found += _differences(name, result, other)
    if not found:
        raise ResultsError(f"{names[0]} and {names[1]} share no case: {_cases(a)} in the one, {_cases(b)} in the other")
    return found, sorted(remarks)


def rows(differences: list[Difference]) -> list[list[str]]:
    """Cells under HEAD."""
    return [
        [
            f"{d.network}: {d.contestant}",
            d.figure,
            _text(d.figure, d.a),
            _text(d.figure, d.b),
            f"{d.ratio:.3f}",
            ("" if not d.moved else "lower" if d.b < d.a else "HIGHER"),
        ]
        for d in differences
    ]


def _differences(network: str, a: Result, b: Result) -> list[Difference]:
    def spread(figure: str, x: Quantiles, y: Quantiles) -> Difference:
        apart = x.p80 < y.p20 or y.p80 < x.p20
        return Difference(network, a.contestant, figure, x.median, y.median, apart)

    def exact(figure: str, x: int, y: int) -> Difference:
        return Difference(network, a.contestant, figure, x, y, abs(x - y) > BYTES * x)

    return [
        spread("ms per step", a.time, b.time),
        spread("x Std", a.time_ratio, b.time_ratio),
        exact("kept MB", a.kept, b.kept),
        exact("peak MB", a.peak, b.peak),
    ]


def _case(measured: Measured, report: Report) -> str:
    return f"batch {measured.batch}, {report.dtype}" + (", tiny input" if measured.tiny else "")


def _cases(report: Report) -> str:
    return "; ".join(f"{name} ({_case(m, report)})" for name, m in report.networks.items()) or "nothing"


def _text(figure: str, value: float) -> str:
    scale = {"ms per step": 1e3, "x Std": 1.0, "kept MB": 1e-6, "peak MB": 1e-6}[figure]
    return f"{value * scale:.3f}"
