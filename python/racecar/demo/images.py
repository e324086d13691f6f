"""Arrays as pictures: pixels inlined into the page, and one figure as a file of its own."""

from __future__ import annotations

import base64
import io
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

Array = NDArray[np.float32]

# Blue, near-white, red: readable on a light and on a dark page, and to colour-blind eyes.
NEGATIVE, ZERO, POSITIVE = np.array([33, 102, 172.0]), np.array([247, 247, 247.0]), np.array([178, 24, 43.0])


def grey_levels(image: Array) -> NDArray[np.uint8]:
    """(1 or 3, height, width) with 0 black and 1 white; values outside are cut."""
    levels = np.nan_to_num(image, nan=0.5).clip(0, 1) * 255
    shown: NDArray[np.uint8] = np.round(levels).astype(np.uint8).transpose(1, 2, 0)
    return shown[..., 0] if shown.shape[2] == 1 else shown


def signed_levels(pattern: Array) -> NDArray[np.uint8]:
    """A pattern of both signs, scaled to its largest entry: blue to red, or colours about grey for colour data."""
    finite = np.nan_to_num(pattern, nan=0.0, posinf=0.0, neginf=0.0)
    scaled = finite / max(float(np.abs(finite).max()), 1e-12)
    if len(scaled) != 1:
        return grey_levels(((scaled + 1) / 2).astype(np.float32))
    level = scaled[0][..., None].astype(np.float64)
    colours = np.where(level < 0, ZERO + (NEGATIVE - ZERO) * -level, ZERO + (POSITIVE - ZERO) * level)
    result: NDArray[np.uint8] = np.round(colours).astype(np.uint8)
    return result


def data_uri(pixels: NDArray[np.uint8]) -> str:
    """PNG bytes as a data: URI, one pixel per pixel; the page enlarges them without smoothing."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")


def save_rows(rows: list[tuple[str, Array]], path: Path) -> None:
    """Rows of images with a label in front as one PNG on white, about 1000 pixels wide, for a README or a slide.

    Args:
        rows: (label, images of shape (count, channels, height, width), 0 black to 1 white).
        path: file to write.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    count = max(len(images) for _, images in rows)
    figure = Figure(figsize=(1.7 + 0.75 * count, 0.8 * len(rows)), facecolor="white", layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.add_gridspec(len(rows), count + 1, width_ratios=[1.7 / 0.75, *[1] * count])
    for row, (label, images) in enumerate(rows):
        words = figure.add_subplot(grid[row, 0])
        words.text(1.0, 0.5, label, ha="right", va="center", fontsize=11, transform=words.transAxes)
        words.axis("off")
        for column, image in enumerate(images):
            axes = figure.add_subplot(grid[row, column + 1])
            axes.imshow(grey_levels(image), cmap="gray", vmin=0, vmax=255, interpolation="nearest")
            axes.axis("off")
    figure.savefig(path, dpi=110)
