"""The networks that are measured, each with an input, both in channels_last.

Every network comes without the classifier head behind its first flatten: the head is no part of the reverse pass.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, nn

from .residual import channels_last, resnet110, weather

POOL = "pool"
UP = "up"


@dataclass(frozen=True)
class Network:
    """A network to measure.

    Attributes:
        title: what a table calls it.
        build: the network with PyTorch's default initialisation: a chain, or a model that names its `parts()`. Its
            argument divides the number of channels; above 1 a deep residual network has fewer blocks as well.
        sample: shape of one sample, without the batch.
        batch: samples per step on a CPU.
        gpu_batch: samples per step on a GPU.
        tiny: shape of one sample where only correctness counts (a dry run, a test, the check of the gradients).
        variants: the reverse passes that it has.
        divisor: of the channels in the check of the gradients, which has to be quick; of the first layer 16 channels
            stay where the full width takes the kernel that serves multiples of 16 alone.
    """

    title: str
    build: Callable[[int], nn.Module]
    sample: tuple[int, ...]
    batch: int
    gpu_batch: int
    tiny: tuple[int, ...]
    variants: tuple[str, ...] = ("full", "local")
    divisor: int = 8

    def model(self, *, narrow: bool = False) -> nn.Module:
        """The network; `narrow`: with an eighth of its channels, where only running it counts."""
        return self.build(8 if narrow else 1)

    def checked(self) -> nn.Module:
        """The network as the check of the gradients takes it."""
        return self.build(self.divisor)

    def inputs(self, batch: int, *, tiny: bool = False) -> Tensor:
        """Normally distributed samples."""
        x = torch.randn(batch, *(self.tiny if tiny else self.sample))
        return x.contiguous(memory_format=torch.channels_last) if x.dim() == 4 else x


def conv_chain(
    channels: int, plan: list[int | str], divisor: int, *, kernel: int = 3, norm: bool = False
) -> nn.Sequential:
    """Stride-1 convolutions with ReLU; an entry of `plan` is a number of output channels, `POOL` or `UP`.

    The numbers of `plan` are divided by `divisor`, `channels` is not.
    """
    modules: list[nn.Module] = []
    for entry in plan:
        if entry == POOL:
            modules.append(nn.MaxPool2d(2))
        elif entry == UP:
            modules.append(nn.Upsample(scale_factor=2))
        else:
            width = max(1, int(entry) // divisor)
            modules.append(nn.Conv2d(channels, width, kernel, padding=kernel // 2))
            if norm:
                modules.append(nn.BatchNorm2d(width))
            modules.append(nn.ReLU())
            channels = width
    return channels_last(nn.Sequential(*modules))


def mnist(divisor: int, channels: int = 1) -> nn.Sequential:
    """MNIST network (Table 9 of the 2020 paper)."""
    return conv_chain(channels, [64, POOL, 64, POOL, 1], divisor)


def cifar(divisor: int) -> nn.Sequential:
    """13 convolutions with batch norm, in VGG-16's order (Table 11 of the 2020 paper)."""
    wide: list[int | str] = [512, 512, 512]
    return conv_chain(3, [64, 64, POOL, 128, 128, POOL, 256, 256, 256, POOL, *wide, POOL, *wide], divisor, norm=True)


def vgg19(divisor: int) -> nn.Sequential:
    """VGG-19's 16 convolutions, without batch norm and without the last pooling."""
    wide: list[int | str] = [512] * 4
    return conv_chain(3, [64, 64, POOL, 128, 128, POOL, 256, 256, 256, 256, POOL, *wide, POOL, *wide], divisor)


def smoke(divisor: int) -> nn.Sequential:
    """Smoke generator: 5x5 kernels, nearest up-sampling twice by 2, one channel of density in and out.

    In the manner of Table 13 of the 2020 paper, whose exact widths were not at hand: take its figures for those of a
    small up-sampling generator, not of the paper's own.
    """
    return conv_chain(1, [16, UP, 32, UP, 16, 1], divisor, kernel=5)


def mlp(divisor: int) -> nn.Sequential:
    """The mutual-information network (Table 7 of the 2020 paper): 12-10-7-5-4-3-2, tanh, 294 parameters.

    Too small to divide.
    """
    widths = [12, 10, 7, 5, 4, 3, 2]
    return nn.Sequential(*(module for a, b in pairwise(widths) for module in (nn.Linear(a, b), nn.Tanh())))


_LOCAL = ("local",)  # no unique path from output to input

NETWORKS = {
    "mnist": Network("MNIST (3 conv), 28x28", mnist, (1, 28, 28), 64, 1024, (1, 12, 12), divisor=4),
    "cifar": Network("CIFAR (13 conv, batch norm), 32x32", cifar, (3, 32, 32), 16, 512, (3, 32, 32), divisor=4),
    "resnet110": Network("ResNet110 (109 conv), 32x32", resnet110, (3, 32, 32), 8, 256, (3, 8, 8), _LOCAL),
    "vgg19": Network("VGG19 (16 conv), 224x224", vgg19, (3, 224, 224), 1, 64, (3, 32, 32), divisor=4),
    "smoke": Network("Smoke generator (4 conv, up-sampling), 16x16", smoke, (1, 16, 16), 8, 256, (1, 6, 6), divisor=1),
    "weather": Network("Weather ResNet (40 conv), 32x64", weather, (38, 32, 64), 1, 32, (38, 8, 12), _LOCAL),
    "mlp": Network("MLP (6 linear, tanh), 12 inputs", mlp, (12,), 512, 4096, (12,)),
}
