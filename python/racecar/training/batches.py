"""Batches whose order depends on the seed and the epoch's number alone, so that a resumed run sees the same ones."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

Augment = Callable[[Tensor, torch.Generator], Tensor]


class Batches:
    """Batches of tensors in memory. A data loader that collates single images would cost more than the step.

    Args:
        x, y: samples and what is to be said of them, (samples, ...) each.
        batch_size: samples per batch; the last one may be smaller.
        seed: of the order, which differs from epoch to epoch; None: the order they have.
        augment: images of a batch, random generator -> images; the generator follows from seed and epoch, too.

    Raises:
        ValueError: x and y of different lengths, nothing in them, a batch size below 1, or `augment` without a seed.
    """

    def __init__(
        self, x: Tensor, y: Tensor, batch_size: int, seed: int | None = None, augment: Augment | None = None
    ) -> None:
        if len(x) != len(y):
            raise ValueError(f"x and y must have the same length, got {len(x)} and {len(y)}")
        if not len(x):
            raise ValueError("x and y are empty; there is nothing to make batches of")
        if not isinstance(batch_size, int) or batch_size < 1:
            raise ValueError(f"batch_size must be a whole number of at least 1, got {batch_size}")
        if augment is not None and seed is None:
            raise ValueError("augment draws random numbers, which need a seed")
        self.x, self.y, self.batch_size, self.seed, self.augment = x, y, batch_size, seed, augment
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Chooses the order of this epoch, counted from 0; where nobody does, every pass is the next epoch."""
        self.epoch = epoch

    def __len__(self) -> int:
        return math.ceil(len(self.x) / self.batch_size)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        order, generator = torch.arange(len(self.x)), torch.Generator()
        if self.seed is not None:
            order = torch.randperm(len(self.x), generator=generator.manual_seed(mixed(self.seed, self.epoch)))
        self.epoch += 1
        for chosen in order.split(self.batch_size):
            x = self.x[chosen]
            yield x if self.augment is None else self.augment(x, generator), self.y[chosen]


class SeededEpochs:
    """Seeds everything random at the start of each epoch, from the seed and the epoch's number.

    Order of a shuffling data loader, dropout, random vectors of a penalty: an epoch's randomness then depends on
    nothing that happened before, so that a run resumed at its start goes on exactly as the unbroken one.

    Args:
        batches: what can be iterated over again and again: a data loader, `Batches`, a list of batches.
        seed: of the run.
    """

    def __init__(self, batches: Iterable[Any], seed: int) -> None:
        self.batches, self.seed, self.epoch = batches, seed, 0

    @property
    def sampler(self) -> SeededEpochs:
        """Lightning tells the epoch to whatever a loader calls its sampler."""
        return self

    def set_epoch(self, epoch: int) -> None:
        """Called before every epoch, with its number from 0."""
        self.epoch = epoch
        for part in self.parts():
            if callable(tell := getattr(part, "set_epoch", None)):
                tell(epoch)

    def parts(self) -> list[Any]:
        """The loader and whatever decides its order."""
        return [self.batches, *(getattr(self.batches, name, None) for name in ("sampler", "batch_sampler"))]

    def __len__(self) -> int:
        return len(self.batches)  # type: ignore[arg-type]

    def __iter__(self) -> Iterator[Any]:
        seed = mixed(self.seed, self.epoch)
        random.seed(seed)
        np.random.seed(seed % 2**32)
        torch.manual_seed(seed)
        for owner in self.parts():
            generator = getattr(owner, "generator", None)
            if isinstance(generator, torch.Generator):  # one of the loader's own goes on from epoch to epoch
                generator.manual_seed(seed)
        yield from self.batches


def mixed(seed: int, epoch: int) -> int:
    """One seed out of two numbers; neighbours share no sequence."""
    return int(np.random.SeedSequence([seed, epoch]).generate_state(1, np.uint64)[0] >> np.uint64(1))
