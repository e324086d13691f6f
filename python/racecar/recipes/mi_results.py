"""What a run of the recipe `mi` found: the JSON, the table beside the paper's, the planes."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ..analysis.optional import optional
from ..training.history import replace_text
from .folder import RESULTS, TABLE
from .tables import comparison

if TYPE_CHECKING:
    from matplotlib.axes import Axes

FORMAT = 1
TASKS = ("A", "AA", "AB")
SCRATCH = "from scratch"
PLANES = "planes.png"
PAPER = {  # mean accuracies of five runs, Xie & Thuerey 2020, Tables 1 and 2
    "Std": {"A": 0.967, "AA": 0.973, "AB": 0.136},
    "Ort": {"A": 0.971, "AA": 0.973, "AB": 0.973},
    "RR¹": {"A": 0.707, "AA": 0.938, "AB": 0.956},
    "RR": {"A": 0.822, "AA": 0.994, "AB": 0.997},
    SCRATCH: {"AB": 0.974},
}


def by_model(values: Sequence[Any], models: Sequence[str], seeds: int) -> dict[str, list[Any]]:
    """Values of a stack's rows, model by model."""
    return {name: list(values[i * seeds : (i + 1) * seeds]) for i, name in enumerate(models)}


def accuracies_of(
    curves: Mapping[str, Any], kinds: Sequence[str], pretrained: Sequence[str], seeds: int
) -> dict[str, dict[str, list[float]]]:
    """Model -> task -> last accuracy of every seed."""
    found: dict[str, dict[str, list[float]]] = {name: {} for name in (*pretrained, SCRATCH)}
    for name, own in by_model(curves["phase I"][-1][1], kinds, seeds).items():
        found[name]["A"] = own
    last = curves["phase II"][-1][1]
    count = len(pretrained) * seeds
    for task, part in (("AA", last[:count]), ("AB", last[count : 2 * count])):
        for name, own in by_model(part, pretrained, seeds).items():
            found[name][task] = own
    found[SCRATCH]["AB"] = last[2 * count :]
    return found


def write_results(content: dict[str, Any], folder: Path) -> None:
    """Writes `results.json`, `table.md` and `planes.png`.

    Args:
        content: ready for JSON; "accuracy", "planes", "command", "settings", "machine", "data" and "seconds" are read.
        folder: where to.
    """
    lines = [f"{json.dumps(name)}: {json.dumps(value, ensure_ascii=False)}" for name, value in content.items()]
    replace_text(folder / RESULTS, ",\n".join([f'{{"format": {FORMAT}', *lines]) + "}\n")
    replace_text(folder / TABLE, table_page(content))
    draw_planes(content["planes"]).savefig(folder / PLANES, dpi=110)


def table_page(content: Mapping[str, Any]) -> str:
    """The table and how it came about, as a Markdown page."""
    machine, settings = content["machine"], content["settings"]
    seeds = settings["seeds"]
    tested = "validation" if settings["validate"] else "test"
    return "\n".join(
        [
            f"# mi: {tested} accuracy, {seeds} seed{'s' if seeds > 1 else ''}, preset {settings['preset']}",
            "",
            comparison(PAPER, content["accuracy"], TASKS),
            "",
            "Paper: Xie & Thuerey 2020, Tables 1 and 2, mean of five runs. Here: mean ± standard deviation over the "
            "seeds; differences paired over the seeds, p of a t-test after Holm's correction.",
            "",
            f"A: {settings['epochs']} epochs, with the pretraining. AA, AB: {settings['transfer_epochs']} epochs more "
            "without it, on A and with swapped labels; Pre has seen no labels before them.",
            "",
            f"- command: `{content['command']}`",
            f"- data: {content['data']}",
            f"- machine: {machine['processor']}, {settings['threads']} of {machine['cores']} cores, "
            f"PyTorch {machine['torch']}, commit {machine['commit']}",
            f"- training took {content['seconds']:.0f} s, begun {content['started']}",
            "",
        ]
    )


def draw_planes(planes: Mapping[str, Mapping[str, Any]]) -> Any:
    """Every model's mutual-information plane, mean over the seeds.

    Args:
        planes: model -> "A" -> [[epoch, [seed][about x, about y][layer]], ...], and "before", "AA", "AB" ->
            [seed][about x, about y][layer].

    Returns:
        A figure: a column for every model; over phase I, and before and after AA and AB.
    """
    figure = optional("matplotlib.figure", "drawing").Figure(figsize=(2.3 * len(planes) + 0.6, 6.6))
    figure.subplots_adjust(left=0.075, right=0.99, bottom=0.07, top=0.95, wspace=0.06, hspace=0.08)
    grid = figure.subplots(3, len(planes), sharex=True, sharey=True, squeeze=False)
    for column, (name, own) in enumerate(planes.items()):
        over = own.get("A", [])
        for i, (_, seeds) in enumerate(over[:-1]):
            draw_layers(grid[0, column], np.mean(seeds, axis=0), "#2166ac", 0.1 + 0.5 * i / len(over))
        if "before" in own:
            draw_layers(grid[0, column], np.mean(own["before"], axis=0), "#2166ac", 1.0, numbers=True)
        for row, task in enumerate(("AA", "AB"), 1):
            if task in own:
                draw_layers(grid[row, column], np.mean(own["before"], axis=0), "#999999", 0.7)
                draw_layers(grid[row, column], np.mean(own[task], axis=0), "#b2182b", 1.0, numbers=True)
        grid[0, column].set_title(name)
        grid[2, column].set_xlabel("I(X; D), bits")
    for row, title in enumerate(("phase I, darker: later", "AA (grey: before)", "AB (grey: before)")):
        grid[row, 0].set_ylabel(f"{title}\nI(D; Y), bits")
    return figure


def draw_layers(ax: Axes, place: NDArray[np.float64], colour: str, strength: float, *, numbers: bool = False) -> None:
    """D1 .. D7 of one moment, joined by a line: (2, layers)."""
    ax.plot(place[0], place[1], color=colour, alpha=strength, linewidth=0.8, marker="o", markersize=3)
    if numbers:
        for layer, (x, y) in enumerate(place.T, 1):
            ax.annotate(str(layer), (x, y), (0, 4), textcoords="offset points", ha="center", fontsize=7, color=colour)


def gather(experiment: Any, *, kinds: Sequence[str], pretrained: Sequence[str]) -> dict[str, Any]:
    """Accuracies, curves and planes of a finished experiment, model by model."""
    state, seeds = experiment.state, experiment.settings.seeds
    planes: dict[str, dict[str, Any]] = {name: {} for name in pretrained}
    for epoch, rows in state["planes"]["phase I"]:
        for name, own in by_model(rows, kinds, seeds).items():
            planes[name].setdefault("A", []).append([epoch, own])
    (_, first), (_, last) = state["planes"]["phase II"]
    count = len(pretrained) * seeds
    for what, part in (("before", first[:count]), ("AA", last[:count]), ("AB", last[count : 2 * count])):
        for name, own in by_model(part, pretrained, seeds).items():
            planes[name][what] = own
    return {
        "accuracy": accuracies_of(state["curves"], kinds, pretrained, seeds),
        "curves": curves_of(state["curves"], kinds, pretrained, seeds),
        "planes": planes,
    }


def curves_of(curves: Mapping[str, Any], kinds: Sequence[str], pretrained: Sequence[str], seeds: int) -> dict[str, Any]:
    """Task -> model -> [[epoch, accuracy of every seed], ...]."""
    found: dict[str, dict[str, list[Any]]] = {task: {} for task in TASKS}
    count = len(pretrained) * seeds
    for epoch, values in curves["phase I"]:
        for name, own in by_model(values, kinds, seeds).items():
            found["A"].setdefault(name, []).append([epoch, own])
    for epoch, values in curves["phase II"]:
        for task, part, models in (
            ("AA", values[:count], pretrained),
            ("AB", values[count:], (*pretrained, SCRATCH)),
        ):
            for name, own in by_model(part, models, seeds).items():
                found[task].setdefault(name, []).append([epoch, own])
    return found
