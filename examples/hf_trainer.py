"""The reverse pass in Hugging Face's Trainer: a mixin in front of it.

python examples/hf_trainer.py --tiny
"""

from __future__ import annotations

import argparse
import tempfile

from digits import Digits, accuracy, cross_entropy, data
from torch import Tensor
from transformers import Trainer, TrainingArguments

import racecar
from racecar.integrations.transformers import ReverseTrainerMixin
from racecar.schedules import warmup


class ReverseTrainer(ReverseTrainerMixin, Trainer):
    pass


class Classifier(Digits):
    """Gives its loss first, as Trainer expects it."""

    def forward(self, x: Tensor, labels: Tensor | None = None):
        logits = super().forward(x)
        return logits if labels is None else {"loss": cross_entropy(logits, labels), "logits": logits}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="few images, one epoch: done in seconds")
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--lam", type=float, default=1e-4)
    args = parser.parse_args()

    train, test = data(args.tiny)
    model = Classifier()
    net = racecar.wrap(model.features, lam=args.lam)
    with tempfile.TemporaryDirectory() as folder:
        settings = TrainingArguments(
            folder,
            num_train_epochs=1 if args.tiny else args.epochs,
            per_device_train_batch_size=32,
            learning_rate=1e-3,
            logging_steps=5,
            save_strategy="no",
            report_to=[],
            use_cpu=True,
            disable_tqdm=True,
        )
        examples = [{"x": x, "labels": y} for x, y in train]
        trainer = ReverseTrainer(model, settings, train_dataset=examples, lam_schedule=warmup(20))
        trainer.train()
    for line in trainer.state.log_history:
        if "reverse_loss" in line:
            print(f"step {line['step']}: loss {line['loss']:.3f}, of which reverse {line['reverse_loss']:.4f}")
    net.unwrap()
    print(f"test accuracy {accuracy(model, test):.3f}")


if __name__ == "__main__":
    main()
