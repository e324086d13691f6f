"""The demo's network."""

from __future__ import annotations

import torch
from torch import nn


def small_convolutional_network(image_shape: tuple[int, int, int], classes: int, width: int = 32) -> nn.Sequential:
    """Three 3×3 convolutions with ReLU, pooling between them where the size allows, and a linear head.

    A small sibling of the MNIST network in Table 9 of the 2020 paper.

    Args:
        image_shape: (channels, height, width) of the input.
        classes: outputs of the head.
        width: channels of every convolution.

    Returns:
        A chain: (images, channels, height, width) -> (images, classes).
    """
    channels, height, columns = image_shape
    layers: list[nn.Module] = []
    for m in range(3):
        layers += [nn.Conv2d(channels, width, 3, padding=1), nn.ReLU()]
        channels = width
        if m < 2 and min(height, columns) >= 4:
            layers.append(nn.MaxPool2d(2))
            height, columns = height // 2, columns // 2
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(width * height * columns, classes))


def fresh_network(image_shape: tuple[int, int, int], classes: int, seed: int) -> nn.Sequential:
    """The network with the initial weights of a seed, the same for every contestant; the global seed is left alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = small_convolutional_network(image_shape, classes)
    # Steps take a third less time so on a CPU, at 8×8 and at 28×28. PyTorch's stub lacks the keyword.
    network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return network
