"""What the recipes on images share: a network learns task A in several ways, then goes on, on A or on another task."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..baselines import autoencoder_stages
from ..data.images import grouped_split
from ..experiments.contestants import Contestant
from ..experiments.folder import SettingsError
from ..experiments.jobs import Job, Leg
from ..experiments.steps import one_after_another, parts_of, step_of
from ..experiments.tasks import Task, part_of_each_class
from ..measure import ratios, step_times
from ..training import Batches
from ..transfer import new_head

ACTIVATIONS = {"": None, "relu": nn.ReLU, "tanh": nn.Tanh}
VALIDATION_PART = 0.2  # of the training images
TEST_BATCH = 256
PHASE_I = "I"


@dataclass(frozen=True)
class Settings:
    """Options of a run; presets set them.

    Attributes:
        preset: where they are from.
        seeds: how many; they are 0 .. seeds − 1, and draw the weights and the order of the images.
        limit, test_limit: images of every task, drawn class by class; 0: all.
        size: height and width of image files; 0: as they are.
        epochs, transfer_epochs: of phase I, and of what follows it.
        lam: λ of every layer. reduction: of the reverse loss.
        input_activation: applied to what comes back at the input: "relu", "tanh", or "" for none.
        ort: factor of Ort's penalty (SRIP).
        batch_size, learning_rate: of every leg.
        divisor: of the network's channels. blocks: of a residual network, in each of its three groups; 0: as published.
        validate: test on a fifth of the training images: for choosing settings.
        accelerator: "cpu", "gpu", or "auto": the GPU where there is one.
        threads: CPU threads of a worker. workers: processes at a time; 0: one for every core, one on a GPU.
        save_every_s: seconds between checkpoints of a leg.
    """

    preset: str = "paper"
    seeds: int = 5
    limit: int = 0
    test_limit: int = 0
    size: int = 0
    epochs: int = 10
    transfer_epochs: int = 10
    lam: float = 1.0
    reduction: str = "mean"
    input_activation: str = ""
    ort: float = 0.01
    batch_size: int = 64
    learning_rate: float = 1e-3
    divisor: int = 1
    blocks: int = 0
    validate: bool = False
    accelerator: str = "auto"
    threads: int = 1
    workers: int = 0
    save_every_s: float = 10.0

    def __post_init__(self) -> None:
        for name in ("seeds", "epochs", "transfer_epochs", "batch_size", "divisor", "threads"):
            if getattr(self, name) < 1:
                raise SettingsError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("limit", "test_limit", "size", "blocks", "workers", "lam", "ort", "save_every_s"):
            if not (math.isfinite(getattr(self, name)) and getattr(self, name) >= 0):
                raise SettingsError(f"{name} must be a number, 0 or larger, got {getattr(self, name)}")
        if self.input_activation not in ACTIVATIONS:
            raise SettingsError(f"input_activation must be relu, tanh or empty, got {self.input_activation!r}")
        if self.accelerator not in ("cpu", "gpu", "auto"):
            raise SettingsError(f"accelerator must be cpu, gpu or auto, got {self.accelerator!r}")
        if self.accelerator == "gpu" and not torch.cuda.is_available():
            raise SettingsError("accelerator is gpu, but this PyTorch sees no CUDA GPU; give cpu or auto")

    @property
    def wrapping(self) -> dict[str, Any]:
        """How phase I is wrapped, beside λ."""
        made = ACTIVATIONS[self.input_activation]
        return {"reduction": self.reduction, "input_activation": None if made is None else made()}

    @property
    def device(self) -> torch.device:
        """Where it trains."""
        return torch.device("cuda" if self.accelerator != "cpu" and torch.cuda.is_available() else "cpu")

    @property
    def processes(self) -> int:
        """How many train side by side."""
        if self.workers or self.device.type == "cuda":
            return self.workers or 1
        return max(1, (os.cpu_count() or 1) // self.threads)


@dataclass(frozen=True)
class Tasks:
    """What a study learns.

    Attributes:
        of: leg -> its task; legs may share one.
        classes: leg -> how many. fresh: legs whose classes are others than phase I's: they begin with a fresh head.
        source: where the images are from, in words. notes: what was done to them, a sentence each.
        as_published: whether they are the paper's, so that its figures may stand beside those found here.
        groups: of phase I's training images, which validation does not part; empty: every image by itself.
        further: column of the table -> leg whose network is tested once more, images, labels.
        fingerprint: tells other data apart.
    """

    of: Mapping[str, Task]
    classes: Mapping[str, int]
    source: str
    fresh: frozenset[str] = frozenset()
    notes: tuple[str, ...] = ()
    as_published: bool = True
    groups: tuple[str, ...] = ()
    further: Mapping[str, tuple[str, Tensor, Tensor]] = field(default_factory=dict)
    fingerprint: int = 0

    def validated(self) -> Tasks:
        """The same, tested on a part of the training images; no test image is looked at.

        Raises:
            SettingsError: a class with a single training image.
        """
        seen: dict[int, Task] = {}
        for task in self.of.values():
            if self.groups:
                _, chosen = grouped_split(task.train_y.numpy(), self.groups, VALIDATION_PART, seed=0)
                held = torch.zeros(len(task.train_y), dtype=torch.bool).index_fill(0, torch.from_numpy(chosen), True)
            else:
                held = part_of_each_class(task.train_y, VALIDATION_PART)
            x, y = task.train_x, task.train_y
            seen[id(task)] = Task(x[~held], y[~held], x[held], y[held])
        return replace(self, of={leg: seen[id(task)] for leg, task in self.of.items()}, further={})


def adam(settings: Settings, phase: str) -> Callable[[list[nn.Parameter]], torch.optim.Optimizer]:
    """Adam with the settings' learning rate, for every leg."""
    return partial(torch.optim.Adam, lr=settings.learning_rate)


@dataclass(frozen=True)
class Study:
    """One of these recipes. Its functions stand in a module, so that worker processes find them.

    Attributes:
        recipe: its name. title: of the table.
        legs: phase I first. columns: leg -> column of the table.
        scratch: legs that are also learned from fresh weights.
        models: who takes part; the first is what the others are compared with.
        network: (channels, height, width), classes, settings -> the network with its initial weights.
        tasks: settings, the user's data or None -> what is learned.
        paper: model -> column -> accuracy in the paper.
        explained: a paragraph below the table.
        optimizer: settings, leg -> optimiser of parameters. scheduler: settings, epochs -> schedule of an optimiser.
        augment: images, random generator -> images; of every training batch.
    """

    recipe: str
    title: str
    legs: tuple[Leg, ...]
    columns: Mapping[str, str]
    models: tuple[Contestant, ...]
    network: Callable[[tuple[int, int, int], int, Settings], nn.Module]
    tasks: Callable[[Settings, Path | None], Tasks]
    paper: Mapping[str, Mapping[str, float]]
    explained: str
    scratch: tuple[str, ...] = ()
    optimizer: Callable[[Settings, str], Callable[[list[nn.Parameter]], torch.optim.Optimizer]] = adam
    scheduler: Callable[[Settings, int], Callable[[torch.optim.Optimizer], Any]] | None = None
    augment: Callable[[Tensor, torch.Generator], Tensor] | None = None


@dataclass(frozen=True)
class Site:
    """What all jobs of a run share; see `racecar.experiments.jobs.Place`.

    `slower`: contestant -> how many times Std's step its step of phase I takes.
    """

    study: Study
    settings: Settings
    tasks: Tasks
    runs: Path
    slower: Mapping[str, float] = field(default_factory=dict)

    @property
    def factors(self) -> Settings:
        return self.settings

    def legs(self, contestant: Contestant) -> Sequence[Leg]:
        if contestant.pretrained:
            return self.study.legs
        return tuple(replace(leg, start=None) for leg in self.study.legs if leg.name in self.study.scratch)

    def epochs(self, phase: str, contestant: Contestant) -> int:
        if phase != PHASE_I:
            return self.settings.transfer_epochs
        epochs = self.settings.epochs
        if contestant.greedy:  # all layers together as many as the others
            return max(1, epochs // self.layers())
        return epochs if contestant.as_long_as is None else round(epochs * self.slower[contestant.as_long_as])

    def layers(self) -> int:
        """How many are trained one by one."""
        return len(autoencoder_stages(self.network(0, PHASE_I), self.tasks.of[PHASE_I].train_x[:1], seed=0))

    def batches(self, phase: str, seed: int) -> tuple[Batches, Batches]:
        task, names = self.tasks.of[phase], [leg.name for leg in self.study.legs]
        order = seed + 1000 * names.index(phase)  # another order in every leg
        train = Batches(task.train_x, task.train_y, self.settings.batch_size, order, self.study.augment)
        return train, Batches(task.test_x, task.test_y, TEST_BATCH)

    def network(self, seed: int, phase: str) -> nn.Module:
        channels, height, width = self.tasks.of[phase].train_x.shape[1:]
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            network = self.study.network((channels, height, width), self.tasks.classes[phase], self.settings)
        # PyTorch's stub lacks the keyword.
        return network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def onward(self, network: nn.Module, seed: int, phase: str) -> nn.Module:
        """With a fresh head where the classes are others; else the network as it is."""
        if phase not in self.tasks.fresh:
            return network
        return new_head(network, self.tasks.classes[phase], seed=seed)

    def options(self, phase: str, epochs: int) -> dict[str, Any]:
        settings, scheduler = self.settings, self.study.scheduler
        return {
            "optimizer": self.study.optimizer(settings, phase),
            "scheduler": None if scheduler is None else scheduler(settings, epochs),
            "save_every_s": settings.save_every_s,
            "accelerator": "gpu" if settings.device.type == "cuda" else "cpu",
        }


def jobs_of(site: Site) -> list[Job]:
    """Every contestant with every seed; seeds in the outer loop, so that a broken run has compared something."""
    return [Job(site, contestant, seed) for seed in range(site.settings.seeds) for contestant in site.study.models]


def measured_ratios(site: Site) -> dict[str, float]:
    """Contestant -> its step of phase I over Std's, measured here, where another is to train as long; else nothing."""
    wanted = {contestant.as_long_as for contestant in site.study.models if contestant.as_long_as}
    if not wanted:
        return {}
    settings, task = site.settings, site.tasks.of[PHASE_I]
    x, y = (t[: settings.batch_size].to(settings.device) for t in (task.train_x, task.train_y))
    base = site.study.models[0]
    steps = {}
    for contestant in (base, *(c for c in site.study.models if c.name in wanted)):
        network = site.network(0, PHASE_I).to(settings.device)
        parts = parts_of(contestant, network, settings, x, y)
        single = [step_of(run, torch.optim.Adam(parameters)) for run, parameters in parts]
        steps[contestant.name] = one_after_another(single)
    times = step_times(steps, rounds=3 if settings.preset == "quick" else 15, device=settings.device)
    return {name: ratio.median for name, ratio in ratios(times, base.name).items()}
