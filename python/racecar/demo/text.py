"""How figures are written, the same on the terminal and in the report."""

from __future__ import annotations


def accuracy_text(mean: float, deviation: float | None) -> str:
    """'.981 ± .002', or '.981' for a single seed."""
    texts = [f"{value:.3f}".removeprefix("0") for value in (mean, deviation) if value is not None]
    return " ± ".join(texts)


def phase_label(phase: str) -> str:
    """'phase I', 'A→A', 'A→B'."""
    return f"phase {phase}" if phase == "I" else phase
