"""The reverse pass in Lightning: one callback, and no change to the module.

python examples/lightning_callback.py --tiny
"""

from __future__ import annotations

import argparse

import lightning.pytorch as L
import torch
from digits import Digits, accuracy, cross_entropy, data
from torch.utils.data import DataLoader

from racecar.integrations.lightning import ReversePass
from racecar.schedules import warmup


class Classifier(L.LightningModule):
    """As anybody would write it."""

    def __init__(self) -> None:
        super().__init__()
        self.model = Digits()

    def training_step(self, batch, _):
        x, y = batch
        loss = cross_entropy(self.model(x), y)
        self.log("task", loss, prog_bar=True)
        return loss

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), 1e-3)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="few images, one epoch: done in seconds")
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--lam", type=float, default=1e-4)
    args = parser.parse_args()

    L.seed_everything(0)
    train, test = data(args.tiny)
    module = Classifier()
    trainer = L.Trainer(
        max_epochs=1 if args.tiny else args.epochs,
        callbacks=[ReversePass("model.features", args.lam, schedule=warmup(20))],
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=not args.tiny,
    )
    trainer.fit(module, DataLoader(train, 32, shuffle=True))
    for name, value in sorted(trainer.logged_metrics.items()):
        print(f"{name}: {value.item():.4f}")
    print(f"test accuracy {accuracy(module.model, test):.3f}")


if __name__ == "__main__":
    main()
