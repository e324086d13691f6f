"""Whether a difference between two models is more than chance: paired over the seeds."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

LEVEL = 0.05


@dataclass(frozen=True)
class Difference:
    """A model's accuracy minus another's, seed by seed.

    Attributes:
        mean: of the differences.
        low, high: 95 % confidence interval of the mean (Student's t); infinite where the seeds tell nothing.
        p: two-sided p-value of the paired t-test; see `t_test` for seeds that all say the same.
        adjusted: the same after Holm's correction for the other comparisons in the same phase.
    """

    mean: float
    low: float
    high: float
    p: float
    adjusted: float

    @property
    def clear(self) -> bool:
        """Whether chance is an unlikely explanation, at the level of 5 % for all comparisons of a phase together."""
        return self.adjusted < LEVEL


def paired_differences(values: Mapping[str, Mapping[int, float]]) -> dict[str, Difference]:
    """Every model against the first, for models that share at least two seeds with it.

    Args:
        values: model -> seed -> its figure, such as an accuracy.
    """
    base = next(iter(values))
    raw: dict[str, tuple[float, float, float, float]] = {}
    for name, own in values.items():
        common = sorted(values[base].keys() & own.keys())
        if name != base and len(common) > 1:
            raw[name] = t_test([own[seed] - values[base][seed] for seed in common])
    adjusted = holm({name: found[3] for name, found in raw.items()})
    return {name: Difference(*found, adjusted[name]) for name, found in raw.items()}


def t_test(values: list[float]) -> tuple[float, float, float, float]:
    """Mean, its 95 % confidence interval, and the p-value for a true mean of 0.

    Accuracies count whole images, so a few seeds may well differ by the same amount. They have no spread for Student's
    t, which would call that certain; what is left is the sign test: of n coins all fall alike with 2^(1 - n).
    """
    from scipy.stats import t as student  # type: ignore[import-untyped]

    count = len(values)
    mean = math.fsum(values) / count
    variance = math.fsum((value - mean) ** 2 for value in values) / (count - 1)
    error = math.sqrt(variance / count)
    if error < 1e-12:
        alike = 2.0 ** (1 - count)
        reach = 0.0 if alike < LEVEL else math.inf
        return mean, mean - reach, mean + reach, alike if abs(mean) > 1e-12 else 1.0
    reach = float(student.ppf(0.5 + 0.95 / 2, count - 1)) * error
    return mean, mean - reach, mean + reach, float(2 * student.sf(abs(mean) / error, count - 1))


def holm(p_values: dict[str, float]) -> dict[str, float]:
    """Holm's step-down adjustment: the k-th smallest of n is multiplied by n - k; none lies below its forerunner."""
    adjusted: dict[str, float] = {}
    largest = 0.0
    for rank, (name, p) in enumerate(sorted(p_values.items(), key=lambda item: item[1])):
        largest = max(largest, min(1.0, p * (len(p_values) - rank)))
        adjusted[name] = largest
    return adjusted
