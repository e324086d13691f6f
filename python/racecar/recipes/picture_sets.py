"""Image sets as the recipes want them: parts of classes, whole folders, a stand-in where the user gave none."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from ..data import DIGITS, DataError, ImageData, load_images
from ..experiments.tasks import Task

STAND_IN = "No --data was given: scikit-learn's digits stand in, enlarged, to show that it runs; no figure of a paper."


def stand_in(settings_limit: int, test_limit: int, side: int) -> ImageData:
    """The digits as colour images of side × side pixels, with a note that says so."""
    read = load_images(DIGITS, limit=settings_limit or None, test_limit=test_limit or None)

    def enlarged(x: Tensor) -> Tensor:
        return F.interpolate(x, size=side, mode="bilinear").clamp(0, 1).expand(-1, 3, -1, -1).contiguous()

    return replace(read, train_x=enlarged(read.train_x), test_x=enlarged(read.test_x), notes=(*read.notes, STAND_IN))


def in_colour(read: ImageData, side: int) -> ImageData:
    """The data, grey images in three equal channels, with a note that says so.

    Raises:
        DataError: images of another size than side × side, as arrays may be; image files have been resized.
    """
    channels, height, width = read.image_shape
    if (height, width) != (side, side):
        raise DataError(f"{read.name}: this recipe takes images of {side}×{side}, got {height}×{width}")
    if channels == 3:
        return read
    train_x, test_x = (x.expand(-1, 3, -1, -1).contiguous() for x in (read.train_x, read.test_x))
    return replace(read, train_x=train_x, test_x=test_x, notes=(*read.notes, "Grey images became colour."))


def task_of(read: ImageData) -> Task:
    """All of it as one task."""
    return Task(read.train_x, read.train_y, read.test_x, read.test_y)


def part_of(task: Task, labels: Sequence[int]) -> Task:
    """The images of some classes, which are counted from 0 again.

    Raises:
        DataError: fewer than two classes.
    """
    if len(labels) < 2:
        raise DataError(f"a part of the classes needs at least two of them, got {len(labels)}")
    places = {label: i for i, label in enumerate(labels)}

    def chosen(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        own = torch.isin(y, torch.tensor(labels))
        return x[own], torch.tensor([places[int(label)] for label in y[own]], dtype=torch.int64)

    return Task(*chosen(task.train_x, task.train_y), *chosen(task.test_x, task.test_y))


def whole(source: Path, classes: Sequence[str], size: int) -> tuple[Tensor, Tensor]:
    """All images of a folder or zip of class folders, none set aside.

    Args:
        source: the folder or zip. classes: names that it has to have; labels are their places.
        size: height and width.

    Raises:
        DataError: not readable, or other classes.
    """
    read = load_images(source, size=size, test_fraction=0.5)
    if set(read.classes) != set(classes):
        other = sorted(set(read.classes) ^ set(classes))
        raise DataError(f"{source}: its classes must be those that are trained on; these are in one of the two only: "
                        f"{', '.join(other)}")  # fmt: skip
    place = torch.tensor([list(classes).index(name) for name in read.classes])
    return torch.cat([read.train_x, read.test_x]), place[torch.cat([read.train_y, read.test_y])]
