"""Data that comes as arrays: scikit-learn's digits, `.npz` files, official MNIST (idx) files."""

from __future__ import annotations

import gzip
import struct
import zipfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .images import DataError, Labels, Part, Pixels, Source

Array = NDArray[Any]

IDX_NAMES = {
    "train-images": "train-images-idx3-ubyte",
    "train-labels": "train-labels-idx1-ubyte",
    "test-images": "t10k-images-idx3-ubyte",
    "test-labels": "t10k-labels-idx1-ubyte",
}


def array_part(pixels: Array, labels: Labels, scale: float) -> Part:
    """A part over pixels in memory, shape (images, height, width[, channels]); `scale` is the value of white."""
    pixels = pixels if pixels.ndim == 4 else pixels[..., None]

    def read(index: Labels) -> Pixels:
        return pixels[index].astype(np.float32) / np.float32(scale)

    return Part(labels, read)


def digits_source() -> Source:
    """scikit-learn's handwritten digits: 1797 grey images, 8×8, of 10 classes; part of the installation."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    part = array_part(digits.images, digits.target.astype(np.int64), scale=16.0)
    return Source("digits", tuple(str(name) for name in digits.target_names), part)


def npz_source(path: Path) -> Source:
    """A NumPy archive holding x_train, y_train, x_test, y_test, or x and y.

    Images: (images, height, width), (images, height, width, 1 or 3) or (images, 1 or 3, height, width), non-negative;
    integers count 255 (uint8) or their largest value as white, floats 1 or their largest value. Labels: one each,
    integers or strings.

    Raises:
        DataError: not an archive, other names in it, or arrays of another kind, shape, length or range.
    """
    try:
        with np.load(path, allow_pickle=False) as archive:
            arrays = {name: archive[name] for name in archive.files}
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise DataError(f"{path}: not a readable .npz archive of plain arrays ({error})") from error
    for names in (("x_train", "y_train", "x_test", "y_test"), ("x", "y")):
        if all(name in arrays for name in names):
            break
    else:
        raise DataError(
            f"{path}: holds {', '.join(sorted(arrays)) or 'nothing'}; "
            f"expected x_train, y_train, x_test, y_test, or x and y"
        )
    pairs = [(arrays[x], arrays[y], x, y) for x, y in zip(names[::2], names[1::2], strict=True)]
    images = [npz_images(path, x_name, x) for x, _, x_name, _ in pairs]
    if len({array.shape[1:] for array in images}) > 1:
        raise DataError(f"{path}: training and test images differ in shape: {images[0].shape}, {images[1].shape}")
    for (_, labels, x_name, y_name), array in zip(pairs, images, strict=True):
        if labels.shape != (len(array),):
            raise DataError(
                f"{path}: {y_name} has shape {labels.shape}; expected one label for each of "
                f"the {len(array)} images in {x_name}"
            )
    labels_of_halves = [npz_labels(path, y_name, labels) for _, labels, _, y_name in pairs]
    names_of_classes, index = np.unique(np.concatenate(labels_of_halves), return_inverse=True)
    scale = 255.0 if images[0].dtype == np.uint8 else max(1.0, max(float(array.max()) for array in images))
    parts, start = [], 0
    for array in images:
        parts.append(array_part(array, index[start : start + len(array)].astype(np.int64), scale))
        start += len(array)
    classes = tuple(str(name) for name in names_of_classes)
    return Source(path.stem, classes, parts[0], parts[1] if len(parts) == 2 else None)


def npz_images(path: Path, name: str, array: Array) -> Array:
    """Checks one array of images and brings it to channels-last order."""
    shape = array.shape
    numbers = np.issubdtype(array.dtype, np.integer) or np.issubdtype(array.dtype, np.floating)
    if not numbers or array.ndim not in (3, 4) or 0 in shape:
        raise DataError(
            f"{path}: {name} is {array.dtype} of shape {shape}; expected numbers of shape (images, height, width) "
            f"or (images, height, width, 1 or 3)"
        )
    if array.ndim == 4 and shape[3] not in (1, 3):
        if shape[1] not in (1, 3):
            raise DataError(f"{path}: {name} of shape {shape} has neither 1 nor 3 channels")
        array = array.transpose(0, 2, 3, 1)
    if not np.isfinite(array).all() or array.min() < 0:
        raise DataError(f"{path}: {name} holds values that are negative or not finite; expected 0 (black) to white")
    return array


def npz_labels(path: Path, name: str, labels: Array) -> Array:
    """Labels as integers, or strings as they are; floats that are whole numbers count as integers."""
    if labels.dtype.kind in "bUS":
        return labels
    if labels.dtype.kind in "iuf":
        # Beyond 2⁵³ a float cannot tell neighbouring integers apart. NaN fails both comparisons.
        whole = labels.dtype.kind != "f" or (np.abs(labels) < 2.0**53) & (labels == np.floor(labels))
        if np.all(whole):
            return labels.astype(np.int64)
        found = f"{labels.dtype} with values such as {labels[~whole][0]}"
    else:
        found = str(labels.dtype)
    raise DataError(f"{path}: {name} holds {found}; labels must be integers or strings, one per image")


def idx_source(folder: Path) -> Source:
    """The four official MNIST files in one folder, each plain or gzipped; also data sets that copy their format.

    Raises:
        DataError: a file is missing, cut short, not an idx file, or images and labels differ in number.
    """
    found = {what: find_idx(folder, name) for what, name in IDX_NAMES.items()}
    missing = [IDX_NAMES[what] for what, path in found.items() if path is None]
    if missing:
        raise DataError(f"{folder}: {' and '.join(missing)} missing (plain or .gz); MNIST consists of four such files")
    arrays = {what: read_idx(path) for what, path in found.items() if path is not None}
    for half in ("train", "test"):
        images, labels = arrays[f"{half}-images"], arrays[f"{half}-labels"]
        if images.ndim != 3 or labels.ndim != 1 or len(images) != len(labels):
            raise DataError(
                f"{found[f'{half}-labels']}: labels of shape {labels.shape} do not go with "
                f"images of shape {images.shape}"
            )
    if arrays["train-images"].shape[1:] != arrays["test-images"].shape[1:]:
        raise DataError(f"{folder}: training and test images differ in size")
    values = np.unique(np.concatenate([arrays["train-labels"], arrays["test-labels"]]))
    train, test = (
        array_part(arrays[f"{half}-images"], np.searchsorted(values, arrays[f"{half}-labels"]).astype(np.int64), 255.0)
        for half in ("train", "test")
    )
    return Source(folder.resolve().name, tuple(str(value) for value in values), train, test)


def find_idx(folder: Path, name: str) -> Path | None:
    """The file of that name, plain or gzipped; some distributions write a dot before idx."""
    for spelling in (name, name.replace("-idx", ".idx")):
        for path in (folder / spelling, folder / f"{spelling}.gz"):
            if path.is_file():
                return path
    return None


def read_idx(path: Path) -> NDArray[np.uint8]:
    """Reads one idx file of unsigned bytes: magic 0, 0, 8, rank; the sizes as big-endian 32-bit integers; the bytes.

    Raises:
        DataError: not such a file, or its length is not what its header says.
    """
    try:
        content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path}: corrupt or cut short ({error})") from error
    if len(content) < 4 or content[:3] != b"\x00\x00\x08" or not 1 <= content[3] <= 4:
        raise DataError(f"{path}: not an idx file of unsigned bytes (starts with {content[:4].hex(' ') or 'nothing'})")
    start = 4 + 4 * content[3]
    if len(content) < start:
        raise DataError(f"{path}: cut short inside its header ({len(content)} bytes)")
    shape = struct.unpack(f">{content[3]}I", content[4:start])
    if len(content) - start != int(np.prod(shape, dtype=np.int64)):
        raise DataError(
            f"{path}: corrupt or cut short: the header says {' × '.join(map(str, shape))} bytes, "
            f"{len(content) - start} follow"
        )
    return np.frombuffer(content, np.uint8, offset=start).reshape(shape)
