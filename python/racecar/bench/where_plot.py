"""What every contestant keeps, as stacked bars by kind of tensor: the picture beside the table of `where`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib import colormaps
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from .plot import save
from .where import Row


def draw(networks: Mapping[str, Mapping[str, Sequence[Row]]], path: Path) -> None:
    """Writes a picture, one panel per network.

    Args:
        networks: title -> contestant -> what it keeps.
        path: where to; its ending is the format.
    """
    roles = list(dict.fromkeys(r.role for own in networks.values() for rows in own.values() for r in rows))
    colours = {role: colormaps["tab20"](i % 20) for i, role in enumerate(roles)}
    height = 1.6 + sum(0.9 + 0.42 * len(own) for own in networks.values())
    figure = Figure(figsize=(8.5, height), layout="constrained")
    panels = figure.subplots(len(networks), 1, squeeze=False)[:, 0]
    for panel, (title, own) in zip(panels, networks.items(), strict=True):
        for place, rows in enumerate(own.values()):
            left = 0.0
            for role in roles:
                for row in rows:
                    if row.role == role:  # layer by layer, so that the white lines tell them apart
                        panel.barh(
                            place, row.kept / 1e6, left=left, color=colours[role], edgecolor="white", linewidth=0.4
                        )
                        left += row.kept / 1e6
        panel.set_yticks(range(len(own)), list(own), fontsize=8)
        panel.invert_yaxis()
        panel.set_title(title.split(":")[0], fontsize=9)
        panel.set_xlabel("MB kept for the backward pass", fontsize=8)
    handles = [Patch(color=colours[role], label=role) for role in roles]
    figure.legend(handles=handles, loc="outside lower center", ncols=4, fontsize=8, frameon=False)
    save(figure, path)
