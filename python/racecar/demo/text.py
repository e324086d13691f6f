"""How figures are written, the same on the terminal and in the report."""

from __future__ import annotations

from .results import Results


def accuracy_text(mean: float, deviation: float | None) -> str:
    """'.981 ± .002', or '.981' for a single seed."""
    texts = [f"{value:.3f}".removeprefix("0") for value in (mean, deviation) if value is not None]
    return " ± ".join(texts)


def phase_label(phase: str) -> str:
    """'phase I', 'A→A', 'A→B'."""
    return f"phase {phase}" if phase == "I" else phase


def models_text(results: Results) -> str:
    """'Std: plain training. RR: trained with its reverse pass (full).'"""
    return " ".join(f"{name}: {title}." for name, title in results.models.items())


def phases_text(results: Results) -> str:
    """What the phases are, in one line."""
    return (
        f"phase I: task A, {reverse_names(results)} with the reverse loss. "
        f"phase II, without it: A→A on task A, A→B on task B (blurred)."
    )


def reverse_names(results: Results) -> str:
    """The models whose phase I had a reverse loss."""
    return " and ".join(name for name in results.models if any(run.reverse_loss for run in results.select(name, "I")))
