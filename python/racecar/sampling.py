"""A cheaper reverse pass, right in expectation: of some layers, or of a part of the batch, in every step.

    net = racecar.wrap(model, lam=1e-5, variant="local", sample=racecar.Sample(layers=4, batch=2))

The layers are dealt into groups and the batch is cut into blocks; every forward reverses one group on one block, drawn
evenly, and its loss counts as many times as there are groups and blocks. So the expected loss and gradient are those of
the whole. Where a reverse batch norm takes its statistics of a block instead of the batch, this holds but nearly.
A reverse pass on every k-th step alone is a schedule of λ: `racecar.schedules.every`.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

import torch
from torch import Tensor

from . import checkpointing


@dataclass(frozen=True)
class Sample:
    """What part of the reverse pass every forward runs. Off by default, and drawn without touching PyTorch's own
    random state.

    Attributes:
        layers: 1/layers of the layers, in turn at random; needs variant="local".
        batch: 1/batch of the batch; the layers then run one by one, not as one autograd node.
        seed: of the draws. In data-parallel training every process should have the same for `layers`.

    Raises:
        TypeError, ValueError: a number is no whole number of at least 1 (`seed`: any whole number).
    """

    layers: int = 1
    batch: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("layers", "batch", "seed"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool):
                raise TypeError(f"{name} of a Sample must be a whole number, got {value!r}")
            if name != "seed" and value < 1:
                raise ValueError(f"{name} of a Sample says which fraction runs, 1/{name}: at least 1, got {value}")


@dataclass(frozen=True)
class Drawn:
    """Which group of layers and which block of the batch a forward reverses."""

    group: int
    groups: int
    block: float
    blocks: int

    def chooses(self, m: int) -> bool:
        """Whether layer m is reversed."""
        return m % self.groups == self.group

    def part(self, tensor: Tensor) -> Tensor:
        """The block of a tensor's first dimension: a view."""
        blocks = self.blocks_of(tensor)
        return tensor if blocks == 1 else tensor.tensor_split(blocks)[int(self.block * blocks)]

    def blocks_of(self, tensor: Tensor) -> int:
        """How many blocks there are: no empty ones."""
        return min(self.blocks, tensor.shape[0])


class Sampler:
    """Draws for one wrapped model."""

    def __init__(self, sample: Sample, layers: int) -> None:
        self.sample = sample
        self.groups = min(sample.layers, layers)
        self._random = random.Random(sample.seed)

    def draw(self) -> Drawn:
        """For the next forward.

        Raises:
            RuntimeError: torch.compile would draw once for all steps, and a checkpoint's second forward another part.
        """
        if checkpointing.runs_again():
            raise RuntimeError(
                "sample= draws anew in every forward, and an activation checkpoint around the model runs it twice; "
                "leave out one of the two"
            )
        if torch.compiler.is_compiling():
            raise RuntimeError(
                "sample= draws anew in every forward, which torch.compile does not trace; leave it out of a compiled "
                "model, or use racecar.schedules.every for a reverse pass on every k-th step"
            )
        return Drawn(self._random.randrange(self.groups), self.groups, self._random.random(), self.sample.batch)
