"""What the demo's jobs share, and what a finished one went through."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..experiments.contestants import Contestant
from ..experiments.jobs import Job, Leg
from ..experiments.tasks import Task, labelled
from ..training import Batches
from .network import fresh_network
from .results import Run
from .settings import Settings

LEGS = (Leg("I", "I"), Leg("A→A", "AA", "I"), Leg("A→B", "AB", "I"))
TEST_BATCH = 256


@dataclass(frozen=True)
class Workplace:
    """What all jobs share.

    Attributes:
        tasks: "A" and "B".
        classes: how many.
        settings: filled.
        runs: folder of all runs.
    """

    tasks: dict[str, Task]
    classes: int
    settings: Settings
    runs: Path

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(channels, height, width)."""
        channels, height, width = self.tasks["A"].train_x.shape[1:]
        return channels, height, width

    def task(self, phase: str, seed: int) -> Task:
        """What a phase learns; the seed draws the labelled images of task B, the same for every contestant."""
        return labelled(self.tasks["B"], self.settings.labels, seed) if phase == "A→B" else self.tasks["A"]

    @property
    def factors(self) -> Settings:
        """λ and the like."""
        return self.settings

    def legs(self, contestant: Contestant) -> Sequence[Leg]:
        """Phase I, then both of phase II; the same for all."""
        return LEGS

    def epochs(self, phase: str, contestant: Contestant | None = None) -> int:
        """Epochs of a phase."""
        return (self.settings.transfer_epochs if phase == "A→B" else self.settings.epochs) or 1

    def batches(self, phase: str, seed: int) -> tuple[Batches, Batches]:
        """Of a phase, to train and to test on."""
        task = self.task(phase, seed)
        train = Batches(task.train_x, task.train_y, self.settings.batch_size, seed)
        return train, Batches(task.test_x, task.test_y, TEST_BATCH)

    def options(self, phase: str, epochs: int) -> dict[str, Any]:
        """Of `run_phase`, the same for all phases."""
        return {
            "optimizer": partial(torch.optim.Adam, lr=self.settings.learning_rate),
            "save_every_s": self.settings.save_every_s,
            "accelerator": self.settings.accelerator,
        }

    def onward(self, network: nn.Module, seed: int, phase: str) -> nn.Module:
        """The network as it is: both tasks have the same classes."""
        return network

    def network(self, seed: int, phase: str = "I") -> nn.Sequential:
        """The network with the initial weights of a seed."""
        return fresh_network(self.image_shape, self.classes, seed)


def result_of(job: Job, phase: str) -> Run:
    """What a finished run went through."""
    history = job.history(phase)
    layers = {name: history.values(name) for name in history.curves if name.startswith("train/reverse/")}
    return Run(
        model=job.contestant.name,
        seed=job.seed,
        phase=phase,
        task_loss=history.values("train/task"),
        reverse_loss=history.values("train/reverse"),
        layer_losses={name.removeprefix("train/reverse/"): curve for name, curve in layers.items()},
        accuracy=history.values("validation/accuracy"),
        seconds=history.seconds,
    )
