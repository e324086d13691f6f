"""The report: one HTML file with everything inside it, drawn from saved results."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from html import escape
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from .curves import panel
from .images import Array, data_uri, grey_levels, save_rows, signed_levels
from .page import PAGE
from .remarks import remarks
from .results import PHASE_TITLES, PHASES, Pictures, Results, load_results
from .text import accuracy_text, models_text, phase_label, reverse_names


def write_report(folder: Path) -> Path:
    """Draws `report.html` and `reconstructions.png` from the results saved in a folder.

    Args:
        folder: what `run_demo` wrote to.

    Returns:
        The path of the report.

    Raises:
        ResultsError: the folder holds no readable results.
    """
    results, pictures = load_results(folder)
    save_rows([(label, images) for label, images, _ in reconstruction_rows(results, pictures)], folder / PICTURE)
    path = folder / "report.html"
    path.write_text(render(results, pictures), encoding="utf-8")
    return path


PICTURE = "reconstructions.png"
COLUMNS = (*(phase_label(phase) for phase in PHASES), "step time", "kept bytes")


def render(results: Results, pictures: Pictures) -> str:
    """The whole page; nothing in it refers to anything outside."""
    sections = [
        section("Accuracy and cost", accuracy_table(results), warnings(results), table_note(results)),
        section("What comes back", *reconstruction_section(results, pictures)),
        section("What the first layer looks at", *modes_section(results, pictures)),
        section("Training curves", legend(results), *curves_section(results)),
        section("How this was made", made_section(results)),
    ]
    name = results.data["name"]
    return PAGE.substitute(
        title=escape(f"Racecar training on {name}"), lead=lead(results), sections="\n".join(s for s in sections if s)
    )


def section(title: str, *parts: str) -> str:
    """A titled part of the page; empty where there is nothing to show."""
    body = "\n".join(part for part in parts if part)
    return f"<section><h2>{escape(title)}</h2>\n{body}\n</section>" if body else ""


def lead(results: Results) -> str:
    """What was done and what came out, in three sentences made from the figures."""
    names = list(results.models)
    seeds = len({run.seed for run in results.runs})
    outcome = "; ".join(
        f"{escape(phase)}: "
        + ", ".join(f"{escape(name)} {accuracy_text(*results.accuracy(name, phase))}" for name in names)
        for phase in PHASES[1:]
    )
    return (
        f"<p>{escape(results.data['description'])}. Task A is to name the class; task B is the same with "
        f"motion-blurred images. {escape(models_text(results))} Phase I trains on A, "
        f"{escape(reverse_names(results))} with the reverse loss beside the "
        f"task's; phase II goes on without it, on A (A→A) and on B (A→B).</p>"
        f"<p><strong>Test accuracy after phase II, {seeds} seed{'s' if seeds > 1 else ''}.</strong> {outcome}.</p>"
    )


def accuracy_table(results: Results) -> str:
    """Accuracy by phase and cost per step; bold where one model is clear of the others."""
    best = {phase: clear_winner(results, phase) for phase in PHASES}
    rows = []
    for i, (name, title) in enumerate(results.models.items()):
        cells = []
        for phase in PHASES:
            mean, deviation = results.accuracy(name, phase)
            text = accuracy_text(mean, deviation)
            cells.append(f"<b>{text}</b>" if name == best[phase] else text)
        cost = results.costs[name]
        cells.append(f"{cost.time_ratio:.2f} ×<small>{cost.milliseconds:.1f} ms</small>")
        cells.append(f"{cost.kept_ratio:.2f} ×<small>{megabytes(cost.kept)}</small>")
        label = f'<th scope="row"><i class="dot c{i}"></i>{escape(name)}<small>{escape(title)}</small></th>'
        # The label stands in front of the figure on a phone, where the head of the table is hidden.
        labelled = "".join(f'<td data-label="{c}">{cell}</td>' for c, cell in zip(COLUMNS, cells, strict=True))
        rows.append(f"<tr>{label}{labelled}</tr>")
    head = "".join(f"<th>{column}</th>" for column in ("model", *COLUMNS))
    return f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{"".join(rows)}</tbody></table></div>'


def clear_winner(results: Results, phase: str) -> str | None:
    """The model whose mean minus deviation exceeds every other's mean plus deviation; None where seeds cannot tell."""
    found = {name: results.accuracy(name, phase) for name in results.models}
    spreads = {name: (mean - (spread or 0.0), mean + (spread or 0.0)) for name, (mean, spread) in found.items()}
    if any(spread is None for _, spread in found.values()):
        return None
    for name, (low, _) in spreads.items():
        if all(low > high for other, (_, high) in spreads.items() if other != name):
            return name
    return None


def warnings(results: Results) -> str:
    """What looks wrong with the training, if anything."""
    return "".join(f"<p><strong>Warning.</strong> {escape(remark)}.</p>" for remark in remarks(results))


def megabytes(count: int) -> str:
    """Bytes in decimal megabytes."""
    return f"{count / 1e6:.2f} MB"


def table_note(results: Results) -> str:
    """What the table's figures are."""
    base = escape(next(iter(results.models)))
    return (
        "<p class='note'>Test accuracy after the last epoch: mean ± sample standard deviation over the seeds, which "
        "set initial weights and order of batches (the same for every model); the split of the data is the same for "
        "all. Bold: mean minus deviation lies above every other model's mean plus deviation; otherwise, and with a "
        "single seed, nothing is bold. Step time: median of one phase-I step (forward, backward, Adam), ratio to "
        f"{base} taken round by round while the models alternate. Kept bytes: what the forward pass keeps for the "
        "backward pass. In phase II all models cost the same.</p>"
    )


Row = tuple[str, Array, Callable[[Array], NDArray[np.uint8]]]


def reconstruction_rows(results: Results, pictures: Pictures) -> list[Row]:
    """Label, images and colouring: the input, then every model's reconstruction, multiplied with its gain."""
    rows: list[Row] = [("input", pictures["input"], grey_levels)]
    for name, made in results.reconstructions.items():
        images = (pictures[f"reconstruction {name}"] * made.gain).astype(np.float32)
        rows.append((f"{name}, × {made.gain:.2g}", images, grey_levels))
    return rows


def reconstruction_section(results: Results, pictures: Pictures) -> Iterable[str]:
    """Inputs, what each model gives back, and what the figure means."""
    yield picture_grid(reconstruction_rows(results, pictures))
    errors = "; ".join(
        f"{escape(name)}: {made.error:.3g} as it comes, {made.error_with_gain:.2f} with its gain"
        for name, made in results.reconstructions.items()
    )
    yield (
        "<p class='note'>The first test image of each class goes through the convolutions after phase I (seed 0) and "
        "all the way back through the same weights, transposed. No model has a decoder. A reconstruction may come "
        "back at another scale: each row is multiplied with the one number that fits the whole test set best, "
        f"given beside the name. Relative error ‖d − d′‖ / ‖d‖ over the test set: {errors}.</p>"
    )


def modes_section(results: Results, pictures: Pictures) -> Iterable[str]:
    """First-layer right singular vectors of every model beside those of the data."""
    rows: list[Row] = [("data", pictures["modes data"], signed_levels)]
    rows += [(name, pictures[f"modes {name}"], signed_levels) for name in results.models]
    yield picture_grid(rows)
    count = len(pictures["modes data"])
    shares = ", ".join(f"{escape(name)} {share:.0%}" for name, share in results.energy.items() if name != "data")
    yield (
        f"<p class='note'>Right singular vectors of the first layer as a linear map on the whole image (the matrix of "
        f"the convolution, after phase I, seed 0), strongest first, beside those of the data matrix (test images "
        f"as rows, mean not removed). Red positive, blue negative, each scaled to its largest entry. Share of the "
        f"data's energy in the span of these {count} directions: {shares}; {count} random directions hold "
        f"{count / pictures['modes data'][0].size:.0%}, the best possible "
        f"{results.energy['data']:.0%}. A convolution treats all places alike, so its strongest directions are "
        f"oscillations across the image, whatever it was trained on.</p>"
    )


def picture_grid(rows: list[Row]) -> str:
    """Rows of small images, each below its label."""
    parts = []
    for label, images, colour in rows:
        cells = "".join(f'<img alt="" src="{data_uri(colour(image))}">' for image in images)
        parts.append(f'<div class="row"><span>{escape(label)}</span><div class="cells">{cells}</div></div>')
    return f'<div class="pictures">{"".join(parts)}</div>'


def legend(results: Results) -> str:
    """Colours of the models."""
    items = "".join(f'<span><i class="dot c{i}"></i>{escape(name)}</span>' for i, name in enumerate(results.models))
    return f'<p class="legend">{items}<span class="quiet">thin: one seed, thick: mean</span></p>'


def curves_section(results: Results) -> Iterable[str]:
    """Accuracy, task loss and reverse loss by epoch, for every phase."""
    names = list(results.models)
    panels = []
    for phase in PHASES:
        series = {name: [run.accuracy for run in results.select(name, phase)] for name in names}
        panels.append(panel(f"Test accuracy, {phase_label(phase)}", series, order=names))
    for phase in PHASES:
        series = {name: [run.task_loss for run in results.select(name, phase)] for name in names}
        panels.append(panel(f"Training loss, {phase_label(phase)}", series, order=names, logarithmic=True))
    reverse = {name: [run.reverse_loss for run in results.select(name, "I")] for name in names}
    reverse = {name: curves for name, curves in reverse.items() if any(curves)}
    if reverse:
        panels.append(panel("Reverse loss (times λ), phase I", reverse, order=names, logarithmic=True))
    yield f'<div class="panels">{"".join(panels)}</div>'


def made_section(results: Results) -> str:
    """Command, seeds, versions, settings, rules applied to the data."""
    rows = {
        "command": f"<code>{escape(results.command)}</code>",
        "started": escape(f"{results.started}, took {results.seconds:.0f} s"),
        "seeds": escape(", ".join(str(seed) for seed in sorted({run.seed for run in results.runs}))),
        "phases": "<br>".join(escape(f"{phase}: {PHASE_TITLES[phase]}") for phase in PHASES),
        "data": "<br>".join(escape(line) for line in [results.data["description"], *results.data["notes"]]),
        "settings": escape(settings_text(results)),
        "versions": escape(", ".join(f"{name} {value}" for name, value in results.versions.items())),
    }
    return "<dl>" + "".join(f"<dt>{name}</dt><dd>{value}</dd>" for name, value in rows.items()) + "</dl>"


def settings_text(results: Results) -> str:
    """The settings that say something: one that is None, or off, was not set."""
    shown = {name: value for name, value in results.settings.items() if value is not None and value is not False}
    return ", ".join(f"{name} = {value}" for name, value in shown.items())
