"""The two tasks: A, to name the class of an image; B, the same for motion-blurred images, of which few are labelled."""

from __future__ import annotations

from torch import Tensor

from ..data import ImageData, motion_blur
from ..experiments.tasks import Task, part_of_each_class
from .settings import Settings

VALIDATION_PART = 1 / 3  # of the training images, with --validate


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
