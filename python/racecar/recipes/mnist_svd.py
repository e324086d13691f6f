"""Recipe `mnist-svd`: one linear layer learns two digits, one image of each. Xie & Thuerey 2020, section 3."""

from __future__ import annotations

import zlib
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..data import DIGITS, DataError, load_images
from .features import COLUMNS, Images, Problem, Settings, run_problem
from .folder import RunFolder
from .listener import Listener

__all__ = ["Listener", "Settings", "run"]

OUTPUTS = 10
PUBLISHED = {"RR": {COLUMNS[2]: 0.99}}  # what the authors' code gives with their two digits


def network(pixels: int) -> nn.Sequential:
    """One linear layer: (images, pixels) -> (images, 10)."""
    return nn.Sequential(nn.Linear(pixels, OUTPUTS))


def run(
    settings: Settings, folder: RunFolder, *, data: Path | None = None, command: str = "", resume: bool = False,
    overwrite: bool = False, listener: Listener | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Runs the recipe or goes on with it; writes checkpoint, `results.json`, `table.md` and `vectors.png`.

    Args:
        settings: what to do. Seed s learns the s-th image of the classes 0 and 1, and is tested on the next ones.
        folder: where to.
        data: the official MNIST files, or other grey images that `racecar.data.load_images` reads; None:
            scikit-learn's digits, 8×8.
        command, resume, overwrite, listener: see `racecar.recipes.peak.run`.

    Raises:
        DataError, SettingsError: bad input, before anything is computed. OSError, KeyboardInterrupt: what was finished
            stays, for `resume`.
    """
    read = load_images(DIGITS if data is None else str(data))
    channels, height, width = read.image_shape
    if channels != 1 or height != width:
        raise DataError(f"mnist-svd takes square grey images, got {channels} channels of {height}×{width}")
    own = [(read.train_y == label).nonzero().flatten() for label in (0, 1)]
    if min(map(len, own)) <= settings.seeds:
        raise DataError(
            f"mnist-svd needs {settings.seeds + 1} training images of the classes 0 and 1 for {settings.seeds} seeds, "
            f"got {len(own[0])} and {len(own[1])}"
        )

    def images(seed: int) -> Images:
        x = [255 * read.train_x[[int(own[0][i]), int(own[1][i])]].flatten(1) for i in (seed, seed + 1)]
        return Images(x[0], torch.arange(2), x[1], torch.arange(2), height)

    mark = zlib.crc32(read.train_x.numpy().tobytes())
    problem = Problem("mnist-svd", images, network, read.describe(), mark, PUBLISHED)
    return run_problem(
        problem, settings, folder, data, command, listener or Listener(), resume=resume, overwrite=overwrite
    )
