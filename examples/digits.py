"""Shared by the examples: a small convolutional network, and scikit-learn's handwritten digits."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import TensorDataset

from racecar.data import load_images


class Digits(nn.Module):
    """`features` is the chain that is trained backwards, too."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(1, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(width, 2 * width, 3, padding=1), nn.ReLU(),
        )  # fmt: skip
        self.head = nn.Sequential(nn.Flatten(), nn.Linear(2 * width * 4 * 4, 10))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x))


def data(tiny: bool) -> tuple[TensorDataset, TensorDataset]:
    """Training and test images, (1, 8, 8) in [0, 1], with their labels."""
    found = load_images(limit=200 if tiny else None)
    return TensorDataset(found.train_x, found.train_y), TensorDataset(found.test_x, found.test_y)


def accuracy(model: nn.Module, test: TensorDataset) -> float:
    x, y = test.tensors
    return (model.eval()(x).argmax(1) == y).float().mean().item()


__all__ = ["Digits", "accuracy", "cross_entropy", "data"]
