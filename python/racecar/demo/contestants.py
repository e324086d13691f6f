"""Who competes in the demo: one network, trained in several ways. A new rival is one more entry of `CONTESTANTS`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

import racecar

from ..baselines import srip
from ..experiments.folder import SettingsError
from .settings import Settings


@dataclass(frozen=True)
class Contestant:
    """One way of running phase I. Phase II is the same for all.

    Attributes:
        name: short name, as the papers have it.
        key: the same in plain ASCII without signs, for the names of files.
        title: what it is, for captions.
        variant: the reverse pass that takes part in phase I, full or local; None: none.
        compared: so many layers, from the input, are compared; None: all.
        orthogonal: whether the kernels are kept nearly orthogonal.
        greedy: whether phase I trains autoencoders layer by layer, without labels.
    """

    name: str
    key: str
    title: str
    variant: str | None = None
    compared: int | None = None
    orthogonal: bool = False
    greedy: bool = False

    @property
    def reverse(self) -> bool:
        """Whether the reverse loss takes part in phase I."""
        return self.variant is not None

    def prepare(self, network: nn.Sequential, settings: Settings) -> nn.Module:
        """The network as it goes into phase I: wrapped in place where the reverse loss takes part."""
        if self.variant is None:
            return network
        return racecar.wrap(network, lam=settings.lam, variant=self.variant, layers=self.compared, reduction="mean")

    def penalty(self, settings: Settings) -> Callable[[nn.Module], Tensor] | None:
        """What joins the loss of phase I beside the reverse loss."""
        if not self.orthogonal:
            return None
        return lambda network: settings.ort * srip(network, side="smaller")

    def release(self, network: nn.Module) -> nn.Sequential:
        """The plain network after phase I, the same object."""
        return network.unwrap() if self.reverse else network  # type: ignore[operator,return-value]


CONTESTANTS = (
    Contestant("Std", "Std", "plain training"),
    Contestant("Ort", "Ort", "with kernels kept nearly orthogonal (SRIP)", orthogonal=True),
    Contestant("Pre", "Pre", "layer-wise autoencoder pretraining, no labels in phase I", greedy=True),
    Contestant("RR¹", "RR1", "full reverse pass, first layer compared", variant="full", compared=1),
    Contestant("RR", "RR", "full reverse pass, all layers compared", variant="full"),
    Contestant("RR local", "RRlocal", "reverse pass layer by layer", variant="local"),
)


def chosen(models: str) -> tuple[Contestant, ...]:
    """The contestants with these keys, "RR,Ort", behind the first, which all are compared with; "" for all.

    Raises:
        SettingsError: a key that there is not.
    """
    keys = [key.strip().lower() for key in models.split(",") if key.strip()]
    known = {contestant.key.lower(): contestant for contestant in CONTESTANTS}
    unknown = [key for key in keys if key not in known]
    if unknown:
        have = ", ".join(contestant.key for contestant in CONTESTANTS)
        raise SettingsError(f"models must be some of {have}, got {models!r}")
    return tuple(c for c in CONTESTANTS if not keys or c is CONTESTANTS[0] or c.key.lower() in keys)


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
