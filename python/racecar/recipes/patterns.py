"""The 4096 binary patterns of the mutual-information study, from its file or from its description.

Shwartz-Ziv & Tishby 2017, "Opening the black box of deep neural networks via information", section 3.1: twelve binary
inputs stand for twelve points on the sphere; the label is a rule that no rotation or reflection changes, a function of
the pattern's power spectrum in spherical harmonics, against a threshold at which both labels are about as frequent.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..data import DataError
from ..data.matlab import read_mat

POINTS = 12
DEGREES = (0, 1)  # of the power spectrum
CORNERS = (0, 2, 9, 4, 11, 10, 7, 1, 6, 3, 8, 5)  # which of `icosahedron` each bit of the study's file stands for


@dataclass(frozen=True, eq=False)
class Patterns:
    """All patterns of twelve bits and their labels.

    Attributes:
        x: 0 or 1, uint8, (4096, 12). y: 0 or 1, int64, (4096,).
        source: where they are from, in a few words.
    """

    x: NDArray[np.uint8]
    y: NDArray[np.int64]
    source: str

    @property
    def fingerprint(self) -> int:
        """Tells other data apart."""
        return zlib.crc32(self.y.tobytes(), zlib.crc32(np.ascontiguousarray(self.x).tobytes()))


def load_patterns(path: Path | None) -> Patterns:
    """The patterns of a file, or without one those that `generated_patterns` makes.

    Raises:
        DataError: the file is missing, damaged, or holds something else than 4096 different patterns of two classes.
    """
    return generated_patterns() if path is None else read_patterns(path)


def read_patterns(path: Path) -> Patterns:
    """Reads the study's `var_u.mat`: F, (4096, 12), and y, (1, 4096).

    Raises:
        DataError: as `load_patterns`.
    """
    path = path.expanduser()
    if path.is_dir():
        path = path / "var_u.mat"
    if not path.is_file():
        raise DataError(f"no such file: {path} (give the study's var_u.mat, or leave --data out to generate patterns)")
    content = read_mat(path, ("F", "y"))
    x, y = content["F"], content["y"]
    if x.shape != (2**POINTS, POINTS) or y.size != len(x):
        raise DataError(f"{path}: F has shape {x.shape} and y {y.shape}; expected (4096, 12) and 4096 labels")
    for name, values in (("F", x), ("y", y)):
        found = np.unique(values)
        if found.dtype.kind not in "buif" or not np.isin(found, (0, 1)).all():
            raise DataError(f"{path}: {name} holds {', '.join(map(str, found[:4]))}, ...; expected 0 and 1 only")
    if len(np.unique(x, axis=0)) != len(x):
        raise DataError(f"{path}: F holds {len(np.unique(x, axis=0))} different patterns; expected all 4096")
    if len(np.unique(y)) != 2:
        raise DataError(f"{path}: y holds one class only, {np.unique(y)[0]}; expected two, 0 and 1")
    return Patterns(x.astype(np.uint8), y.reshape(-1).astype(np.int64), path.name)


def generated_patterns() -> Patterns:
    """The study's patterns from its description: bit by bit those of its file.

    The points are the corners of an icosahedron. The label is 1 where f(x) = A_0(x) + A_1(x) lies above a threshold,
    with the amplitude A_l of degree l in spherical harmonics, the root of its power: by the addition theorem
    A_l² = 4π/(2l + 1) · Σ_m |Σ_i x_i Y_lm(p_i)|² = Σ_ij x_i x_j P_l(p_i · p_j). A_0 counts the points; A_1 is the
    length of the sum of their places. The threshold is where the labels come closest to being equally frequent, .517
    to .483.

    The study says "spherically symmetric" and "power spectrum", no more; which points, which f and which bit is which
    point follows from the file: its labels do not change under the symmetries of an icosahedron, and this f gives all
    4096 of them.
    """
    x = (np.arange(2**POINTS)[:, None] >> np.arange(POINTS)[::-1]) & 1
    points = icosahedron()[list(CORNERS)]
    f = np.round(sum(amplitude(x, points, degree) for degree in DEGREES), 9)  # equal where patterns are symmetric
    values = np.unique(f)
    above = np.array([(f > value).mean() for value in values])
    y = f > values[np.abs(above - 0.5).argmin()]
    return Patterns(x.astype(np.uint8), y.astype(np.int64), "generated patterns")


def icosahedron() -> NDArray[np.float64]:
    """Its twelve corners on the unit sphere: (12, 3)."""
    golden = (1 + 5**0.5) / 2
    corners = [np.roll((0, one, other), k) for k in range(3) for one in (-1, 1) for other in (-golden, golden)]
    points: NDArray[np.float64] = np.array(corners, np.float64)
    return points / np.linalg.norm(points, axis=1, keepdims=True)


def amplitude(x: NDArray[Any], points: NDArray[np.float64], degree: int) -> NDArray[np.float64]:
    """A_l of `generated_patterns`: (patterns, points) and (points, 3) to (patterns,)."""
    kernel = np.polynomial.legendre.Legendre.basis(degree)(np.clip(points @ points.T, -1, 1))
    power: NDArray[np.float64] = np.einsum("pi,ij,pj->p", x, kernel, x, optimize=True)
    return np.sqrt(np.maximum(power, 0))
