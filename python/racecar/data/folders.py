"""Image folders and zips of them: one folder per class, optionally below train/ and test/."""

from __future__ import annotations

import io
import re
import warnings
import zipfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Protocol

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from .images import DataError, Part, Pixels, Source

SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".bmp", ".gif", ".tif", ".tiff", ".webp", ".ppm", ".pgm"})
TEST_NAMES = ("test", "val", "valid", "validation")


class Tree(Protocol):
    """Where image files lie: a folder or a zip."""

    label: str

    def names(self) -> Iterable[str]:
        """Paths of all files inside, with forward slashes."""

    def content(self, name: str) -> bytes:
        """The bytes of one file."""

    def spell(self, name: str) -> str:
        """The file's name as a user would find it."""


class FolderTree:
    """Files below a folder; hidden ones are left out."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.label = str(path)

    def names(self) -> Iterable[str]:
        return (file.relative_to(self.path).as_posix() for file in self.path.rglob("*") if file.is_file())

    def content(self, name: str) -> bytes:
        return (self.path / name).read_bytes()

    def spell(self, name: str) -> str:
        return str(self.path / name)


class ZipTree:
    """Files inside a zip.

    Raises:
        DataError: the file is not a zip, or cut short.
    """

    def __init__(self, path: Path) -> None:
        self.label = str(path)
        try:
            self.archive = zipfile.ZipFile(path)
        except (OSError, zipfile.BadZipFile) as error:
            raise DataError(f"{path}: not a readable zip ({error})") from error

    def names(self) -> Iterable[str]:
        return (info.filename for info in self.archive.infolist() if not info.is_dir())

    def content(self, name: str) -> bytes:
        return self.archive.read(name)

    def spell(self, name: str) -> str:
        return f"{name} inside {self.label}"


@dataclass(frozen=True)
class ImageFile:
    """One image of a class, not read yet."""

    tree: Tree
    name: str
    class_name: str


@dataclass(frozen=True)
class Sizing:
    """How images are brought to one size.

    Attributes:
        size: crop the centre square and resize it to size×size; None: keep the shape.
        max_side: without `size`, shrink images whose longer side is above this, in proportion; None: never.
    """

    size: int | None = None
    max_side: int | None = None

    def apply(self, image: Image.Image) -> Image.Image:
        """The image in its final size."""
        if self.size is not None:
            side = min(image.size)
            left, top = (image.width - side) // 2, (image.height - side) // 2
            box = (left, top, left + side, top + side)
            return image.resize((self.size, self.size), Image.Resampling.BILINEAR, box=box, reducing_gap=2.0)
        if self.max_side is not None and max(image.size) > self.max_side:
            factor = self.max_side / max(image.size)
            shape = (max(1, round(image.width * factor)), max(1, round(image.height * factor)))
            return image.resize(shape, Image.Resampling.BILINEAR, reducing_gap=2.0)
        return image


def folder_source(path: Path, sizing: Sizing) -> Source:
    """Reads the layout of an image folder, of a zip of one, or of a folder with train.zip and test.zip.

    Layouts: class/image, or train/class/image beside test/class/image (`val` serves as well), either one inside any
    number of enclosing folders. Where grey and colour images are mixed, all become colour, so that nothing is lost.

    Args:
        path: a folder or a .zip.
        sizing: how images are brought to one size.

    Raises:
        DataError: no images, or no class folders; on reading: a corrupt image (by name) or images of several sizes.
    """
    halves = [(path / f"{name}.zip") for name in ("train", *TEST_NAMES)]
    zips = [half for half in halves if path.is_dir() and half.is_file()]
    if zips and zips[0].name == "train.zip":
        train = list_images(ZipTree(zips[0]))
        test = list_images(ZipTree(zips[1])) if len(zips) > 1 else None
    else:
        files = list_images(ZipTree(path) if path.is_file() else FolderTree(path))
        train, test = split_by_folder(files)
    classes = sorted({file.class_name for file in [*train, *(test or [])]})
    index = {name: i for i, name in enumerate(classes)}
    reader = ImageReader(train[0], sizing)

    def part(files: list[ImageFile]) -> Part:
        labels = np.array([index[file.class_name] for file in files], dtype=np.int64)
        names = tuple(PurePosixPath(file.name).name for file in files)
        return Part(labels, lambda chosen: reader.read([files[i] for i in chosen]), names)

    name = path.stem if path.is_file() else path.resolve().name
    return Source(name, tuple(classes), part(train), part(test) if test else None, reader.notes, reader.colour_notes)


def list_images(tree: Tree) -> list[ImageFile]:
    """All images of a tree in sorted order; the folder that holds an image is its class."""
    names = []
    for name in tree.names():
        path = PurePosixPath(name)
        hidden = any(part.startswith((".", "__MACOSX")) for part in path.parts)
        if path.suffix.lower() in SUFFIXES and not hidden:
            names.append(name)
    if not names:
        raise DataError(
            f"{tree.label}: unknown kind of data: no image found. Expected official MNIST (idx) files, a folder or zip "
            f"of class/image files ({', '.join(sorted(SUFFIXES))}), or an .npz"
        )
    loose = [name for name in names if len(PurePosixPath(name).parts) < 2]
    if loose:
        raise DataError(f"{tree.spell(loose[0])}: lies in no class folder; expected class/image, one folder per class")
    return [ImageFile(tree, name, PurePosixPath(name).parent.name) for name in sorted(names)]


def split_by_folder(files: list[ImageFile]) -> tuple[list[ImageFile], list[ImageFile] | None]:
    """Splits files by the folder above their class where those are train and test; otherwise (files, None)."""

    def half(file: ImageFile) -> str:
        parts = PurePosixPath(file.name).parts
        return parts[-3].lower() if len(parts) > 2 else ""

    train = [file for file in files if half(file) == "train"]
    test = [file for file in files if half(file) in TEST_NAMES]
    if not train:
        return files, None
    return train, test or None


class ImageReader:
    """Decodes image files to the size of the first training image, and to colour where any of them has it."""

    def __init__(self, first: ImageFile, sizing: Sizing) -> None:
        self.first = first
        self.sizing = sizing
        image = decode(first)
        self.grey = self.colour = 0  # how many images of each kind were read
        shape = sizing.apply(image)
        self.shape = (shape.height, shape.width)
        self.notes: tuple[str, ...] = ()
        if shape.size != image.size:
            self.notes = (f"Images are resized to {shape.height}×{shape.width}.",)

    def read(self, files: list[ImageFile]) -> Pixels:
        """Pixels in [0, 1] of shape (images, height, width, 1 or 3).

        Raises:
            DataError: a corrupt image, or an image of another size, each by name.
        """
        pixels = np.empty((len(files), *self.shape, 1), dtype=np.float32)
        for i, file in enumerate(files):
            one = self.one(file).astype(np.float32) / np.float32(255)
            if one.shape[-1] > pixels.shape[-1]:  # the first colour image among grey ones
                pixels = np.repeat(pixels, 3, axis=-1)
            pixels[i] = one  # a single grey channel goes into all three
        return pixels

    def colour_notes(self) -> tuple[str, ...]:
        """What was done about colours, once all images are read."""
        if not (self.grey and self.colour):
            return ()
        return (f"Grey and colour images are mixed: the {self.grey} grey ones used became colour.",)

    def one(self, file: ImageFile) -> NDArray[np.uint8]:
        """One image as bytes of shape (height, width, 1 or 3)."""
        image = decode(file)
        grey = is_grey(image)
        image = self.sizing.apply(image.convert("L" if grey else "RGB"))
        if (image.height, image.width) != self.shape:
            raise DataError(
                f"images differ in size: {file.tree.spell(file.name)} is {image.height}×{image.width}, "
                f"{self.first.tree.spell(self.first.name)} is {self.shape[0]}×{self.shape[1]} (height × width); "
                f"--size N crops and resizes all to N×N"
            )
        array = np.asarray(image, dtype=np.uint8)
        self.grey, self.colour = self.grey + grey, self.colour + (not grey)
        return array[..., None] if grey else array


def is_grey(image: Image.Image) -> bool:
    """Whether the file itself is grey (one channel, with or without transparency)."""
    return image.mode in ("1", "L", "LA", "F")


def decode(file: ImageFile) -> Image.Image:
    """Decodes one file completely, so that damage shows here and not in the middle of training.

    Raises:
        DataError: the file cannot be read or decoded; names it.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            image = Image.open(io.BytesIO(file.tree.content(file.name)))
            image.load()
            if image.mode.startswith("I"):  # 16-bit grey, which Pillow's own conversion would clip to white
                return Image.fromarray((np.asarray(image).clip(0, 65535) // 256).astype(np.uint8))
    except (OSError, ValueError, SyntaxError, zipfile.BadZipFile, UnidentifiedImageError) as error:
        # Pillow names the object that it read from, an address in memory, where the file's name should stand.
        why = re.sub(r"\s*<[^>]* object at 0x[^>]*>", "", str(error))
        raise DataError(f"{file.tree.spell(file.name)}: corrupt image ({why})") from error
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise DataError(f"{file.tree.spell(file.name)}: image too large ({error})") from error
    return image
