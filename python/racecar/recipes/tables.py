"""Markdown tables of what a paper reports and what was found here."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence

from ..experiments.significance import paired_differences


def comparison(
    paper: Mapping[str, Mapping[str, float]],
    here: Mapping[str, Mapping[str, Sequence[float]]],
    tasks: Sequence[str],
    digits: int = 3,
    reference: str = "paper",
) -> str:
    """A row for every model, and for every task what the paper has and what was found: mean ± standard deviation.

    Behind it stands the difference to the first model, with the p-value of a t-test paired over the seeds after Holm's
    correction for the other models.

    Args:
        paper: model -> task -> mean; what is not there the paper does not report.
        here: model -> task -> one value for every seed; without a task: –.
        tasks: columns.
        digits: behind the point.
        reference: what the paper's columns are called.
    """
    base = next(iter(here))
    head = ["model", *(f"{task} {where}" for task in tasks for where in (reference, "here", f"− {base} (p)"))]
    against = {
        task: paired_differences({name: dict(enumerate(own.get(task, ()))) for name, own in here.items()})
        for task in tasks
    }
    lines = [head, ["---"] + ["---:"] * (len(head) - 1)]
    for name, own in here.items():
        row = [name]
        for task in tasks:
            known, values, found = paper.get(name, {}).get(task), own.get(task), against[task].get(name)
            row.append("–" if known is None else number(known, digits))
            row.append("–" if not values else mean_and_deviation(values, digits))
            row.append("" if found is None else f"{signed(found.mean, digits)} ({p_value(found.adjusted)})")
        lines.append(row)
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def mean_and_deviation(values: Sequence[float], digits: int = 3) -> str:
    """'.981 ± .002', or '.981' of a single value."""
    mean = number(statistics.fmean(values), digits)
    return f"{mean} ± {number(statistics.stdev(values), digits)}" if len(values) > 1 else mean


def number(value: float, digits: int = 3) -> str:
    """'.981', '1.000'."""
    return f"{value:.{digits}f}".removeprefix("0")


def signed(value: float, digits: int = 3) -> str:
    """'+.009', '−.012'."""
    return ("+" if value >= 0 else "−") + number(abs(value), digits)


def p_value(p: float) -> str:
    """'.013', or '< .001'."""
    return "< .001" if p < 0.001 else number(p)
