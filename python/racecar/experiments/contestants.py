"""Who competes: one network, trained in several ways. A new rival is one more entry of `CONTESTANTS`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor, nn

import racecar

from ..baselines import srip
from .folder import SettingsError


class Factors(Protocol):
    """What an experiment sets of phase I: λ, the factor of the penalty, further arguments of `racecar.wrap`."""

    @property
    def lam(self) -> float: ...

    @property
    def ort(self) -> float: ...

    @property
    def wrapping(self) -> dict[str, Any]: ...


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
        as_long_as: the contestant whose phase I takes as much time: as many epochs more as that one's step is slower.
        pretrained: False: there is no phase I, and the target task begins with fresh weights.
    """

    name: str
    key: str
    title: str
    variant: str | None = None
    compared: int | None = None
    orthogonal: bool = False
    greedy: bool = False
    as_long_as: str | None = None
    pretrained: bool = True

    @property
    def reverse(self) -> bool:
        """Whether the reverse loss takes part in phase I."""
        return self.variant is not None

    def prepare(self, network: nn.Module, factors: Factors) -> nn.Module:
        """The network as it goes into phase I: wrapped in place where the reverse loss takes part."""
        if self.variant is None:
            return network
        return racecar.wrap(network, lam=factors.lam, variant=self.variant, layers=self.compared, **factors.wrapping)

    def penalty(self, factors: Factors) -> Callable[[nn.Module], Tensor] | None:
        """What joins the loss of phase I beside the reverse loss."""
        if not self.orthogonal:
            return None
        return lambda network: factors.ort * srip(network, side="smaller")

    def release(self, network: nn.Module) -> nn.Module:
        """The plain network after phase I, the same object."""
        return network.unwrap() if self.reverse else network  # type: ignore[operator]


CONTESTANTS = (
    Contestant("Std", "Std", "plain training"),
    Contestant("Ort", "Ort", "with kernels kept nearly orthogonal (SRIP)", orthogonal=True),
    Contestant("Pre", "Pre", "layer-wise autoencoder pretraining, no labels in phase I", greedy=True),
    Contestant("RR¹", "RR1", "full reverse pass, first layer compared", variant="full", compared=1),
    Contestant("RR", "RR", "full reverse pass, all layers compared", variant="full"),
    Contestant("RR local", "RRlocal", "reverse pass layer by layer", variant="local"),
)

STD_FOR_LONG = Contestant("Std, same time", "Stdlong", "plain training for as long as RR takes", as_long_as="RR")
SCRATCH = Contestant("from scratch", "scratch", "no phase I", pretrained=False)


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
