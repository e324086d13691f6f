"""What networks learn and are tested on, parts of it, and its fingerprint."""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .folder import SettingsError


@dataclass(frozen=True)
class Task:
    """Images and labels of one task: x of shape (images, channels, height, width), y of shape (images,)."""

    train_x: Tensor
    train_y: Tensor
    test_x: Tensor
    test_y: Tensor


def part_of_each_class(y: Tensor, part: float) -> Tensor:
    """A mask that is true for a random part of every class, at least one image of it and never all.

    Raises:
        SettingsError: a class of a single image.
    """
    mask = torch.zeros(len(y), dtype=torch.bool)
    generator = torch.Generator().manual_seed(0)
    for label in y.unique().tolist():
        own = (y == label).nonzero().flatten()
        if len(own) < 2:
            raise SettingsError("validate needs at least two training images of every class, one has a single image")
        count = min(max(1, round(part * len(own))), len(own) - 1)
        mask[own[torch.randperm(len(own), generator=generator)[:count]]] = True
    return mask


def labelled(task: Task, count: int, seed: int) -> Task:
    """The task with so many training images of every class, drawn by the seed; all of them where `count` is 0."""
    if not count:
        return task
    generator = torch.Generator().manual_seed(seed)
    kept = []
    for label in task.train_y.unique().tolist():
        own = (task.train_y == label).nonzero().flatten()
        kept.append(own[torch.randperm(len(own), generator=generator)[:count]])
    few = torch.cat(kept).sort().values
    return replace(task, train_x=task.train_x[few], train_y=task.train_y[few])


def fingerprint(tasks: Mapping[str, Task]) -> int:
    """A number that changes with the images or the labels, to tell whether a run goes on with the same data."""
    crc = 0
    for task in tasks.values():
        for tensor in (task.train_x, task.train_y, task.test_x, task.test_y):
            crc = zlib.crc32(tensor.contiguous().numpy().tobytes(), crc)
    return crc
