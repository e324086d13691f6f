"""Recipe `mi`: what pretraining does to the information in a small tanh network, and what that is worth afterwards.

Xie & Thuerey 2020, section 4.1, Tables 1 and 2, on the data of Shwartz-Ziv & Tishby 2017. Phase I trains on task A with
every kind of pretraining; phase II goes on from there without any of it, on A (AA) and with swapped labels (AB).
All seeds, kinds and tasks of a phase are one stack of networks (`stacked.py`).
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..analysis import MutualInformationPlane
from ..analysis.optional import optional
from ..baselines import autoencoder_stages
from ..bench.machine import facts
from ..experiments.folder import SettingsError
from ..experiments.threads import cpu_threads
from .folder import RunFolder, stop_asked
from .listener import Listener
from .mi_results import PAPER, gather, write_results
from .patterns import Patterns, load_patterns
from .stacked import Decoders, Stack, autoencoder_loss, perceptron, reconstructed, reverse_losses, states
from .stacked_training import Samples, StackTraining, Terms, accuracies

WIDTHS = (12, 10, 7, 5, 4, 3, 2)
KINDS = ("Std", "Ort", "RR local", "RR¹", "RR")  # rows of phase I; those with a full reverse pass side by side
PRETRAINED = (*KINDS, "Pre")
PART_FOR_TESTS = 5  # one in so many samples
MOMENTS = 12  # of phase I at which the plane is recorded, evenly on a logarithmic scale


@dataclass(frozen=True)
class Settings:
    """Options of a run; the defaults are the paper's protocol, see docs/recipes.md.

    Attributes:
        preset: where they are from.
        seeds: how many; they are 0 .. seeds − 1, and draw weights, split and batches.
        epochs: of phase I. transfer_epochs: of AA, of AB and from scratch.
        lam: λ of every reverse loss, of half the sum of squares over the batch.
        ort: factor of Ort's penalty.
        batch_size: patterns per step. learning_rate: of Adam, in every phase.
        input_tanh: whether the reverse pass applies tanh to what comes back at the input (Table 7).
        signed: inputs −1 and 1 in place of 0 and 1.
        ordered: the last fifth of the patterns, as their file has them, is tested, and batches come in that order too,
            as in the code of the study; see docs/recipes.md. Otherwise the seed draws both.
        twice: softmax once more in front of the cross-entropy, as in the authors' published code.
        validate: test on a fifth of the training patterns instead of the test patterns: for choosing settings.
        threads: CPU threads.
        save_every_s: seconds between checkpoints.
    """

    preset: str = "paper"
    seeds: int = 5
    epochs: int = 20000
    transfer_epochs: int = 20000
    lam: float = 1e-2
    ort: float = 1e-2
    batch_size: int = 512
    learning_rate: float = 4e-4
    input_tanh: bool = True
    signed: bool = False
    ordered: bool = True
    twice: bool = False
    validate: bool = False
    threads: int = 1
    save_every_s: float = 10.0

    def __post_init__(self) -> None:
        for name in ("seeds", "epochs", "transfer_epochs", "batch_size", "threads"):
            if getattr(self, name) < 1:
                raise SettingsError(f"{name} must be at least 1, got {getattr(self, name)}")


@dataclass(frozen=True)
class Split:
    """What is learned and what is tested: samples by seed, and all patterns for the plane."""

    train: Samples
    test: Samples
    x: torch.Tensor
    y: torch.Tensor


def split(patterns: Patterns, settings: Settings) -> Split:
    """The last fifth of the patterns, or one drawn by the seed, is for testing; with `validate` a fifth of the rest.

    What `validate` holds back is drawn by the seed in both cases.
    """
    x = torch.from_numpy(patterns.x).float()
    x = 2 * x - 1 if settings.signed else x
    labels = torch.from_numpy(patterns.y).float() * 2 - 1
    train, test = [], []
    for seed in range(settings.seeds):
        generator = torch.Generator().manual_seed(seed)
        order = torch.arange(len(x)) if settings.ordered else torch.randperm(len(x), generator=generator)
        count = len(x) // PART_FOR_TESTS
        rest, held = order[:-count], order[-count:]
        if settings.validate:
            drawn = torch.randperm(len(rest), generator=generator)
            count = len(rest) // PART_FOR_TESTS
            rest, held = rest[drawn[:-count].sort().values], rest[drawn[-count:]]
        train.append(rest)
        test.append(held)

    def samples(index: list[torch.Tensor]) -> Samples:
        return Samples(torch.stack([x[i] for i in index]), torch.stack([labels[i] for i in index]))

    return Split(samples(train), samples(test), x, torch.from_numpy(patterns.y))


class Experiment:
    """The stages of a run, one after the other: Pre's layers, phase I, phase II.

    Args:
        settings: what to do.
        data: split.

    Attributes:
        state: all that is known so far, ready for a checkpoint: finished weights by stage, curves, planes, and the
            training under way.
    """

    def __init__(self, settings: Settings, data: Split) -> None:
        self.settings, self.data = settings, data
        self.state: dict[str, Any] = {"done": {}, "curves": {}, "planes": {}, "seconds": 0.0, "training": None}
        self.stages = [*(f"Pre, layer {m}" for m in range(1, len(WIDTHS))), "phase I", "phase II"]

    def epochs(self, stage: str) -> int:
        """Of a stage. Pre's layers share phase I's evenly, so that it takes as many steps as the others."""
        if stage.startswith("Pre"):
            return -(-self.settings.epochs // (len(WIDTHS) - 1))
        return self.settings.epochs if stage == "phase I" else self.settings.transfer_epochs

    def training(self, stage: str) -> tuple[Stack, StackTraining]:
        """What a stage trains, as it begins."""
        build = {"phase I": self._phase_one, "phase II": self._phase_two}.get(stage)
        stack, objective, parameters, labels = build() if build else self._greedy(self.stages.index(stage))
        return stack, StackTraining(
            objective,
            parameters,
            self.data.train,
            batch_size=self.settings.batch_size,
            learning_rate=self.settings.learning_rate,
            seed=self.stages.index(stage),
            labels=labels,
            shuffle=not self.settings.ordered,
        )

    def _phase_one(self) -> tuple[Stack, Any, list[torch.Tensor], None]:
        seeds = self.settings.seeds
        stack = Stack.of([perceptron(WIDTHS, seed) for _ in KINDS for seed in range(seeds)])
        lam = torch.zeros(len(stack), len(WIDTHS) - 1)
        lam[slice(*self.rows("RR"))] = lam[slice(*self.rows("RR local"))] = self.settings.lam
        lam[slice(*self.rows("RR¹")), 0] = self.settings.lam
        terms = Terms(
            full=(self.rows("RR¹")[0], self.rows("RR")[1]),
            local=self.rows("RR local"),
            lam=lam,
            orthogonal=self.rows("Ort"),
            factor=self.settings.ort,
            input_tanh=self.settings.input_tanh,
            twice=self.settings.twice,
        )
        return stack, partial(terms.loss, stack), stack.parameters, None

    def _phase_two(self) -> tuple[Stack, Any, list[torch.Tensor], torch.Tensor]:
        """AA of every kind, AB of every kind, and networks that begin on B."""
        done, seeds = self.state["done"], self.settings.seeds
        fresh = Stack.of([perceptron(WIDTHS, seed) for seed in range(seeds)])
        both = [done["phase I"], done[self.stages[len(WIDTHS) - 2]]]
        parts = [torch.cat(own) for own in zip(*both, strict=True)]
        parts = [torch.cat([own, own, new.detach()]) for own, new in zip(parts, fresh.parameters, strict=True)]
        stack = Stack(parts[::2], parts[1::2]).leaves()
        count = seeds * len(PRETRAINED)
        labels = torch.cat([torch.ones(count), -torch.ones(count + seeds)])
        return stack, partial(Terms(twice=self.settings.twice).loss, stack), stack.parameters, labels

    def _greedy(self, m: int) -> tuple[Stack, Any, list[torch.Tensor], None]:
        """Layer m, from 0, of the networks that Pre trains; those below it are finished."""
        seeds = range(self.settings.seeds)
        networks = [perceptron(WIDTHS, seed) for seed in seeds]
        stages = [autoencoder_stages(n, self.data.x[:1], seed=s)[m] for n, s in zip(networks, seeds, strict=True)]
        ops: list[Any] = [stage.decoder.op for stage in stages]
        decoders = Decoders(
            torch.stack([op.weight.detach() for op in ops]).requires_grad_(),
            torch.stack([op.bias.detach() for op in ops])[..., None].requires_grad_(),
        )
        stack = Stack.of(networks)
        if m:
            below = self.state["done"][self.stages[m - 1]]
            stack = Stack(below[::2], below[1::2]).leaves()

        def objective(x: torch.Tensor, labels: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
            return autoencoder_loss(stack, m, decoders, x)

        return stack, objective, [stack.weights[m], stack.biases[m], decoders.weight, decoders.bias], None

    def rows(self, kind: str) -> tuple[int, int]:
        """Of a kind in phase I, or among those that phase II goes on from."""
        first = PRETRAINED.index(kind) * self.settings.seeds
        return first, first + self.settings.seeds

    def run(self, folder: RunFolder, listener: Listener) -> None:
        """Everything that is not done yet; saves a checkpoint now and then, and after every stage.

        Raises:
            KeyboardInterrupt: Ctrl-C, after the epoch under way has been saved.
            OSError: the checkpoint cannot be written; the one before is still whole.
        """
        done = [stage for stage in self.stages if stage in self.state["done"]]
        under_way = self.state["training"]
        behind = sum(map(self.epochs, done)) + (0 if under_way is None else under_way["epochs"])
        listener.plan(sum(map(self.epochs, self.stages)), behind)
        with stop_asked() as asked:
            for stage in self.stages:
                if stage not in done:
                    listener.stage(stage)
                    self._run_stage(stage, folder, listener, asked)

    def _run_stage(self, stage: str, folder: RunFolder, listener: Listener, asked: Callable[[], bool]) -> None:
        stack, training = self.training(stage)
        if self.state["training"] is not None:
            training.load_state_dict(self.state["training"])
            # what was trained lies in the stack itself; of Pre's, the layers below came with it
        else:
            self._record(stage, stack, training)
        epochs, saved = self.epochs(stage), time.perf_counter()
        began = saved
        while training.epochs < epochs:
            training.epoch()
            listener.advance(1)
            self._record(stage, stack, training)
            now = time.perf_counter()
            if asked() or now - saved > self.settings.save_every_s:
                self.state["seconds"] += now - began
                self.state["training"] = training.state_dict()
                folder.save(self.state)
                saved = began = now
            if asked():
                raise KeyboardInterrupt
        self.state["seconds"] += time.perf_counter() - began
        self.state["done"][stage] = [p.detach().clone() for p in stack.parameters]
        self.state["training"] = None
        folder.save(self.state)

    def _record(self, stage: str, stack: Stack, training: StackTraining) -> None:
        """Accuracies, losses and planes at the epochs chosen for them."""
        epoch, epochs = training.epochs, self.epochs(stage)
        if stage.startswith("Pre") or epoch not in moments(epochs):
            return
        labels = None if stage == "phase I" else training.labels
        found = accuracies(stack, self.data.test, labels)
        self.state["curves"].setdefault(stage, []).append([epoch, found.tolist()])
        if stage == "phase I" or epoch in (0, epochs):
            count = len(PRETRAINED) * self.settings.seeds  # AB begins where AA does; from scratch has no plane
            shown = len(stack) if stage == "phase I" else 2 * count if epoch else count
            rows = [plane_row(stack, row, self.data) for row in range(shown)]
            self.state["planes"].setdefault(stage, []).append([epoch, rows])


def moments(epochs: int) -> list[int]:
    """Epochs at which something is recorded: the first and last among them, denser at the beginning."""
    return sorted({0, *(round(epochs ** (i / (MOMENTS - 1))) for i in range(MOMENTS))})


def plane_row(stack: Stack, row: int, data: Split) -> list[list[float]]:
    """I(X; D) and I(D; Y) of D1 .. D7 of one network over all patterns, in bits: two lists."""
    plane = MutualInformationPlane(data.x, data.y)
    plane.record(stack.network(row), 0)
    return [np.round(about[0], 4).tolist() for about in (plane.result.about_x, plane.result.about_y)]


def final_reverse_losses(experiment: Experiment) -> dict[str, list[float]]:
    """Per pattern and layer, what each kind's full reverse pass leaves after phase I: mean over the seeds."""
    data, settings = experiment.data, experiment.settings
    found = {}
    for kind in PRETRAINED:
        stage = "phase I" if kind in KINDS else experiment.stages[len(WIDTHS) - 2]
        parameters = experiment.state["done"][stage]
        first = KINDS.index(kind) * settings.seeds if kind in KINDS else 0
        own = [p[first : first + settings.seeds] for p in parameters]
        stack = Stack(own[::2], own[1::2])
        with torch.no_grad():
            d = states(stack, data.x.T.expand(len(stack), -1, -1))
            back = reconstructed(stack, d, full=True, input_tanh=settings.input_tanh)
            found[kind] = (reverse_losses(d, back).mean(0) / len(data.x)).tolist()
    return found


def run(
    settings: Settings,
    folder: RunFolder,
    *,
    data: Path | None = None,
    command: str = "",
    resume: bool = False,
    overwrite: bool = False,
    listener: Listener | None = None,
) -> dict[str, Any]:
    """Runs the recipe, or goes on with it, and writes checkpoint, `results.json`, `table.md` and `planes.png`.

    Args:
        settings: what to do.
        folder: where to.
        data: the study's var_u.mat; None: `generated_patterns`.
        command: the command line, for the results.
        resume, overwrite: what to do with a run that the folder holds; see `RunFolder.begin`.
        listener: is told what happens.

    Returns:
        What `results.json` holds.

    Raises:
        ModuleNotFoundError: matplotlib or SciPy is missing. DataError, SettingsError: bad input or a folder that holds
            something else. All of them before anything is computed.
        OSError: the disk is full or gone. KeyboardInterrupt: Ctrl-C. The last checkpoint stays, for `resume`.
    """
    listener = listener or Listener()
    for module in ("matplotlib.figure", "scipy.stats"):
        optional(module, "the recipe")  # before an hour is spent, not after
    patterns = load_patterns(data)
    with folder.held(), cpu_threads(settings.threads):
        folder.begin(settings, data, patterns.fingerprint, command, resume=resume, overwrite=overwrite)
        experiment = Experiment(settings, split(patterns, settings))
        kept = folder.load()
        now = datetime.now().astimezone().isoformat(timespec="seconds")
        machine = json.loads(json.dumps(facts()))  # plain strings: a checkpoint is loaded with weights only
        experiment.state.update({"started": now, "machine": machine, **(kept or {})})
        experiment.run(folder, listener)
        content = {
            "recipe": "mi",
            "command": folder.command,
            "settings": asdict(settings),
            "data": f"{patterns.source}, {patterns.y.mean():.3f} of the labels 1",
            "machine": experiment.state["machine"],  # where the run began, and on which commit
            "started": experiment.state["started"],
            "seconds": experiment.state["seconds"],
            "paper": PAPER,
            **gather(experiment, kinds=KINDS, pretrained=PRETRAINED),
            "left by the reverse pass": final_reverse_losses(experiment),
        }
        write_results(content, folder.path)
        folder.finish()
    return content
