"""How well every layer of a chain gives back what it received."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, overload

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from .pictures import axes_for, figure_of
from .recording import check_count, check_samples, evaluated, states_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class LayerReversibility:
    """How well one layer's input d comes back as d'.

    The gain g is the number that makes ‖d − g·d'‖ smallest, and the error ‖d − g·d'‖ / ‖d‖ the sine of the angle
    between d and d': 0 where d comes back but for its scale, 1 where nothing of it does. A plain network, which
    nothing taught the right scale, is so compared fairly. NaN where either is not finite; 0 where d is all zeros.

    Attributes:
        name: the layer's, as `plan` has it.
        local: error when the layer is reversed from its own output.
        full: error of what comes back to it from the network's output.
        local_gain, full_gain: the gains.
    """

    name: str
    local: float
    full: float
    local_gain: float
    full_gain: float


@dataclass(frozen=True)
class Reversibility(Sequence[LayerReversibility]):
    """One entry per layer, m = 1 first; the errors also as arrays, and as a figure.

    Attributes:
        layers: the entries.
    """

    layers: tuple[LayerReversibility, ...]

    @overload
    def __getitem__(self, index: int) -> LayerReversibility: ...
    @overload
    def __getitem__(self, index: slice) -> tuple[LayerReversibility, ...]: ...
    def __getitem__(self, index: int | slice) -> LayerReversibility | tuple[LayerReversibility, ...]:
        return self.layers[index]

    def __len__(self) -> int:
        return len(self.layers)

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(layer.name for layer in self.layers)

    @property
    def local(self) -> NDArray[np.float64]:
        """Error of every layer when it is reversed from its own output, (layers,)."""
        return np.array([layer.local for layer in self.layers])

    @property
    def full(self) -> NDArray[np.float64]:
        """Error of what comes back to every layer from the network's output, (layers,)."""
        return np.array([layer.full for layer in self.layers])

    def plot(self, ax: Axes | None = None) -> Figure:
        """Draws both errors over the layers: 0 where a layer's input comes back, 1 where nothing of it does.

        Args:
            ax: where to; None: a new figure.

        Returns:
            The figure drawn into.
        """
        ax = axes_for(ax, (max(4.0, 1.5 + 0.6 * len(self)), 3.2))
        places = range(len(self))
        ax.plot(places, self.local, marker="o", label="from its own output (local)")
        ax.plot(places, self.full, marker="s", label="from the network's output (full)")
        ax.set_xticks(places, self.names)
        ax.set_ylim(-0.03, 1.03)
        ax.set_xlabel("layer")
        ax.set_ylabel("error ‖d − g·d′‖ / ‖d‖")
        ax.legend()
        return figure_of(ax)


@torch.no_grad()
def reversibility(model: nn.Module, x: Tensor, *, batch_size: int = 256) -> Reversibility:
    """Runs x forwards and backwards and compares every layer's input with what comes back, local and full.

    Args:
        model: with a unique path from output to input, as `racecar.wrap` finds it, wrapped or not; norms as in
            evaluation. It is left as it was.
        x: the model's input, (samples, ...).
        batch_size: samples at a time.

    Returns:
        One entry per layer, m = 1 first.

    Raises:
        TypeError: x is no tensor.
        ValueError: x is empty, or the model has no unique path.
    """
    check_samples("reversibility", x)
    check_count("batch_size", batch_size)
    with evaluated(model) as engine:
        names = engine.plan.names[: engine.plan.chain]
        count = len(names)
        # d·d, d·d', d'·d' of every layer, from its own output and from the network's
        local, full = (torch.zeros(count, 3, dtype=torch.float64) for _ in range(2))
        for batch in x.split(batch_size):
            with engine.recording(reconstruct=True) as run:
                model(batch)
            states = states_of(engine, run)
            back = states[-1]
            for m in reversed(range(count)):
                back = engine.reverse_of(m, back, run)
                full[m] += products(states[m], back)
                local[m] += products(states[m], engine.reverse_of(m, states[m + 1], run))
        found = zip(names, map(error_and_gain, local), map(error_and_gain, full), strict=True)
    return Reversibility(
        tuple(LayerReversibility(name, own[0], whole[0], own[1], whole[1]) for name, own, whole in found)
    )


def products(d: Tensor, back: Tensor) -> Tensor:
    """(d·d, d·d', d'·d') in float64."""
    a, b = d.double(), back.double()
    return torch.stack([(a * a).sum(), (a * b).sum(), (b * b).sum()]).cpu()


def error_and_gain(sums: Tensor) -> tuple[float, float]:
    """‖d − g·d'‖ / ‖d‖ for the best g, and g, from (d·d, d·d', d'·d')."""
    own, mixed, other = sums.tolist()
    if not math.isfinite(own + mixed + other):
        return math.nan, math.nan
    gain = mixed / other if other > 0 else 0.0
    rest = max(0.0, own - gain * mixed)
    return math.sqrt(rest / own) if own > 0 else 0.0, gain
