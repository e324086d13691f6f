"""Recipe `peak`: two linear layers learn two kinds of peaks among scribbles. Xie & Thuerey 2020, section 3."""

from __future__ import annotations

import zlib
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .features import COLUMNS, Images, Problem, Settings, run_problem
from .folder import RunFolder
from .listener import Listener
from .peaks import SIDE, generated_peaks, read_peaks

__all__ = ["Listener", "Settings", "run"]

HIDDEN = 128
PUBLISHED = {  # what the authors' code gives with their own images
    "Std": dict.fromkeys(COLUMNS[:2], 0.08),
    "Ort": dict.fromkeys(COLUMNS[:2], 0.07),
    "RR": {COLUMNS[0]: 0.81, COLUMNS[1]: 0.84},
}


def network(pixels: int) -> nn.Sequential:
    """Two linear layers, batch norm and ReLU behind each: (images, pixels) -> (images, 2)."""

    def norm(features: int) -> nn.BatchNorm1d:
        return nn.BatchNorm1d(features, eps=1e-3)

    return nn.Sequential(
        nn.Linear(pixels, HIDDEN), norm(HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, 2), norm(2), nn.ReLU()
    )  # fmt: skip


def run(
    settings: Settings, folder: RunFolder, *, data: Path | None = None, command: str = "", resume: bool = False,
    overwrite: bool = False, listener: Listener | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Runs the recipe or goes on with it; writes checkpoint, `results.json`, `table.md` and `vectors.png`.

    Args:
        settings: what to do.
        folder: where to.
        data: a folder of images, see `read_peaks`; None: they are generated, anew for every seed.
        command: the command line, for the results.
        resume, overwrite: what to do with a run that the folder holds; see `RunFolder.begin`.
        listener: is told what happens.

    Raises:
        DataError, SettingsError: bad input, before anything is computed. OSError, KeyboardInterrupt: what was finished
            stays, for `resume`.
    """
    read = None if data is None else read_peaks(data)

    def images(seed: int) -> Images:
        train, test = generated_peaks(seed) if read is None else read
        labels = [torch.arange(2).repeat_interleave(own.shape[1]) for own in (train, test)]
        x = [torch.from_numpy(own.reshape(-1, own.shape[2])) for own in (train, test)]
        return Images(x[0], labels[0], x[1], labels[1], SIDE)

    source = "generated peaks among scribbles, anew for every seed" if data is None else f"peaks from {data.name}"
    mark = zlib.crc32(images(0).train_x.numpy().tobytes())
    problem = Problem("peak", images, network, source, mark, PUBLISHED)
    return run_problem(
        problem, settings, folder, data, command, listener or Listener(), resume=resume, overwrite=overwrite
    )
