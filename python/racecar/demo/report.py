"""The report: one HTML file with everything inside it, drawn from saved results."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from functools import partial
from html import escape
from pathlib import Path

from ..analysis.pictures import Row, draw_rows, grey_levels
from ..experiments.significance import Difference
from .curves import panel
from .inside import (
    information_section,
    layer_numbers,
    modes_section,
    reconstruction_rows,
    reconstruction_section,
    reversibility_section,
)
from .page import PAGE, model_label, note, picture_grid, section, table
from .remarks import remarks
from .results import PHASES, Pictures, Results, Run, load_results
from .significance import differences
from .text import (
    first_images_text,
    joined,
    megabytes,
    p_text,
    phase_label,
    phase_text,
    result_text,
    reverse_names,
    signed_text,
    tested_on,
    time_text,
)


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
    rows = reconstruction_rows(results, pictures)
    draw_rows(rows).savefig(folder / PICTURE, dpi=110)  # about 1000 pixels wide, for a README or a slide
    path = folder / "report.html"
    path.write_text(render(results, pictures), encoding="utf-8")
    return path


PICTURE = "reconstructions.png"


def render(results: Results, pictures: Pictures) -> str:
    """The whole page; nothing in it refers to anything outside."""
    sections = [
        section("Accuracy", warnings(results), accuracy_table(results), accuracy_note(results)),
        section("Cost", cost_table(results), cost_note(results)),
        section("The two tasks", *tasks_section(results, pictures)),
        section("What comes back", *reconstruction_section(results, pictures)),
        section("How well each layer comes back", *reversibility_section(results)),
        section("What the layers tell", *information_section(results)),
        section("What the first layer looks at", *modes_section(results, pictures)),
        section("Training curves", legend(results), *curves_section(results)),
        section("How this was made", made_section(results)),
    ]
    name = results.data["name"]
    return PAGE.substitute(
        title=escape(f"Racecar training on {name}"), lead=lead(results), sections="\n".join(s for s in sections if s)
    )


def lead(results: Results) -> str:
    """What was done and what came out, in sentences made from the figures."""
    names = reverse_names(results)
    reverse = (
        f": {names} with a reverse pass, in which the output runs back through the same weights and what comes back "
        f"is compared with what went in"
    )
    return (
        f"<p>One small network is trained in several ways. <strong>Phase I</strong> prepares it on task A, to name the "
        f"class of an image{escape(reverse) if names else ''}. <strong>Phase II</strong> is plain training, the same "
        f"for all, and goes on from there: on task A again (A→A), or on task B (A→B), the same classes in "
        f"motion-blurred images{escape(few_text(results))}.</p>{outcome(results)}"
        f'<p class="quiet">{escape(data_text(results))}</p>'
    )


def few_text(results: Results) -> str:
    """Names the number of labelled images of task B."""
    labelled = results.data.get("labelled")
    return f", of which only {labelled:,} are labelled" if labelled and labelled < results.data["used"][0] else ""


def data_text(results: Results) -> str:
    """What the data are, and on which part of them the figures rest."""
    text = f"{results.data['description']}."
    if not results.data.get("validated"):
        return text
    return (
        f"{text} {results.data['used'][1]:,} of the training images are set aside; accuracies and errors are of those."
    )


def outcome(results: Results) -> str:
    """Which models differ from the first beyond chance, in each part of phase II."""
    base = next(iter(results.models))
    parts = []
    for phase in PHASES[1:]:
        found = differences(results, phase)
        clear = [
            f"{name} is {abs(d.mean) * 100:.1f} points {'ahead of' if d.mean > 0 else 'behind'} {base}"
            for name, d in found.items()
            if d.clear
        ]
        if found:
            said = "; ".join(clear) or f"no clear difference to {base}"
            parts.append(f"<strong>{escape(phase)}:</strong> {escape(said)}.")
    return f"<p>{' '.join(parts)}</p>" if parts else ""


def accuracy_table(results: Results) -> str:
    """Accuracy by phase, and below it how sure the difference to the first model is; bold: the highest mean."""
    against = {phase: differences(results, phase) for phase in PHASES}
    best = {phase: highest(results, phase) for phase in PHASES}
    rows = []
    for name in results.models:
        cells = []
        for phase in PHASES:
            text = escape(result_text(results, name, phase))
            text = f"<b>{text}</b>" if name == best[phase] else text
            found = against[phase].get(name)
            cells.append(f"{text}{interval_text(found)}" if found else text)
        rows.append((model_label(results, name, title=True), cells))
    return table("Accuracy", [phase_label(phase) for phase in PHASES], rows, cards=True)


def interval_text(difference: Difference) -> str:
    """'▲ +.009 [+.004, +.014],' and below it 'p .002': an arrow where chance is an unlikely explanation."""
    arrow = ("▲ " if difference.mean > 0 else "▼ ") if difference.clear else ""
    first = f"{arrow}{signed_text(difference.mean)}"
    if math.isfinite(difference.low):
        first += f" [{signed_text(difference.low)}, {signed_text(difference.high)}]"
    look = ' class="clear"' if difference.clear else ""
    return f"<small{look}>{escape(first)}, <br>{escape(f'p {p_text(difference.adjusted)}')}</small>"


def highest(results: Results, phase: str) -> str | None:
    """The model with the highest mean; None where two share it or only one has an accuracy."""
    means = {name: found[0] for name in results.models if (found := results.accuracy(name, phase)) is not None}
    top = [name for name, mean in means.items() if mean == max(means.values())]
    return top[0] if len(top) == 1 and len(means) > 1 else None


def warnings(results: Results) -> str:
    """What looks wrong with the training, if anything."""
    return "".join(f"<p><strong>Warning.</strong> {escape(remark)}.</p>" for remark in remarks(results))


def accuracy_note(results: Results) -> str:
    """What the table's figures are."""
    base = escape(next(iter(results.models)))
    seeds = len({run.seed for run in results.runs})
    spread = f": mean ± sample standard deviation over {seeds} seeds" if seeds > 1 else ", of one seed"
    tested = any(differences(results, phase) for phase in PHASES)
    unlabelled = [name for name in results.models if results.accuracy(name, "I") is None]
    return note(
        f"Accuracy on the {tested_on(results)} after the last epoch{spread}.",
        "A seed sets the initial weights, the order of the batches and task B's labelled images, alike for every "
        "model; the split of the data is always the same. Bold: the highest mean.",
        "All are given the same number of epochs, not the same time: what a step costs is in the next table.",
        "" if tested else "A single run cannot tell a difference from chance.",
    ) + note(
        f"In small print: the difference to {base}, paired over the seeds, with its own 95% confidence interval, and "
        f"the p-value of a t-test after Holm's correction for all comparisons of the column; ▲ ▼ where p &lt; .05. "
        f"These speak of other seeds on the same split, not of other data."
        if tested
        else "",
        f"{escape(joined(unlabelled))}: phase I sees no labels, so there is no accuracy, and the last layer begins "
        f"phase II untrained."
        if unlabelled
        else "",
    )


def cost_table(results: Results) -> str:
    """What a step of phase I costs."""
    rows = []
    for name in results.models:
        cost = results.costs[name]
        cells = [
            f"{cost.time_ratio:.2f} ×<small>{cost.milliseconds:.1f} ms</small>",
            f"{cost.kept_ratio:.2f} ×<small>{megabytes(cost.kept)}</small>",
            f"{cost.peak_ratio:.2f} ×<small>{megabytes(cost.peak)}</small>",
        ]
        rows.append((model_label(results, name), cells))
    return table("Cost of a step of phase I", ["step time", "kept bytes", "peak bytes"], rows)


def cost_note(results: Results) -> str:
    """What the figures of the cost table are."""
    base = escape(next(iter(results.models)))
    greedy = [name for name in results.models if results.accuracy(name, "I") is None]
    return note(
        f"One step of phase I (forward, backward, Adam), as a ratio to {base}, and below it the figure itself. Step "
        f"time: median over rounds in which the models take turns. Kept: what the forward pass keeps for the backward "
        f"pass. Peak: the most that a step holds at once beyond what it begins with.",
        f"{escape(joined(greedy))}: one step of every layer's autoencoder; the times are added, the bytes are those of "
        f"the largest."
        if greedy
        else "",
        "In phase II all models cost the same.",
    )


def tasks_section(results: Results, pictures: Pictures) -> Iterable[str]:
    """The same images as task A and as task B have them."""
    yield picture_grid(
        [Row("task A", pictures["input"], grey_levels), Row("task B", pictures["blurred"], grey_levels)],
        what="example image",
    )
    length, angle = results.settings.get("blur"), results.settings.get("angle")
    blur = f"blurred over {length:g} pixels at {angle:g}°" if length and angle is not None else "blurred"
    labelled = results.data.get("labelled")
    yield note(
        f"{escape(first_images_text(results))}. Task B's are {blur}"
        f"{f', and {labelled:,} labelled images are there to learn it' if labelled else ''}."
    )


def legend(results: Results) -> str:
    """Colours of the models."""
    items = "".join(f'<span><i class="dot c{i}"></i>{escape(name)}</span>' for i, name in enumerate(results.models))
    several = len({run.seed for run in results.runs}) > 1
    seeds = '<span class="quiet">thin: one seed, thick: mean</span>' if several else ""
    return f'<p class="legend">{items}{seeds}</p>'


Curve = Callable[[Run], list[float]]


def loss_of_layer(run: Run, *, layer: str) -> list[float]:
    """A layer's loss by epoch; empty where the run had none."""
    return run.layer_losses.get(layer, [])


def curves_section(results: Results) -> Iterable[str]:
    """Accuracy, task loss and the losses of the layers by epoch, for every phase."""
    names = list(results.models)

    def drawn(title: str, phase: str, curve: Curve, *, logarithmic: bool = True) -> str:
        series = {name: [curve(run) for run in results.select(name, phase)] for name in names}
        series = {name: curves for name, curves in series.items() if any(curves)}
        epochs = max((len(run.task_loss) for run in results.runs if run.phase == phase), default=1)
        return panel(title, series, order=names, logarithmic=logarithmic, epochs=epochs) if series else ""

    panels = [
        drawn(f"Accuracy, {phase_label(phase)}", phase, lambda run: run.accuracy, logarithmic=False) for phase in PHASES
    ]
    panels += [drawn(f"Task loss, {phase_label(phase)}", phase, lambda run: run.task_loss) for phase in PHASES]
    for layer, number in layer_numbers(results).items():
        panels.append(drawn(f"Loss of layer {number}, phase I", "I", partial(loss_of_layer, layer=layer)))
    yield f'<div class="panels">{"".join(panels)}</div>'
    layered = [n for n in results.models if any(run.layer_losses for run in results.select(n, "I"))]
    yield note(
        f"Accuracy is on the {tested_on(results)}; task loss is the cross-entropy on the training images, without "
        f"reverse loss and penalty.",
        f"Loss of a layer ({escape(joined(layered))}): mean square of what comes back to it minus what it received, "
        f"before the factor λ, each model's own way: along the whole network, from the layer's own output, or "
        f"through its autoencoder."
        if layered
        else "",
    )


def made_section(results: Results) -> str:
    """Command, seeds, versions, settings, rules applied to the data."""
    resumed = ", the last part of a demo that was broken off before" if results.resumed else ""
    rows = {
        "command": f"<code>{escape(results.command)}</code>" if results.command else "",
        "started": escape(f"{time_text(results.started)}; took {results.seconds:.0f} s{resumed}"),
        "seeds": escape(", ".join(str(seed) for seed in sorted({run.seed for run in results.runs}))),
        "phases": "<br>".join(escape(phase_text(phase)) for phase in PHASES),
        "data": "<br>".join(escape(line) for line in [results.data["description"], *results.data["notes"]]),
        "settings": escape(settings_text(results)),
        "versions": escape("; ".join(f"{name} {value}" for name, value in results.versions.items())),
    }
    return "<dl>" + "".join(f"<dt>{name}</dt><dd>{value}</dd>" for name, value in rows.items() if value) + "</dl>"


def settings_text(results: Results) -> str:
    """The settings that say something: one that is None, empty or off was not set."""
    shown = {name: v for name, v in results.settings.items() if v is not None and v is not False and v != ""}
    return "; ".join(name if value is True else f"{name} = {value}" for name, value in shown.items())
