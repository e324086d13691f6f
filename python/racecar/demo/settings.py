"""What the demo is asked to do: every option, its default and its check."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass, replace
from typing import Any

from ..data import DIGITS, ImageData
from ..experiments.folder import SettingsError

MOST_WORKERS = 8  # each holds PyTorch and Lightning, some 400 MB
LARGEST_SIZE = 256  # the demo's network at 256×256 takes 64 times the work per image that it takes at 32×32


@dataclass(frozen=True)
class Settings:
    """Options of one demo.

    Attributes:
        data: "digits" or a path; see `racecar.data.load_images`.
        models: keys of the contestants that take part beside Std, "RR,Ort"; empty: all.
        seeds: how many seeds, 5; they are 0 .. seeds - 1.
        epochs: of phase I and of A→A; None: 40 for the digits, 20 for other data.
        transfer_epochs: of A→B, 40; its few images make short epochs.
        labels: labelled images of every class in task B, drawn by the seed; 0: all.
        lam: λ of every reverse loss in phase I, with the "mean" reduction.
        ort: factor of the penalty that keeps kernels orthogonal.
        batch_size: images per step.
        learning_rate: of Adam, in every phase.
        blur: length of task B's motion blur in pixels; None: three eighths of the image's width.
        angle: its direction in degrees, counter-clockwise from horizontal.
        limit: at most so many training images, and as many test images; None: all digits, 1000 of other data.
        size: image files are cropped and resized to size×size, at most 256; None: a longer side above 32 is shrunk
            to 32.
        accelerator: Lightning's name of the device: "cpu", "gpu", "auto".
        threads: CPU threads of every worker. One by default: an operation of this small network takes microseconds, so
            that a second thread gains little on a quiet machine, and on a busy one waiting for it was seen to cost ten
            times the step.
        workers: processes that train side by side; None: one per CPU and `threads`, at most 8; one on a GPU.
        validate: test on a third of the training images instead of the test images: for choosing settings.
        save_every_s: seconds between saves from which a run that was broken off goes on, at the end of an epoch.
        quick: two seeds, two epochs: shows that everything runs, and nothing else.
    """

    data: str = DIGITS
    models: str = ""
    seeds: int | None = None
    epochs: int | None = None
    transfer_epochs: int | None = None
    labels: int = 30
    lam: float = 1.0
    ort: float = 0.01
    batch_size: int = 64
    learning_rate: float = 1e-3
    blur: float | None = None
    angle: float = 15.0
    limit: int | None = None
    size: int | None = None
    accelerator: str = "cpu"
    threads: int = 1
    workers: int | None = None
    validate: bool = False
    save_every_s: float = 10.0
    quick: bool = False

    def __post_init__(self) -> None:
        for name in ("seeds", "epochs", "transfer_epochs", "batch_size", "limit", "size", "workers"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise SettingsError(f"{name.replace('_', '-')} must be at least 1, got {value}")
        if self.size is not None and self.size > LARGEST_SIZE:
            raise SettingsError(f"size must be at most {LARGEST_SIZE} pixels, got {self.size}")
        if self.labels < 0:
            raise SettingsError(f"labels must be 0 (all) or the number per class, got {self.labels}")
        cores = os.cpu_count() or 1
        if not 1 <= self.threads <= cores:
            raise SettingsError(f"threads must be at least 1 and at most {cores}, the CPUs here, got {self.threads}")
        for name in ("lam", "ort", "save_every_s"):
            if not (math.isfinite(getattr(self, name)) and getattr(self, name) >= 0):
                option = name.replace("_", "-")
                raise SettingsError(f"{option} must be a number, 0 or larger, got {getattr(self, name)}")
        if not (math.isfinite(self.learning_rate) and self.learning_rate > 0):
            raise SettingsError(f"learning-rate must be larger than 0, got {self.learning_rate}")
        if self.blur is not None and not (math.isfinite(self.blur) and self.blur >= 1):
            raise SettingsError(f"blur must be a length in pixels, at least 1, got {self.blur}")
        if not math.isfinite(self.angle):
            raise SettingsError(f"angle must be a number of degrees, got {self.angle}")
        if self.accelerator not in ("cpu", "gpu", "auto"):
            raise SettingsError(f"accelerator must be cpu, gpu or auto, got {self.accelerator}")

    @property
    def wrapping(self) -> dict[str, Any]:
        """How phase I is wrapped, beside λ."""
        return {"reduction": "mean"}

    @property
    def image_limits(self) -> tuple[int | None, int | None]:
        """Limits of training and test images: as given, else what two CPU cores finish in some ten minutes.

        With `validate` half as many training images more are read, so that a third of them can be set aside.
        """
        default = None if self.data == DIGITS else 1000
        limit = self.limit if self.limit is not None else default
        return limit * 3 // 2 if limit is not None and self.validate else limit, limit

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
        epochs = 2 if self.quick else 40 if self.data == DIGITS else 20
        beside = 1 if self.accelerator != "cpu" else max(1, min(available_cpus() // self.threads, MOST_WORKERS))
        return replace(
            self,
            seeds=self.seeds if self.seeds is not None else 2 if self.quick else 5,
            epochs=self.epochs if self.epochs is not None else epochs,
            transfer_epochs=self.transfer_epochs if self.transfer_epochs is not None else 2 if self.quick else 40,
            blur=self.blur if self.blur is not None else max(1.0, 3 * width / 8),
            workers=self.workers if self.workers is not None else beside,
        )


def available_cpus() -> int:
    """CPUs that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
