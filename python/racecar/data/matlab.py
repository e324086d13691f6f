"""Digits in MATLAB files, as n-MNIST is published (Basu et al. 2017): MNIST with noise or with motion blur."""

from __future__ import annotations

import io
import math
import tarfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from .arrays import array_part
from .images import DataError, Labels, Source

ARRAYS = ("train_x", "train_y", "test_x", "test_y")
MOTION_BLUR = ("mnist-with-motion-blur.mat", "mnist-with-motion-blur.gz")


def blurred_digits(folder: Path) -> Path | None:
    """n-MNIST's motion blur in a folder, as it is published (a tar in spite of its name) or unpacked; else None."""
    return next((folder / name for name in MOTION_BLUR if (folder / name).is_file()), None)


def mat_source(path: Path) -> Source:
    """Reads train_x, train_y, test_x and test_y of a MATLAB file, or of the one in a tar archive.

    Images: uint8, (images, height · width), square, row by row. Labels: (images, classes) with a single 1 in each row.

    Raises:
        DataError: not readable, other arrays in it, or of another kind, shape or range.
    """
    try:
        if path.suffix.lower() == ".mat":
            arrays = read_mat(path, ARRAYS)
        else:
            with tarfile.open(path) as archive:
                member = next((m for m in archive if m.isfile() and m.name.lower().endswith(".mat")), None)
                file_in = None if member is None else archive.extractfile(member)
                if file_in is None:
                    raise DataError(f"{path}: holds no .mat file")
                arrays = read_mat(path, ARRAYS, io.BytesIO(file_in.read()))
    except (OSError, EOFError, tarfile.TarError) as error:
        raise DataError(f"{path}: not a readable tar archive or MATLAB file ({error})") from error
    parts, classes = [], set()
    for half in ("train", "test"):
        x = images(path, f"{half}_x", arrays[f"{half}_x"])
        y = labels(path, f"{half}_y", arrays[f"{half}_y"], len(x))
        classes.add(arrays[f"{half}_y"].shape[1])
        parts.append(array_part(x, y, scale=255.0))
    if len(classes) > 1:
        raise DataError(f"{path}: train_y and test_y differ in the number of classes: {sorted(classes)}")
    return Source(path.stem, tuple(map(str, range(classes.pop()))), parts[0], parts[1])


def read_mat(path: Path, names: Sequence[str], file: BinaryIO | None = None) -> dict[str, NDArray[Any]]:
    """Arrays of a MATLAB file, by name; `file`: where it is open already.

    Raises:
        DataError: not readable, or one of them is not in it.
    """
    from scipy.io import loadmat  # type: ignore[import-untyped]

    try:
        content: dict[str, Any] = loadmat(path if file is None else file)
    except Exception as error:  # of a damaged file SciPy raises whatever the bytes lead it to
        raise DataError(f"{path}: not a readable MATLAB file, or cut short ({error})") from error
    if any(name not in content for name in names):
        have = ", ".join(name for name in content if not name.startswith("_")) or "nothing"
        raise DataError(f"{path}: holds {have}; expected {', '.join(names)}")
    return {name: np.asarray(content[name]) for name in names}


def images(path: Path, name: str, pixels: NDArray[Any]) -> NDArray[np.uint8]:
    """Rows of pixels as square images."""
    side = math.isqrt(pixels.shape[-1]) if pixels.ndim == 2 else 0
    if pixels.dtype != np.uint8 or not len(pixels) or not side or side * side != pixels.shape[-1]:
        raise DataError(
            f"{path}: {name} is {pixels.dtype} of shape {pixels.shape}; expected uint8 of shape (images, pixels), "
            f"with as many pixels as a square image has"
        )
    return pixels.reshape(-1, side, side)


def labels(path: Path, name: str, given: NDArray[Any], count: int) -> Labels:
    """Where the single 1 of every row stands."""
    if given.ndim != 2 or len(given) != count or given.dtype.kind not in "buif":
        raise DataError(
            f"{path}: {name} is {given.dtype} of shape {given.shape}; expected ({count}, classes), one row an image"
        )
    wrong = np.flatnonzero(((given != 0) & (given != 1)).any(1) | ((given == 1).sum(1) != 1))
    if len(wrong):
        raise DataError(f"{path}: row {wrong[0]} of {name} is {given[wrong[0]].tolist()}; expected a single 1, else 0")
    found: Labels = given.argmax(1).astype(np.int64)
    return found
