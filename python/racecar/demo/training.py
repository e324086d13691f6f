"""One training run by Lightning: a phase of one contestant with one seed."""

from __future__ import annotations

import logging
import math
import signal
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import lightning.pytorch as L
import torch
from torch import Tensor, nn
from torch.nn import functional as F


@dataclass(frozen=True)
class Task:
    """Images and labels of one task: x of shape (images, channels, height, width), y of shape (images,)."""

    train_x: Tensor
    train_y: Tensor
    test_x: Tensor
    test_y: Tensor


@dataclass
class Curve:
    """What one run went through, one value per epoch: mean losses of its training steps, accuracy on the test set."""

    task_loss: list[float] = field(default_factory=list)
    reverse_loss: list[float] = field(default_factory=list)
    accuracy: list[float] = field(default_factory=list)


class Batches:
    """Batches of tensors in memory. A data loader that collates single images would cost more than the step.

    Args:
        x, y: images and labels.
        batch_size: images per batch; the last one may be smaller.
        seed: of the order, which differs from epoch to epoch; None: the order they have.
    """

    def __init__(self, x: Tensor, y: Tensor, batch_size: int, seed: int | None = None) -> None:
        self.x, self.y, self.batch_size = x, y, batch_size
        self.generator = None if seed is None else torch.Generator().manual_seed(seed)

    def __len__(self) -> int:
        return math.ceil(len(self.x) / self.batch_size)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        count = len(self.x)
        order = torch.arange(count) if self.generator is None else torch.randperm(count, generator=self.generator)
        for chosen in order.split(self.batch_size):
            yield self.x[chosen], self.y[chosen]


class Classifier(L.LightningModule):
    """Cross-entropy, plus the reverse loss where the network has one; Adam.

    Args:
        network: images -> logits; wrapped by `racecar.wrap` or plain.
        learning_rate: of Adam.
        reverse: whether to add `network.reverse_loss`.
    """

    def __init__(self, network: nn.Module, learning_rate: float, reverse: bool) -> None:
        super().__init__()
        self.network = network
        self.learning_rate = learning_rate
        self.reverse = reverse
        self.curve = Curve()
        # Sums stay tensors until an epoch ends: reading a number at every step would make a GPU wait.
        self.sums: dict[str, list[Tensor]] = {"task": [], "reverse": [], "hits": []}

    def training_step(self, batch: tuple[Tensor, Tensor], _: int) -> Tensor:
        x, y = batch
        loss = F.cross_entropy(self.network(x), y)
        self.sums["task"].append(loss.detach())
        if self.reverse:
            reverse_loss: Tensor = self.network.reverse_loss  # type: ignore[assignment]
            self.sums["reverse"].append(reverse_loss.detach())
            loss = loss + reverse_loss
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor], _: int) -> None:
        x, y = batch
        self.sums["hits"].append((self.network(x).argmax(1) == y).float())

    def on_validation_epoch_end(self) -> None:
        self.curve.accuracy.append(self.collect("hits", torch.cat))

    def on_train_epoch_end(self) -> None:
        self.curve.task_loss.append(self.collect("task", torch.stack))
        if self.reverse:
            self.curve.reverse_loss.append(self.collect("reverse", torch.stack))

    def collect(self, name: str, join: Callable[[list[Tensor]], Tensor]) -> float:
        """The mean of what was gathered in this epoch; forgets it."""
        mean = join(self.sums[name]).mean().item()
        self.sums[name].clear()
        return mean

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=self.learning_rate)


class StepCounter(L.Callback):
    """Reports every finished step, for a progress bar over many runs."""

    def __init__(self, advance: Callable[[int], None]) -> None:
        self.advance = advance

    def on_train_batch_end(self, *_: object) -> None:
        self.advance(1)


def train(
    network: nn.Module,
    task: Task,
    *,
    epochs: int,
    batch_size: int,
    learning_rate: float,
    reverse: bool,
    seed: int,
    accelerator: str = "cpu",
    advance: Callable[[int], None] = lambda steps: None,
) -> Curve:
    """Trains a network in place and tests it after every epoch.

    Args:
        network: images -> logits.
        task: what to learn.
        epochs, batch_size, learning_rate: the usual.
        reverse: whether to add `network.reverse_loss`.
        seed: of the order of the batches.
        accelerator: Lightning's name of the device.
        advance: called with 1 after every step.

    Returns:
        The curves; the last accuracy is the result.
    """
    module = Classifier(network, learning_rate, reverse)
    batches = Batches(task.train_x, task.train_y, batch_size, seed)
    test = Batches(task.test_x, task.test_y, batch_size=256)
    with quiet_lightning():
        trainer = L.Trainer(
            max_epochs=epochs,
            accelerator=accelerator,
            devices=1,
            callbacks=[StepCounter(advance)],
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            num_sanity_val_steps=0,
        )
        handler = signal.getsignal(signal.SIGINT)
        try:
            trainer.fit(module, train_dataloaders=batches, val_dataloaders=test)
        except SystemExit:
            # Lightning answers Ctrl-C by ignoring the signal from then on and leaving the process.
            if not trainer.interrupted:
                raise
            signal.signal(signal.SIGINT, handler)
            raise KeyboardInterrupt from None
    return module.curve


@contextmanager
def quiet_lightning() -> Iterator[None]:
    """Keeps Lightning's remarks on devices, tips and workers off a terminal that shows one progress bar."""
    loggers = [logging.getLogger(name) for name in ("lightning.pytorch", "lightning.fabric", "lightning")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module="lightning.*")
            warnings.filterwarnings("ignore", message=".*LeafSpec.*")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
