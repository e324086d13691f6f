"""The two tasks: A, to name the class of an image; B, the same for motion-blurred images, of which few are labelled."""

from __future__ import annotations

import zlib
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..data import ImageData, motion_blur
from ..experiments.folder import SettingsError
from .settings import Settings

VALIDATION_PART = 1 / 3  # of the training images, with --validate


@dataclass(frozen=True)
class Task:
    """Images and labels of one task: x of shape (images, channels, height, width), y of shape (images,)."""

    train_x: Tensor
    train_y: Tensor
    test_x: Tensor
    test_y: Tensor


def tasks_of(data: ImageData, settings: Settings) -> dict[str, Task]:
    """Tasks "A" and "B", which share their images; B's are blurred.

    With `settings.validate` the test images are a third of the training images, and the data's own test images are not
    looked at: settings can then be chosen without spoiling the test.

    Raises:
        SettingsError: too few training images to validate on.
    """
    train_x, train_y, test_x, test_y = data.train_x, data.train_y, data.test_x, data.test_y
    if settings.validate:
        chosen = part_of_each_class(train_y, VALIDATION_PART)
        train_x, train_y, test_x, test_y = train_x[~chosen], train_y[~chosen], train_x[chosen], train_y[chosen]
    length = settings.blur if settings.blur is not None else 1.0

    def blurred(x: Tensor) -> Tensor:
        return motion_blur(x, length, settings.angle)

    return {
        "A": Task(train_x, train_y, test_x, test_y),
        "B": Task(blurred(train_x), train_y, blurred(test_x), test_y),
    }


def part_of_each_class(y: Tensor, part: float) -> Tensor:
    """A mask that is true for a random part of every class, at least one image of it and never all.

    Raises:
        SettingsError: a class of a single image.
    """
    mask = torch.zeros(len(y), dtype=torch.bool)
    generator = torch.Generator().manual_seed(0)
    for label in y.unique().tolist():
        own = (y == label).nonzero().flatten()
        if len(own) < 2:
            raise SettingsError("validate needs at least two training images of every class, one has a single image")
        count = min(max(1, round(part * len(own))), len(own) - 1)
        mask[own[torch.randperm(len(own), generator=generator)[:count]]] = True
    return mask


def labelled(task: Task, count: int, seed: int) -> Task:
    """The task with so many training images of every class, drawn by the seed; all of them where `count` is 0."""
    if not count:
        return task
    generator = torch.Generator().manual_seed(seed)
    kept = []
    for label in task.train_y.unique().tolist():
        own = (task.train_y == label).nonzero().flatten()
        kept.append(own[torch.randperm(len(own), generator=generator)[:count]])
    few = torch.cat(kept).sort().values
    return replace(task, train_x=task.train_x[few], train_y=task.train_y[few])


def fingerprint(tasks: dict[str, Task]) -> int:
    """A number that changes with the images or the labels, to tell whether a demo goes on with the same data."""
    crc = 0
    for task in tasks.values():
        for tensor in (task.train_x, task.train_y, task.test_x, task.test_y):
            crc = zlib.crc32(tensor.contiguous().numpy().tobytes(), crc)
    return crc
