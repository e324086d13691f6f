"""Whether a difference between two of the demo's models is more than chance."""

from __future__ import annotations

from ..experiments.significance import Difference, paired_differences
from .results import Results


def differences(results: Results, phase: str) -> dict[str, Difference]:
    """Every model's last accuracy against the first's, for models with an accuracy in this phase."""
    return paired_differences({name: last_by_seed(results, name, phase) for name in results.models})


def last_by_seed(results: Results, name: str, phase: str) -> dict[int, float]:
    """The last accuracies of a model, by seed."""
    return {run.seed: run.accuracy[-1] for run in results.select(name, phase) if run.accuracy}
