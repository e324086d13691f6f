"""Measured ratios as bars: step time, kept bytes and peak bytes, network by network."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib import colormaps, rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from .contestants import STD
from .steps import Measured, Result
from .targets import CPU, Target

PANELS = {"step": "step time", "kept": "kept bytes", "peak": "peak bytes"}


def draw(networks: Mapping[str, Measured], path: Path, where: str, targets: Sequence[Target] = tuple(CPU)) -> None:
    """Writes a picture: one panel per figure, all as multiples of plain training.

    A whisker spans the 20th to the 80th percentile of a step time; a diamond is the least possible ratio by
    multiplications; a black line across a bar is its target.

    Args:
        networks: what was measured.
        path: where to; its ending is the format.
        where: one line about the machine.
        targets: whose lines are drawn; for tiny inputs, which say nothing about speed, none are.
    """
    names = list(dict.fromkeys(r.contestant for m in networks.values() for r in m.results if r.contestant != STD))
    width = 0.84 / max(1, len(names))
    # a bar needs some 0.14 inches to be told from its neighbour
    figure = Figure(figsize=(max(7.0, 1.2 + 0.17 * len(names) * len(networks)), 9.5), layout="constrained")
    axes = figure.subplots(3, 1, sharex=True)
    for panel, (key, title) in zip(axes, PANELS.items(), strict=True):
        for group, (name, measured) in enumerate(networks.items()):
            for result in measured.results:
                if result.contestant == STD:
                    continue
                place = names.index(result.contestant)
                x = group + (place - (len(names) - 1) / 2) * width
                _bar(panel, key, x, width, result, _colour(place, len(names)))
                goal = None if measured.tiny else _goal(targets, name, result.contestant, key)
                if goal is not None:
                    panel.plot([x - width / 2, x + width / 2], [goal, goal], color="black", linewidth=2.2, zorder=4)
        panel.axhline(1.0, color="grey", linewidth=0.8, linestyle=":")
        panel.set_ylabel(f"{title}, × Std")
        panel.set_ylim(bottom=0)
    labels = [f"{name}\nbatch {m.batch}" + (", tiny input" if m.tiny else "") for name, m in networks.items()]
    axes[-1].set_xticks(range(len(networks)), labels, fontsize=9)
    handles: list[Line2D] = [
        Line2D([], [], color=_colour(i, len(names)), linewidth=6, label=name) for i, name in enumerate(names)
    ]
    handles.append(Line2D([], [], color="black", marker="D", markersize=4, linestyle="", label="least possible step"))
    handles.append(Line2D([], [], color="black", linewidth=2.2, label="target"))
    figure.legend(handles=handles, loc="outside upper center", ncols=3, fontsize=8, frameon=False)
    figure.supxlabel(where, fontsize=8)
    save(figure, path)


def save(figure: Figure, path: Path) -> None:
    """Writes the same bytes for the same figures; the text of an SVG stays text."""
    with rc_context({"svg.hashsalt": "racecar", "svg.fonttype": "none"}):
        figure.savefig(path, dpi=150, metadata={"Date": None} if path.suffix == ".svg" else None)


def _bar(panel: Axes, key: str, x: float, width: float, result: Result, colour: tuple[float, ...]) -> None:
    if key != "step":
        panel.bar(x, result.kept_ratio if key == "kept" else result.peak_ratio, width * 0.9, color=colour)
        return
    ratio = result.time_ratio
    panel.bar(x, ratio.median, width * 0.9, color=colour)
    panel.plot([x, x], [ratio.p20, ratio.p80], color="dimgrey", linewidth=1.2, zorder=3)
    if result.least is not None:
        panel.plot([x], [result.least], color="black", marker="D", markersize=3, linestyle="", zorder=5)


def _goal(targets: Sequence[Target], network: str, contestant: str, key: str) -> float | None:
    for target in targets:
        if target.network == network and target.contestant == contestant:
            return {"step": target.step, "kept": target.kept, "peak": target.peak}[key]
    return None


def _colour(place: int, count: int) -> tuple[float, ...]:
    """Evenly along a map whose lightness rises, so that neighbours differ for everybody."""
    colour: tuple[float, ...] = colormaps["viridis"](place / max(1, count - 1) * 0.92)
    return colour
