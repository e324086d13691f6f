"""Image data from what users have: MNIST, n-MNIST and CIFAR files, image folders and zips, `.npz`, digits."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from .arrays import digits_source, idx_source, npz_source
from .augment import crop_and_flip
from .blur import motion_blur, motion_kernel
from .cifar import cifar10_1, cifar_files, cifar_source
from .folders import Sizing, folder_source
from .images import DataError, ImageData, Source, assemble
from .matlab import mat_source

__all__ = ["DataError", "ImageData", "cifar10_1", "crop_and_flip", "load_images", "motion_blur", "motion_kernel"]

DIGITS = "digits"
N_MNIST = "mnist-with-"  # its archives end in .gz, as much else does


def load_images(
    source: str | Path = DIGITS,
    *,
    limit: int | None = None,
    test_limit: int | None = None,
    size: int | None = None,
    max_side: int | None = None,
    test_fraction: float | None = None,
    seed: int = 0,
    group: Callable[[str], str] | None = None,
) -> ImageData:
    """Reads a classification task, recognising its kind.

    Args:
        source: `"digits"` (scikit-learn's), or a path to: a folder with the official MNIST files
            (`train-images-idx3-ubyte`, plain or .gz); the official CIFAR-10 or CIFAR-100 files (their folder, the
            folder that it lies in, or the .tar.gz; CIFAR-10 where both are there); a folder of class folders,
            optionally below train/ and test/, a zip of one, a folder with train.zip and test.zip; an .npz with
            x_train, y_train, x_test, y_test (or x, y); or a file of n-MNIST (mnist-with-*.mat or .gz).
        limit: at most so many training images, drawn class by class; None for all.
        test_limit: at most so many test images; None: half of `limit`, or all.
        size: image files are cropped to their centre square and resized to size×size pixels; None keeps them.
        max_side: image files with a longer side above this many pixels are shrunk to it; None keeps them.
        test_fraction: part of every class kept for testing where there is no test set; 1/2 for the digits, else 1/5.
        seed: of that split and of the limit's choice.
        group: name of an image file -> its group, where images belong together (views of one object): that split does
            not part them.

    Returns:
        Images in [0, 1], labels and class names; `.describe()` says what was found.

    Raises:
        DataError: no such path, an unknown kind of data, a corrupt file (named), images of several sizes, or a class
            with too few images; before anything is computed.
    """
    for name, value in (("limit", limit), ("test_limit", test_limit), ("size", size), ("max_side", max_side)):
        if value is not None and value < 1:
            raise DataError(f"{name} must be at least 1, got {value}")
    if test_fraction is None:
        # Half of the 1797 digits: 898 test images tell accuracies apart to a thousandth.
        test_fraction = 0.5 if str(source) == DIGITS else 0.2
    if not 0 < test_fraction < 1:
        raise DataError(f"test_fraction must lie between 0 and 1, got {test_fraction}")
    found = recognise(source, Sizing(size, max_side))
    return assemble(found, limit=limit, test_limit=test_limit, test_fraction=test_fraction, seed=seed, group=group)


def recognise(source: str | Path, sizing: Sizing) -> Source:
    """Tells the kind of data by name and content, and opens it."""
    if str(source) == DIGITS:
        return digits_source()
    path = Path(source).expanduser()
    if not path.exists():
        raise DataError(f"no such file or folder: {path} (give a path, or '{DIGITS}' for scikit-learn's digits)")
    cifar = cifar_files(path)
    if cifar is not None:
        return cifar_source(*cifar)
    if path.is_dir():
        has_idx = any(path.glob("*-ubyte")) or any(path.glob("*-ubyte.gz"))
        return idx_source(path) if has_idx else folder_source(path, sizing)
    if path.suffix.lower() == ".mat" or path.name.startswith(N_MNIST):
        return mat_source(path)
    if path.suffix.lower() == ".npz":
        return npz_source(path)
    if path.suffix.lower() == ".zip":
        return folder_source(path, sizing)
    raise DataError(
        f"{path}: unknown kind of data; expected a folder (official MNIST or CIFAR files, or class/image), "
        f"a .zip of one, an .npz, or n-MNIST's .mat"
    )
