"""The networks of the recipes on images, each with its head."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor, nn

from ..bench.networks import cifar, mnist
from ..bench.residual import ResNet

if TYPE_CHECKING:
    from .study import Settings

Shape = tuple[int, int, int]


def glorot_(network: nn.Module) -> nn.Module:
    """Glorot & Bengio's uniform weights and biases of 0 (2010), TensorFlow's default, which the authors' code has."""
    for module in network.modules():
        if isinstance(module, (nn.Linear, nn.Conv2d)):
            nn.init.xavier_uniform_(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    return network


def with_head(convolutions: nn.Sequential, shape: Shape, halved: int, width: int, classes: int) -> nn.Sequential:
    """A chain of convolutions that halves the image so many times, and a linear layer on all that it gives."""
    _, height, columns = shape
    return nn.Sequential(
        *convolutions, nn.Flatten(), nn.Linear(width * (height >> halved) * (columns >> halved), classes)
    )


def mnist_network(shape: Shape, classes: int, settings: Settings) -> nn.Module:
    """Table 9 of the 2020 paper: three convolutions, the last with a single channel, and a linear head."""
    return glorot_(with_head(mnist(settings.divisor, shape[0]), shape, 2, 1, classes))


def cifar_network(shape: Shape, classes: int, settings: Settings) -> nn.Module:
    """Table 11 of the 2020 paper: 13 convolutions with batch norm, and a linear head."""
    return glorot_(with_head(cifar(settings.divisor), shape, 4, 512 // settings.divisor, classes))


class ResidualClassifier(nn.Module):
    """ResNet for CIFAR with its head (He et al. 2016): mean over the image, then a linear layer.

    Shapes: (images, 3, height, width) -> (images, classes).
    """

    def __init__(self, features: ResNet, width: int, classes: int) -> None:
        super().__init__()
        self.features, self.head = features, nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.features(x).mean((2, 3)))
        return out


def residual_network(shape: Shape, classes: int, settings: Settings) -> nn.Module:
    """ResNet-110, or a shallower one with so many blocks in each of its three groups."""
    a, b, c = (width // settings.divisor for width in (16, 32, 64))
    network = ResidualClassifier(ResNet(settings.blocks or 18, (a, b, c)), c, classes)
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")  # He et al. 2015
    return network
