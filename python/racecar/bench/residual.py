"""The residual networks that are measured. What of them runs backwards is written down as their parts.

They are wrapped part by part, each part a chain that runs as one autograd node (the stem, the branch of every block),
and the parts' reverse losses are added up: that keeps less than `racecar.wrap` of the whole, which runs layer by layer.
A part's `input_activation` stands for what lies between the last addition and its input, so that for ResNet110 this is
the local reverse of docs/concepts.md layer by layer. In the weather network one layer of forty differs from it: the
first branch's first convolution comes back without the stem's activation and norm, of which the branch knows nothing.
Every contestant runs the same parts.
"""

from __future__ import annotations

from itertools import pairwise
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Model = TypeVar("Model", bound=nn.Module)


class Part(NamedTuple):
    """A chain inside a model that runs backwards by itself.

    Attributes:
        path: as `get_submodule` takes it; "" is the model itself.
        input_activation: applied to what comes back at the part's input; None: nothing is.
    """

    path: str
    input_activation: nn.Module | None = None

    def chain(self, model: nn.Module) -> nn.Sequential:
        """This part of the model."""
        found = model.get_submodule(self.path)
        if not isinstance(found, nn.Sequential):
            raise TypeError(f"a part that runs backwards is an nn.Sequential, got {type(found).__name__}")
        return found


def parts_of(model: nn.Module) -> list[Part]:
    """The parts of a model that run backwards: what its `parts()` says, or a chain as a whole."""
    if isinstance(model, (ResNet, WeatherResNet)):
        return model.parts()
    if not isinstance(model, nn.Sequential):
        raise TypeError(f"a network to measure is an nn.Sequential or names its parts, got {type(model).__name__}")
    return [Part("")]


class ResidualBlock(nn.Module):
    """relu(x + branch(x)) of He et al. 2016; where the shape changes, x is strided and padded with zero channels."""

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        self.stride, self.missing = (1, 0) if channels == width else (2, width - channels)
        self.branch = nn.Sequential(
            nn.Conv2d(channels, width, 3, stride=self.stride, padding=1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(),
            nn.Conv2d(width, width, 3, padding=1, bias=False),
            nn.BatchNorm2d(width),
        )

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x
        if self.missing:
            shortcut = F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, 0, self.missing))
        return F.relu_(shortcut + self.branch(x))


class ResNet(nn.Module):
    """ResNet for CIFAR (He et al. 2016, section 4.2): 6n + 1 convolutions, parameter-free shortcuts, no head."""

    def __init__(self, n: int, widths: tuple[int, int, int]) -> None:
        super().__init__()
        first = widths[0]
        self.stem = nn.Sequential(nn.Conv2d(3, first, 3, padding=1, bias=False), nn.BatchNorm2d(first), nn.ReLU())
        sizes = [first] + [width for width in widths for _ in range(n)]
        self.blocks = nn.Sequential(*(ResidualBlock(a, b) for a, b in pairwise(sizes)))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.blocks(self.stem(x))
        return out

    def parts(self) -> list[Part]:
        """Every branch receives what a ReLU gave."""
        return [Part("stem"), *(Part(f"blocks.{i}.branch", nn.ReLU()) for i in range(len(self.blocks)))]


class WeatherBlock(nn.Module):
    """x + dropout(branch(x)): twice convolution, LeakyReLU, batch norm, dropout."""

    def __init__(self, width: int, dropout: float) -> None:
        super().__init__()
        self.branch = nn.Sequential(
            periodic(width, width, 3),
            nn.LeakyReLU(0.3),
            nn.BatchNorm2d(width),
            nn.Dropout(dropout),
            periodic(width, width, 3),
            nn.LeakyReLU(0.3),
            nn.BatchNorm2d(width),
        )
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = x + self.dropout(self.branch(x))
        return out


class WeatherResNet(nn.Module):
    """The weather network of Rasp & Thuerey 2021: 19 blocks of 128 features, from 38 fields to Z500 and T850.

    `nn.Conv2d` pads both axes alike, so latitude is periodic here as longitude is; the paper pads the poles with zeros.
    The cost is the same.
    """

    def __init__(self, blocks: int, width: int, fields: int = 38, dropout: float = 0.1) -> None:
        super().__init__()
        self.stem = nn.Sequential(periodic(fields, width, 7), nn.LeakyReLU(0.3), nn.BatchNorm2d(width))
        self.dropout = nn.Dropout(dropout)
        self.blocks = nn.Sequential(*(WeatherBlock(width, dropout) for _ in range(blocks)))
        self.head = nn.Sequential(periodic(width, 2, 3))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.blocks(self.dropout(self.stem(x))))
        return out

    def parts(self) -> list[Part]:
        """An addition ends in front of every branch, so nothing is applied to what comes back there."""
        return [Part("stem"), *(Part(f"blocks.{i}.branch") for i in range(len(self.blocks))), Part("head")]


def periodic(channels: int, width: int, kernel: int) -> nn.Conv2d:
    """A convolution on a grid whose borders meet."""
    return nn.Conv2d(channels, width, kernel, padding=kernel // 2, padding_mode="circular")


def channels_last(model: Model) -> Model:
    """The model with its convolutions' weights in channels_last, which is twice as fast on a CPU."""
    converted: Model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return converted


def resnet110(divisor: int) -> ResNet:
    """ResNet110 (n = 18); a divided one has n = 2."""
    a, b, c = (width // divisor for width in (16, 32, 64))
    return channels_last(ResNet(18 if divisor == 1 else 2, (a, b, c)))


def weather(divisor: int) -> WeatherResNet:
    """19 residual blocks; a divided one has 2."""
    return channels_last(WeatherResNet(19 if divisor == 1 else 2, 128 // divisor))
