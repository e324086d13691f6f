"""Labelled images in memory, and the seeded splits and subsamples that make them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Labels = NDArray[np.int64]
Pixels = NDArray[np.float32]


class DataError(ValueError):
    """Data that cannot be used; the message says what was given and what would be right."""


@dataclass(frozen=True)
class ImageData:
    """A classification task on images.

    Attributes:
        name: what the data is called in tables and reports.
        train_x, test_x: float32 images in [0, 1], shape (images, channels, height, width).
        train_y, test_y: int64 class indices, shape (images,).
        classes: class names; `classes[i]` names label i.
        found: (training images, test images) found at the source, before any limit.
        train_names: of the training images' files; none where they are no files.
        notes: rules that were applied on the way (a split, a limit, a change of size or colour), one sentence each.
    """

    name: str
    train_x: Tensor
    train_y: Tensor
    test_x: Tensor
    test_y: Tensor
    classes: tuple[str, ...]
    found: tuple[int, int]
    notes: tuple[str, ...] = ()
    train_names: tuple[str, ...] = ()

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(channels, height, width) of one image."""
        channels, height, width = self.train_x.shape[1:]
        return channels, height, width

    def describe(self) -> str:
        """What was found and what of it is used, in one line."""
        channels, height, width = self.image_shape
        return (
            f"{self.name}: found {sum(self.found):,} images of {len(self.classes)} classes; using "
            f"{len(self.train_y):,} for training and {len(self.test_y):,} for testing, "
            f"{height}×{width} {'grey' if channels == 1 else 'colour'}"
        )


@dataclass(frozen=True)
class Part:
    """The training or test half of a source whose pixels have not been read yet.

    Attributes:
        labels: class index of every image.
        names: of the image files; none where the images are no files.
        read: indices -> pixels, float32 in [0, 1], shape (images, height, width, channels).
    """

    labels: Labels
    read: Callable[[Labels], Pixels]
    names: tuple[str, ...] = ()


@dataclass(frozen=True)
class Source:
    """What a reader found: class names, a training part and, where the data has one, a test part.

    `notes` are known at once, what `late_notes` gives only when the pixels have been read.
    """

    name: str
    classes: tuple[str, ...]
    train: Part
    test: Part | None = None
    notes: tuple[str, ...] = ()
    late_notes: Callable[[], tuple[str, ...]] = tuple


def stratified_split(labels: Labels, test_fraction: float, seed: int) -> tuple[Labels, Labels]:
    """Splits indices class by class, so that both halves hold every class; at least one image of each in either half.

    Args:
        labels: class index of every image, every class at least twice.
        test_fraction: part of every class that goes to the test half, between 0 and 1.
        seed: of the shuffle; the same seed gives the same split on every machine.

    Returns:
        Sorted indices of the training half and of the test half.
    """
    rng = np.random.default_rng(seed)
    train, test = [], []
    for label in np.unique(labels):
        members = rng.permutation(np.flatnonzero(labels == label))
        count = int(np.clip(round(test_fraction * len(members)), 1, len(members) - 1))
        test.append(members[:count])
        train.append(members[count:])
    return np.sort(np.concatenate(train)), np.sort(np.concatenate(test))


def grouped_split(labels: Labels, groups: Sequence[str], test_fraction: float, seed: int) -> tuple[Labels, Labels]:
    """The same with whole groups: no image is tested of whose group another is trained on.

    Args:
        labels: class index of every image. groups: group of every image; one of two classes counts as two.
        test_fraction: part of every class that goes to the test half, as nearly as whole groups allow; at least one
            group of every class to either half.
        seed: of the shuffle.

    Raises:
        DataError: a class whose images are all of one group.
    """
    rng = np.random.default_rng(seed)
    of = np.array(groups)
    test = []
    for label in np.unique(labels):
        own = np.flatnonzero(labels == label)
        names, sizes = np.unique(of[own], return_counts=True)
        if len(names) < 2:
            raise DataError(
                f"all {len(own)} images of class {label} are of one group, {names[0]!r}; at least 2 are needed"
            )
        wanted, count = test_fraction * len(own), 0
        chosen: list[str] = []
        for i in rng.permutation(len(names)):
            nearer = abs(count + sizes[i] - wanted) < abs(count - wanted)
            if (nearer and len(chosen) < len(names) - 1) or not chosen:
                chosen.append(names[i])
                count += sizes[i]
        test.append(own[np.isin(of[own], chosen)])
    held = np.sort(np.concatenate(test))
    return np.setdiff1d(np.arange(len(labels)), held), held


def stratified_subsample(labels: Labels, limit: int, seed: int) -> Labels:
    """At most `limit` indices (never fewer than one per class), shared out over the classes as they occur.

    Args:
        labels: class index of every image.
        limit: how many images to keep; all of them where there are no more.
        seed: of the choice.

    Returns:
        Sorted indices of the images that are kept.
    """
    if len(labels) <= limit:
        return np.arange(len(labels))
    rng = np.random.default_rng(seed)
    kept = []
    for label in np.unique(labels):
        members = rng.permutation(np.flatnonzero(labels == label))
        kept.append(members[: max(1, limit * len(members) // len(labels))])
    return np.sort(np.concatenate(kept))


def assemble(
    source: Source,
    *,
    limit: int | None,
    test_limit: int | None,
    test_fraction: float,
    seed: int,
    group: Callable[[str], str] | None = None,
) -> ImageData:
    """Checks the classes, splits and subsamples, and only then reads the pixels that are used.

    Args:
        source: what a reader found.
        limit: at most so many training images; None for all.
        test_limit: at most so many test images; None: half of `limit`.
        test_fraction: of the split that is made where the source has no test part.
        seed: of split and subsample.
        group: name of an image file -> its group, which that split keeps together.

    Raises:
        DataError: fewer than two classes, a class with too few images, or a limit below the number of classes.
    """
    check_classes(source)
    notes = list(source.notes)
    test = source.test
    if test is None and group is not None:
        if not source.train.names:
            raise DataError(f"{source.name}: holds no image files, whose names could be grouped")
        groups = [group(name) for name in source.train.names]
        train_index, test_index = grouped_split(source.train.labels, groups, test_fraction, seed)
        test = source.train
        notes.append(f"No test set given: {test_fraction:.0%} of every class, whole groups, is kept (seed {seed}).")
    elif test is None:
        train_index, test_index = stratified_split(source.train.labels, test_fraction, seed)
        test = source.train
        notes.append(f"No test set given: {test_fraction:.0%} of every class is kept for testing (seed {seed}).")
    else:
        train_index, test_index = np.arange(len(source.train.labels)), np.arange(len(test.labels))
    found = (len(train_index), len(test_index))
    classes = len(source.classes)
    for name, value in (("limit", limit), ("test_limit", test_limit)):
        if value is not None and value < classes:
            raise DataError(f"{name} is {value}, but there are {classes} classes: give at least one image each")
    train_limit = found[0] if limit is None else limit
    if test_limit is None:
        test_limit = found[1] if limit is None else max(limit // 2, classes)
    if found[0] > train_limit or found[1] > test_limit:
        train_index = train_index[stratified_subsample(source.train.labels[train_index], train_limit, seed)]
        test_index = test_index[stratified_subsample(test.labels[test_index], test_limit, seed)]
        notes.append(
            f"Limited to {len(train_index)} of {found[0]} training and {len(test_index)} of {found[1]} test images, "
            f"drawn class by class (seed {seed})."
        )
    train_x, test_x = as_images(source.train.read(train_index)), as_images(test.read(test_index))
    channels = max(train_x.shape[1], test_x.shape[1])  # one half may be grey, and the other have colour
    notes += source.late_notes()
    return ImageData(
        name=source.name,
        train_x=train_x.expand(-1, channels, -1, -1).contiguous(),
        train_y=torch.from_numpy(source.train.labels[train_index]),
        test_x=test_x.expand(-1, channels, -1, -1).contiguous(),
        test_y=torch.from_numpy(test.labels[test_index]),
        classes=source.classes,
        found=found,
        notes=tuple(notes),
        train_names=tuple(source.train.names[i] for i in train_index) if source.train.names else (),
    )


def check_classes(source: Source) -> None:
    """Raises DataError unless there are two classes or more, each with an image to train on and one to test on."""
    names = ", ".join(source.classes[:10]) or "none"
    if len(source.classes) < 2:
        raise DataError(f"{source.name}: found {len(source.classes)} class ({names}); at least 2 are needed")
    check_same_classes(source)
    needed = 2 if source.test is None else 1
    for part, what in ((source.train, "training "), (source.test, "test ")):
        if part is None:
            continue
        counts = np.bincount(part.labels, minlength=len(source.classes))
        few = int(counts.argmin())
        if counts[few] < needed:
            what = what if source.test is not None else ""
            raise DataError(
                f"{source.name}: class '{source.classes[few]}' has {counts[few]} "
                f"{what}image{'' if counts[few] == 1 else 's'}; at least {needed} "
                f"{'are needed, one to train and one to test on' if needed == 2 else 'is needed'}"
            )


def check_same_classes(source: Source) -> None:
    """Raises DataError where the training part has classes that the test part lacks, or the reverse; names them."""
    if source.test is None:
        return
    train, test = (set(np.unique(part.labels).tolist()) for part in (source.train, source.test))
    lonely = [("train", sorted(train - test)), ("test", sorted(test - train))]
    if train == test:
        return
    listed = "; ".join(f"only in {half}: {shortened(source.classes, found)}" for half, found in lonely if found)
    raise DataError(f"{source.name}: train and test must hold the same classes, but these stand alone: {listed}")


def shortened(classes: tuple[str, ...], found: list[int], most: int = 10) -> str:
    """Names of classes in one line; beyond `most`, how many more there are."""
    more = f" and {len(found) - most} more" if len(found) > most else ""
    return ", ".join(classes[i] for i in found[:most]) + more


def as_images(pixels: Pixels) -> Tensor:
    """(images, height, width, channels) in NumPy -> (images, channels, height, width) in PyTorch."""
    return torch.from_numpy(np.ascontiguousarray(pixels.transpose(0, 3, 1, 2)))
