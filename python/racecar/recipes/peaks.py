"""The images of the recipe `peak`: one of two peaks among random scribbles, 28×28, generated or from a folder.

Xie & Thuerey 2020, section 3: a class is all that the images of one label share, and everything else in them differs.
The authors' images lie in their repository; these here follow the description, and are others.
"""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ..data import DataError

SIDE = 28
PER_CLASS, TESTED = 50, 5  # for training, and for testing
SCRIBBLES = 3
# Corners of the line that a class shares, (x, y) in pixels: a peak upwards, and the same downwards.
LINES = (
    ((3, 20), (10, 20), (14, 7), (18, 20), (25, 20)),
    ((3, 8), (10, 8), (14, 21), (18, 8), (25, 8)),
)
Images = NDArray[np.float32]


def stroke(corners: NDArray[np.float64], half_width: float) -> NDArray[np.float64]:
    """A line through these points, (points, 2), with soft edges: (28, 28) from 0 to 1."""
    y, x = np.mgrid[0:SIDE, 0:SIDE].astype(np.float64)
    nearest = np.full((SIDE, SIDE), np.inf)
    for (x0, y0), (x1, y1) in pairwise(corners):
        dx, dy = x1 - x0, y1 - y0
        along = np.clip(((x - x0) * dx + (y - y0) * dy) / max(dx * dx + dy * dy, 1e-9), 0, 1)
        nearest = np.minimum(nearest, np.hypot(x - x0 - along * dx, y - y0 - along * dy))
    return np.clip(half_width + 0.5 - nearest, 0, 1)


def peak_image(label: int, random: np.random.Generator) -> NDArray[np.float64]:
    """One image of a class: its peak and `SCRIBBLES` broken lines of five points, (28, 28) in 0 .. 255."""
    image = stroke(np.array(LINES[label], np.float64), 1.0)
    for _ in range(SCRIBBLES):
        start, steps = random.uniform(1, SIDE - 2, (1, 2)), random.normal(0, 5, (4, 2))
        corners = np.clip(np.cumsum(np.concatenate([start, steps]), axis=0), 0, SIDE - 1)
        image = np.maximum(image, stroke(corners, 0.5))
    return np.round(255 * image)


def generated_peaks(seed: int = 0) -> tuple[Images, Images]:
    """Images for training and for testing: (2, 50, 784) and (2, 5, 784), by class, in 0 .. 255."""
    random = np.random.default_rng(seed)
    images = [[peak_image(label, random) for label in (0, 1)] for _ in range(PER_CLASS + TESTED)]
    found = np.array(images, np.float32).transpose(1, 0, 2, 3).reshape(2, PER_CLASS + TESTED, SIDE * SIDE)
    return found[:, :PER_CLASS], found[:, PER_CLASS:]


def read_peaks(folder: Path) -> tuple[Images, Images]:
    """The same from a folder with the images 0.png, 1.png, ... of either class in `0` and `1`, as the authors' are.

    Raises:
        DataError: a file is missing, is no image, or is not 28×28.
    """
    from PIL import Image, UnidentifiedImageError

    if not folder.is_dir():
        raise DataError(
            f"{folder} is no folder; peak takes one with the folders 0 and 1, or makes images without --data"
        )
    classes = []
    for label in ("0", "1"):
        own = []
        for number in range(PER_CLASS + TESTED):
            path = folder / label / f"{number}.png"
            try:
                with Image.open(path) as image:
                    pixels = np.asarray(image.convert("RGB"), np.float32)[..., 0]
            except FileNotFoundError as error:
                most = PER_CLASS + TESTED - 1
                raise DataError(f"{path} is missing; 0.png to {most}.png are needed of either class") from error
            except (OSError, UnidentifiedImageError) as error:
                raise DataError(f"{path} cannot be read as an image: {error}") from error
            if pixels.shape != (SIDE, SIDE):
                raise DataError(f"{path} has {pixels.shape[1]}×{pixels.shape[0]} pixels, peak needs {SIDE}×{SIDE}")
            own.append(pixels.reshape(-1))
        classes.append(np.stack(own))
    found = np.stack(classes)
    return found[:, :PER_CLASS], found[:, PER_CLASS:]
