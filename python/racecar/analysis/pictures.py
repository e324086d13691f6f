"""Arrays as pictures: rows of small images, and the figures that everything here is drawn into."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from .optional import optional

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Array = NDArray[Any]
Pixels = NDArray[np.uint8]

# Blue, near-white, red: readable on a light and on a dark page, and to colour-blind eyes.
NEGATIVE, ZERO, POSITIVE = np.array([33, 102, 172.0]), np.array([247, 247, 247.0]), np.array([178, 24, 43.0])


@dataclass(frozen=True)
class Row:
    """A row of small images.

    Attributes:
        label: in front of them.
        images: (count, channels, height, width).
        colour: one image -> its pixels.
        details: below the label, in small print.
    """

    label: str
    images: Array
    colour: Callable[[Array], Pixels]
    details: tuple[str, ...] = ()


def grey_levels(image: Array) -> Pixels:
    """(1 or 3, height, width) with 0 black and 1 white; values outside are cut."""
    levels = np.nan_to_num(image, nan=0.5).clip(0, 1) * 255
    shown: Pixels = np.round(levels).astype(np.uint8).transpose(1, 2, 0)
    return shown[..., 0] if shown.shape[2] == 1 else shown


def signed_levels(pattern: Array) -> Pixels:
    """A pattern of both signs, scaled to its largest entry: blue to red, or colours about grey for colour data."""
    finite = np.nan_to_num(pattern, nan=0.0, posinf=0.0, neginf=0.0)
    scaled = finite / max(float(np.abs(finite).max()), 1e-12)
    if len(scaled) != 1:
        return grey_levels(((scaled + 1) / 2).astype(np.float32))
    level = scaled[0][..., None].astype(np.float64)
    colours = np.where(level < 0, ZERO + (NEGATIVE - ZERO) * -level, ZERO + (POSITIVE - ZERO) * level)
    result: Pixels = np.round(colours).astype(np.uint8)
    return result


def as_images(values: Array, image_shape: Sequence[int] | None = None) -> Array:
    """(count, ...) as (count, 1 or 3, height, width).

    Args:
        values: (count, channels, height, width), (count, height, width), or anything with `image_shape`.
        image_shape: (channels, height, width) or (height, width) of every image, where it is not theirs already.

    Raises:
        ValueError: these are no images.
    """
    own = tuple(values.shape[1:])
    shape = own if image_shape is None else tuple(image_shape)
    shape = (1, *shape) if len(shape) == 2 else shape
    if len(shape) != 3 or shape[0] not in (1, 3) or np.prod(shape) != np.prod(own):
        given = "" if image_shape is None else f", and image_shape={tuple(image_shape)} does not make images of them"
        raise ValueError(
            f"drawing needs images, (1 or 3 channels, height, width); these are {own}{given}; give image_shape=, "
            "such as (1, 28, 28) for 784 values"
        )
    return values.reshape(-1, *shape)


def axes_for(ax: Axes | None, size: tuple[float, float]) -> Axes:
    """`ax`, or that of a new figure of this size in inches, which no window and no global list holds."""
    if ax is not None:
        return ax
    figure = optional("matplotlib.figure", "drawing").Figure(figsize=size, layout="constrained")
    return figure.add_subplot()


def figure_of(ax: Axes) -> Figure:
    """The whole figure, which can be saved, also where the axes are in a part of it."""
    return ax.figure.canvas.figure


def draw_rows(rows: Sequence[Row], ax: Axes | None = None) -> Figure:
    """Draws rows of images, all of one height and width, their labels in front.

    Args:
        rows: from top to bottom.
        ax: where to; None: a new figure.

    Returns:
        The figure drawn into.
    """
    count = max(len(row.images) for row in rows)
    ax = axes_for(ax, (1.7 + 0.75 * count, 0.8 * len(rows)))
    picture, centres = mosaic(rows)
    ax.imshow(picture, interpolation="nearest")
    ax.set_yticks(centres, ["\n".join((row.label, *row.details)) for row in rows])
    ax.set_xticks([])
    ax.tick_params(length=0)
    for edge in ax.spines.values():
        edge.set_visible(False)
    return figure_of(ax)


def mosaic(rows: Sequence[Row]) -> tuple[Pixels, list[float]]:
    """All images side by side on white, (height, width, 3), and the height at which the middle of every row lies."""
    height, width = rows[0].images.shape[-2:]
    gap = max(1, round(0.08 * max(height, width)))
    down, across = height + gap, width + gap
    count = max(len(row.images) for row in rows)
    picture = np.full((down * len(rows) - gap, across * count - gap, 3), 255, np.uint8)
    for i, row in enumerate(rows):
        for j, image in enumerate(row.images):
            pixels = row.colour(image)
            colours = pixels if pixels.ndim == 3 else pixels[..., None]
            picture[down * i : down * i + height, across * j : across * j + width] = colours
    return picture, [down * i + (height - 1) / 2 for i in range(len(rows))]
