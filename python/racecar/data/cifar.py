"""The official CIFAR files (Krizhevsky 2009), and those of CIFAR-10.1 (Recht et al. 2018)."""

from __future__ import annotations

import io
import pickle
import tarfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .arrays import array_part
from .images import DataError, Labels, Source

SIDE = 32
PIXELS = 3 * SIDE * SIDE
Bytes = NDArray[np.uint8]


@dataclass(frozen=True)
class Kind:
    """One of the published archives.

    Attributes:
        title: of the data. folder: that the archive holds. archive: its name.
        train, test: files. names: the file of class names. classes: how many.
        labels: of a pickle, the key of the labels. meta: the key of the class names. before: of a binary record, how
            many bytes stand before the label that counts.
    """

    title: str
    folder: str
    archive: str
    train: tuple[str, ...]
    test: tuple[str, ...]
    names: str
    classes: int
    labels: str = ""
    meta: str = ""
    before: int = 0


KINDS = (
    Kind(
        "CIFAR-10", "cifar-10-batches-py", "cifar-10-python.tar.gz", tuple(f"data_batch_{i}" for i in range(1, 6)),
        ("test_batch",), "batches.meta", 10, "labels", "label_names",
    ),
    Kind(
        "CIFAR-10", "cifar-10-batches-bin", "cifar-10-binary.tar.gz", tuple(f"data_batch_{i}.bin" for i in range(1, 6)),
        ("test_batch.bin",), "batches.meta.txt", 10,
    ),
    Kind(
        "CIFAR-100", "cifar-100-python", "cifar-100-python.tar.gz", ("train",), ("test",), "meta", 100, "fine_labels",
        "fine_label_names",
    ),
    Kind(
        "CIFAR-100", "cifar-100-binary", "cifar-100-binary.tar.gz", ("train.bin",), ("test.bin",),
        "fine_label_names.txt", 100, before=1,
    ),
)  # fmt: skip


def cifar_files(path: Path, title: str | None = None) -> tuple[Kind, Path] | None:
    """Which of the published folders or archives a path is, or holds; None: neither.

    Args:
        path: a folder or an archive. title: "CIFAR-10" or "CIFAR-100" where only that one is looked for.

    Raises:
        DataError: a published folder lies in the path, but a file is missing.
    """
    for kind in KINDS:
        if title is not None and kind.title != title:
            continue
        for place in (path, path / kind.folder, path / kind.archive):
            if place.name == kind.archive and place.is_file():
                return kind, place
            if not place.is_dir():
                continue
            files = (*kind.train, *kind.test, kind.names)
            missing = [name for name in files if not (place / name).is_file()]
            if not missing:
                return kind, place
            known = place.name == kind.folder or {kind.train[0], *kind.test, kind.names}.isdisjoint(missing)
            if known and len(missing) < len(files):  # a file "train" alone may be any folder's
                raise DataError(f"{place}: holds no {', '.join(missing)} of {kind.title}; fetch the archive again")
    return None


def cifar_source(kind: Kind, place: Path) -> Source:
    """Reads one of them, as bytes; pixels become numbers when they are asked for.

    Raises:
        DataError: a file is missing, cut short or not what it should be; it is named.
    """
    read = reader_of(kind, place)
    names = class_names(kind, place, read)
    parts = []
    for files in (kind.train, kind.test):
        found = [images_of(kind, place, name, read(name)) for name in files]
        pixels = np.concatenate([pixels for pixels, _ in found]).reshape(-1, 3, SIDE, SIDE).transpose(0, 2, 3, 1)
        parts.append(array_part(pixels, np.concatenate([labels for _, labels in found]), scale=255.0))
    return Source(kind.title, names, parts[0], parts[1])


def reader_of(kind: Kind, place: Path) -> Callable[[str], bytes]:
    """Gives the bytes of a file in a folder or an archive, by name."""
    if place.is_dir():

        def from_folder(name: str) -> bytes:
            try:
                return (place / name).read_bytes()
            except OSError as error:
                raise DataError(f"{place / name}: cannot be read ({error.strerror or error})") from error

        return from_folder
    try:
        with tarfile.open(place) as archive:  # once through, since it is compressed as a whole
            wanted = {f"{kind.folder}/{name}": name for name in (*kind.train, *kind.test, kind.names)}
            found = {
                wanted[member.name]: content.read()
                for member in archive
                if member.name in wanted and (content := archive.extractfile(member)) is not None
            }
    except (tarfile.TarError, OSError, EOFError, zlib.error) as error:
        raise DataError(f"{place}: not a readable archive, or cut short ({error})") from error

    def from_archive(name: str) -> bytes:
        if name not in found:
            raise DataError(f"{place}: holds no {kind.folder}/{name}; fetch the archive again")
        return found[name]

    return from_archive


def class_names(kind: Kind, place: Path, read: Callable[[str], bytes]) -> tuple[str, ...]:
    """In the order of the labels."""
    content = read(kind.names)
    if kind.meta:
        given = unpickled(place / kind.names, content).get(kind.meta.encode())
        names = [name.decode("utf-8", "replace") for name in given or [] if isinstance(name, bytes)]
    else:
        names = content.decode("utf-8", "replace").split()
    if len(names) != kind.classes:
        raise DataError(f"{place / kind.names}: {kind.title} has {kind.classes} classes, found {len(names)} names")
    return tuple(names)


def images_of(kind: Kind, place: Path, name: str, content: bytes) -> tuple[Bytes, Labels]:
    """Pixels (images, 3072), channel by channel, and labels of one file."""
    where = place / name
    if kind.labels:
        batch = unpickled(where, content)
        pixels, given = batch.get(b"data"), batch.get(kind.labels.encode())
        if not isinstance(pixels, np.ndarray) or pixels.dtype != np.uint8 or pixels.shape[1:] != (PIXELS,):
            shape = f"{pixels.dtype} {pixels.shape}" if isinstance(pixels, np.ndarray) else type(pixels).__name__
            raise DataError(f"{where}: 'data' must be uint8 of shape (images, {PIXELS}), found {shape}")
        if not isinstance(given, list) or len(given) != len(pixels) or not all(isinstance(i, int) for i in given):
            raise DataError(f"{where}: {kind.labels!r} must be {len(pixels)} whole numbers, one for each image")
        labels = np.array(given, dtype=np.int64)
    else:
        record = kind.before + 1 + PIXELS
        if not content or len(content) % record:
            raise DataError(
                f"{where}: has {len(content):,} bytes, which is no multiple of an image's {record:,}: cut short?"
            )
        rows = np.frombuffer(content, np.uint8).reshape(-1, record)
        pixels, labels = rows[:, kind.before + 1 :], rows[:, kind.before].astype(np.int64)
    wrong = labels[(labels < 0) | (labels >= kind.classes)]
    if len(wrong):
        raise DataError(f"{where}: labels of {kind.title} lie in 0 .. {kind.classes - 1}, found {wrong[0]}")
    return pixels, labels


class OnlyArrays(pickle.Unpickler):
    """Unpickles arrays and plain containers. A pickle may otherwise run any code at all."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("_codecs", "encode"):  # how Python 3 writes bytes for Python 2
            return lambda text, encoding: text.encode(encoding) if encoding == "latin1" else self._refuse(encoding)
        if module in ("numpy.core.multiarray", "numpy._core.multiarray") and name == "_reconstruct":
            return lambda kind, shape, code: np.ndarray.__new__(np.ndarray, (0,), "b")
        if module == "numpy" and name in ("ndarray", "dtype"):
            return getattr(np, name)
        return self._refuse(f"{module}.{name}")

    def _refuse(self, what: str) -> Any:
        raise pickle.UnpicklingError(f"it asks for {what}, which these files never hold")


def unpickled(where: Path, content: bytes) -> dict[bytes, Any]:
    """A pickled dictionary of bytes -> arrays and lists."""
    try:
        found = OnlyArrays(io.BytesIO(content), encoding="bytes").load()
    except Exception as error:  # damaged bytes lead an unpickler into errors of every kind
        why = str(error) or type(error).__name__
        raise DataError(f"{where}: not readable as one of the published files ({why})") from error
    if not isinstance(found, dict):
        raise DataError(f"{where}: must hold a dictionary, found {type(found).__name__}")
    return {key.encode() if isinstance(key, str) else key: value for key, value in found.items()}


def cifar10_1(folder: str | Path) -> tuple[Tensor, Tensor]:
    """CIFAR-10.1 (Recht et al. 2018): newer photographs of CIFAR-10's classes, for testing.

    Args:
        folder: holds cifar10.1_v6_data.npy and cifar10.1_v6_labels.npy, or those of v4.

    Returns:
        Images in [0, 1], float32 (images, 3, 32, 32), and labels, int64 (images,), in CIFAR-10's order.

    Raises:
        DataError: the files are missing, damaged, or hold something else.
    """
    place = Path(folder).expanduser()
    version = next((v for v in ("v6", "v4") if (place / f"cifar10.1_{v}_data.npy").is_file()), None)
    if version is None:
        raise DataError(f"{place}: holds no cifar10.1_v6_data.npy (nor v4's)")
    found = []
    for name in (f"cifar10.1_{version}_data.npy", f"cifar10.1_{version}_labels.npy"):
        try:
            found.append(np.load(place / name, allow_pickle=False))
        except (OSError, ValueError, EOFError) as error:
            raise DataError(f"{place / name}: missing, or no readable array ({error})") from error
    pixels, labels = found
    if pixels.dtype != np.uint8 or pixels.ndim != 4 or pixels.shape[1:] != (SIDE, SIDE, 3):
        raise DataError(
            f"{place}: images of CIFAR-10.1 are uint8 (images, 32, 32, 3), found {pixels.dtype} {pixels.shape}"
        )
    if labels.shape != pixels.shape[:1] or labels.dtype.kind not in "iu":
        raise DataError(f"{place}: {len(pixels)} images need as many whole-numbered labels, found {labels.shape}")
    if len(labels) and not (labels.min() >= 0 and labels.max() < 10):
        raise DataError(f"{place}: labels of CIFAR-10.1 lie in 0 .. 9, found {labels.min()} .. {labels.max()}")
    x = torch.from_numpy(np.ascontiguousarray(pixels.transpose(0, 3, 1, 2))).float() / 255
    return x, torch.from_numpy(labels.astype(np.int64))
