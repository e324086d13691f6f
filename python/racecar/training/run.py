"""Runs a phase by Lightning in a folder of its own: logs, weights, resume after a kill, early stop."""

from __future__ import annotations

import logging
import math
import os
import pickle
import signal
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence, Sized
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import torch
from lightning.pytorch.callbacks import Callback, Checkpoint, EarlyStopping, ModelCheckpoint
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor, nn
from torch.utils.data import DataLoader

from .batches import SeededEpochs
from .checkpoints import CheckpointError, load_checkpoint, save_checkpoint
from .errors import TrainingError
from .history import History, HistoryError
from .identity import IDENTITY, check_identity, describe_run, write_identity
from .objectives import Objective, classification
from .phase import ADAM, MakeOptimizer, MakeScheduler, Phase

HISTORY, WEIGHTS, TABLE, LAST, BEST = "history.json", "weights.safetensors", "metrics.csv", "last.ckpt", "best.ckpt"


def run_phase(
    network: nn.Module,
    train: Iterable[Any],
    validation: Iterable[Any] | None = None,
    *,
    epochs: int,
    folder: str | Path | None = None,
    objective: Objective = classification,
    penalty: Callable[[nn.Module], Tensor] | None = None,
    optimizer: MakeOptimizer = ADAM,
    scheduler: MakeScheduler | None = None,
    parameters: Iterable[nn.Parameter] | None = None,
    seed: int = 0,
    resume: bool = False,
    save_every_s: float = 30.0,
    patience: int | None = None,
    monitor: str = "validation/task",
    precision: Any = "32-true",
    accelerator: str = "cpu",
    devices: int = 1,
    progress: bool = True,
    callbacks: Sequence[Callback] = (),
    **trainer_options: Any,
) -> History:
    """Trains a network in place, from its present weights, and returns what happened.

    Everything random in an epoch follows from `seed` and the epoch's number, and the caller's random state stays as it
    is. With a folder, the run leaves there `metrics.csv` and TensorBoard's event file (one value per epoch of the
    loss, its parts, every layer's reverse loss, the validation), `weights.safetensors` with the keys of the plain
    `state_dict`, and `history.json`, which says that it is finished.

    Args:
        network: plain, wrapped by `racecar.wrap`, or with wrapped parts, whose reverse losses join the objective.
        train, validation: batches, to be iterated over once per epoch: data loaders, `Batches`, lists.
        epochs: how many, at most.
        folder: where the run is kept; None: nowhere.
        objective, penalty, optimizer, scheduler, parameters: see `Phase`.
        seed: of everything random while training; the initial weights are the caller's.
        resume: go on with what the folder holds: a finished run is loaded, a broken one continued behind its last saved
            epoch, with the same result as an unbroken one. False: begin anew.
        save_every_s: seconds between saves that a broken run can be continued from, at the end of an epoch; 0: of
            every epoch.
        patience: stop when `monitor` has not become better for so many epochs, and keep the best epoch's weights.
        monitor: curve that decides; losses are to fall, a name that ends in `accuracy` is to rise.
        precision: Lightning's name of it: "32-true", "bf16-mixed", "16-mixed", "64-true" (which leaves the network in
            float64).
        accelerator: Lightning's: "cpu", "gpu", "auto".
        devices: 1; batches are not shared out over several yet.
        progress: show Lightning's progress bar.
        callbacks: more of Lightning's callbacks.
        trainer_options: more of `lightning.pytorch.Trainer`'s arguments, such as gradient_clip_val.

    Returns:
        The curves; with early stop `.best` names the epoch whose weights the network now has.

    Raises:
        TrainingError: arguments that do not go together, or a folder with another run.
        KeyboardInterrupt: Ctrl-C; what was saved so far stays.
    """
    check_arguments(train, epochs, patience, validation, resume, folder, devices, trainer_options)
    place = None if folder is None else Path(folder)
    if place is not None:
        identity = describe_run(network, train, optimizer, epochs, seed, patience, monitor, precision)
        if resume and (history := finished_run(network, place, identity)) is not None:
            return history
        prepare(place, resume, identity)
    if not network.training:
        network.train()  # Lightning would train it in evaluation mode; a single part in evaluation mode stays
    phase = Phase(
        network,
        objective=objective,
        penalty=penalty,
        optimizer=optimizer,
        scheduler=scheduler,
        parameters=parameters,
    )
    keepers = keepers_of(place, save_every_s, patience, monitor)
    with isolate_rng(), quiet_lightning():
        trainer = L.Trainer(
            max_epochs=epochs,
            accelerator=accelerator,
            devices=devices,
            precision=precision,
            callbacks=[*keepers, *callbacks],
            logger=False if place is None else TensorBoardLogger(place, name="", version="", default_hp_metric=False),
            enable_checkpointing=bool(keepers),
            enable_progress_bar=progress,
            enable_model_summary=False,
            num_sanity_val_steps=0,
            **trainer_options,
        )
        fit(trainer, phase, SeededEpochs(train, seed), validation, place)
    restore_best(keepers, network, phase.history, monitor)
    if place is not None:
        finish(network, phase.history, place)
    return phase.history


def check_arguments(
    train: Iterable[Any],
    epochs: int,
    patience: int | None,
    validation: Iterable[Any] | None,
    resume: bool,
    folder: str | Path | None,
    devices: int,
    trainer_options: dict[str, Any],
) -> None:
    """Refuses what does not go together, before anything is written."""
    if iter(train) is train:
        raise TrainingError("train can be iterated over once only, but every epoch needs it; give a list or a loader")
    if validation is not None and iter(validation) is validation:
        raise TrainingError("validation can be iterated over once only; give a list or a loader")
    if isinstance(train, Sized) and len(train) == 0:
        raise TrainingError("train holds no batch; there is nothing to learn from")
    if devices != 1:
        raise TrainingError(f"devices must be 1: batches are not shared out over several yet; got {devices}")
    if patience is not None and trainer_options.get("check_val_every_n_epoch", 1) != 1:
        raise TrainingError("patience counts epochs, so it needs a validation after each; drop check_val_every_n_epoch")
    if epochs < 1:
        raise TrainingError(f"epochs must be at least 1, got {epochs}")
    if patience is not None and patience < 1:
        raise TrainingError(f"patience must be at least 1 epoch, got {patience}")
    if patience is not None and validation is None:
        raise TrainingError(f"patience is {patience}, but there is no validation data to watch; give validation=")
    if patience is not None and folder is None:
        raise TrainingError(f"patience is {patience}, but the best weights need a place; give folder=")
    if resume and folder is None:
        raise TrainingError("resume=True needs the folder of the run that is to go on; give folder=")


def finished_run(network: nn.Module, folder: Path, identity: dict[str, Any]) -> History | None:
    """Weights and curves of a run that has come to its end; None if it has not, or its files are damaged."""
    if not (folder / HISTORY).is_file():
        return None
    check_identity(folder, identity)
    try:
        history = History.load(folder / HISTORY)
        load_checkpoint(network, folder / WEIGHTS)
    except (HistoryError, CheckpointError):
        return None
    return history


def prepare(folder: Path, resume: bool, identity: dict[str, Any]) -> None:
    """Makes the folder; removes what a former run left there, unless that is to go on."""
    folder.mkdir(parents=True, exist_ok=True)
    if resume and readable(folder / LAST):
        check_identity(folder, identity)
        return
    names = (IDENTITY, HISTORY, WEIGHTS, TABLE, LAST, BEST)
    found = [name for name in names if (folder / name).exists()]
    if found and IDENTITY not in found:
        raise TrainingError(f"{folder} holds {', '.join(found)}, but no run of this kind; give another folder")
    for name in (*names, *(f"{name}.partial" for name in names)):
        (folder / name).unlink(missing_ok=True)
    write_identity(folder, identity)
    for events in folder.glob("events.out.tfevents.*"):
        events.unlink()


def readable(checkpoint: Path) -> bool:
    """Whether a run can go on from a checkpoint; a damaged one is as good as none."""
    try:
        torch.load(checkpoint, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError):
        return False
    return True


def finish(network: nn.Module, history: History, folder: Path) -> None:
    """Keeps the weights, then the history, which says that all is there; removes what a resumed run would need."""
    save_checkpoint(network, folder / WEIGHTS)
    history.save_csv(folder / TABLE)
    history.save(folder / HISTORY)
    for name in (LAST, BEST):
        (folder / name).unlink(missing_ok=True)


class KeepResumable(Checkpoint):
    """Saves all that the run needs to go on, and the table so far, when an epoch ends and enough time has passed."""

    def __init__(self, folder: Path, every_s: float) -> None:
        self.folder, self.every_s, self.saved = folder, every_s, time.monotonic()

    def on_train_epoch_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        if time.monotonic() - self.saved >= self.every_s:
            partial = self.folder / f"{LAST}.partial"
            trainer.save_checkpoint(partial)
            os.replace(partial, self.folder / LAST)
            if trainer.is_global_zero and isinstance(module, Phase):
                module.history.save_csv(self.folder / TABLE)
            self.saved = time.monotonic()


class BestWeights(ModelCheckpoint):
    """Keeps the weights of the best epoch."""

    def restore(self, network: nn.Module) -> int:
        """Puts them into the network; returns their epoch."""
        saved = torch.load(self.best_model_path, map_location="cpu", weights_only=True)
        prefix = "network."
        network.load_state_dict(
            {k.removeprefix(prefix): v for k, v in saved["state_dict"].items() if k.startswith(prefix)}
        )
        return int(saved["epoch"])


def restore_best(keepers: Iterable[Callback], network: nn.Module, history: History, monitor: str) -> None:
    """Puts the best epoch's weights into the network, where they were kept."""
    for keeper in keepers:
        if isinstance(keeper, BestWeights):
            history.best = keeper.restore(network)
            if not math.isfinite(history.result(monitor)):
                raise TrainingError(f"training diverged: {monitor} was not finite in epoch {history.best + 1}")


def keepers_of(folder: Path | None, save_every_s: float, patience: int | None, monitor: str) -> list[Callback]:
    """The callbacks that keep what a run finds."""
    keepers: list[Callback] = [] if patience is None else early_stop(patience, monitor, folder)
    if folder is not None:
        # Last: what it saves then holds what the others have found out about this epoch.
        keepers.append(KeepResumable(folder, 0.0 if patience is not None else save_every_s))
    return keepers


def early_stop(patience: int, monitor: str, folder: Path | None) -> list[Callback]:
    """The callbacks that stop a run, and keep its best weights."""
    mode = "max" if monitor.endswith("accuracy") else "min"
    best = BestWeights(
        folder,
        Path(BEST).stem,
        monitor=monitor,
        mode=mode,
        save_weights_only=True,
        enable_version_counter=False,
        save_on_train_epoch_end=True,
    )
    return [StopsAgain(monitor, patience=patience, mode=mode, check_on_train_epoch_end=True), best]


class StopsAgain(EarlyStopping):
    """Early stop that a resumed run remembers: one that was killed after its last epoch has no epoch more."""

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        trainer.should_stop = self.wait_count >= self.patience


def fit(
    trainer: L.Trainer, phase: Phase, train: SeededEpochs, validation: Iterable[Any] | None, folder: Path | None
) -> None:
    """Lightning's fit, from where the folder's run broke off; its answer to Ctrl-C is turned back into Python's."""
    last = folder / LAST if folder is not None and (folder / LAST).is_file() else None
    if isinstance(validation, list | tuple):  # of batches; Lightning would take it for several data loaders
        validation = DataLoader(validation, batch_size=None)  # type: ignore[arg-type]
    handler = signal.getsignal(signal.SIGINT)
    try:
        trainer.fit(phase, train_dataloaders=train, val_dataloaders=validation, ckpt_path=last)
    except SystemExit:
        # Lightning answers Ctrl-C by ignoring the signal from then on and leaving the process.
        if not trainer.interrupted or trainer.received_sigterm:
            raise
        signal.signal(signal.SIGINT, handler)
        raise KeyboardInterrupt from None


@contextmanager
def quiet_lightning() -> Iterator[None]:
    """Keeps Lightning's remarks on devices, tips and workers off the terminal."""
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
