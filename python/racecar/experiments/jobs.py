"""One contestant with one seed through its runs, each in a folder of its own; a finished one is not run again."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import lightning.pytorch as L
from torch import nn

from ..baselines import autoencoder_stages
from ..training import Batches, History, load_checkpoint, reconstruction, run_phase, save_checkpoint
from ..training.run import HISTORY, WEIGHTS
from .contestants import Contestant, Factors

EVALUATIONS = 10  # of the test set, about so many in each run


@dataclass(frozen=True)
class Leg:
    """One run of a contestant.

    Attributes:
        name: in tables: "I", "A→A".
        key: the same in plain ASCII, for the names of files.
        start: the leg that left the weights; None: fresh ones, and the contestant's own way of training.
    """

    name: str
    key: str
    start: str | None = None


class Place(Protocol):
    """What all jobs of an experiment share; a copy of it goes to every process."""

    @property
    def runs(self) -> Path:
        """Folder of all runs."""

    @property
    def factors(self) -> Factors:
        """Of phase I."""

    def legs(self, contestant: Contestant) -> Sequence[Leg]:
        """The runs of a contestant, in their order."""

    def epochs(self, phase: str, contestant: Contestant) -> int:
        """Epochs of a leg; of greedy pretraining those of every layer."""

    def batches(self, phase: str, seed: int) -> tuple[Batches, Batches]:
        """What a leg trains on, and what it is tested on."""

    def network(self, seed: int, phase: str) -> nn.Module:
        """The network for a leg with the initial weights of a seed, the same for every contestant."""

    def onward(self, network: nn.Module, seed: int, phase: str) -> nn.Module:
        """The network that another leg left, made ready for this one."""

    def options(self, phase: str, epochs: int) -> dict[str, Any]:
        """More of `run_phase`'s arguments: optimizer, accelerator and the like."""


@dataclass(frozen=True)
class Job:
    """The runs of one contestant with one seed."""

    place: Place
    contestant: Contestant
    seed: int

    @property
    def title(self) -> str:
        return f"{self.contestant.name}, seed {self.seed}"

    @property
    def legs(self) -> Sequence[Leg]:
        return self.place.legs(self.contestant)

    def folder(self, phase: str) -> Path:
        """Where a run is kept: runs/RR-seed0-AB."""
        key = next(leg.key for leg in self.legs if leg.name == phase)
        return self.place.runs / f"{self.contestant.key}-seed{self.seed}-{key}"

    def finished(self, phase: str) -> bool:
        """Whether a run has come to its end."""
        return (self.folder(phase) / HISTORY).is_file()

    def load(self, phase: str = "I") -> nn.Module:
        """The network as a finished run left it."""
        network = self.place.network(self.seed, phase)
        load_checkpoint(network, self.folder(phase) / WEIGHTS)
        return network

    def history(self, phase: str) -> History:
        """The curves of a finished run."""
        return History.load(self.folder(phase) / HISTORY)

    def steps(self, phase: str) -> int:
        """Training steps of a run."""
        train, _ = self.place.batches(phase, self.seed)
        stages = len(self.stages(self.place.network(0, phase), phase)) if self.is_greedy(phase) else 1
        return stages * self.place.epochs(phase, self.contestant) * len(train)

    def is_greedy(self, phase: str) -> bool:
        """Whether a run trains the layers one by one."""
        return self.contestant.greedy and next(leg for leg in self.legs if leg.name == phase).start is None

    def stages(self, network: nn.Module, phase: str) -> list[Any]:
        """The autoencoders of greedy pretraining, whose encoders are the network's own layers."""
        train, _ = self.place.batches(phase, self.seed)
        return autoencoder_stages(network, train.x[:1], seed=self.seed)

    def run(self, stage: Callable[[str], None], advance: Callable[[int], None]) -> None:
        """One leg after the other, each from the weights that it starts from, head included.

        Args:
            stage: is told what begins.
            advance: is told steps done, and at once all steps of a run that was finished before.
        """
        left: dict[str, nn.Module] = {}
        for leg in self.legs:
            stage(f"{self.title}, {leg.name}")
            if self.finished(leg.name):
                advance(self.steps(leg.name))
            if leg.start is not None:
                network = self.place.onward(copy.deepcopy(left[leg.start]), self.seed, leg.name)
                self.train(network, leg.name, advance)
            else:
                network = self.pretrained(leg.name, advance)
            left[leg.name] = network

    def pretrained(self, phase: str, advance: Callable[[int], None]) -> nn.Module:
        """A fresh network, trained in the contestant's own way."""
        network = self.place.network(self.seed, phase)
        if self.contestant.greedy:
            self.pretrain_greedily(network, phase, advance)
            return network
        penalty = self.contestant.penalty(self.place.factors)
        self.train(self.contestant.prepare(network, self.place.factors), phase, advance, penalty=penalty)
        return self.contestant.release(network)

    def train(self, network: nn.Module, phase: str, advance: Callable[[int], None], **options: Any) -> None:
        """One supervised run in place, tested now and then."""
        train, test = self.place.batches(phase, self.seed)
        epochs = self.place.epochs(phase, self.contestant)
        every = max(n for n in range(1, epochs + 1) if epochs % n == 0 and n <= max(1, epochs // EVALUATIONS))
        run_phase(
            network,
            train,
            test,
            folder=self.folder(phase),
            check_val_every_n_epoch=every,
            **self.options(phase, advance),
            **options,
        )

    def pretrain_greedily(self, network: nn.Module, phase: str, advance: Callable[[int], None]) -> None:
        """A run without labels: one per layer, below the folder of the phase."""
        folder = self.folder(phase)
        if self.finished(phase):
            load_checkpoint(network, folder / WEIGHTS)
            return
        joined = History()
        for stage in self.stages(network, phase):
            train, _ = self.place.batches(phase, self.seed)
            history = run_phase(
                stage,
                train,
                folder=folder / f"layer-{stage.name}",
                objective=reconstruction,
                parameters=stage.trained_parameters(),
                **self.options(phase, advance),
            )
            joined.curves[f"train/reverse/{stage.name}"] = history.curves["train/task"]
            joined.seconds += history.seconds
        save_checkpoint(network, folder / WEIGHTS)
        joined.save(folder / HISTORY)

    def options(self, phase: str, advance: Callable[[int], None]) -> dict[str, Any]:
        """What every run is given."""
        epochs = self.place.epochs(phase, self.contestant)
        return {
            "epochs": epochs,
            "seed": self.seed,
            "resume": True,  # an experiment that begins anew has emptied its folder
            "progress": False,
            "callbacks": [StepCounter(advance)],
            **self.place.options(phase, epochs),
        }


class StepCounter(L.Callback):
    """Reports every finished step, for a progress bar over many runs."""

    def __init__(self, advance: Callable[[int], None]) -> None:
        self.advance = advance

    def on_train_batch_end(self, *_: object) -> None:
        self.advance(1)
