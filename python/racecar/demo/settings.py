"""What the demo is asked to do: every option, its default and its check."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass, replace

from ..data import DIGITS, ImageData

LARGEST_SIZE = 256  # the demo's network at 256×256 takes 64 times the work per image that it takes at 32×32


class SettingsError(ValueError):
    """An option with a value that cannot be used; the message says what was given and what would be right."""


@dataclass(frozen=True)
class Settings:
    """Options of one demo.

    Attributes:
        data: "digits" or a path; see `racecar.data.load_images`.
        seeds: how many seeds; they are 0 .. seeds - 1.
        epochs: of every phase; None: 40 for the digits, 5 for other data.
        lam: λ of the reverse loss in phase I, with the "mean" reduction.
        batch_size: images per step.
        learning_rate: of Adam, in every phase.
        blur: length of task B's motion blur in pixels; None: three eighths of the image's width.
        angle: its direction in degrees, counter-clockwise from horizontal.
        limit: at most so many training images and half as many test images; None: all digits, 3000 of other data.
        size: image files are cropped and resized to size×size, at most 256; None: a longer side above 32 is shrunk
            to 32.
        accelerator: Lightning's name of the device: "cpu", "gpu", "auto".
        threads: CPU threads, at most one per CPU. One by default: an operation of this small network takes
            microseconds, so that a second thread gains little on a quiet machine, and on a busy one waiting for it
            was seen to cost ten times the step.
        quick: two seeds, two epochs, at most 1000 images of other data than the digits: shows that everything runs, and
            nothing else.
    """

    data: str = DIGITS
    seeds: int | None = None
    epochs: int | None = None
    lam: float = 0.1
    batch_size: int = 64
    learning_rate: float = 1e-3
    blur: float | None = None
    angle: float = 15.0
    limit: int | None = None
    size: int | None = None
    accelerator: str = "cpu"
    threads: int = 1
    quick: bool = False

    def __post_init__(self) -> None:
        for name in ("seeds", "epochs", "batch_size", "limit", "size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise SettingsError(f"{name.replace('_', '-')} must be at least 1, got {value}")
        if self.size is not None and self.size > LARGEST_SIZE:
            raise SettingsError(f"size must be at most {LARGEST_SIZE} pixels, got {self.size}")
        cores = os.cpu_count() or 1
        if not 1 <= self.threads <= cores:
            raise SettingsError(f"threads must be at least 1 and at most {cores}, the CPUs here, got {self.threads}")
        if not (math.isfinite(self.lam) and self.lam >= 0):
            raise SettingsError(f"lam must be a number, 0 or larger, got {self.lam}")
        if not (math.isfinite(self.learning_rate) and self.learning_rate > 0):
            raise SettingsError(f"learning-rate must be larger than 0, got {self.learning_rate}")
        if self.blur is not None and not (math.isfinite(self.blur) and self.blur >= 1):
            raise SettingsError(f"blur must be a length in pixels, at least 1, got {self.blur}")
        if not math.isfinite(self.angle):
            raise SettingsError(f"angle must be a number of degrees, got {self.angle}")
        if self.accelerator not in ("cpu", "gpu", "auto"):
            raise SettingsError(f"accelerator must be cpu, gpu or auto, got {self.accelerator}")

    @property
    def image_limit(self) -> int | None:
        """The limit that applies: as given, else what two CPU cores finish in about three minutes."""
        if self.limit is not None:
            return self.limit
        if self.data == DIGITS:
            return None
        return 1000 if self.quick else 3000

    def filled(self, data: ImageData) -> Settings:
        """The same settings with every None replaced by what it stands for with this data.

        Raises:
            SettingsError: a blur longer than the images.
        """
        _, height, width = data.image_shape
        if self.blur is not None and self.blur > max(height, width):
            raise SettingsError(
                f"blur must be at most {max(height, width)} pixels, the longer side of these {height}×{width} images, "
                f"got {self.blur:g}"
            )
        epochs = 2 if self.quick else 40 if self.data == DIGITS else 5
        return replace(
            self,
            seeds=self.seeds if self.seeds is not None else 2 if self.quick else 3,
            epochs=self.epochs if self.epochs is not None else epochs,
            blur=self.blur if self.blur is not None else max(1.0, 3 * width / 8),
        )
