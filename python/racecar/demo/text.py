"""How figures are written, the same on the terminal and in the report."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime

from ..experiments.significance import Difference
from .results import PHASE_TITLES, Results


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
    names = reverse_names(results)
    labelled = results.data.get("labelled")
    few = f", {labelled} labelled images" if labelled else ""
    return (
        f"phase I: task A{f', {names} with the reverse loss' if names else ''}. "
        f"phase II, without it: A→A on task A, A→B on task B (blurred{few})."
    )


def reverse_names(results: Results) -> str:
    """The models whose phase I had a reverse loss: 'RR¹, RR and RR local'; empty where none had."""
    names = [n for n in results.models if any(run.reverse_loss for run in results.select(n, "I"))]
    return joined(names)


def joined(names: Sequence[str]) -> str:
    """'RR', 'RR¹ and RR', 'RR¹, RR and RR local'."""
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)


def tested_on(results: Results) -> str:
    """What the accuracies and errors are of."""
    return "validation images" if results.data.get("validated") else "test images"


def first_images_text(results: Results) -> str:
    """Which images are shown: none was picked by hand."""
    classes = len(results.data.get("classes", ()))
    shown = "of each class" if classes <= 10 else "of each of the first ten classes"
    return f"The first of the {tested_on(results)} {shown}"


def result_text(results: Results, model: str, phase: str) -> str:
    """'.981 ± .002', or '–' for a phase without labels."""
    found = results.accuracy(model, phase)
    return "–" if found is None else accuracy_text(*found)


def difference_text(difference: Difference) -> str:
    """'+.009 (p .002)': accuracy against the first model's, and Holm's p-value."""
    return f"{signed_text(difference.mean)} (p {p_text(difference.adjusted)})"


def signed_text(value: float) -> str:
    """'+.009', '−.012'."""
    return ("+" if value >= 0 else "−") + f"{abs(value):.3f}".removeprefix("0")


def p_text(p: float) -> str:
    """'.013', or '< .001'."""
    return "< .001" if p < 0.001 else f"{p:.3f}".removeprefix("0")


def figure_text(value: float) -> str:
    """A factor or error of any size in a few digits: '0.0015', '0.38', '504', '1.2e+07'."""
    size = abs(value)
    if size >= 1e6 or size < 0.1:
        return f"{value:.2g}"
    return f"{value:.2f}" if size < 10 else f"{value:,.0f}"


def megabytes(count: int) -> str:
    """Bytes in decimal megabytes."""
    return f"{count / 1e6:.2f} MB"


def phase_text(phase: str) -> str:
    """'A→B, phase II: transferred to task B, plain'."""
    title = PHASE_TITLES[phase]
    return title if title.startswith(f"phase {phase}:") else f"{phase}, {title}"


def time_text(iso: str) -> str:
    """'2026-01-31 09:52 +01:00'; as it is where it is no time."""
    try:
        return datetime.fromisoformat(iso).isoformat(" ", "minutes").replace("+", " +")
    except ValueError:
        return iso
